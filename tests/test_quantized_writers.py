"""The readers in quantized_writers.py against other implementations, and its writers against its readers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from quantized_writers import (
    CONFIGS,
    FORMATS,
    NF4_CODE,
    WRITERS,
    config_entry,
    dequantize,
    dynamic_map,
    pack_bits,
    quantized_checkpoint,
    read_safetensors,
    unpack_bits,
    write_safetensors,
    written,
)

GOLDEN = Path(__file__).parent / "golden"
GOLDENS = sorted((GOLDEN / "quantized").glob("*.safetensors"))
# Largest error that a writer may make on normal weights, as a part of their standard deviation.
ERRORS = {"1": 1.8, "2": 0.9, "3": 0.5, "4": 0.25, "5": 0.15, "6": 0.1, "8": 0.05}


def golden(path: Path) -> tuple[dict[str, np.ndarray], dict[str, object], dict[str, np.ndarray]]:
    """The layer's tensors, the config, and the tensors beside them (`expected` and more)."""
    tensors, metadata = read_safetensors(path)
    layer = {k.removeprefix("m."): v for k, v in tensors.items() if k.startswith("m.")}
    return layer, json.loads(metadata["config"]), {k: v for k, v in tensors.items() if not k.startswith("m.")}


def matrix(out: int = 64, n_in: int = 128, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((out, n_in), np.float32)


def test_there_are_goldens() -> None:
    assert len(GOLDENS) > 70


@pytest.mark.parametrize("path", GOLDENS, ids=lambda p: p.stem)
def test_readers_agree_with_other_implementations(path: Path) -> None:
    layer, config, beside = golden(path)
    found = dequantize(layer, config)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, beside["expected"], strict=True)


@pytest.mark.parametrize("name", FORMATS)
def test_writers_name_and_type_tensors_as_the_goldens_do(name: str) -> None:
    (config,) = CONFIGS[name].values()
    alike = [p for p in GOLDENS if kind(golden(p)[1]) == kind(config)]
    assert alike, "no golden of that kind"
    tensors = WRITERS[name](matrix(), np.random.default_rng(1)).tensors
    assert types(tensors) in [types(golden(p)[0]) for p in alike]


def types(tensors: dict[str, np.ndarray]) -> dict[str, tuple[str, int]]:
    """Dtypes and ranks; the two halves are as good as each other."""
    return {k: (v.dtype.name.replace("bfloat16", "float16"), v.ndim) for k, v in tensors.items()}


def kind(config: dict[str, object]) -> tuple[object, ...]:
    """What decides on the tensors' names."""
    return tuple(config.get(k) for k in ("quant_method", "format", "mode", "quant_algo", "load_in_8bit"))


@pytest.mark.parametrize("name", FORMATS)
def test_writers_stay_near_what_they_are_given(name: str) -> None:
    w = matrix()
    found = WRITERS[name](w, np.random.default_rng(1)).dequantized
    assert found.shape == w.shape and found.dtype == np.float32
    digit = re.search(r"\d", name.replace("nvfp4", "4").replace("gptq-v2", "gptq-4"))
    assert np.sqrt(np.mean((found - w) ** 2)) < ERRORS[digit[0] if digit else "4"]
    assert np.isfinite(WRITERS[name](np.zeros((64, 128), np.float32), np.random.default_rng(1)).dequantized).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 37))
    words = pack_bits(codes, bits)
    assert words.shape == (3, -(-37 * bits // 32))
    np.testing.assert_array_equal(unpack_bits(words, bits, 37), codes)
    number = int.from_bytes(words[1].tobytes(), "little")
    assert [number >> bits * k & 2**bits - 1 for k in range(37)] == codes[1].tolist()


def test_bitsandbytes_tables() -> None:
    layer, _, _ = golden(GOLDEN / "quantized" / "bnb_nf4_nested.safetensors")
    np.testing.assert_array_equal(layer["weight.quant_map"], NF4_CODE)
    np.testing.assert_allclose(layer["weight.nested_quant_map"], dynamic_map(), rtol=2e-7)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    layer, _, _ = golden(GOLDEN / "quantized" / "ct_nvfp4.safetensors")
    layer["scalar"] = np.array(3, np.uint8)
    write_safetensors(tmp_path / "x.safetensors", layer)
    found, metadata = read_safetensors(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"} and found.keys() == layer.keys()
    for k, v in layer.items():
        np.testing.assert_array_equal(found[k], v, strict=True)


def test_llm_int8_outliers() -> None:
    """What bitsandbytes multiplies: columns with an entry of 6 or more in float32, the others in int8."""
    layer, config, beside = golden(GOLDEN / "quantized" / "bnb_int8.safetensors")
    x, codes, largest = beside["x"].astype(np.float32), layer["weight"].astype(np.float32), layer["SCB"]
    for threshold, y in ((6.0, beside["y_threshold6_f32"]), (np.inf, beside["y_threshold0_f32"])):
        outlier = np.abs(x) >= threshold
        columns = outlier.any(0)
        rest = np.where(outlier, 0, x)
        row = np.abs(rest).max(1, keepdims=True)  # the other entries of such a column count here
        small = np.where(columns, 0, np.rint(rest * (127 / row)))
        found = small @ codes.T * (row * largest) / 127**2 + x[:, columns] @ dequantize(layer, config)[:, columns].T
        np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(beside["y_threshold6"].astype(np.float32), beside["y_threshold6_f32"], atol=0.02)


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_checkpoint(name: str, tmp_path: Path) -> None:
    """Both directories hold the same numbers, and what is no projection is untouched."""
    source = GOLDEN / "checkpoints" / "qwen3_moe"
    original, _ = read_safetensors(source / "model.safetensors")
    skip = lambda module: not fits(name, original[f"{module}.weight"])  # noqa: E731
    quantized, plain = quantized_checkpoint(source, tmp_path, name, np.random.default_rng(0), skip)
    dense, _ = read_safetensors(plain / "model.safetensors")
    tensors, _ = read_safetensors(quantized / "model.safetensors")
    config = json.loads((quantized / "config.json").read_text())
    (key,) = CONFIGS[name]
    assert dense.keys() == original.keys()
    assert "quantization" not in (plain / "config.json").read_text()
    changed = 0
    for full, x in original.items():
        module = full.removesuffix(".weight")
        expert = re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)", module)
        if expert and key == "quantization":
            prefix, index = f"{expert[1]}.switch_mlp.{expert[3]}.", int(expert[2])
            layer = {k.removeprefix(prefix): v[index] for k, v in tensors.items() if k.startswith(prefix)}
        else:
            layer = {k.removeprefix(f"{module}."): v for k, v in tensors.items() if k.startswith(f"{module}.")}
        if layer.keys() == {"weight"}:
            np.testing.assert_array_equal(dense[full], x)
            np.testing.assert_array_equal(layer["weight"], x)
        elif layer:
            assert full.endswith("_proj.weight")
            np.testing.assert_array_equal(dense[full], dequantize(layer, config[key]))
            changed += not np.array_equal(dense[full], x)
    assert changed > 10


def fits(name: str, x: np.ndarray) -> bool:
    try:
        written(x, np.random.default_rng(0), name)
    except ValueError:
        return False
    return True


def test_a_matrix_that_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mlx-4 cannot hold model.layers.0.mlp.down_proj \[32, 48\]: in 48 is not a"):
        quantized_checkpoint(GOLDEN / "checkpoints" / "llama", tmp_path, "mlx-4", np.random.default_rng(0))


@pytest.mark.parametrize(
    ("source", "left"), [("checkpoints/mixtral", ".gate"), ("deepseek/v3", ".gate"), ("checkpoints/odd", "lm_head")]
)
def test_other_models(source: str, left: str, tmp_path: Path) -> None:
    quantized, _ = quantized_checkpoint(GOLDEN / source, tmp_path, "bnb-nf4", np.random.default_rng(0))
    names = read_safetensors(quantized / "model.safetensors")[0]
    projections = [k for k in names if re.search(r"_proj(_with_mqa)?\.weight$|w[123]\.weight$", k)]
    assert projections and all(f"{k}.absmax" in names for k in projections)
    skipped = json.loads((quantized / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert any(s.endswith(left) for s in skipped)


def test_mlx_stacks_experts(tmp_path: Path) -> None:
    skip = lambda module: "w2" in module  # noqa: E731
    source = GOLDEN / "checkpoints" / "mixtral"
    quantized, _ = quantized_checkpoint(source, tmp_path, "mlx-4", np.random.default_rng(0), skip)
    tensors, _ = read_safetensors(quantized / "model.safetensors")
    prefix = "model.layers.0.block_sparse_moe"
    assert tensors[f"{prefix}.switch_mlp.gate_proj.weight"].shape == (4, 24, 4)  # 32 codes of 4 bits in 4 words
    assert tensors[f"{prefix}.switch_mlp.down_proj.weight"].shape == (4, 32, 24)  # as it was
    config = json.loads((quantized / "config.json").read_text())["quantization"]
    assert config["bits"] == 4 and config[f"{prefix}.switch_mlp.down_proj"] is config[f"{prefix}.gate"] is False


def test_group_sizes() -> None:
    rng = np.random.default_rng(0)
    assert written(matrix(), rng, "gptq-4", 32).tensors["scales"].shape == (4, 64)
    assert written(matrix(), rng, "fp8-block", (48, 128)).tensors["weight_scale_inv"].shape == (2, 1)
    assert config_entry("gptq-4", 32)["quantization_config"]["group_size"] == 32
    assert config_entry("ct-fp8-block", (48, 128))["quantization_config"]["config_groups"]["group_0"]["weights"][
        "block_structure"
    ] == [48, 128]
