"""The engine: many answers at a time, each as it is alone."""

from pathlib import Path

import numpy as np
import pytest
from compiled import is_step, watch
from covering import some
from tiny_gguf import Tiny, reference_logits, write

import jaxllm
from jaxllm.engine.slots import in_common
from jaxllm.kernels.cpu import library

GOLDEN = Path(__file__).parent / "golden"
TINY = Tiny(layers=1)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 50, n).tolist() for n in (12, 3, 40, 1, 25, 7)]
SHORT = [PROMPTS[i] for i in (0, 1)]  # which take one size of program; so do engines that all have 4 slots


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return path, write(path, TINY)


@pytest.fixture
def model(load_once, file):
    return load_once(file[0], mesh="tp=1", dtype="float32", weights="packed")


def greedy(weights, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(reference_logits(TINY, weights, tokens)[-1])))
    return tokens[len(prompt) :]


def run(engine):
    while engine.busy:
        engine.step()


def one_by_one(engine, prompts, options, count):
    """Answers of an engine that has only one at a time. That those are right, the tests of each family say."""
    answers = []
    for prompt, given in zip(prompts, options, strict=True):
        answers.append(engine.add(prompt, count, eos_ids=(), **given))
        run(engine)
    return [answer.completion.tokens for answer in answers]


# Each answer is what it is alone.


@pytest.mark.parametrize("mesh", some(["tp=1", "tp=2", "tp=2,dp=2"], ["tp=1", "tp=2,dp=2"]))
def test_answers_are_those_given_alone(load_once, file, mesh):
    """More requests than slots, which come while others are answered; against the model written out in numpy."""
    model = load_once(file[0], mesh=mesh, dtype="float32", weights="packed")
    engine, lengths = jaxllm.Engine(model, 4, 64), (9, 20, 3, 12, 1, 6)
    prompts = PROMPTS if mesh == "tp=1" else [prompt[:16] for prompt in PROMPTS]  # with fewer programs
    answers = []
    for prompt, length in zip(prompts, lengths, strict=True):
        answers.append(engine.add(prompt, length, eos_ids=()))
        engine.step()
    run(engine)
    for answer, prompt, length in zip(answers, prompts, lengths, strict=True):
        assert answer.completion.tokens == greedy(file[1], prompt, length)
        assert (answer.done, answer.completion.finish_reason) == (True, "length")
    assert engine.stats.generated_tokens == sum(lengths)


@pytest.mark.parametrize("name", some(["gpt_oss/mxfp4", *(few := ["checkpoints/mistral", "deepseek/v3"])], few))
def test_rows_of_other_architectures(load_once, name):
    """Rings, sinks and latents: steps of two of four sequences, of different lengths, give what transformers gives."""
    model = load_once(GOLDEN / name, mesh="tp=1", dtype="float32", weights="packed")
    golden = np.load(GOLDEN / name / "golden.npz")
    (text, other), greedy = golden["tokens"].tolist(), golden["greedy"].tolist()
    engine = jaxllm.Engine(model, 4, 64)
    asked = [(other, 1), (text, 8), (other, 1), (text + greedy[:4], 8)]
    answers = [engine.add(prompt, count, eos_ids=()) for prompt, count in asked]
    run(engine)
    likeliest = [int(golden["logits"][1, -1].argmax())]
    assert [answer.completion.tokens for answer in answers] == [likeliest, greedy[:8], likeliest, greedy[4:]]


@pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
@pytest.mark.parametrize("whole", some([False, True], [False]))
def test_answers_of_the_demo_are_those_given_alone(load_once, short_demo, whole):
    """With activations rounded to int8, where the slightest difference would grow: greedy, drawn, and guessed ahead."""
    model = load_once("demo" if whole else short_demo)
    prompts = ["1, 2, 1, 2, 1,", "Once upon a time", "A B C A B C A B"]
    options = [{"temperature": 0.9 if i % 2 else 0.0, "seed": i} for i in range(len(prompts))]
    alone = one_by_one(jaxllm.Engine(model, 2, 256), prompts, options, 12)
    for drafter in (None, jaxllm.PromptLookup()):
        engine = jaxllm.Engine(model, 2, 256, drafter)
        answers = [engine.add(p, 12, eos_ids=(), **given) for p, given in zip(prompts, options, strict=True)]
        run(engine)
        assert [answer.completion.tokens for answer in answers] == alone
    assert engine.stats.accepted > 0


def test_draws_depend_on_seed_and_stream_alone(model):
    options = {"temperature": 1.5, "top_k": 30, "presence_penalty": 0.3, "eos_ids": ()}
    alone = [model.generate(PROMPTS[0], 10, seed=seed, **options).tokens for seed in (1, 2)]
    engine = jaxllm.Engine(model, 4, 64)
    answers = [engine.add(PROMPTS[0], 10, seed=1, **options), engine.add(PROMPTS[1], 10)]
    engine.step()
    answers += [engine.add(PROMPTS[0], 10, seed=2, **options), engine.add(PROMPTS[0], 10, seed=1, stream=1, **options)]
    run(engine)
    tokens = [answer.completion.tokens for answer in answers]
    assert [tokens[0], tokens[2]] == alone
    assert tokens[3] not in alone


def test_a_program_for_each_number_of_rows_and_no_more(model):
    engine = jaxllm.Engine(model, 4, 64)
    for temperature in (0.0, 0.7, 1.3):
        for count in (1, 2, 3, 4):
            for prompt in PROMPTS[:count]:
                engine.add(prompt[:8], 5, temperature=temperature, top_p=0.9 if count > 2 else None)
            run(engine)
    programs = [key for key in model.programs.compiled if key[0] == "advance"]
    steps = [shape for _, shape, _, slots, *_ in programs if slots == 4 and shape[1] == 1]
    assert sorted(steps) == [(1, 1), (2, 1), (4, 1)]  # also of the tests before


def test_what_is_new_near_the_end_of_a_slot_takes_programs_of_few_sizes(tmp_path):
    """Conversations end at any length; with a program for each, a process that runs for long would compile for ever."""
    tiny = Tiny(layers=1, context=512)
    weights = write(tmp_path / "long.gguf", tiny)
    model = jaxllm.load(tmp_path / "long.gguf", dtype="float32", weights="packed", progress=False)
    engine, first = jaxllm.Engine(model, 1, 512), RNG.integers(0, 50, 350).tolist()
    for more in (0, 131, 161, 162):
        prompt = first + RNG.integers(0, 50, more).tolist()
        answer = engine.add(prompt, 1, eos_ids=())
        run(engine)
        assert answer.completion.cached_tokens == (350 if more else 0)
        assert answer.completion.tokens == [int(np.argmax(reference_logits(tiny, weights, prompt)[-1]))]
    sizes = {key[1][1] for key in model.programs.compiled if key[0] == "advance"}
    assert sizes == {1, 16, 32, 128, 512}


def test_an_answer_is_not_written_over_its_end(model, file):
    """The cache is as long as prompt and answers, and neighbours are longer."""
    engine = jaxllm.Engine(model, 4, 64)
    assert engine.capacity == 512
    short, long = engine.add(PROMPTS[1], 5, eos_ids=()), engine.add(RNG.integers(0, 50, 100).tolist(), 29, eos_ids=())
    run(engine)
    assert short.completion.tokens == greedy(file[1], PROMPTS[1], 5)
    assert len(long.completion.tokens) == 29
    whole = engine.add(list(range(50)) * 2 + list(range(27)), 60, eos_ids=())
    run(engine)
    assert (len(whole.completion.tokens), whole.completion.finish_reason) == (2, "length")  # the context has 128


# Beginnings that are held already.


def test_a_beginning_is_computed_once(model, file, monkeypatch):
    monkeypatch.setattr("jaxllm.engine.slots.WORTH_COPYING", 8)
    counts = []
    watch(monkeypatch, model, lambda batch: is_step(batch) or counts.append(int(batch.counts.sum())))
    system = RNG.integers(0, 50, 30).tolist()
    prompts = [[*system, *PROMPTS[1]], [*system, *PROMPTS[0]], [*system, 5]]
    engine = jaxllm.Engine(model, 4, 64)
    answers = [engine.add(prompt, 6, eos_ids=()) for prompt in prompts]  # at the same time: two wait for the first
    run(engine)
    again = engine.add(prompts[1], 6, eos_ids=())
    run(engine)
    for answer, prompt in zip([*answers, again], [*prompts, prompts[1]], strict=True):
        assert answer.completion.tokens == greedy(file[1], prompt, 6)
    assert [answer.completion.cached_tokens for answer in (*answers, again)] == [0, 30, 30, 41]
    assert counts == [33, 13, 1]
    assert engine.stats.cached_tokens == 30 + 30 + 41


def test_what_other_parameters_computed_is_not_used(model):
    engine = jaxllm.Engine(model, 1, 64)
    for _ in range(2):
        answer = engine.add(PROMPTS[0], 2, eos_ids=())
        run(engine)
    assert answer.completion.cached_tokens == 11
    model.programs.refresh()
    answer = engine.add(PROMPTS[0], 2, eos_ids=())
    run(engine)
    assert answer.completion.cached_tokens == 0


def test_in_common():
    a = list(range(700))
    for n in (0, 1, 255, 256, 257, 600, 700):
        b = [*a[:n], -1, *a[n + 1 :]]
        assert in_common(a, b[:700]) == min(n, 700)
    assert in_common(a, a[:300]) == 300
    assert in_common([], a) == 0


# What ends an answer, and what is said of it.


def test_a_cancelled_answer_frees_its_slot(model, file):
    engine = jaxllm.Engine(model, 1, 64)
    first, second, third = (engine.add(prompt, 20, eos_ids=()) for prompt in PROMPTS[:3])
    for _ in range(4):
        engine.step()
    engine.cancel(first)
    engine.cancel(third)
    assert (engine.waiting, engine.running) == (1, 0)
    run(engine)
    assert (first.completion.finish_reason, third.completion.finish_reason) == ("cancelled", "cancelled")
    assert 0 < len(first.completion.tokens) < 20
    assert third.completion.tokens == []
    assert second.completion.tokens == greedy(file[1], PROMPTS[1], 20)


def test_prompts_do_not_silence_answers(model):
    """While a long prompt is processed in pieces, an answer gets a token after each of them."""
    engine = jaxllm.Engine(model, 4, 128)
    events = []
    answer = engine.add(PROMPTS[0], 100, eos_ids=())
    engine.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxllm.engine.engine.PIECE_BESIDE_ANSWERS", 16)
        watch(patch, model, lambda batch: events.append("step" if is_step(batch) else "piece"))
        long = engine.add(RNG.integers(0, 50, 64).tolist(), 3)
        while not long.completion.tokens:
            engine.step()
    assert "piece piece" not in " ".join(events)
    assert events.count("piece") == 4
    engine.cancel(answer)
    run(engine)


def test_log_probabilities(model, file):
    completion = model.generate(PROMPTS[0], 4, eos_ids=(), temperature=2.0, logprobs=3, seed=3)
    tokens = list(PROMPTS[0])
    for token, entry in zip(completion.tokens, completion.logprobs, strict=True):
        logits = reference_logits(TINY, file[1], tokens)[-1].astype(np.float64)
        expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        assert entry.token == token
        assert entry.logprob == pytest.approx(expected[token], abs=1e-4)
        best = np.argsort(-expected)[:3]
        assert [token for token, _ in entry.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in entry.top], expected[best], atol=1e-4)
        tokens.append(token)
    assert model.generate(PROMPTS[0], 4).logprobs is None


def test_logit_bias(model, file):
    free = greedy(file[1], PROMPTS[0], 1)[0]
    assert model.generate(PROMPTS[0], 5, eos_ids=(), logit_bias={7: 1000.0}).tokens == [7] * 5
    assert free not in model.generate(PROMPTS[0], 5, eos_ids=(), logit_bias={free: -1000.0}).tokens


def test_penalties_count_what_the_answer_has(model):
    """A large one lets no token come twice, although prompts hold all of them."""
    tokens = model.generate(PROMPTS[2], 30, eos_ids=(), presence_penalty=1e4).tokens
    assert len(set(tokens)) == 30
    assert len(set(model.generate(PROMPTS[2], 30, eos_ids=()).tokens)) < 30
    fresh = model.generate(PROMPTS[2], 5, eos_ids=(), repetition_penalty=1e4).tokens
    assert not set(fresh) & set(PROMPTS[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be 1 or above"),
        ({"stop": [""]}, "stop: an empty text"),
        ({"logprobs": 21}, "logprobs=21: must be 0 to 20"),
        ({"logit_bias": {50: 1.0}}, "logit_bias: at most 1024 tokens, with ids 0 to 49"),
        ({"schema": {"type": "object"}}, "needs a tokenizer"),
    ],
)
def test_what_is_refused(model, options, message):
    with pytest.raises(jaxllm.InputError, match=message):
        model.generate(PROMPTS[0], **{"max_new_tokens": 3} | options)


def test_what_engines_refuse(model):
    with pytest.raises(jaxllm.InputError, match="slots=0, capacity=8: must be 1 or above"):
        jaxllm.Engine(model, 0, 8)
    with pytest.raises(jaxllm.InputError, match="capacity at most 128"):
        jaxllm.Engine(model, 1, 129)


class Stuck:
    """A guide that cannot begin, or not go on."""

    ended = False

    def __init__(self, good):
        self.good = good

    def mask(self, out):
        if not self.good:
            raise jaxllm.InputError("stuck")
        out[:] = 2**32 - 1

    def accept(self, token):
        self.good -= 1


@pytest.mark.parametrize("good", [0, 3])
def test_a_grammar_that_is_stuck_ends_its_own_answer_alone(model, file, monkeypatch, good):
    monkeypatch.setattr(jaxllm.Engine, "_guide", lambda self, constraint: Stuck(good))
    engine = jaxllm.Engine(model, 4, 64)
    stuck, other = engine.add(PROMPTS[0], 10, constraint="any"), engine.add(PROMPTS[1], 6, eos_ids=())
    told = []
    while engine.busy:
        told += engine.step()
    assert (str(stuck.error), stuck.completion.finish_reason, len(stuck.completion.tokens)) == ("stuck", "error", good)
    assert stuck in told
    assert other.completion.tokens == greedy(file[1], PROMPTS[1], 6)


# Guesses.


class Oracle:
    """Guesses right, or wrong from some token on."""

    most = 4

    def __init__(self, texts, wrong=99):
        self.texts, self.wrong = texts, wrong

    def prepare(self, slots, capacity):
        assert slots >= 1

    def guess(self, answers):
        found = {}
        for number, answer in answers.items():
            tokens = answer.known
            [text] = [text for text in self.texts if text[: len(tokens)] == tokens]
            right = text[len(tokens) : len(tokens) + self.most]
            found[number] = [token if i < self.wrong else (token + 1) % 50 for i, token in enumerate(right)]
        return found


@pytest.mark.parametrize("wrong", [0, 2, 99])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "top_k": 20, "frequency_penalty": 0.2}])
def test_guesses_change_no_answer(model, options, wrong):
    expected = [model.generate(p, 15, eos_ids=(), seed=4, **options).tokens for p in SHORT]
    oracle = Oracle([[*p, *tokens] for p, tokens in zip(SHORT, expected, strict=True)], wrong)
    engine = jaxllm.Engine(model, 4, 64, drafter=oracle)
    answers = [engine.add(p, 15, seed=4, eos_ids=(), **options) for p in SHORT]
    run(engine)
    assert [answer.completion.tokens for answer in answers] == expected
    stats = engine.stats
    if wrong == 0:
        assert stats.accepted == 0 < stats.drafted
    else:
        assert stats.accepted == stats.drafted if wrong == 99 else 0 < stats.accepted < stats.drafted
        assert stats.steps < (6 if wrong == 99 else 12)


def test_rings_survive_wrong_guesses(load_once):
    path = GOLDEN / "checkpoints" / "mistral"
    model = load_once(path, mesh="tp=1", dtype="float32", weights="packed")
    prompt = np.load(path / "golden.npz")["tokens"][0].tolist()
    expected = model.generate(prompt, 30, eos_ids=()).tokens
    engine = jaxllm.Engine(model, 1, 64, drafter=Oracle([[*prompt, *expected]], wrong=1))
    answer = engine.add(prompt, 30, eos_ids=())
    run(engine)
    assert answer.completion.tokens == expected


@pytest.mark.parametrize("options", some([{}, {"temperature": 0.8}], [{"temperature": 0.8}]))
def test_a_model_guesses(load_once, model, tmp_path_factory, options):
    """Itself, which is always right; and another, which shares only the vocabulary."""
    expected = [model.generate(p, 15, eos_ids=(), seed=4, **options).tokens for p in SHORT]
    path = tmp_path_factory.mktemp("other") / "other.gguf"
    write(path, Tiny(layers=1, seed=5))
    other = load_once(path, mesh="tp=1", dtype="float32", weights="packed")
    for helper in (model, other):
        engine = jaxllm.Engine(model, 4, 64, drafter=jaxllm.DraftModel(helper, 4))
        answers = [engine.add(p, 15, seed=4, eos_ids=(), **options) for p in SHORT]
        run(engine)
        assert [answer.completion.tokens for answer in answers] == expected
        stats = engine.stats
        assert (stats.accepted == stats.drafted) if helper is model else (stats.accepted < stats.drafted)
        assert stats.steps <= 10 or helper is other


def test_text_is_looked_up_where_it_occurred_before():
    lookup = jaxllm.PromptLookup(most=3)
    assert lookup.continuation([1, 2, 3, 9, 8, 1, 2, 3]) == [9, 8, 1]
    assert lookup.continuation([5, 6, 1, 5, 6, 2, 5, 6]) == [2, 5, 6]  # the newest occurrence
    assert lookup.continuation([1, 2, 3]) == []
