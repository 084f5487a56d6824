"""Models with random weights, from a configuration alone."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_hf

import jaxllm
from jaxllm.initializing import RandomMatrix
from jaxllm.models.families import FAMILIES
from jaxllm.models.gpt_oss.config import GptOssConfig
from jaxllm.parallel import make_mesh
from jaxllm.plan import dense, fill_with_shapes

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = {name: tiny_hf.COMMON | config for name, config in tiny_hf.MODELS.items()}
CONFIGS["olmo2"] = tiny_hf.COMMON | tiny_hf.LLAMA | {"model_type": "olmo2", "num_hidden_layers": 3}
CONFIGS["gpt_oss"] = json.loads((GOLDEN / "gpt_oss" / "bf16" / "config.json").read_text())
DEMO = {"vocab_size": 96, "dim": 64, "inter_dim": 96, "moe_inter_dim": 32, "n_layers": 2, "n_heads": 4}
DEMO |= {"n_routed_experts": 4, "n_shared_experts": 1, "n_activated_experts": 2, "kv_lora_rank": 32}
DEMO |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "max_batch_size": 3, "max_seq_len": 64}


@pytest.fixture(scope="module")
def make():
    made = {}

    def make(name, **options):
        key = name, tuple(options.items())
        if key not in made:
            made[key] = jaxllm.initialize(CONFIGS[name], **{"dtype": "float32", "progress": False} | options)
        return made[key]

    return make


def matrix(p):
    """What a parameter holds, in the order of a checkpoint and without padding."""
    values = np.asarray(p.weight if isinstance(p.weight, jax.Array) else p.weight.dequantize())
    declared = p.declaration
    axes = [declared.rows] if values.ndim == 1 else [declared.stack, declared.rows, declared.cols][-values.ndim :]
    for axis, index in enumerate(axes):
        if index is not None:
            values = values.take([list(index).index(i) for i in range(max(index) + 1)], axis=axis)
    assert values.shape == declared.shape
    return values


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("llama", "tp=2"), ("llama", "tp=8"), ("qwen3_moe", "ep=3"), ("deepseek", "ep=3,tp=2"), ("gpt_oss", "tp=2,ep=4")],
)
def test_a_seed_gives_the_same_numbers_on_any_mesh(make, name, mesh):
    one, many = ({p.name: matrix(p) for p in make(name, mesh=m).placed} for m in ("tp=1", mesh))
    assert one.keys() == many.keys()
    for key, values in one.items():
        np.testing.assert_array_equal(values, many[key], key)


def test_another_seed_gives_other_numbers(make):
    one, other = ({p.name: matrix(p) for p in make("llama", mesh="tp=1", seed=seed).placed} for seed in (0, 1))
    correlations = [np.corrcoef(one[n].ravel(), other[n].ravel())[0, 1] for n in one if one[n].ndim > 1]
    assert len(correlations) == 9 and max(map(abs, correlations)) < 0.1


def test_logits_have_a_sensible_scale(make):
    tokens = np.random.default_rng(0).integers(0, 96, (2, 9))
    assert 0.3 < np.std(make("deepseek", mesh="ep=3,tp=2").logits(tokens)) < 3


@pytest.mark.parametrize("name", ["deepseek", "gpt_oss", "olmo2"])
def test_numbers_are_as_documented(make, name):
    """Independent and uniform, with a variance of 1 / (size of the input); norms 1, biases and sinks 0."""
    rows, vectors = [], 0
    for p in make(name, mesh="tp=1").placed:
        values = matrix(p)
        if values.ndim == 1 or values.shape[-1] == 1:
            assert (values == (1 if "norm" in p.name else 0)).all(), p.name
            vectors += 1
        else:
            rows += list(values.reshape(-1, values.shape[-1])[:, :32] * math.sqrt(values.shape[-1]))
    rows = np.array(rows)
    assert vectors > 9 and len(rows) > 1000
    place, even = np.sort(rows.ravel()) / 3**0.5 / 2 + 0.5, (np.arange(rows.size) + 0.5) / rows.size
    assert np.abs(place - even).max() < 1.6 / rows.size**0.5  # Kolmogorov and Smirnov: 1 % of uniform ones are beyond
    # Of independent numbers, the largest singular value is about this (Marchenko and Pastur); of others it is larger.
    assert np.linalg.norm(rows, 2) < 1.05 * (len(rows) ** 0.5 + 32**0.5)
    assert len(np.unique(rows)) > 0.99 * rows.size


def test_every_way_to_describe_a_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    (tmp_path / "args.json").write_text(json.dumps(DEMO))
    options = {"dtype": "float32", "progress": False}
    one = jaxllm.initialize(CONFIGS["llama"], **options)
    for config in (tmp_path, str(tmp_path / "config.json"), one.config):
        model = jaxllm.initialize(config, **options)
        assert model.config == one.config
        np.testing.assert_array_equal(*(m.placed[0].weight.values for m in (one, model)))
    assert jaxllm.initialize(tmp_path / "config.json", **options).name == tmp_path.name
    for config in (DEMO, tmp_path / "args.json"):
        model = jaxllm.initialize(config, **options)
        assert (model.config.hidden_size, model.max_seq_len, model.max_batch_size) == (64, 64, 3)
    assert jaxllm.initialize(DEMO, **options, max_batch_size=5, max_seq_len=7).max_batch_size == 5


def test_v3_has_its_correction_bias_without_a_checkpoint_that_shows_it(make):
    assert any(p.name.endswith("e_score_correction_bias") for p in make("deepseek", mesh="tp=1").placed)


BILLIONS = {
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.6,
    "deepseek-v2-lite-16b": 15.7,
    "deepseek-v2-236b": 235.7,
    "deepseek-v3-671b": 671,
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
    "gemma-3n-e2b": 4.4,
    "gemma-3n-e4b": 6.8,
}


def test_presets():
    assert list(jaxllm.PRESETS) == list(BILLIONS)
    config = GptOssConfig.from_hf(jaxllm.PRESETS["gpt-oss-20b"])
    [family] = [f for f in FAMILIES if isinstance(config, f.config)]
    mesh = make_mesh("tp=1")
    sizes = fill_with_shapes(family.model(config, mesh, 1), mesh, dense("int8"))
    assert sum(sizes.values()) / 1e9 == pytest.approx(BILLIONS["gpt-oss-20b"], rel=0.01)


def test_encoded_as_while_loading(make):
    exact, packed = (
        {p.name: p for p in make("qwen3_moe", **o).placed}
        for o in ({"mesh": "tp=1"}, {"mesh": "ep=3", "quantize": "q8_0", "weights": "packed"})
    )
    formats = {
        name: p.weight.format for name, p in packed.items() if p.declaration.shape[1:] and not p.declaration.keep
    }
    assert set(formats.values()) == {"Q8_0"} and len(formats) == 9
    for name in formats:
        want = matrix(exact[name])
        np.testing.assert_allclose(matrix(packed[name]), want, atol=np.abs(want).max() / 127)


def test_a_weight_is_never_whole_on_the_host(monkeypatch):
    """Devices make what they hold, of the largest matrix as of every other."""
    made, really = [], RandomMatrix.__array__
    monkeypatch.setattr(RandomMatrix, "__array__", lambda m, *a, **k: made.append(m.shape) or really(m, *a, **k))
    model = jaxllm.initialize(CONFIGS["llama"], mesh="tp=8", progress=False)
    vocabulary, hidden = model.config.vocab_size, model.config.hidden_size
    assert made.count((vocabulary // 8, hidden)) == 16  # embedding table and head, over eight devices
    assert made.count((hidden, 192 // 8)) == 8
    assert max(math.prod(shape) for shape in made) <= 2 * max(vocabulary, 192) * hidden // 8


WRONG = {
    "no preset": (
        "gpt-oss-21b",
        {},
        "gpt-oss-21b: no such file, and no preset; those are llama-3.1-8b, .*120b",
    ),
    "no model": ({"model_type": "gpt2"}, {}, "config: models of type 'gpt2' are not supported"),
    "no config": ({"hidden_size": 64}, {}, "config: 'hidden_size' is not a field of the demo's ModelArgs"),
    "no size": ({"model_type": "llama"}, {}, ".*'hidden_size' is missing"),
    "no type": (7, {}, "config is a int, not a name, path, dict or configuration"),
    "dtype": (CONFIGS["llama"], {"dtype": "float8"}, "dtype 'float8': choose one of bfloat16, float32"),
    "no heads to hold apart": (
        CONFIGS["llama"],
        {"attention": "naive"},
        "attention 'naive' means nothing for models like Llama, only for DeepSeek",
    ),
    "another attention": (
        CONFIGS["deepseek"],
        {"attention": "flash"},
        "attention 'flash': choose one of absorbed, naive",
    ),
    "nobody": (CONFIGS["llama"], {"max_batch_size": 0}, "max_batch_size=0: must be 1 or above"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_makes_no_sense_is_one_line(name):
    config, options, message = WRONG[name]
    with pytest.raises(jaxllm.InputError, match=message) as error:
        jaxllm.initialize(config, progress=False, **options)
    assert "\n" not in str(error.value)
