"""The numpy transcription of DeepSeek's demo against transformers, and the demo's FP8 kernels against plain numbers."""

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from deepseek_numpy import (
    E4M3,
    Transformer,
    act_quant,
    as_demo,
    fp8_gemm,
    gate,
    load,
    model_args,
    read_safetensors,
    weight_dequant,
)

CHECKPOINTS = Path(__file__).parent / "golden" / "deepseek"
NAMES = sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir())
FP8 = [name for name in NAMES if "fp8" in name]
# Where transformers computes another model than the demo, and the fields that make the difference.
UNLIKE_DEMO = {
    "v3_half_rope": {"rope_interleave"},
    "v3_plain_rope": {"norm_eps"},
    "v3_unlike_demo": {"mscale_all_dim", "norm_topk_prob"},
}


def golden(name):
    return dict(np.load(CHECKPOINTS / name / "golden.npz"))


def distance(params, args, gold, **options):
    return np.abs(Transformer(params, args, **options)(gold["tokens"]) - gold["logits"]).max()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("attn_impl", ["naive", "absorb"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name, attn_impl, dtype):
    assert distance(*load(CHECKPOINTS / name), golden(name), attn_impl=attn_impl, dtype=dtype) < 1e-4


@pytest.mark.parametrize("attn_impl", ["naive", "absorb"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_transformers(name, attn_impl):
    gold = golden(name)
    model = Transformer(*load(CHECKPOINTS / name), attn_impl=attn_impl)
    tokens = [model(gold["tokens"][:1])[0, -1].argmax()]
    while len(tokens) < len(gold["greedy"]):
        tokens.append(model(np.array([tokens[-1:]]))[0, -1].argmax())
    assert tokens == gold["greedy"].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_the_demo_agrees_but_for_what_it_lacks(name):
    params, args = load(CHECKPOINTS / name)
    demo = as_demo(args)
    missing = UNLIKE_DEMO.get(name, set())
    agreeing = replace(demo, **{field: getattr(args, field) for field in missing})
    assert distance(params, agreeing, golden(name)) < 1e-4
    for field in missing:
        assert distance(params, replace(agreeing, **{field: getattr(demo, field)}), golden(name)) > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_both_spellings_of_a_config_mean_the_same(name):
    new, old = (json.loads((CHECKPOINTS / name / f).read_text()) for f in ("config.json", "config_old.json"))
    assert model_args(new) == model_args(old)


def test_a_wrong_setting_shows():
    wrong = {
        "v2": {"route_scale": 1.0, "n_expert_groups": 1, "rope_factor": 1.0, "mscale": 0.0, "beta_slow": 3},
        "v3": {"route_scale": 1.0, "n_expert_groups": 1, "score_func": "softmax", "norm_topk_prob": False},
        "v3_no_q_lora": {"rope_theta": 1e4, "max_seq_len": 64, "n_activated_experts": 2},
        "v3_plain_rope": {"n_limited_groups": 2, "rope_interleave": False},
        "v3_unlike_demo": {"beta_fast": 32, "beta_slow": 1, "mscale": 0.5, "mscale_all_dim": 1.0},
        "v3_fp8_small_blocks": {"rope_factor": 40.0},
    }
    for name, fields in wrong.items():
        params, args = load(CHECKPOINTS / name)
        for field, value in fields.items():
            bad = replace(args, **{field: value})
            if field == "mscale" and args.mscale_all_dim == args.mscale:
                bad = replace(bad, mscale_all_dim=value)
            assert distance(params, bad, golden(name)) > 0.05, (name, field)


def test_a_wrong_tensor_shows():
    params, args = load(CHECKPOINTS / "v3")
    for name in ("gate.bias", "q_norm.weight", "kv_norm.weight", "shared_experts.w2.weight"):
        bad = {k: np.zeros_like(x) if k.endswith(name) else x for k, x in params.items()}
        assert distance(bad, args, golden("v3")) > 0.05, name
    params, args = load(CHECKPOINTS / "v3_fp8")
    for name in ("attn.wkv_b.scale", "attn.wo.scale", "layers.0.ffn.w1.scale", "layers.0.ffn.w2.scale"):
        bad = {k: np.flip(x) if k.endswith(name) else x for k, x in params.items()}
        assert distance(bad, args, golden("v3_fp8")) > 0.05, name


def test_the_score_of_refused_groups_matters_only_for_negative_scores():
    _, args = load(CHECKPOINTS / "v3")
    args = replace(args, n_activated_experts=3, n_expert_groups=4, n_limited_groups=2)
    logits = np.zeros((1, 8))
    bias = np.array([0.5, 0.4, 0.3, -0.6, 0.1, -0.6, -0.6, -0.6])
    assert gate(logits, bias, args)[1].tolist() == [[0, 1, 2]]
    bias[2:4] = [0.45, -0.6]  # the group with 0.5 and 0.4, and one with 0.45 and -0.6
    more = replace(args, n_activated_experts=4)
    assert gate(logits, bias, more)[1].tolist() == [[0, 2, 1, 3]]
    assert gate(logits, bias, as_demo(more))[1].tolist() == [[0, 2, 1, 4]]  # 4 was refused, but 0 beats 0.5 - 0.6


def test_groups_by_their_best_expert_or_by_the_sum_of_two():
    _, args = load(CHECKPOINTS / "v3_plain_rope")  # the better of 2 groups of 4
    logits = np.array([[3.0, -3.0, -3.0, -3.0, 1.0, 1.0, -3.0, -3.0]])
    assert gate(logits, np.zeros(8), args)[1].tolist() == [[4, 5]]
    assert gate(logits, None, args)[1].tolist() == [[0, 1]]


def test_weights_are_of_the_scores_without_bias():
    _, args = load(CHECKPOINTS / "v3_no_q_lora")
    logits, bias = np.array([[0.0] * 4 + [9.0] * 4]), np.array([0.9, 0.8, 0.7, 0.6, 0.0, 0.0, 0.0, 0.0])
    weights, indices = gate(logits, bias, args)
    assert indices.tolist() == [[0, 1, 2]]
    np.testing.assert_allclose(weights, [[2.5 / 3] * 3])
    np.testing.assert_allclose(gate(logits, bias, replace(args, norm_topk_prob=False))[0], [[1.25] * 3])


# FP8


def every_e4m3():
    return np.arange(256, dtype=np.uint8).view(E4M3)[np.isfinite(np.arange(256, dtype=np.uint8).view(E4M3))]


def test_act_quant_takes_the_nearest_e4m3_of_each_group():
    x = np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32) * np.float32([[1e-4], [1], [1e4]])
    x[1, 128:] = 0
    q, s = act_quant(x)
    assert (q.dtype, q.shape, s.dtype, s.shape) == (E4M3, (3, 256), np.float32, (3, 2))
    assert s[1, 1] == 1 and not q[1, 128:].any()
    np.testing.assert_array_equal(np.abs(q.astype(np.float32)).reshape(3, 2, 128).max(-1)[s != 1], 448)
    scaled = x / s.repeat(128, 1)
    nearest = np.abs(scaled[..., None] - every_e4m3().astype(np.float32)).min(-1)
    np.testing.assert_array_equal(np.abs(scaled - q.astype(np.float32)), nearest)


def test_act_quant_of_a_smaller_last_group():
    x = np.array([[448, -224, 0, 4.48, 2.24, -0.01]], np.float32)
    q, s = act_quant(x, 3)
    np.testing.assert_array_equal(s, np.float32([[1, 0.01]]))
    np.testing.assert_array_equal(q.astype(np.float32), [[448, -224, 0, 448, 224, -1]])
    q, s = act_quant(x, 4)
    np.testing.assert_array_equal(s, np.float32([[1, 0.005]]))
    np.testing.assert_array_equal(q.astype(np.float32)[0, 4:], [448, -2])


def test_weight_dequant_of_ragged_blocks():
    x = np.ones((5, 3)).astype(E4M3)
    s = np.arange(6, dtype=np.float32).reshape(3, 2)
    want = [[0, 0, 1], [0, 0, 1], [2, 2, 3], [2, 2, 3], [4, 4, 5]]
    np.testing.assert_array_equal(weight_dequant(x, s, (2, 2)), want)
    with pytest.raises(AssertionError):
        weight_dequant(x, s[:2], (2, 2))


@pytest.mark.parametrize(("k", "n", "block"), [(256, 160, (128, 128)), (200, 136, (128, 128)), (44, 20, (16, 8))])
def test_fp8_gemm_is_the_product_of_what_was_quantized(k, n, block):
    rng = np.random.default_rng(k)
    a, a_s = act_quant(rng.normal(size=(7, k)), block[1])
    grid = -(-n // block[0]), -(-k // block[1])
    b, b_s = rng.normal(size=(n, k)).astype(E4M3), rng.uniform(0.5, 2, grid).astype(np.float32)
    exact = a.astype(np.float64) * a_s.repeat(block[1], 1)[:, :k]
    want = exact @ weight_dequant(b, b_s, block).astype(np.float64).T
    got = fp8_gemm(a, a_s, b, b_s, block)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", FP8)
@pytest.mark.parametrize("attn_impl", ["naive", "absorb"])
def test_quantized_activations_are_rounded_inputs_of_every_fp8_product(name, attn_impl):
    class Rounded(Transformer):
        def linear(self, at, x):
            if self.params[f"{at}.weight"].dtype == E4M3:
                q, s = act_quant(x, self.args.block[1])
                x = q.astype(x.dtype) * s.repeat(self.args.block[1], -1)[..., : x.shape[-1]]
            return x @ self.weight(at).T

    params, args = load(CHECKPOINTS / name)
    gold = golden(name)
    got = Transformer(params, args, attn_impl=attn_impl, gemm_impl="fp8")(gold["tokens"])
    want = Rounded(params, args, attn_impl=attn_impl)(gold["tokens"])
    assert np.median(np.abs(got - want)) < 1e-3  # float32 or float64 may round an input to another E4M3
    assert np.median(np.abs(got - gold["logits"])) > 0.01


@pytest.mark.parametrize("name", FP8)
def test_an_fp8_directory_stores_what_deepseek_stores(name):
    path = CHECKPOINTS / name
    tensors = read_safetensors(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    block = np.array(config["quantization_config"]["weight_block_size"])
    ragged = 0
    for key, x in tensors.items():
        if scaled := f"{key}_scale_inv" in tensors:
            grid = -(-np.array(x.shape) // block)
            assert x.dtype == E4M3 and tensors[f"{key}_scale_inv"].shape == tuple(grid), key
            ragged += bool(np.any((grid > 1) & (np.array(x.shape) % block > 0)))
        assert scaled == ("_proj" in key and "eh_proj" not in key and not key.endswith("_scale_inv")), key
        if not scaled:
            kept = key.endswith(("_scale_inv", "e_score_correction_bias"))
            assert x.dtype == (np.float32 if kept else ml_dtypes.bfloat16), key
    assert ragged >= 5
    extra = {key.split(".", 3)[3] for key in tensors if key.startswith("model.layers.3.")}
    assert bool(extra) == bool(config["num_nextn_predict_layers"])
    if extra:
        last = {key.split(".", 3)[3] for key in tensors if key.startswith("model.layers.2.")}
        parts = ("enorm", "hnorm", "eh_proj", "embed_tokens", "shared_head.norm", "shared_head.head")
        assert extra == last | {f"{part}.weight" for part in parts}
