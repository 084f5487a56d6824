"""Training beside torch and peft (tests/reference/finetune_goldens.py), on meshes and over packed bases."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
import tiny_hf
from covering import some
from quantized_writers import quantized_checkpoint
from tiny_tokenizer import tokenizer

import jaxllm
from jaxllm.cli import main
from jaxllm.errors import InputError
from jaxllm.finetuning.checkpoints import Checkpoints
from jaxllm.finetuning.data import Example
from jaxllm.finetuning.factors import as_adapter, begun, continued
from jaxllm.finetuning.loop import Training
from jaxllm.finetuning.packing import packed
from jaxllm.finetuning.settings import Settings
from jaxllm.finetuning.step import Steps
from jaxllm.kernels import dispatch

GOLDEN = Path(__file__).parent / "golden"
FINETUNED = GOLDEN / "finetuned"
SETTINGS = {"steps": 20, "warmup": 0.2, "learning_rate": 1e-2, "weight_decay": 0.1, "clip": 0.5}


def base_of(name):
    return GOLDEN / json.loads((FINETUNED / name / "adapter_config.json").read_text())["base_model_name_or_path"]


def examples(golden):
    """The texts of a golden, as examples."""
    pairs = zip(golden["tokens"], golden["learned"], strict=True)
    return [Example(tokens[tokens >= 0], learned[tokens >= 0]) for tokens, learned in pairs]


def training(model, name, settings, length=32):
    golden = np.load(FINETUNED / name / "golden.npz")
    rows = packed(examples(golden), length, np.arange(len(golden["tokens"])))
    places, factors = continued(model, FINETUNED / name)
    return Training(model, Settings(**SETTINGS | settings), rows, None, places, False), factors, golden


MESHES = [
    ("llama", "tp=8", {"batch": 1, "accumulate": 2, "remat": True}),  # two texts in each row
    ("deepseek", "tp=2,ep=2", {}),  # also trains experts, as the others below do
    ("gpt_oss", "tp=1", {}),
    ("deepseek", "tp=2,ep=4", {"remat": True}),
    ("qwen3_moe", "tp=2,ep=2", {}),
    ("llama", "dp=2", {}),
    ("llama", "tp=1", {"remat": True}),
    ("llama", "tp=2", {}),
    ("qwen3_moe", "tp=1", {"remat": True}),
    ("qwen3_moe", "tp=8", {}),
    ("deepseek", "tp=1", {}),
    ("deepseek", "tp=2", {}),
    ("gpt_oss", "ep=2", {"batch": 1, "accumulate": 2}),
    ("gpt_oss", "tp=8", {}),
]


@pytest.mark.parametrize(("name", "mesh", "settings"), some(MESHES, MESHES[:3]))
def test_losses_are_those_of_torch(name, mesh, settings):
    model = jaxllm.load(base_of(name), mesh=mesh, dtype="float32", progress=False)
    run, factors, golden = training(model, name, settings)
    trained, log, _ = run.run(factors, None)
    np.testing.assert_allclose(log.losses, golden["losses"], atol=1e-3)
    model.adapters.attach(as_adapter(name, run.places, trained), 1.0)
    after = model.logits(np.load(base_of(name) / "golden.npz")["tokens"])
    np.testing.assert_allclose(after, golden["logits"], atol=1e-2)


@pytest.mark.parametrize(("name", "family"), some([("gptq-4", "llama"), ("mxfp4", "qwen3_moe")], [("gptq-4", "llama")]))
def test_a_packed_base_trains_as_the_matrices_that_it_stands_for(tmp_path, name, family):
    """What these are, tests/quantized_writers.py says."""
    source = tiny_hf.write(tmp_path / "source", family)
    packed_, plain = quantized_checkpoint(source, tmp_path, name, np.random.default_rng(1))
    rng, losses, programs = np.random.default_rng(2), [], {}
    rows = packed([Example(rng.integers(0, tiny_hf.VOCAB, 20, np.int32), np.arange(20) > 4)], 20, np.arange(1))
    for path in (packed_, plain):
        model = jaxllm.load(path, mesh="tp=2", dtype="float32", weights="packed", progress=False)
        settings = Settings(steps=6, learning_rate=1e-2, warmup=0.0, rank=4)
        places, factors = begun(model, settings.rank, settings.scale, None, 0)
        run = Training(model, settings, rows, None, places, False)
        run.steps.compiled |= programs
        losses.append(run.run(factors, None)[1].losses)
        programs["update"] = run.steps.compiled["update"]  # which knows nothing of the base
    assert losses[0][-1] < losses[0][0] - 0.1
    np.testing.assert_allclose(*losses, atol=1e-3)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_no_decoded_copy_of_the_model_is_kept(tmp_path, backend):
    """The programs' own memory is below that of the float32 matrices, of which a backward pass needs every one."""
    tiny_gguf.write(tmp_path / "m.gguf", tiny_gguf.Tiny(hidden=256, intermediate=1024, layers=3))
    model = jaxllm.load(tmp_path / "m.gguf", dtype="float32", weights="packed", progress=False)
    places, factors = begun(model, 4, 2.0, None, 0)
    rows = packed([Example(np.arange(16, dtype=np.int32), np.arange(16) > 0)], 16, np.arange(1))
    steps = Training(model, Settings(steps=1), rows, None, places, False).steps
    trained = steps.replicated(factors)
    with nullcontext() if backend is None else dispatch.using(backend):
        steps.add(steps.zeros(trained), trained, rows.take(np.arange(1), 1))
    decoded = sum(4 * np.prod(place.declaration.shape) for place in places.values())
    temporary = steps.compiled["add"].memory_analysis().temp_size_in_bytes
    assert temporary < decoded / 2


SUMS = ("one one two", "one two three", "two three five", "one three four", "two two four")
DATA = [
    {
        "messages": [
            {"role": "user", "content": f"What is {a} plus {b} ?"},
            {"role": "assistant", "content": f"ANSWER: {c}"},
        ]
    }
    for a, b, c in map(str.split, SUMS)
]
SHORT = {"epochs": 3, "batch": 2, "length": 12, "rank": 4, "learning_rate": 1e-2, "save_every": 2, "held_out": 1}


@pytest.fixture
def llama():
    model = jaxllm.load(GOLDEN / "checkpoints" / "llama", mesh="tp=2", dtype="float32", progress=False)
    model.tokenizer = tokenizer()
    return model


@pytest.fixture(scope="module")
def programs():
    return {}


@pytest.fixture
def compiled_once(programs, monkeypatch):
    """Trainings of the model above on the data above, as `SHORT` says, have the same programs, but for the leaves of a
    model to which adapters were attached before."""
    begin = Steps.__init__

    def reusing(self, *args):
        begin(self, *args)
        self.compiled = programs.setdefault(len(self._leaves), {})

    monkeypatch.setattr(Steps, "__init__", reusing)


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_an_interrupted_training_goes_on_to_the_same_bits(llama, compiled_once, tmp_path, monkeypatch):
    prompt = np.array([[5, 6, 7, 8]])
    before = np.asarray(llama.logits(prompt))
    done = jaxllm.finetune(llama, DATA, tmp_path / "whole", **SHORT)
    assert dict(llama.adapters) == {"whole": 1.0}
    assert len(done.losses) == 6 and [step for step, _ in done.evaluations] == [0, 2, 4, 6]
    assert done.losses[-1] < done.losses[0] and done.evaluations[-1][1] < done.evaluations[0][1]
    assert done.tokens_per_second > 0
    after = np.asarray(llama.logits(prompt))
    del llama.adapters["whole"]
    np.testing.assert_array_equal(llama.logits(prompt), before)

    save = Checkpoints.save

    def interrupted(self, now, changes, log):
        save(self, now, changes, log)
        if len(log.losses) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(Checkpoints, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            jaxllm.finetune(llama, DATA, tmp_path / "parts", **SHORT)
    assert not (tmp_path / "parts").exists()
    assert [p.name for p in (tmp_path / ".parts.partial" / "content").iterdir()] == ["checkpoint-00000004"]
    again = jaxllm.finetune(llama, DATA, tmp_path / "parts", **SHORT)
    assert again.losses == done.losses and again.evaluations == done.evaluations
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert sorted(files(tmp_path / "parts")) == ["adapter_config.json", "adapter_model.safetensors", "training.json"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []

    options = {"adapters": [tmp_path / "parts"], "dtype": "float32", "progress": False}
    other = jaxllm.load(GOLDEN / "checkpoints" / "llama", **options)
    np.testing.assert_allclose(other.logits(prompt), after, atol=1e-4)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(llama, compiled_once, tmp_path, monkeypatch):
    step = Steps.update

    def third_is_lost(self, now, sums):
        now, sums, loss, norm = step(self, now, sums)
        self.count = getattr(self, "count", 0) + 1
        return now, sums, loss if self.count < 3 else loss * np.nan, norm

    monkeypatch.setattr(Steps, "update", third_is_lost)
    with pytest.raises(InputError) as error:
        jaxllm.finetune(llama, DATA, tmp_path / "out", **SHORT)
    kept = tmp_path / ".out.partial" / "content" / "checkpoint-00000002"
    assert str(error.value) == (
        f"step 3: the loss is nan; the newest checkpoint is {kept}; try a smaller learning_rate"
    )
    assert dict(llama.adapters) == {} and not (tmp_path / "out").exists()
    assert llama.adapters.add(kept) == "checkpoint-00000002"  # it is an adapter like any other


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["q_proj", "x_proj"]}, "targets 'x_proj': llama has down_proj, gate_proj, k_proj, o_proj"),
        ({"rank": 0}, "rank 0: must be 1 or above"),
        ({"warmup": 2.0}, "warmup 2.0: it is a part of all steps"),
        ({"schedule": "sine"}, "schedule 'sine': choose one of cosine, linear, constant"),
        ({"length": 4096}, "length 4096: the context holds 64 tokens"),
        ({"length": 8}, "5 of 5 examples are longer than 8 tokens"),
        ({"held_out": 5}, "held_out 5: there are 5 examples"),
        ({"start": GOLDEN / "adapters" / "ends"}, "which is not trained here"),
    ],
)
def test_what_cannot_be_done_is_said_before_training(llama, settings, message):
    with pytest.raises(InputError) as error:
        jaxllm.finetune(llama, DATA, **settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_models_that_cannot_be_trained(llama):
    llama.adapters.add(GOLDEN / "adapters" / "second")
    with pytest.raises(InputError, match="adapters are attached .second.: take them off"):
        jaxllm.finetune(llama, DATA)
    llama.tokenizer = None
    with pytest.raises(InputError, match="llama has no tokenizer"):
        jaxllm.finetune(llama, DATA)


def test_the_command_line_says_what_is_wrong(tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text("{")
    command = ["finetune", "--model", "demo", "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out")]
    assert main([*command, "--rank", "many"]) == 2
    assert "argument --rank: invalid int value: 'many'" in capsys.readouterr().err
    assert main(command) == 2
    assert f"error: {tmp_path / 'data.jsonl'}: line 1: not JSON" in capsys.readouterr().err
