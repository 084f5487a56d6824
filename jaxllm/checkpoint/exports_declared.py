"""What config.json says of the weights that `exports_integers` and `exports_floats` write. The inverse of `declared`.

A function here takes the modules that are not quantized and, by module, the sizes of groups (which formats without
groups, or with a fixed size, ignore), and gives the entries for config.json.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxllm.errors import InputError

Config = dict[str, Any]
Groups = Mapping[str, int]
Declare = Callable[[Sequence[str], Groups], Config]

_TOKEN = {"num_bits": 8, "symmetric": True, "dynamic": True, "strategy": "token"}


def usual(groups: Groups, default: int) -> int:
    """The size that most modules have."""
    return Counter(groups.values()).most_common(1)[0][0] if groups else default


def nothing(left_out: Sequence[str], groups: Groups) -> Config:
    """For numbers that stand for themselves."""
    return {}


def _entry(method: str, **said: Any) -> Config:
    return {"quantization_config": {"quant_method": method, **said}}


def gptq(bits: int, symmetric: bool, ordered: bool) -> Declare:
    """GPTQ. Modules of the blocks that are left out need two entries: `dynamic` excludes them for gptqmodel and vLLM;
    `modules_in_block_to_quantize`, the list of all others, does for optimum, on which transformers rests."""

    def declare(left_out: Sequence[str], groups: Groups) -> Config:
        said: Config = {
            "bits": bits,
            "group_size": _only("GPTQ", groups),
            "desc_act": ordered,
            "sym": symmetric,
            "checkpoint_format": "gptq" if symmetric else "gptq_v2",
            "lm_head": False,
            "pack_dtype": "int32",
        }
        if skipped := [module for module in left_out if _IN_BLOCK.match(module)]:
            said["dynamic"] = {f"-:^{re.escape(module)}$": {} for module in skipped}
            said |= {"modules_in_block_to_quantize": [_ends(groups, skipped)]} if groups else {}
        return _entry("gptq", **said)

    return declare


_IN_BLOCK = re.compile(r".*?\.layers\.\d+\.")


def _ends(modules: Iterable[str], others: Sequence[str]) -> list[str]:
    """What the names of modules end with, as short as can be without naming others: mostly their names in a block."""
    short = {module: _IN_BLOCK.sub("", module, count=1) for module in modules}
    return sorted({module if any(o.endswith(end) for o in others) else end for module, end in short.items()})


def awq(left_out: Sequence[str], groups: Groups) -> Config:
    size, skipped = _only("AWQ", groups), list(left_out) or None
    return _entry("awq", bits=4, group_size=size, zero_point=True, version="gemm", modules_to_not_convert=skipped)


def _only(what: str, groups: Groups) -> int:
    size = usual(groups, 128)
    if other := [module for module, its in groups.items() if its != size]:
        raise InputError(f"'{other[0]}' has groups of {groups[other[0]]}, others of {size}; {what} needs one size")
    return size


def bitsandbytes(kind: str) -> Declare:
    """Every matrix states its own block size.

    Args:
        kind: "nf4", "fp4" or "int8".
    """

    def declare(left_out: Sequence[str], groups: Groups) -> Config:
        four_bits = {
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        }
        return _entry(
            "bitsandbytes",
            load_in_4bit=kind != "int8",
            load_in_8bit=kind == "int8",
            **({} if kind == "int8" else four_bits),
            llm_int8_threshold=6.0,
            llm_int8_has_fp16_weight=False,
            llm_int8_enable_fp32_cpu_offload=False,
            llm_int8_skip_modules=list(left_out),
        )

    return declare


def block_fp8(left_out: Sequence[str], groups: Groups) -> Config:
    said = {"activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
    return _entry("fp8", **said, modules_to_not_convert=list(left_out))


def gpt_oss(left_out: Sequence[str], groups: Groups) -> Config:
    return _entry("mxfp4", modules_to_not_convert=list(left_out))


def compressed(form: str, weights: Config, activations: Config | None = None) -> Declare:
    """compressed-tensors. Modules with groups of an unusual size are listed by name, which precedes "Linear"."""

    def group(targets: Sequence[str], size: int | None) -> Config:
        said = {"symmetric": True, "dynamic": False, **weights}
        return {
            "targets": list(targets),
            "weights": said | ({"group_size": size} if size else {}),
            "input_activations": activations,
            "output_activations": None,
            "format": form,
        }

    def declare(left_out: Sequence[str], groups: Groups) -> Config:
        grouped = weights.get("strategy") == "group" and "group_size" not in weights
        size = usual(groups, 128) if grouped else None
        parts = {"group_0": group(["Linear"], size)}
        others = sorted(set(groups.values()) - {size}, reverse=True) if grouped else []
        for number, other in enumerate(others, 1):
            parts[f"group_{number}"] = group([module for module, its in groups.items() if its == other], other)
        return _entry(
            "compressed-tensors",
            format=form,
            quantization_status="compressed",
            config_groups=parts,
            ignore=list(left_out),
            kv_cache_scheme=None,
        )

    return declare


def mlx(bits: int, mode: str, fixed: int | None) -> Declare:
    """MLX lists modules that differ by their paths. Its own writer gives the same object under both names.

    Args:
        fixed: the group size, if the mode knows only one.
    """

    def declare(left_out: Sequence[str], groups: Groups) -> Config:
        size = fixed or usual(groups, 64)
        said: Config = {"group_size": size, "bits": bits, "mode": mode}
        said |= {m: {**said, "group_size": its} for m, its in groups.items() if not fixed and its != size}
        said |= dict.fromkeys(left_out, False)
        return {"quantization": said, "quantization_config": said}

    return declare


INT4 = compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group"})
INT8 = compressed("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, {**_TOKEN, "type": "int"})
ROW_FP8 = compressed(
    "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, {**_TOKEN, "type": "float"}
)
_POWERS = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
_POWERS["zp_dtype"] = "torch.uint8"
MXFP4 = compressed("mxfp4-pack-quantized", {"num_bits": 4, **_POWERS})
MXFP8 = compressed("mxfp8-quantized", {"num_bits": 8, **_POWERS})
_SMALL = {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
NVFP4 = compressed(
    "nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, **_SMALL}
)
