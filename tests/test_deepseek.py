"""DeepSeek-V2 and V3 against transformers, and against the demo's own mathematics in numpy for what it lacks."""

import json
import shutil
from functools import partial
from pathlib import Path

import covering
import deepseek_numpy
import jax
import jax.numpy as jnp
import kernel_cases
import ml_dtypes
import numpy as np
import pytest
from compiled import decode_steps, step_by_step
from covering import in_turn, some
from deepseek_numpy import Transformer, act_quant, load, read_safetensors
from safetensors.numpy import save_file

import jaxllm
from jaxllm.formats.scaled import Scaled
from jaxllm.kernels.activations import Quantized
from jaxllm.kernels.block_fp8 import reference as block_fp8
from jaxllm.layers.experts import TopKRouter
from jaxllm.plan import collectives

CHECKPOINTS = Path(__file__).parent / "golden" / "deepseek"
DOWN = "model.layers.0.mlp.down_proj.weight"
NAMES = sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir())
# Models whose blocks are cut in ways of their own are on many devices; the others differ in what each device computes.
FEW = {"v2": "tp=2,ep=4", "v3": "tp=2,ep=4", "v3_fp8_small_blocks": "tp=8"}
CASES = some(
    [*in_turn(NAMES, "tp=1", "tp=2,ep=4", "ep=4"), ("v3_fp8_small_blocks", "tp=8")],
    [(name, FEW.get(name, "tp=1")) for name in NAMES if name != "v3_fp8"],  # one large block for each matrix
)
# Those that decode in ways of their own: queries without latents, the rotations, scales.
STEPS = ["v3_fp8_small_blocks", "v3_half_rope", "v3_no_q_lora", "v3_unlike_demo"]


def golden(name):
    return np.load(CHECKPOINTS / name / "golden.npz")


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_logits_and_tokens_are_those_of_transformers(load_once, name, mesh):
    """A prompt is attended to per head, a decode step on latents: both give transformers' result (of the latter, see
    the next test for most models)."""
    expected = golden(name)
    model = load_once(CHECKPOINTS / name, mesh=mesh, dtype="float32", weights="packed")
    np.testing.assert_allclose(model.logits(expected["tokens"]), expected["logits"], atol=1e-3)
    if name == "v3" or covering.FULL:
        assert model.generate(expected["tokens"][0].tolist(), 12).tokens == expected["greedy"].tolist()


@pytest.mark.parametrize(("name", "mesh"), some(CASES, [case for case in CASES if case[0] in STEPS]))
def test_token_by_token_equals_all_at_once(load_once, name, mesh):
    """Every step of this is absorbed, and of the other side naive."""
    tokens, logits = golden(name)["tokens"], golden(name)["logits"]
    model = load_once(CHECKPOINTS / name, mesh=mesh, dtype="float32", weights="packed")
    np.testing.assert_allclose(step_by_step(model, tokens), logits, atol=1e-3)


@pytest.mark.parametrize("mesh", some(["tp=1", "tp=2", "tp=8"], ["tp=8"]))
def test_every_heads_keys_and_values_can_be_kept_instead(load_once, mesh):
    expected = golden("v3")
    model = load_once(CHECKPOINTS / "v3", mesh=mesh, dtype="float32", attention="naive")
    np.testing.assert_allclose(model.logits(expected["tokens"]), expected["logits"], atol=1e-3)
    np.testing.assert_allclose(step_by_step(model, expected["tokens"]), expected["logits"], atol=1e-3)
    heads = {"tp=1": 4, "tp=2": 4, "tp=8": 8}[mesh]  # of the last, 4 are zeros
    assert model.programs.empty_cache(1, 256).keys[0].shape == (1, heads, 256, 16)


def test_a_choice_of_attention_is_for_latent_attention():
    llama = CHECKPOINTS.parent / "checkpoints" / "llama"
    with pytest.raises(jaxllm.InputError, match="llama: attention 'naive' means nothing for models like Llama"):
        jaxllm.load(llama, attention="naive")
    with pytest.raises(jaxllm.InputError, match="attention 'paged': choose one of absorbed, naive"):
        jaxllm.load(CHECKPOINTS / "v3", attention="paged")


def test_a_cached_token_is_a_latent_and_a_rotary_key(load_once):
    model = load_once(CHECKPOINTS / "v3", mesh="tp=2", dtype="float32", weights="packed")
    cache, c = model.programs.empty_cache(1, 256), model.config
    absorbed = load_once(CHECKPOINTS / "v3", mesh="tp=2", dtype="float32", weights="packed", attention="absorbed")
    assert jax.tree.map(jnp.shape, absorbed.programs.empty_cache(1, 256)) == jax.tree.map(jnp.shape, cache)
    nbytes = sum(x.nbytes for x in (*cache.keys, *cache.values))
    assert nbytes == 256 * c.num_hidden_layers * (c.kv_lora_rank + c.qk_rope_head_dim) * 4
    assert nbytes < 0.4 * 256 * c.num_hidden_layers * c.num_attention_heads * (8 + 8 + 8) * 4


@pytest.mark.parametrize("mesh", some(["tp=2", "tp=2,ep=4"], ["tp=2,ep=4"]))
def test_a_block_sums_twice(load_once, mesh):
    model = load_once(CHECKPOINTS / "v3", mesh=mesh, dtype="float32", weights="packed")
    model.generate(golden("v3")["tokens"][0].tolist(), 12)  # as above, with the same programs
    [step] = decode_steps(model)
    # One more sum for the embedding, whose vocabulary is cut, and the logits put together.
    assert collectives(step.as_text()) == {"all-reduce": 2 * model.config.num_hidden_layers + 1, "all-gather": 1}


@pytest.mark.parametrize("mesh", ["tp=8", "tp=2,ep=4"])
def test_scales_are_cut_with_their_weights(load_once, mesh):
    model = load_once(CHECKPOINTS / "v3_fp8_small_blocks", mesh=mesh, dtype="float32", weights="packed")
    fp8 = [p for p in model.placed if isinstance(p.weight, Scaled)]
    assert len(fp8) > 20
    for p in fp8:
        for leaf in (p.weight.values, p.weight.scales):
            assert len({s.data.shape for s in leaf.addressable_shards}) == 1
        assert p.weight.values.dtype == ml_dtypes.float8_e4m3fn
    assert {p.name for p in model.placed if "gate.weight" in p.name or "embed" in p.name}.isdisjoint(
        p.name for p in fp8
    )


def test_activations_in_fp8_are_the_demos(load_once):
    """Both round the same activations, so they differ by rounding order only, but for a value at a rounding border."""
    name = "v3_fp8_small_blocks"
    tokens, plain = golden(name)["tokens"][:, :8], golden(name)["logits"][:, :8]
    params, args = load(CHECKPOINTS / name)
    expected = Transformer(params, args, gemm_impl="fp8", attn_impl="absorb")(tokens)
    model = load_once(CHECKPOINTS / name, mesh="tp=1", dtype="float32", matmul="fp8")
    got = np.asarray(model.logits(tokens))
    assert np.abs(got - plain).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=0.02)


def test_scales_of_powers_of_two_where_the_config_says_ue8m0(load_once, tmp_path, monkeypatch):
    name = "v3_fp8_small_blocks"
    for file in (CHECKPOINTS / name).iterdir():
        shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = golden(name)["tokens"][:, :8]
    params, args = load(tmp_path)
    other = Transformer(params, args, gemm_impl="fp8", attn_impl="absorb")(tokens)
    monkeypatch.setattr(deepseek_numpy, "act_quant", partial(kernel_cases.act_quant, power_of_two=True))
    expected = Transformer(params, args, gemm_impl="fp8", attn_impl="absorb")(tokens)
    got = np.asarray(load_once(tmp_path, mesh="tp=2", dtype="float32", matmul="fp8").logits(tokens))
    assert np.abs(got - other).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=0.02)


@pytest.mark.parametrize("group", [8, 128])
def test_act_quant_is_the_demos(group):
    x = np.random.default_rng(0).normal(size=(5, 3 * group)).astype(np.float32) * 10
    x[1, :group] = 0
    values, scales = block_fp8.act_quant(jnp.asarray(x), group)
    expected_values, expected_scales = act_quant(x, group)
    np.testing.assert_array_equal(np.asarray(values).view(np.uint8), np.asarray(expected_values).view(np.uint8))
    np.testing.assert_array_equal(scales, expected_scales)


def test_act_quant_of_a_ragged_row():
    x = np.arange(1, 11, dtype=np.float32)[None]
    values, scales = block_fp8.act_quant(jnp.asarray(x), 4)
    assert (values.shape, scales.shape) == ((1, 10), (1, 3))
    np.testing.assert_allclose(Quantized(values, scales, 4).dequantize(), x, rtol=0.07)


def test_fp8_activations_need_fp8_weights():
    with pytest.raises(jaxllm.InputError, match="needs a checkpoint with FP8 weights"):
        jaxllm.load(CHECKPOINTS / "v3", matmul="fp8")
    with pytest.raises(jaxllm.InputError, match="weights 'bfloat16': choose one of packed"):
        jaxllm.load(CHECKPOINTS / "v3_fp8", matmul="fp8", weights="bfloat16")


ROUTERS = {
    "softmax": {"scoring_func": "softmax"},
    "softmax, groups": {
        "scoring_func": "softmax",
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
    },
    "sigmoid": {"scoring_func": "sigmoid", "bias": True},
    "sigmoid, groups": {"scoring_func": "sigmoid", "n_group": 4, "topk_group": 2, "bias": True},
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", ROUTERS)
def test_routers_choose_as_the_demos(name, normalize):
    options = dict(ROUTERS[name])
    rng = np.random.default_rng(4)
    bias = rng.normal(size=16).astype(np.float32) if options.pop("bias", False) else None
    logits = rng.normal(size=(50, 16)).astype(np.float32)
    groups = options.get("n_group", 1), options.get("topk_group", 1)
    route = TopKRouter(4, normalize, options["scoring_func"], *groups, "max" if bias is None else "top2", scale=2.5)
    scores, experts = route(jnp.asarray(logits), None if bias is None else jnp.asarray(bias))
    expected_scores, expected = plain_route(logits, bias, options["scoring_func"], *groups, normalize)
    np.testing.assert_array_equal(np.sort(experts, -1), np.sort(expected, -1))
    order, wanted = np.argsort(experts, -1), np.argsort(expected, -1)
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(scores), order, -1),
        np.take_along_axis(expected_scores, wanted, -1) * 2.5,
        rtol=1e-5,
    )


def plain_route(logits, bias, scoring, groups, kept, normalize):
    """One token after another, with sorting."""
    all_scores, all_experts = [], []
    for row in logits.astype(np.float64):
        scores = np.exp(row) / np.exp(row).sum() if scoring == "softmax" else 1 / (1 + np.exp(-row))
        choice = scores if bias is None else scores + bias
        parts = choice.reshape(groups, -1)
        best = [part.max() if bias is None else np.sort(part)[-2:].sum() for part in parts]
        allowed = sorted(range(groups), key=lambda g: -best[g])[:kept]
        size = len(row) // groups
        candidates = [e for e in range(len(row)) if e // size in allowed]
        experts = sorted(candidates, key=lambda e: -choice[e])[:4]
        chosen = scores[experts]
        all_scores.append(chosen / chosen.sum() if normalize else chosen)
        all_experts.append(experts)
    return np.array(all_scores), np.array(all_experts)


@jax.jit
def decoded(weight):
    return weight.dequantize()


@pytest.mark.parametrize(("shape", "block"), [((300, 200), (128, 128)), ((3, 40, 50), (16, 8)), ((7, 5), (128, 128))])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu])
def test_block_fp8_decodes_bit_for_bit(shape, block, dtype):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, shape, np.uint8)
    values[values & 127 == 127] = 1  # NaN
    values = values.view(ml_dtypes.float8_e4m3fn)
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    scales = np.ldexp(np.float32(1), rng.integers(-6, 6, grid)).astype(dtype)
    expected = np.empty(shape, np.float32)
    for i in np.ndindex(shape):
        expected[i] = np.float32(values[i]) * np.float32(scales[(*i[:-2], i[-2] // block[0], i[-1] // block[1])])
    weight = Scaled(values, scales, block, None)
    assert (weight.shape, weight.format) == (shape, f"FP8 {block[0]}x{block[1]}")
    np.testing.assert_array_equal(np.asarray(decoded(weight)).view(np.uint32), expected.view(np.uint32))
    np.testing.assert_array_equal(decoded(weight.refined(1, 1)), expected)


def test_block_fp8_from_dense_keeps_seven_significant_percent():
    w = np.random.default_rng(1).normal(size=(200, 300)).astype(np.float32)
    w[:128, :128] = 0
    weight = Scaled.from_dense(w)
    back = np.asarray(weight.dequantize())
    assert (back[:128, :128] == 0).all()
    assert np.abs(back - w).max() < 0.07 * np.abs(w).max()
    for r, c in np.ndindex(2, 3):
        part = np.s_[128 * r : 128 * r + 128, 128 * c : 128 * c + 128]
        if w[part].any():
            assert np.abs(back[part]).max() == pytest.approx(np.abs(w[part]).max(), rel=1e-6)


DAMAGE = {
    "no scales": (
        lambda tensors, config: tensors.pop(f"{DOWN}_scale_inv"),
        f"'{DOWN}' is FP8, but '{DOWN}_scale_inv' is missing",
    ),
    "another grid": (
        lambda tensors, config: tensors.update({f"{DOWN}_scale_inv": np.ones((2, 2), np.float32)}),
        r"down_proj.weight': the grid of scales has shape \[2, 2\], expected \[3, 7\]",
    ),
    "another method": (
        lambda tensors, config: config["quantization_config"].update(quant_method="vptq"),
        "quantization 'vptq' is not supported",
    ),
    "no object": (lambda tensors, config: config.update(quantization_config="fp8"), "is 'fp8', expected an object"),
    "no block": (
        lambda tensors, config: config["quantization_config"].update(weight_block_size=[0, 128]),
        r"'weight_block_size' is \[0, 128\], not two numbers above 0",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_fp8_checkpoint_says_why(tmp_path, name):
    damage, message = DAMAGE[name]
    source = CHECKPOINTS / "v3_fp8_small_blocks"
    tensors, config = read_safetensors(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    damage(tensors, config)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(jaxllm.InputError, match=message) as error:
        jaxllm.load(tmp_path, progress=False)
    assert str(error.value).startswith(str(tmp_path))
