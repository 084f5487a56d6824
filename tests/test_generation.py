"""Generation as its users meet it: random draws, conversations, steps started ahead, caches of one's own."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_hf
from compiled import is_step, watch
from gguf import GGMLQuantizationType as T
from tiny_gguf import Tiny, reference_logits, write

import jaxllm
from jaxllm import bench, decoding
from jaxllm.engine.answer import rates
from jaxllm.loading import default_weights
from jaxllm.perplexity import perplexity
from jaxllm.programs import runs_ahead
from jaxllm.sampling import Sampling, SamplingOptions

CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
TINY = Tiny(layers=1)
PROMPT = [3, 14, 15, 9, 2, 6, 5, 35, 8, 9, 7, 9]
MESHES = ["tp=1", "tp=2"]  # the first starts steps ahead, the second waits for each


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return path, write(path, TINY)


@pytest.fixture(params=MESHES)
def model(request, load_once, file):
    return load_once(file[0], mesh=request.param, dtype="float32", weights="packed")


@pytest.fixture
def alone(load_once, file):
    return load_once(file[0], mesh="tp=1", dtype="float32", weights="packed")


def greedy(weights, prompt, count, tiny=TINY):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(reference_logits(tiny, weights, tokens)[-1])))
    return tokens[len(prompt) :]


# Random draws.


def test_every_step_draws_with_a_new_key(alone):
    """At such a temperature every token is as likely as any other: equal keys would give one token again and again."""
    drawn = np.array(alone.generate(PROMPT, 100, temperature=1e6).tokens)
    assert len(set(drawn.tolist())) > 30  # of 50; 43 are expected
    assert (drawn[1:] == drawn[:-1]).mean() < 0.1


def test_prompts_of_a_list_draw_from_different_streams(alone):
    answers = [tuple(c.tokens) for c in alone.generate([PROMPT] * 9, 8, temperature=1e6, seed=5)]
    assert len(set(answers)) == 9  # also from one batch of eight to the next
    same, other = (tuple(alone.generate(PROMPT, 8, temperature=1e6, seed=seed).tokens) for seed in (5, 6))
    assert answers[0] == same != other


# Conversations.


def turn(model, memory, prompt, count, **options):
    completion = jaxllm.Completion(prompt)
    list(model.stream(prompt, count, memory=memory, completion=completion, **options))
    return completion


@pytest.fixture
def processed(model, monkeypatch):
    """How many tokens of prompts every call has got."""
    counts = []
    watch(monkeypatch, model, lambda batch: is_step(batch) or counts.append(int(batch.counts.sum())))
    return counts


@pytest.mark.parametrize("end", ["length", "eos", "abandoned"])
def test_a_conversation_processes_only_what_is_new(model, file, processed, end):
    """However the first answer ended, the second is what the whole text gives, and its beginning is not processed."""
    weights, memory = file[1], jaxllm.Memory()
    expected = greedy(weights, PROMPT, 6)
    stop = next(i for i in range(2, 6) if expected[i] not in expected[:i])
    if end == "abandoned":
        answer = memory.engine_for(model, 64).add(PROMPT, 20, eos_ids=())
        while len(answer.completion.tokens) < stop + 1:
            memory.engine.step()
        memory.engine.cancel(answer)
        said = answer.completion.tokens
    else:
        limits = {"eos_ids": [expected[stop]]} if end == "eos" else {"eos_ids": ()}
        said = turn(model, memory, PROMPT, 20 if end == "eos" else stop + 1, **limits).tokens
    assert said == expected[: stop + 1]
    assert processed == [12]

    second = [*PROMPT, *said, 1, 2, 3, 4]
    completion = turn(model, memory, second, 5)
    assert completion.tokens == greedy(weights, second, 5)
    # All but the newest token; and that, too, where the step that puts it into the cache was started ahead.
    ahead = model.mesh.size == 1 and end != "length"
    assert completion.cached_tokens == len(PROMPT) + stop + ahead
    assert processed == [12, len(second) - completion.cached_tokens]
    assert completion.prompt_tokens == len(second)


def test_a_conversation_that_changes_keeps_what_is_equal(model, file, processed):
    weights, memory = file[1], jaxllm.Memory()
    turn(model, memory, PROMPT, 5)
    other = [*PROMPT[:7], 40, 41, *PROMPT[:5]]
    assert turn(model, memory, other, 5).tokens == greedy(weights, other, 5)
    assert memory.reused == 7
    unlike = [30, *PROMPT]
    completion = turn(model, memory, unlike, 5)
    assert (completion.tokens, completion.cached_tokens) == (greedy(weights, unlike, 5), 0)
    assert processed == [12, 7, 13]


def test_a_turn_that_is_interrupted_leaves_no_donated_cache(model, file, monkeypatch):
    memory, calls = jaxllm.Memory(), []

    def interrupt(batch):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt

    watch(monkeypatch, model, after=interrupt)
    with pytest.raises(KeyboardInterrupt):
        turn(model, memory, PROMPT, 8)
    assert turn(model, memory, PROMPT, 4).tokens == greedy(file[1], PROMPT, 4)


# Steps.


@pytest.mark.parametrize(
    ("platform", "devices", "expected"),
    [("cpu", 1, True), ("cpu", 2, False), ("gpu", 1, True), ("gpu", 8, True), ("tpu", 4, True)],
)
def test_where_steps_are_started_ahead(platform, devices, expected):
    grid = np.array([SimpleNamespace(platform=platform) for _ in range(devices)], object).reshape(1, devices)
    assert runs_ahead(SimpleNamespace(devices=grid)) is expected


def test_a_step_is_started_before_the_newest_token_is_handed_out(model, monkeypatch):
    events = []
    watch(monkeypatch, model, lambda batch: is_step(batch) and events.append("step"))
    engine = jaxllm.Engine(model, 1)
    engine.add(PROMPT, 4, eos_ids=())
    while engine.busy:
        events += ["token"] * len(engine.step())
    # The first token never waits for the first step to be compiled.
    ahead, waiting = "token step step token step token token", "token step token step token step token"
    assert " ".join(events) == (ahead if model.mesh.size == 1 else waiting)


@pytest.mark.parametrize("count", [1, 2, 6])
def test_an_answer_that_ends_early_wastes_at_most_one_step(model, file, monkeypatch, count):
    answer, steps = greedy(file[1], PROMPT, 6), []
    watch(monkeypatch, model, lambda batch: is_step(batch) and steps.append(batch))
    completion = model.generate(PROMPT, 50, eos_ids={answer[count - 1]})
    assert completion.finish_reason == "stop"
    assert completion.tokens == answer[: answer.index(answer[count - 1]) + 1]
    assert len(steps) - (len(completion.tokens) - 1) in ((0, 1) if model.mesh.size == 1 else (0,))


def test_the_cache_is_donated(model, monkeypatch):
    caches, advance = [], model.programs.advance

    def watched(cache, *args):
        caches.append(cache)
        return advance(cache, *args)

    monkeypatch.setattr(model.programs, "advance", watched)
    model.generate(PROMPT, 3, eos_ids=())
    assert len(caches) == 3  # the prompt and two steps
    assert all(leaf.is_deleted() for cache in caches[:-1] for leaf in (*cache.keys, *cache.values))
    shards = 2 * 512 * 2 * 16 * 4 // model.mesh.size  # keys and values, capacity, heads, numbers, bytes
    used = [p for key, p in model.programs.compiled.items() if key[0] == "advance"]
    assert len(used) >= 2
    assert all(program.memory_analysis().alias_size_in_bytes >= shards for program in used)


# Logits and caches of one's own.


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_only_the_last_logits(model, file):
    model.programs.compiled.clear()
    got = model.logits([PROMPT, PROMPT[::-1]], last_only=True)
    close(got, [reference_logits(TINY, file[1], p)[-1] for p in (PROMPT, PROMPT[::-1])])
    heads = {key[1] for key in model.programs.compiled if key[0] == "head"}
    assert heads == {(2, TINY.hidden)}  # no other position's were computed


@pytest.mark.parametrize("chunk", [512, 16])
def test_forward_token_by_token_gives_the_logits_of_the_whole(model, file, monkeypatch, chunk):
    monkeypatch.setattr(decoding, "CHUNK", chunk)
    text = (PROMPT * 4)[:41]
    want = reference_logits(TINY, file[1], text)
    cache = model.empty_cache(1, len(text))
    first, cache = model.forward([text[:18]], cache)
    middle, cache = model.forward([text[18:21]], cache)
    rows = [first, middle]
    for token in text[21:30]:
        logits, cache = model.forward([[token]], cache, last_only=True)
        rows.append(logits[:, None])
    end, cache = model.forward([text[30:]], cache)  # up to the very end of the cache, where padding has no room
    close(np.concatenate([*rows, end], axis=1)[0], want)
    assert np.asarray(cache.lengths).tolist() == [41]
    with pytest.raises(jaxllm.InputError, match=r"41 \+ 1 tokens, but the cache holds 41"):
        model.forward([[1]], cache)


def test_embeddings(alone, monkeypatch):
    """The head's matrix times the last one gives the last logits; the mean does not depend on chunks."""
    alone.programs.compiled.clear()
    last = alone.embed([PROMPT, PROMPT[:5]], "last")
    for row, prompt in zip(last, (PROMPT, PROMPT[:5]), strict=True):
        close(alone.programs.head(row), np.asarray(alone.logits([prompt]))[0, -1])
    whole = alone.embed([PROMPT * 3])
    each = [alone.embed([(PROMPT * 3)[:n]], "last")[0] for n in range(1, 37)]
    close(whole[0], np.mean(each, axis=0))
    monkeypatch.setattr(decoding, "CHUNK", 16)
    close(alone.embed([PROMPT * 3]), whole)
    with pytest.raises(jaxllm.InputError, match="pooling='sum': choose mean or last"):
        alone.embed([PROMPT], "sum")


def test_what_forward_refuses(alone):
    cache = alone.empty_cache(2, 8)
    with pytest.raises(jaxllm.InputError, match="1 rows of tokens, but the cache holds 2 sequences"):
        alone.forward([[1]], cache)
    with pytest.raises(jaxllm.InputError, match="token ids must be 0 to 49"):
        alone.forward([[1], [50]], cache)
    with pytest.raises(jaxllm.InputError, match=r"tokens must be ids \[batch, time\], not float"):
        alone.forward([[1.5], [2.5]], cache)
    alone.forward([[1], [2]], cache)
    with pytest.raises(jaxllm.InputError, match="use the one that forward returned"):
        alone.forward([[1], [2]], cache)
    with pytest.raises(
        jaxllm.InputError, match="batch=1, capacity=129: must be 1 or above, and a capacity at most 128"
    ):
        alone.empty_cache(1, 129)


def test_perplexity_is_that_of_the_windows_of_a_text(load_once, file, monkeypatch):
    """A text longer than the context is split; each chunk's logits are computed by themselves."""
    monkeypatch.setattr(decoding, "CHUNK", 16)
    model = load_once(file[0], dtype="float32", weights="packed", max_seq_len=40)
    ids = np.random.default_rng(3).integers(0, 50, 60).tolist()
    losses = []
    for start in (0, 40):
        window = ids[start : start + 41]
        logits = reference_logits(TINY, file[1], window[:-1])
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += [-row[token] for row, token in zip(logprobs, window[1:], strict=True)]
    monkeypatch.setattr(model, "tokenizer", SimpleNamespace(encode=lambda text: ids))
    assert perplexity(model, "text") == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert max(key[1][1] for key in model.programs.compiled if key[0] == "head") == 16


# What ends an answer, and how tokens are chosen.


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_without_a_tokenizer_the_configs_end_token_counts(tmp_path, where):
    expected = np.load(CHECKPOINTS / "llama" / "golden.npz")
    prompt, tokens = expected["tokens"][0].tolist(), expected["greedy"].tolist()
    end = next(t for i, t in enumerate(tokens) if i >= 3 and t not in tokens[:i])
    folder = tmp_path / "llama"
    shutil.copytree(
        CHECKPOINTS / "llama", folder, ignore=shutil.ignore_patterns("golden.npz", "generation_config.json")
    )
    settings = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 63}
    (folder / "config.json").write_text(json.dumps(settings))
    changed = json.loads((folder / where).read_text()) if (folder / where).exists() else {}
    (folder / where).write_text(json.dumps(changed | {"eos_token_id": [end]}))
    model = jaxllm.load(folder, dtype="float32", progress=False)
    assert (model.tokenizer, model.eos_ids) == (None, {end})
    answer = model.generate(prompt, 12)
    assert (answer.tokens, answer.finish_reason) == (tokens[: tokens.index(end) + 1], "stop")
    assert model.generate(prompt, 12, eos_ids=()).tokens == tokens
    assert model.generate(prompt, 12, eos_ids=[tokens[0]]).tokens == tokens[:1]


def test_options_are_the_fields_of_sampling():
    options = {field.name: field.type for field in dataclasses.fields(Sampling)}
    assert SamplingOptions.__annotations__ == options


def test_keywords_count_more_than_sampling_and_that_more_than_the_checkpoint(alone, monkeypatch):
    monkeypatch.setattr(alone, "sampling", Sampling(temperature=1e6, top_k=1, repetition_penalty=1.5))
    answer = jaxllm.Engine(alone).add(PROMPT, sampling=Sampling(top_k=7, top_p=0.5), temperature=2.0)
    assert answer.request.sampling == Sampling(2.0, top_k=7, top_p=0.5, repetition_penalty=1.5)
    drawn = alone.generate(PROMPT, 8, temperature=1e6, top_k=50, seed=4).tokens
    assert drawn == alone.generate(PROMPT, 8, sampling=Sampling(top_k=50), seed=4).tokens
    with pytest.raises(TypeError, match="temprature"):
        alone.generate(PROMPT, temprature=1.0)


# Numbers about a model.


def testrates_leave_out_the_first_step():
    assert rates(20, [1.0, 3.0]) == (10.0, 0.0)
    assert rates(20, [1.0, 3.0, 7.0]) == (10.0, 1 / 4)  # nothing better is known
    assert rates(20, [1.0, 3.0, 7.0, 7.5, 8.0]) == (10.0, 2.0)


@pytest.mark.parametrize(("gigabytes", "expected"), [(1.0, "packed"), (3.0, "bfloat16")])
def test_matrices_are_dequantized_only_if_that_fits_half_of_the_memory(monkeypatch, gigabytes, expected):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=gigabytes * 2**30))
    tensors = {"w": SimpleNamespace(shape=(2**14, 2**15))}  # 1 GiB in bfloat16
    cpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="cpu")], object))
    assert default_weights(tensors, "bfloat16", cpu) == expected
    gpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")], object))
    assert default_weights(tensors, "bfloat16", gpu) == "packed"


@pytest.mark.parametrize("tied", [False, True])
def test_the_bytes_that_a_token_reads(load_once, tmp_path, tied):
    """Q8_0 holds 32 weights in 34 bytes; the embedding table is read only as a head."""
    tiny = Tiny(layers=2, tied=tied, types={"ffn_up.weight": T.Q4_0})  # 32 weights in 18 bytes
    write(tmp_path / "m.gguf", tiny)
    q8 = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 2 * 96 * 64) + 50 * 64  # q and o, k and v, gate and down; the head
    model = load_once(tmp_path / "m.gguf", dtype="float32", weights="packed")
    assert bench.bytes_per_token(model) == q8 // 32 * 34 + 2 * 96 * 64 // 32 * 18


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek"])
def test_a_token_reads_only_the_experts_that_it_is_routed_to(tmp_path, name):
    model = jaxllm.load(tiny_hf.write(tmp_path / name, name), dtype="float32", progress=False)
    shapes = tiny_hf.shapes(tiny_hf.COMMON | tiny_hf.MODELS[name])
    matrices = {n: int(np.prod(s)) for n, s in shapes.items() if len(s) > 1 and "embed" not in n}
    idle = sum(size for n, size in matrices.items() if ".experts.2." in n or ".experts.3." in n)  # two of four
    assert bench.bytes_per_token(model) == 4 * (sum(matrices.values()) - idle)


def test_only_the_newest_programs_are_kept(tmp_path, monkeypatch):
    write(tmp_path / "x.gguf", TINY)
    model = jaxllm.load(tmp_path / "x.gguf", dtype="float32", weights="packed", progress=False)
    expected = [np.asarray(model.logits([PROMPT * n], last_only=True)) for n in (1, 2, 1)]
    monkeypatch.setattr("jaxllm.programs.MOST_PROGRAMS", 2)
    for n, logits in zip((1, 2, 1), expected, strict=True):
        np.testing.assert_array_equal(model.logits([PROMPT * n], last_only=True), logits)
    assert len(model.programs.compiled) == 2
