"""Writes tests/golden/quantized: one small quantized matrix a file, and what another implementation makes of it.

Each <case>.safetensors holds the tensors of one linear layer as checkpoints name and type them, under the prefix `m`
(`m.qweight`, `m.scales`, ...), and

    expected  float32 [out, in] (or [E, out, in])  the matrix as the package named in the metadata dequantizes it

with the metadata `config` (JSON text: the object that config.json holds under `key`), `key`, `made_by`, `decoded_by`,
`expected_dtype` (the arithmetic of the decoder) and `note`. Some files hold more; their note says what.

Run with Python 3.11 and

    torch transformers safetensors bitsandbytes compressed-tensors mlx mlx-cpu
    accelerate psutil threadpoolctl dill pillow torchao scipy termcolor  (what the next line imports)
    --no-deps: autoawq auto-gptq gptqmodel hqq nvidia-modelopt

(README.md beside the files names the versions). Nothing is published: all weights are random. The last five import more
than that; stubs take the place of what is not needed here.

Without arguments the files and the README are written anew; `--check` writes nothing, decodes every file again with
its package and with the bit-by-bit decoder of this script where there is one, and compares. `--only REGEX` restricts
either. The `ct_legacy` cases need a release that still knows activation order:

    pip install --no-deps --target OLD compressed-tensors==0.12.2
    PYTHONPATH=OLD python tests/reference/quantized_goldens.py --only ct_legacy
"""

import argparse
import importlib.util
import json
import logging
import math
import platform
import re
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1] / "golden" / "quantized"
Tensors = dict[str, Tensor]
Config = dict[str, Any]
F8 = torch.float8_e4m3fn


@dataclass
class Case:
    """One file. `make` gives the tensors and the config, `decode` reads them; `second` is another decoder; `products`
    multiplies with bnb8_input, where the format says how."""

    make: Callable[[torch.Generator], tuple[Tensors, Config]]
    decode: Callable[[Tensors, Config], Tensor]
    made_by: str
    decoded_by: str
    note: str = ""
    key: str = "quantization_config"
    expected_dtype: str = "float32"
    second: Callable[[Tensors, Config], Tensor] | None = None
    products: Callable[[Tensors, Tensor], Tensors] | None = None


class Stubs:
    """Imports what gptqmodel and modelopt name at the top of their files and these cases never call."""

    names = frozenset(
        ["pcre", "logbar", "device_smi", "tokenicer", "defuser", "datasets", "omegaconf", "pulp", "peft", "nvtx"]
    )

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self) if name.split(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> MagicMock:
        module = MagicMock(name=spec.name, __path__=[], __spec__=spec)
        module.__name__ = spec.name
        return module

    def exec_module(self, module: ModuleType) -> None: ...


@cache
def module_file(package: str, path: str) -> ModuleType:
    """One file of a package, without what the package imports around it."""
    found = importlib.util.find_spec(package)
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(found.submodule_search_locations[0]) / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normal(gen: torch.Generator, *shape: int) -> Tensor:
    """Weights whose rows and columns differ in size, so that a scale taken from elsewhere shows."""
    w = torch.randn(*shape, generator=gen)
    return w * (0.5 + torch.rand(*shape[:-1], 1, generator=gen)) * (0.5 + torch.rand(shape[-1], generator=gen)) * 0.1


def codes(gen: torch.Generator, bits: int, *shape: int) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=gen)


def stream(values: Tensor, bits: int) -> Tensor:
    """Codes [n, k] as int32 words [n, k * bits / 32]: one long integer a row, bit 0 first."""
    assert values.shape[1] * bits % 32 == 0
    rows = []
    for row in values.tolist():
        number = sum(v << (bits * i) for i, v in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(len(row) * bits // 8, "little"), "<i4"))
    return torch.from_numpy(np.stack(rows).astype(np.int32))


def bit_by_bit(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `stream`, one bit at a time."""
    out = []
    for row in words.contiguous().view(torch.uint8).tolist():
        stored = [byte >> i & 1 for byte in row for i in range(8)]
        out.append([sum(stored[k * bits + i] << i for i in range(bits)) for k in range(count)])
    return torch.tensor(out)


# ---- GPTQ ----------------------------------------------------------------------------------------------------------


def gptq_config(bits: int, group: int, form: str | None, act_order: bool = False) -> Config:
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": False}
    return config | {"damp_percent": 0.01, "true_sequential": True} | ({"checkpoint_format": form} if form else {})


def gptq_make(
    gen: torch.Generator, bits: int, group: int = 32, form: str | None = None, order: bool = False, g_idx: bool = True
) -> tuple[Tensors, Config]:
    n_in, n_out = 128, 32
    size = n_in if group == -1 else group
    groups = math.ceil(n_in / size)
    zeros = codes(gen, bits, groups, n_out)
    zeros[0, :4] = 2**bits - 1  # as v1: a zero point of 2^bits
    scales = (torch.rand(groups, n_out, generator=gen) * 0.02 + 0.001).half()
    index = torch.arange(n_in) // size
    if order:
        index = index[torch.randperm(n_in, generator=gen)]
    tensors = {
        "qweight": stream(codes(gen, bits, n_out, n_in), bits).T.contiguous(),
        "qzeros": stream(zeros, bits),
        "scales": scales,
    }
    if g_idx:
        tensors["g_idx"] = index.int()
    return tensors, gptq_config(bits, group, form, order)


def gptq_index(t: Tensors, config: Config, n_in: int) -> Tensor:
    size = n_in if config["group_size"] == -1 else config["group_size"]
    return t.get("g_idx", torch.arange(n_in, dtype=torch.int32) // size)


def gptq_v1(t: Tensors, config: Config) -> Tensor:
    """auto-gptq's matmul with the unit matrix, in float32."""
    bits, n_out = config["bits"], t["scales"].shape[1]
    n_in = t["qweight"].shape[0] * 32 // bits
    layer = module_file("auto_gptq", "nn_modules/qlinear/qlinear_cuda.py").QuantLinear(
        bits, config["group_size"], n_in, n_out, False, weight_dtype=torch.float32
    )
    layer.qweight, layer.qzeros, layer.scales = t["qweight"], t["qzeros"], t["scales"].float()
    layer.g_idx = gptq_index(t, config, n_in)
    return layer(torch.eye(n_in)).T


def gptq_v2(t: Tensors, config: Config) -> Tensor:
    """gptqmodel's dequantize_weight of its torch kernel, which reads v2 only."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT

    bits, n_out = config["bits"], t["scales"].shape[1]
    n_in = t["qweight"].shape[0] * 32 // bits
    layer = TorchLinear(
        bits=bits,
        group_size=config["group_size"],
        sym=False,
        desc_act=config["desc_act"],
        in_features=n_in,
        out_features=n_out,
        format=FORMAT.GPTQ_V2,
    )
    layer.qweight, layer.qzeros, layer.scales = t["qweight"], t["qzeros"], t["scales"].float()
    layer.g_idx = gptq_index(t, config, n_in)
    return layer.dequantize_weight().T


def gptq_slow(t: Tensors, config: Config) -> Tensor:
    bits, n_out = config["bits"], t["scales"].shape[1]
    n_in = t["qweight"].shape[0] * 32 // bits
    q = bit_by_bit(t["qweight"].T, bits, n_in)
    zeros = bit_by_bit(t["qzeros"], bits, n_out) + (config.get("checkpoint_format", "gptq") == "gptq")
    index = gptq_index(t, config, n_in).tolist()
    scales = t["scales"].float()
    return torch.stack([(q[:, i] - zeros[g]).float() * scales[g] for i, g in enumerate(index)], 1)


def gptq_cases() -> dict[str, Case]:
    def case(note: str, **how: Any) -> Case:
        v2 = how.get("form") == "gptq_v2"
        decoder = (gptq_v2, "gptqmodel") if v2 else (gptq_v1, "auto-gptq")
        return Case(partial(gptq_make, **how), decoder[0], "random codes", decoder[1], note, second=gptq_slow)

    out = {}
    for bits in (2, 3, 4, 8):
        stored = f"zeros stored as {2**bits - 1} in columns 0..3 of group 0"
        out[f"gptq_{bits}"] = case(f"v1 (no checkpoint_format); {stored}: zero point {2**bits}", bits=bits)
        out[f"gptq_{bits}_v2"] = case(f"v2; {stored}: zero point {2**bits - 1}", bits=bits, form="gptq_v2")
    out["gptq_4_one_group"] = case("group_size -1: one group", bits=4, group=-1, form="gptq")
    out["gptq_4_act_order"] = case("desc_act: g_idx is a shuffle of 0..3", bits=4, order=True)
    out["gptq_3_act_order_v2"] = case("desc_act, 3 bits, v2", bits=3, order=True, form="gptq_v2")
    out["gptq_4_no_g_idx"] = case("no g_idx tensor", bits=4, g_idx=False)
    return out


# ---- AWQ -----------------------------------------------------------------------------------------------------------


def awq_make(gen: torch.Generator, group: int) -> tuple[Tensors, Config]:
    n_in, n_out = 192, 48
    words = 2**31
    tensors = {
        "qweight": torch.randint(-words, words, (n_in, n_out // 8), generator=gen).int(),
        "qzeros": torch.randint(-words, words, (n_in // group, n_out // 8), generator=gen).int(),
        "scales": (torch.rand(n_in // group, n_out, generator=gen) * 0.02 + 0.001).half(),
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return tensors, config | {"modules_to_not_convert": None}


def awq_decode(t: Tensors, config: Config) -> Tensor:
    dequantize = module_file("awq", "utils/packing_utils.py").dequantize_gemm
    return dequantize(t["qweight"], t["qzeros"], t["scales"].float(), 4, config["group_size"]).T


# ---- bitsandbytes --------------------------------------------------------------------------------------------------


def bnb4_make(
    gen: torch.Generator,
    kind: str,
    nested: bool,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    storage: torch.dtype = torch.uint8,
) -> tuple[Tensors, Config]:
    import bitsandbytes.functional as bnb

    w = normal(gen, *shape).to(dtype)
    packed, state = bnb.quantize_4bit(
        w, blocksize=64, quant_type=kind, compress_statistics=nested, quant_storage=storage
    )
    tensors = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": str(storage).removeprefix("torch."),
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": ["lm_head"],
    }
    return tensors, config


def bnb4_decode(t: Tensors, config: Config) -> Tensor:
    """bitsandbytes' own torch code. Its C++ kernel for CPUs with AVX512 takes the wrong absmax where blocks straddle
    rows (`in` no multiple of the block size); where they do not, the two have to agree."""
    import bitsandbytes.functional as bnb
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    state = {k.removeprefix("weight."): v for k, v in t.items() if k.startswith("weight.")}
    state = bnb.QuantState.from_dict(state, device=torch.device("cpu"))
    state.dtype = torch.float32  # of the result; the file says bfloat16
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    size, shape = state.blocksize, tuple(state.shape)
    packed = t["weight"].reshape(-1).view(torch.uint8)
    dense = _dequantize_4bit_compute(packed, absmax, state.code, size, shape, torch.float32)
    if shape[1] % size == 0:
        assert torch.equal(dense, bnb.dequantize_4bit(t["weight"], state))
    return dense


def bnb8_make(gen: torch.Generator) -> tuple[Tensors, Config]:
    import bitsandbytes as bnb

    w = normal(gen, 40, 96).half()
    layer = bnb.nn.Linear8bitLt(96, 40, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(w, requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")  # quantizes
    layer(torch.zeros(1, 96).half())  # moves the scales where state_dict looks for them
    config = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True, "llm_int8_threshold": 6.0}
    return dict(layer.state_dict()), config | {"llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": ["lm_head"]}


def bnb8_decode(t: Tensors, config: Config) -> Tensor:
    import bitsandbytes.functional as bnb

    return bnb.int8_vectorwise_dequant(t["weight"], t["SCB"])


def bnb8_input(gen: torch.Generator) -> Tensor:
    """Its columns 3, 50 and 95 hold entries of 6 and more."""
    x = torch.randn(6, 96, generator=gen).half()
    x[1, 3], x[4, 50], x[5, 50], x[2, 95] = 9.5, -7.25, 6.0, 30.0
    return x


def bnb8_products(t: Tensors, x: Tensor) -> Tensors:
    import bitsandbytes.functional as bnb

    out = {"x": x}
    for name, threshold, given in (
        ("y_threshold6", 6.0, x),
        ("y_threshold6_f32", 6.0, x.float()),
        ("y_threshold0_f32", 0.0, x.float()),
    ):
        quantized, stats, columns = bnb.int8_vectorwise_quant(given.clone(), threshold=threshold)
        y, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(given, quantized, t["weight"], stats, t["SCB"], columns)
        out[name] = y
    return out


# ---- MLX -----------------------------------------------------------------------------------------------------------

TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def to_mlx(x: Tensor) -> Any:
    import mlx.core as mx

    if x.dtype == torch.bfloat16:
        return mx.array(x.float().numpy()).astype(mx.bfloat16)
    return mx.array(x.numpy())


def from_mlx(x: Any) -> Tensor:
    import mlx.core as mx

    if x.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(x.astype(mx.float32))).bfloat16()
    return torch.from_numpy(np.array(x))


def mlx_make(
    gen: torch.Generator, bits: int, group: int, mode: str = "affine", dtype: str = "float32", experts: int = 0
) -> tuple[Tensors, Config]:
    import mlx.core as mx

    shape = (experts, 24, 128) if experts else (24, 256)
    w = to_mlx(normal(gen, *shape).to(TORCH[dtype]))
    parts = mx.quantize(w, group_size=group, bits=bits, mode=mode)
    tensors = dict(zip(("weight", "scales", "biases"), map(from_mlx, parts), strict=False))
    return tensors, {"group_size": group, "bits": bits, "mode": mode}


def mlx_decode(t: Tensors, config: Config) -> Tensor:
    import mlx.core as mx

    given = {k: to_mlx(v) for k, v in t.items()}
    scales, biases = given["scales"], given.get("biases")
    if config["mode"] == "affine":  # the arithmetic is that of the scales
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    dense = mx.dequantize(given["weight"], scales, biases, **config, dtype=mx.float32)
    return from_mlx(dense)


def mlx_slow(t: Tensors, config: Config) -> Tensor:
    """Affine only."""
    bits, group = config["bits"], config["group_size"]
    words = t["weight"].view(torch.int32).reshape(-1, t["weight"].shape[-1])
    count = words.shape[1] * 32 // bits
    q = bit_by_bit(words, bits, count).reshape(*t["weight"].shape[:-1], count // group, group).float()
    return (q * t["scales"].float()[..., None] + t["biases"].float()[..., None]).flatten(-2)


def mlx_cases() -> dict[str, Case]:
    def case(note: str = "", second: Any = mlx_slow, **how: Any) -> Case:
        return Case(partial(mlx_make, **how), mlx_decode, "mlx", "mlx", note, key="quantization", second=second)

    out = {}
    dtypes = ("float16", "bfloat16", "float32")
    for n, bits in enumerate((1, 2, 3, 4, 5, 6, 8)):
        dtype, group = dtypes[n % 3], (32, 64, 128)[(n + n // 3) % 3]
        out[f"mlx_{bits}"] = case(f"{dtype} scales", bits=bits, group=group, dtype=dtype)
    for group, dtype in ((32, "bfloat16"), (64, "float32"), (128, "float16")):
        out[f"mlx_4_group{group}"] = case(f"{dtype} scales", bits=4, group=group, dtype=dtype)
    out["mlx_3_group32"] = case("3 words a group", bits=3, group=32, dtype="float16")
    out["mlx_6_group32"] = case("6 words a group", bits=6, group=32, dtype="bfloat16")
    out["mlx_4_experts"] = case("a stack of 3 experts, as switch_mlp holds it", bits=4, group=64, experts=3)
    for mode, bits, group in (("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)):
        note = "no biases; scales U8: " + ("E4M3 codes" if mode == "nvfp4" else "E8M0 codes")
        out[f"mlx_{mode}"] = case(note, None, bits=bits, group=group, mode=mode)
    return out


# ---- HQQ -----------------------------------------------------------------------------------------------------------


def hqq_make(
    gen: torch.Generator, bits: int, axis: int, dtype: torch.dtype = torch.float16, as_float: bool = False
) -> tuple[Tensors, Config]:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    layer = torch.nn.Linear(128, 40, bias=False)
    layer.weight.data = normal(gen, 40, 128)
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis, view_as_float=as_float)
    state = HQQLinear(layer, config, compute_dtype=dtype, device="cpu").state_dict()
    return {k: v.detach().contiguous() for k, v in state.items()}, {
        "quant_method": "hqq",
        "quant_config": config,
        "skip_modules": ["lm_head"],
    }


def hqq_decode(t: Tensors, config: Config) -> Tensor:
    from hqq.core.quantize import _META_TYPE, Quantizer
    from hqq.core.utils import decode_safetensor_type

    meta = {k: decode_safetensor_type(v, _META_TYPE[k]) for k, v in t.items() if k in _META_TYPE}
    meta |= {"compute_dtype": torch.float32, "scale": meta["scale"].float(), "zero": meta["zero"].float()}
    return Quantizer.dequantize(t["W_q"], meta)


# ---- FP8 -----------------------------------------------------------------------------------------------------------


def fp8_block_make(gen: torch.Generator, dtype: torch.dtype, block: tuple[int, int]) -> tuple[Tensors, Config]:
    w = normal(gen, 72, 112)
    rows, cols = (torch.arange(n) // b for n, b in zip(w.shape, block, strict=True))
    scale = torch.zeros(rows[-1] + 1, cols[-1] + 1)
    for i, j in np.ndindex(*scale.shape):
        scale[i, j] = w[rows == i][:, cols == j].abs().max() / 448
    if dtype == torch.float8_e8m0fnu:
        scale = torch.exp2(scale.log2().ceil())
    scale = scale.to(dtype)
    quantized = (w / scale.float()[rows][:, cols]).clamp(-448, 448).to(F8)
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": list(block)}
    return {"weight": quantized, "weight_scale_inv": scale}, config


def fp8_make(gen: torch.Generator, **tensors: tuple[int, ...]) -> tuple[Tensors, Config]:
    """Keywords: a scale's name and shape. One of 40 rows has a scale a row, else one holds for all."""
    w = normal(gen, 40, 96)
    (name, shape), *more = tensors.items()
    scale = (w.abs().amax(1) if 40 in shape else w.abs().max()).reshape(shape) / 448
    out = {"weight": (w / scale).clamp(-448, 448).to(F8), name: scale}
    out |= {k: torch.full(s, 0.0371) for k, s in more}
    return out, {"quant_method": "fp8", "activation_scheme": "static" if more else "dynamic"}


def fp8_decode(t: Tensors, config: Config) -> Tensor:
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    scale = t["weight_scale_inv"] if "weight_scale_inv" in t else t["weight_scale"]
    return _dequantize_fp8_weight(t["weight"].clone(), scale, config.get("weight_block_size"), torch.float32)


# ---- ModelOpt ------------------------------------------------------------------------------------------------------


def modelopt_config(algorithm: str, **more: Any) -> Config:
    """What modelopt's convert_hf_quant_config_format puts into config.json."""
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    inner = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"], **more}
    given = {"producer": {"name": "modelopt", "version": version("nvidia-modelopt")}, "quantization": inner}
    return convert_hf_quant_config_format(given)


def modelopt_nvfp4_make(gen: torch.Generator) -> tuple[Tensors, Config]:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    packed, scale, scale_2 = NVFP4QTensor.quantize(normal(gen, 48, 128), 16)
    tensors = {"weight": packed._quantized_data, "weight_scale": scale, "weight_scale_2": scale_2}
    tensors["input_scale"] = torch.tensor(0.0123)
    return tensors, modelopt_config("NVFP4", group_size=16)


def modelopt_nvfp4_decode(t: Tensors, config: Config) -> Tensor:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    shape = torch.Size((t["weight"].shape[0], 2 * t["weight"].shape[1]))
    packed = NVFP4QTensor(shape, torch.float32, t["weight"])
    return packed.dequantize(
        torch.float32, scale=t["weight_scale"], double_scale=t["weight_scale_2"], block_sizes={-1: 16}
    )


def modelopt_fp8_make(gen: torch.Generator, algorithm: str) -> tuple[Tensors, Config]:
    from modelopt.torch.quantization.qtensor.fp8_tensor import FP8QTensor

    if algorithm == "FP8_PB_WO":
        w = normal(gen, 96, 128)
        packed, scale = FP8QTensor.quantize(w, block_sizes={0: 32, 1: 64})
        tensors = {"weight": packed._quantized_data, "weight_scale": scale[:, None, :, None]}
        return tensors, modelopt_config(algorithm) | {"weight_block_size": [32, 64]}
    w = normal(gen, 40, 96)
    packed, scale = FP8QTensor.quantize(w, axis=0 if algorithm == "FP8_PER_CHANNEL_PER_TOKEN" else None)
    scale = scale.reshape(40) if algorithm == "FP8_PER_CHANNEL_PER_TOKEN" else scale.reshape(())
    tensors = {"weight": packed._quantized_data, "weight_scale": scale.float()}
    if algorithm == "FP8":
        tensors["input_scale"] = torch.tensor(0.0123)
    return tensors, modelopt_config(algorithm)


def modelopt_fp8_decode(t: Tensors, config: Config) -> Tensor:
    from modelopt.torch.quantization.qtensor.fp8_tensor import FP8QTensor

    packed, scale = FP8QTensor(t["weight"].shape, torch.float32, t["weight"]), t["weight_scale"]
    if scale.ndim == 4:
        return packed.dequantize(torch.float32, scale=scale[:, 0, :, 0], block_sizes={0: 32, 1: 64})
    return packed.dequantize(torch.float32, scale=scale[:, None] if scale.ndim == 1 else scale)


# ---- compressed-tensors --------------------------------------------------------------------------------------------

# What W8A8 models say about activations: one scale a token, found as they come.
CT_ACTIVATIONS = {"num_bits": 8, "symmetric": True, "dynamic": True, "strategy": "token"}


def ct_scheme(config: Config) -> Any:
    from compressed_tensors.quantization import QuantizationScheme

    return QuantizationScheme(**config["config_groups"]["group_0"])


def ct_compressor(config: Config) -> Any:
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(config["format"])


def ct_config(form: str, weights: Config, activations: Config | None) -> Config:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=activations and QuantizationArgs(**activations),
        format=form,
    )
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=form, ignore=["lm_head"], quantization_status="compressed"
    )
    return json.loads(json.dumps(config.model_dump(mode="json")))


def ct_make(
    gen: torch.Generator,
    form: str,
    weights: Config,
    activations: Config | None = None,
    shape: tuple[int, int] = (48, 128),
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensors, Config]:
    """Scales by the package's calculate_qparams, in `dtype` as the files have them; then its compress."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    config = ct_config(form, weights, activations)
    args = ct_scheme(config).weights
    w = normal(gen, *shape)
    if args.strategy == "tensor":
        low, high = w.min(), w.max()
    elif args.strategy == "channel":
        low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    elif args.strategy == "block":
        (b0, b1), (n0, n1) = args.block_structure, shape
        padded = torch.nn.functional.pad(w, (0, -n1 % b1, 0, -n0 % b0)).unflatten(1, (-1, b1)).unflatten(0, (-1, b0))
        low, high = padded.amin((1, 3)), padded.amax((1, 3))
    else:
        groups = w.unflatten(1, (-1, args.group_size))
        low, high = groups.amin(2), groups.amax(2)
    state = {"weight": w}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(w.min(), w.max())
    scale, zero = calculate_qparams(low, high, args, global_scale=state.get("weight_global_scale"))
    small_floats = args.type == "float" and args.num_bits < 8
    state["weight_scale"] = scale.float() if small_floats else scale.to(dtype).float()
    state["weight_zero_point"] = zero.to(torch.int8) if args.type == "int" else zero.float()
    out = ct_compressor(config).compress(state, ct_scheme(config))
    out = {k: v.detach() for k, v in out.items()}
    if out["weight_scale"].dtype == torch.float32:
        out["weight_scale"] = out["weight_scale"].to(dtype)
    if args.type == "float":
        out.pop("weight_zero_point", None)
    if activations and activations.get("dynamic") is False:
        out["input_scale"] = torch.full((1,), 0.0371, dtype=dtype)
    if activations and activations.get("strategy") == "tensor_group":
        out["input_global_scale"] = torch.full((1,), 321.5)
    return out, config


def ct_decode(t: Tensors, config: Config) -> Tensor:
    """The package's decompress, in float32 except where it insists on bfloat16 (see the next function)."""
    given = dict(t)
    if given["weight_scale"].dtype == torch.bfloat16:
        given["weight_scale"] = given["weight_scale"].float()
    return ct_compressor(config).decompress(given, ct_scheme(config))["weight"]


def ct_fp4_decode(t: Tensors, config: Config) -> Tensor:
    """What its decompress of 4-bit floats does, but in float32: that one fixes bfloat16."""
    from compressed_tensors.compressors.mx_utils import decompress_mx_scale
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    packed, scale = t["weight_packed"], t["weight_scale"]
    scale = decompress_mx_scale(scale) if scale.dtype == torch.uint8 else scale
    dense = dequantize(
        x_q=unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], torch.float32),
        scale=scale.float(),
        args=ct_scheme(config).weights,
        global_scale=t.get("weight_global_scale"),
        dtype=torch.float32,
    )
    rounded = ct_compressor(config).decompress(dict(t), ct_scheme(config))["weight"]
    assert torch.equal(dense.bfloat16(), rounded)
    return dense


def ct_mxfp8_decode(t: Tensors, config: Config) -> Tensor:
    """Its scales are bfloat16 powers of two, so nothing is lost in them; the product is taken in float32."""
    from compressed_tensors.compressors.mx_utils import decompress_mx_scale
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    scale = decompress_mx_scale(t["weight_scale"]).float()
    return dequantize(x_q=t["weight"], scale=scale, args=ct_scheme(config).weights, dtype=torch.float32)


def ct_pack_slow(t: Tensors, config: Config) -> Tensor:
    """pack-quantized read bit by bit; releases before 0.20 leave the last bits of a word empty (3, 5, 6, 7 bits)."""
    args = config["config_groups"]["group_0"]["weights"]
    bits, (n_out, n_in) = args["num_bits"], t["weight_shape"].tolist()
    scale = t["weight_scale"].float()

    def unpack(words: Tensor, count: int) -> Tensor:
        a_word = 32 // bits
        if words.shape[1] == math.ceil(count * bits / 32):
            return bit_by_bit(words, bits, count) - 2 ** (bits - 1)
        return bit_by_bit(words.reshape(-1, 1), bits, a_word).reshape(len(words), -1)[:, :count] - 2 ** (bits - 1)

    q = unpack(t["weight_packed"], n_in)
    zero = torch.zeros(scale.shape)
    if "weight_zero_point" in t:
        zero = unpack(t["weight_zero_point"].T, n_out).T
    index = t["weight_g_idx"].long() if "weight_g_idx" in t else torch.arange(n_in) // (n_in // scale.shape[1])
    return (q - zero[:, index]).float() * scale[:, index]


def ct_legacy_make(gen: torch.Generator, bits: int, order: bool) -> tuple[Tensors, Config]:
    """pack-quantized as compressed-tensors before 0.20 wrote it."""
    from compressed_tensors.compressors.quantized_compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    args = QuantizationArgs(num_bits=bits, strategy="group", group_size=32, actorder="group" if order else None)
    config = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=args)},
        format="pack-quantized",
        ignore=["lm_head"],
        quantization_status="compressed",
    )
    w = normal(gen, 48, 128)
    index = (torch.arange(128) // 32)[torch.randperm(128, generator=gen)].int() if order else None
    sorted_w = w[:, torch.argsort(index)] if order else w
    scale = (sorted_w.unflatten(1, (-1, 32)).abs().amax(2) / (2 ** (bits - 1) - 0.5)).bfloat16()
    compressor = PackedQuantizationCompressor(config)
    out = compressor.compress_weight(w, scale.float(), args, g_idx=index)
    out["weight_scale"] = scale
    if order:
        out["weight_g_idx"] = index
    return out, json.loads(json.dumps(config.model_dump(mode="json")))


def ct_legacy_decode(t: Tensors, config: Config) -> Tensor:
    from compressed_tensors.compressors.quantized_compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs

    args = QuantizationArgs(**config["config_groups"]["group_0"]["weights"])
    given = t | {"weight_scale": t["weight_scale"].float()}
    return PackedQuantizationCompressor.decompress_weight(None, given, args)


def ct_cases() -> dict[str, Case]:
    def case(
        note: str, form: str, weights: Config, activations: Config | None = None, decode: Any = ct_decode, **how: Any
    ) -> Case:
        make = partial(ct_make, form=form, weights=weights, activations=activations, **how)
        second = ct_pack_slow if form == "pack-quantized" else None
        return Case(make, decode, "compressed-tensors", "compressed-tensors", note, second=second)

    group = {"strategy": "group", "group_size": 32}
    act8, act_float = CT_ACTIVATIONS | {"type": "int"}, CT_ACTIVATIONS | {"type": "float"}
    static = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor"}
    e4m3 = {"num_bits": 8, "type": "float"}
    nv = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": F8}
    nv["zp_dtype"] = F8
    nv_act = nv | {"dynamic": "local"}
    mx4 = {"num_bits": 4, "type": "float", **group, "scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
    pack = "pack-quantized"
    out = {
        "ct_pack_4": case("group 32, symmetric", pack, {"num_bits": 4, **group}),
        "ct_pack_4_asym": case(
            "group 32, zero points packed along out; 44 rows do not fill the last word",
            pack,
            {"num_bits": 4, "symmetric": False, **group},
            shape=(44, 128),
        ),
        "ct_pack_8_channel": case("one scale a row [out, 1]", pack, {"num_bits": 8, "strategy": "channel"}),
        "ct_pack_8_asym": case(
            "one scale and one zero point a row", pack, {"num_bits": 8, "strategy": "channel", "symmetric": False}
        ),
        "ct_pack_2": case("group 32", pack, {"num_bits": 2, **group}),
        "ct_pack_3": case("dense bit stream: 12 words for 128 codes", pack, {"num_bits": 3, **group}),
        "ct_pack_3_asym": case("dense, zero points too", pack, {"num_bits": 3, "symmetric": False, **group}),
        "ct_pack_5": case("dense bit stream", pack, {"num_bits": 5, **group}),
        "ct_pack_6": case("dense bit stream", pack, {"num_bits": 6, **group}),
        "ct_pack_3_ragged": case(
            "in 100 fills 9.4 words", pack, {"num_bits": 3, "strategy": "channel"}, shape=(48, 100)
        ),
        "ct_int8_channel": case("W8A8", "int-quantized", {"num_bits": 8, "strategy": "channel"}, act8),
        "ct_int8_tensor": case("W8A8, scale [1]", "int-quantized", {"num_bits": 8, "strategy": "tensor"}, act8),
        "ct_int8_asym": case(
            "weight_zero_point I8 [out, 1]",
            "int-quantized",
            {"num_bits": 8, "strategy": "channel", "symmetric": False},
            act8,
        ),
        "ct_fp8_tensor": case(
            "scale [1], static input_scale", "float-quantized", {**e4m3, "strategy": "tensor"}, static
        ),
        "ct_fp8_channel": case("scale [out, 1]", "float-quantized", {**e4m3, "strategy": "channel"}, act_float),
        "ct_fp8_block": case(
            "blocks of 32 x 64, ragged both ways",
            "float-quantized",
            {**e4m3, "strategy": "block", "block_structure": [32, 64]},
            CT_ACTIVATIONS | {"type": "float", "strategy": "group", "group_size": 64},
            shape=(72, 112),
        ),
        "ct_fp8_naive": case("format naive-quantized", "naive-quantized", {**e4m3, "strategy": "channel"}, act_float),
        "ct_nvfp4": case(
            "weight_global_scale and input_global_scale divide", "nvfp4-pack-quantized", nv, nv_act, ct_fp4_decode
        ),
        "ct_mxfp4": case("scales U8 E8M0", "mxfp4-pack-quantized", mx4, None, ct_fp4_decode),
        "ct_mxfp8": case(
            "E4M3 with E8M0 scales a group of 32",
            "mxfp8-quantized",
            {**e4m3, **group, "scale_dtype": torch.uint8, "zp_dtype": torch.uint8},
            None,
            ct_mxfp8_decode,
        ),
    }
    for name, note, bits, order in (
        ("ct_legacy_act_order", "actorder group: weight_g_idx", 4, True),
        ("ct_legacy_pack_3", "10 codes a word, 2 bits empty: 13 words for 128 codes", 3, False),
    ):
        make = partial(ct_legacy_make, bits=bits, order=order)
        made = "compressed-tensors"
        out[name] = Case(make, ct_legacy_decode, made, made, note, second=ct_pack_slow)
    return out


# ---- MXFP4 and F8Q8 ------------------------------------------------------------------------------------------------


def mxfp4_make(gen: torch.Generator, gpt_oss: bool = False) -> tuple[Tensors, Config]:
    shape = (3, 32, 64) if gpt_oss else (48, 128)
    blocks = codes(gen, 8, *shape[:-1], shape[-1] // 2).byte()
    scales = torch.randint(115, 132, (*shape[:-1], shape[-1] // 32), generator=gen).byte()
    if gpt_oss:
        tensors = {"gate_up_proj_blocks": blocks.unflatten(-1, (-1, 16)), "gate_up_proj_scales": scales}
    else:
        scales[0], scales[1, :2] = torch.tensor([0, 1, 2, 254]), torch.tensor([254, 252])
        # 2 * 2^127 is beyond float32: where the scale is 254 the magnitudes stay at 1.5 and below.
        largest = scales.repeat_interleave(16, 1) == 254
        blocks = torch.where(largest, blocks & 0xBB, blocks)
        tensors = {"blocks": blocks, "scales": scales}
    excluded = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return tensors, {"quant_method": "mxfp4", "modules_to_not_convert": excluded}


def mxfp4_decode(t: Tensors, config: Config) -> Tensor:
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    blocks = t["blocks"].unflatten(-1, (-1, 16))[None] if "blocks" in t else t["gate_up_proj_blocks"]
    scales = t["scales"][None] if "scales" in t else t["gate_up_proj_scales"]
    dense = _convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)  # it gives [E, in, out]
    return dense[0] if "blocks" in t else dense


def mxfp4_slow(t: Tensors, config: Config) -> Tensor:
    """One byte at a time, in Python's own floats."""
    blocks = t["blocks"] if "blocks" in t else t["gate_up_proj_blocks"].flatten(-2)
    scales = t["scales"] if "scales" in t else t["gate_up_proj_scales"]
    out = []
    for row, exponents in zip(blocks.flatten(0, -2).tolist(), scales.flatten(0, -2).tolist(), strict=True):
        nibbles = [n for byte in row for n in (byte & 15, byte >> 4)]
        out.append([e2m1(n) * 2.0 ** (exponents[i // 32] - 127) for i, n in enumerate(nibbles)])
    return torch.tensor(out, dtype=torch.float64).float().reshape(*blocks.shape[:-1], -1)


def e2m1(code: int) -> float:
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
    return -magnitude if code & 8 else magnitude


def e4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = 2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8
    return -magnitude if code & 128 else magnitude


def f8q8_make(gen: torch.Generator) -> tuple[Tensors, Config]:
    """Blocks of 33 bytes over the flat matrix: the scale as E4M3 of 448 times it, 32 signed bytes."""
    flat = normal(gen, 24, 48).flatten().tolist()
    table = [e4m3(c) for c in range(127)]
    out = b""
    for start in range(0, len(flat), 32):
        block = flat[start : start + 32]
        step = max(map(abs, block)) / 127
        code = min(range(127), key=lambda c: abs(table[c] - 448 * step))
        out += struct.pack("<B32b", code, *(max(-127, min(127, round(v / step))) for v in block))
    data = torch.frombuffer(bytearray(out), dtype=torch.uint8).reshape(-1, 33)
    return {"blocks": data, "shape": torch.tensor([24, 48])}, {"quant_method": "f8q8"}


def f8q8_decode(t: Tensors, config: Config) -> Tensor:
    values = []
    for block in t["blocks"].numpy():
        code, *q = struct.unpack("<B32b", block.tobytes())
        step = np.float32(e4m3(code)) / np.float32(448)
        values += [np.float32(v) * step for v in q]
    n_out, n_in = t["shape"].tolist()
    return torch.tensor(np.array(values[: n_out * n_in], np.float32)).reshape(n_out, n_in)


# ---- all together --------------------------------------------------------------------------------------------------


def cases() -> dict[str, Case]:
    bnb, own, hf, opt = "bitsandbytes", "this script (struct, Python floats)", "transformers", "nvidia-modelopt"
    out = gptq_cases()
    for group in (32, 64):
        out[f"awq_{group}"] = Case(partial(awq_make, group=group), awq_decode, "random codes", "autoawq")
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            name = f"bnb_{kind}" + "_nested" * nested
            shape = (52, 320) if kind == "nf4" and nested else (48, 128)
            make = partial(bnb4_make, kind=kind, nested=nested, shape=shape)
            note = "260 blocks: two nested blocks of 256" if kind == "nf4" and nested else ""
            out[name] = Case(make, bnb4_decode, bnb, bnb, note)
    out["bnb_nf4_straddle"] = Case(
        partial(bnb4_make, kind="nf4", nested=False, shape=(40, 96)), bnb4_decode, bnb, bnb, "blocks straddle rows"
    )
    out["bnb_nf4_partial"] = Case(
        partial(bnb4_make, kind="nf4", nested=True, shape=(9, 80), dtype=torch.float16),
        bnb4_decode,
        bnb,
        bnb,
        "720 elements: the last block of 64 holds 16; dtype float16",
    )
    out["bnb_nf4_storage"] = Case(
        partial(bnb4_make, kind="nf4", nested=True, shape=(24, 128), storage=torch.bfloat16),
        bnb4_decode,
        bnb,
        bnb,
        "bnb_4bit_quant_storage bfloat16: the same bytes, four codes an element",
    )
    out["bnb_int8"] = Case(
        bnb8_make,
        bnb8_decode,
        bnb,
        bnb,
        "x F16 [6, in]; y_threshold6 F16 (all in float16), y_threshold6_f32 and y_threshold0_f32 (x in float32)",
        products=bnb8_products,
    )
    out |= mlx_cases()
    for bits in (8, 4, 3, 2, 1):
        for axis in (0, 1):
            dtype = torch.bfloat16 if bits in (8, 3) else torch.float16
            note = f"scale and zero {str(dtype).removeprefix('torch.')}"
            make = partial(hqq_make, bits=bits, axis=axis, dtype=dtype)
            out[f"hqq_{bits}_axis{axis}"] = Case(make, hqq_decode, "hqq", "hqq", note)
    out["hqq_4_axis1_float_view"] = Case(
        partial(hqq_make, bits=4, axis=1, as_float=True), hqq_decode, "hqq", "hqq", "W_q viewed as float16"
    )
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16), ("e8m0", torch.float8_e8m0fnu)):
        make = partial(fp8_block_make, dtype=dtype, block=(32, 64))
        out[f"fp8_block_{name}"] = Case(make, fp8_decode, "torch", hf, "blocks of 32 x 64, ragged both ways")
    for name, note, tensors in (
        ("tensor", "scalar weight_scale", {"weight_scale": ()}),
        ("tensor_static", "weight_scale [1], input_scale [1]", {"weight_scale": (1,), "input_scale": (1,)}),
        ("tensor_static_scalar", "scalars weight_scale and input_scale", {"weight_scale": (), "input_scale": ()}),
        ("channel", "weight_scale [out, 1]", {"weight_scale": (40, 1)}),
        (
            "tensor_old",
            "scalar weight_scale_inv (a multiplier) and activation_scale",
            {"weight_scale_inv": (), "activation_scale": ()},
        ),
    ):
        out[f"fp8_{name}"] = Case(partial(fp8_make, **tensors), fp8_decode, "torch", hf, note)
    out["modelopt_nvfp4"] = Case(modelopt_nvfp4_make, modelopt_nvfp4_decode, opt, opt, "weight_scale_2 multiplies")
    for algorithm, note in (
        ("FP8", "scalar weight_scale and input_scale"),
        ("FP8_PER_CHANNEL_PER_TOKEN", "weight_scale [out]"),
        ("FP8_PB_WO", "weight_scale [R, 1, C, 1]; blocks of 32 x 64, where real files have 128 x 128"),
    ):
        make = partial(modelopt_fp8_make, algorithm=algorithm)
        out[f"modelopt_{algorithm.lower()}"] = Case(make, modelopt_fp8_decode, opt, opt, note)
    out |= ct_cases()
    out["mxfp4"] = Case(
        mxfp4_make, mxfp4_decode, "random codes", hf, "scales 0, 1, 2, 252, 254 in rows 0 and 1", second=mxfp4_slow
    )
    out["mxfp4_gpt_oss"] = Case(
        partial(mxfp4_make, gpt_oss=True),
        mxfp4_decode,
        "random codes",
        hf,
        "names and shapes of GPT-OSS experts; rows gate, up, gate, up, ...",
        second=mxfp4_slow,
    )
    out["f8q8"] = Case(f8q8_make, f8q8_decode, own, own, "mistral.rs; no package, and no config.json declares it")
    return out


def legacy(name: str) -> bool:
    """Whether the installed compressed-tensors is of the wrong age for the case."""
    if not name.startswith("ct_"):
        return False
    old = importlib.util.find_spec("compressed_tensors.compressors.quantized_compressors") is not None
    return old != name.startswith("ct_legacy")


def versioned(packages: str) -> str:
    try:
        import compressed_tensors

        found = compressed_tensors.__version__ if packages == "compressed-tensors" else version(packages)
    except Exception:
        return packages
    return f"{packages} {found}"


def expected_of(case: Case, tensors: Tensors, config: Config) -> Tensor:
    return case.decode({k: v.clone() for k, v in tensors.items()}, config).detach().float().contiguous()


def write(name: str, case: Case) -> None:
    gen = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    torch.manual_seed(0)
    tensors, config = case.make(gen)
    out = {f"m.{k}": v.detach().contiguous().clone() for k, v in tensors.items()}
    out["expected"] = expected_of(case, tensors, config)
    if case.products:
        out |= case.products(tensors, bnb8_input(gen))
    metadata = {
        "config": json.dumps(config),
        "key": case.key,
        "made_by": versioned(case.made_by),
        "decoded_by": versioned(case.decoded_by),
        "expected_dtype": case.expected_dtype,
        "note": case.note,
    }
    path = ROOT / f"{name}.safetensors"
    data = save(out, metadata)
    size = int.from_bytes(data[:8], "little")  # its header comes in any order, which would change the file each time
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def read(path: Path) -> tuple[Tensors, dict[str, str]]:
    with safe_open(path, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118


def differences(name: str, case: Case) -> list[str]:
    tensors, metadata = read(ROOT / f"{name}.safetensors")
    expected = tensors["expected"]
    given = {k.removeprefix("m."): v for k, v in tensors.items() if k.startswith("m.")}
    config = json.loads(metadata["config"])
    found = []
    if not bool(expected.isfinite().all()) or expected.std() == 0:
        found.append("not finite, or constant")
    if not legacy(name) and not torch.equal(expected_of(case, given, config), expected):
        found.append(f"{case.decoded_by} gives something else now")
    if case.second:
        worst = ((case.second(given, config) - expected).abs() / expected.abs().max()).max()
        if worst > 1e-7:  # mlx may fuse the multiplication and the addition
            found.append(f"the second decoder differs by {worst:.2g}")
    if case.products:
        now = case.products(given, tensors["x"])
        found += [f"{k} is different now" for k, y in now.items() if not torch.equal(y, tensors[k])]
    return found


def write_readme(all_cases: dict[str, Case]) -> None:
    lines = [
        "# Quantized matrices and what other implementations make of them",
        "",
        "Written by `tests/reference/quantized_goldens.py`, which describes the files and says how to run it.",
        f"Made with Python {platform.python_version()}, torch {version('torch')}; the packages are in the table.",
        "With `--check` it decodes every file again. All weights are random: nothing here comes from a published",
        "model. Do not edit by hand.",
        "",
        "| case | tensors | made by | decoded by | note |",
        "|---|---|---|---|---|",
    ]
    kinds = {"float8_e4m3fn": "e4m3", "float8_e8m0fnu": "e8m0"}
    for name, case in all_cases.items():
        if not (ROOT / f"{name}.safetensors").exists():
            continue
        tensors, metadata = read(ROOT / f"{name}.safetensors")
        shown = []
        for k, v in tensors.items():
            kind = str(v.dtype).removeprefix("torch.")
            if k.startswith("m."):
                shown.append(f"{k[2:]} {kinds.get(kind, kind)} {list(v.shape)}")
        second = " and bit by bit" if case.second else ""
        row = (name, "; ".join(shown), metadata["made_by"], metadata["decoded_by"] + second, case.note)
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", *SURPRISES]
    (ROOT / "README.md").write_text("\n".join(lines) + "\n")


SURPRISES = """\
## Surprises

* bitsandbytes' C++ kernel for CPUs with AVX512 dequantizes 4-bit weights wrongly where `in` is a multiple of 16 but not
  of the block size: it takes absmax[row * (in // 64) + column // 64], though blocks run over rows. Its torch code is
  right (and gives back what was quantized), and is used here.
* `weight_format` of LLM.int8 and ModelOpt's scalars are tensors without axes; compressed-tensors writes [1].
* LLM.int8: the absmax of a row leaves out the outlier ENTRIES; the other entries of an outlier column count in it,
  though the column is multiplied in floating point.
* GPTQ v1 stores the zero point less 1 and does not wrap: stored 15 is 16.
* compressed-tensors 0.20 has no activation order (`actorder: group`) any more and packs 3, 5, 6 and 7 bits densely;
  releases before it put floor(32 / bits) codes into a word. The number of words tells which. weight_zero_point is
  packed along out in both.
* compressed-tensors dequantizes 4-bit floats in bfloat16. `expected` is its float32 arithmetic; the script asserts
  that it rounds to what `decompress` gives.
* MLX and modelopt multiply by a second NVFP4 scale, compressed-tensors divides by it.
* HQQ pads 3-bit codes to a multiple of ten rows; the rows of axis 0 are the group (64 become 7 words), those of
  axis 1 the groups. Its scalars are I32 [] (numbers), U8 [] (flags) and U8 text.
* MLX scales may be negative. E8M0 code 0 is 2^-127, a denormal float32: what flushes those to zero gets 0.
* No config.json declares f8q8, and `shape` there is this script's own; `m.blocks`, `m.scales` of MXFP4 are
  mistral.rs's names. compressed-tensors has `weight_packed`, `weight_scale`; GPT-OSS `*_blocks`, `*_scales`.
""".splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; compare what is there")
    parser.add_argument("--only", default="", help="cases that match this regular expression")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sys.meta_path.append(Stubs())
    all_cases = cases()
    chosen = {name: case for name, case in all_cases.items() if re.search(args.only, name)}
    failures = 0
    for name, case in chosen.items():
        if not args.check and legacy(name):
            print(f"{name}: left as it is (see the module docstring)")
            continue
        if not args.check:
            write(name, case)
        found = differences(name, case)
        failures += bool(found)
        print(f"{name}: {'; '.join(found) or 'ok'}")
    if not args.check:
        write_readme(all_cases)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
