"""Llama from a GGUF file against numpy, on every mesh; prefill, decode and batches against one another."""

import re

import numpy as np
import pytest
from compiled import decode_steps
from covering import in_turn, some, widest_and_in_turn
from gguf import GGMLQuantizationType as T
from tiny_gguf import Tiny, reference_logits, write

TOKENS = [3, 14, 15, 9, 2, 6, 5, 35, 8, 9, 7, 9]

CASES = {
    "grouped": Tiny(),
    "nine heads on three": Tiny(heads=9, kv_heads=3, head_dim=32, type=T.Q4_1),
    "one key head": Tiny(
        heads=5, kv_heads=1, type=T.F16, tied=True, head_dim=32, types={"output.weight": T.Q5_0}, layers=1
    ),
    "no groups": Tiny(heads=4, kv_heads=4, types={"output.weight": T.BF16}, layers=1),
    "other value size": Tiny(head_dim=16, value_dim=32, rotary_dim=8, type=T.F32, rope_freqs=True, layers=1),
    "blocks of 256": Tiny(
        hidden=256,
        intermediate=768,
        heads=8,
        kv_heads=4,
        head_dim=64,
        type=T.Q4_K,
        types={
            "attn_v.weight": T.Q6_K,
            "token_embd.weight": T.Q3_K,
            "ffn_down.weight": T.Q5_K,
            "ffn_up.weight": T.Q2_K,
        },
        layers=1,
    ),
    "blocks that span heads": Tiny(hidden=256, heads=16, kv_heads=8, head_dim=16, type=T.Q4_1, layers=1, tied=True),
}
MESHES = ["tp=1", "tp=2", "tp=3", "tp=4", "tp=2,ep=2", "tp=8"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    paths = {name: folder / f"{name}.gguf" for name in CASES}
    return {name: (path, write(path, CASES[name])) for name, path in paths.items()}


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


# Every one on the widest mesh, and every other mesh once.
TABLE = some(widest_and_in_turn(CASES, *MESHES), [*in_turn(CASES, MESHES[-1]), *in_turn([*CASES][:5], *MESHES[:5])])


@pytest.mark.parametrize(("name", "mesh"), TABLE)
def test_logits_equal_numpys_on_every_mesh(load_once, files, name, mesh):
    path, weights = files[name]
    model = load_once(path, mesh=mesh, dtype="float32", weights="packed")
    close(model.logits([TOKENS])[0], reference_logits(CASES[name], weights, TOKENS))


@pytest.mark.parametrize("weights", ["bfloat16", "float32"])
def test_a_decoded_copy_gives_the_same_logits_as_packed_weights(load_once, files, weights):
    path, _ = files["nine heads on three"]
    packed = load_once(path, mesh="tp=2", dtype="float32", weights="packed").logits([TOKENS])
    copy = load_once(path, mesh="tp=2", dtype="float32", weights=weights).logits([TOKENS])
    scale = np.abs(packed).max()
    assert np.abs(copy - packed).max() < {"bfloat16": 2e-2, "float32": 1e-5}[weights] * scale


def test_bfloat16_activations_stay_near_float32(load_once, files):
    path, _ = files["grouped"]
    exact = load_once(path, mesh="tp=1", dtype="float32", weights="packed").logits([TOKENS])
    rounded = load_once(path, mesh="tp=1", dtype="bfloat16").logits([TOKENS])
    assert 0 < np.abs(rounded - exact).max() < 5e-2 * np.abs(exact).max()


def greedy(tiny, weights, prompt, count):
    """Greedy tokens by the numpy model, which sees the whole text anew at each step."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(reference_logits(tiny, weights, tokens)[-1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("mesh", some(["tp=1", "tp=3", "tp=8"], ["tp=8"]))
def test_decoding_step_by_step_equals_seeing_the_whole_text(load_once, files, mesh):
    path, weights = files["nine heads on three"]
    model = load_once(path, mesh=mesh, dtype="float32", weights="packed")
    assert model.generate(TOKENS, 12).tokens == greedy(CASES["nine heads on three"], weights, TOKENS, 12)


def test_prompts_of_different_lengths_in_a_batch_get_what_they_get_alone(load_once, files):
    path, weights = files["grouped"]
    model = load_once(path, mesh="tp=2", dtype="float32", weights="packed")
    for c in model.generate([TOKENS[:1], TOKENS, TOKENS[:5], [1, 2, 3]], 10):
        assert c.tokens == greedy(CASES["grouped"], weights, c.prompt, 10)


def test_a_prompt_longer_than_a_chunk_is_fed_in_pieces(load_once, files, monkeypatch):
    (path, weights), tiny = files["grouped"], CASES["grouped"]
    monkeypatch.setattr("jaxllm.decoding.CHUNK", 16)
    model = load_once(path, mesh="tp=2", dtype="float32", weights="packed")
    prompts = [list(np.random.default_rng(1).integers(0, 50, n)) for n in (40, 16, 17, 3)]
    close(model.logits([prompts[0]])[0], reference_logits(tiny, weights, prompts[0]))
    for c in model.generate([list(map(int, p)) for p in prompts], 6):
        assert c.tokens == greedy(tiny, weights, c.prompt, 6)


def test_an_answer_ends_where_the_context_does(load_once, files, monkeypatch):
    model = load_once(files["grouped"][0], mesh="tp=2", dtype="float32", weights="packed")
    monkeypatch.setattr(model, "max_seq_len", 16)  # as if it had been loaded so, with the programs of other tests
    completions = model.generate([TOKENS, TOKENS[:2], TOKENS[:8], TOKENS[:2]], 100)
    assert [len(c.tokens) + c.prompt_tokens for c in completions] == [17] * 4  # the last token need not be held
    assert {c.finish_reason for c in completions} == {"length"}


def test_new_lengths_reuse_programs(load_once, files):
    model = load_once(files["grouped"][0], mesh="tp=1", dtype="float32", weights="packed")
    model.generate(TOKENS, 5)
    before = set(model.programs.compiled)
    for n in range(1, 16):
        model.generate([3] * n, n, temperature=0.0)
    assert set(model.programs.compiled) == before
    model.generate(TOKENS, 5, temperature=0.7, top_k=4)
    drawing = set(model.programs.compiled)
    model.generate(TOKENS, 5, temperature=0.9, top_k=9, seed=3)
    assert set(model.programs.compiled) == drawing == before


@pytest.mark.parametrize("mesh", some(["tp=2", "tp=8", "tp=2,ep=2"], ["tp=8"]))
def test_a_step_communicates_twice_a_block_and_at_both_ends(load_once, files, mesh):
    model = load_once(files["nine heads on three"][0], mesh=mesh, dtype="float32", weights="packed")
    model.generate(TOKENS, 2)
    [step] = decode_steps(model)
    found = re.findall(
        r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", step.as_text()
    )
    # Two sums a block; one for the embedding, whose vocabulary is cut, and the logits put together.
    assert sorted(found) == ["all-gather"] + ["all-reduce"] * (2 * 2 + 1)


def test_the_cache_is_updated_in_place(load_once, files):
    model = load_once(files["grouped"][0], mesh="tp=1", dtype="float32", weights="packed")
    model.generate(TOKENS, 2)
    model.programs.compiled.clear()
    model.generate(TOKENS, 2)
    [step] = decode_steps(model)
    cache = 2 * 2 * 2 * 256 * 16 * 4  # keys and values, layers, kv heads, capacity, head_dim, bytes
    assert step.memory_analysis().alias_size_in_bytes >= cache
    assert not re.findall(r"f32\[1,2,256,16\]\S* copy\(", step.as_text())
