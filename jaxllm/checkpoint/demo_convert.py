"""Convert a DeepSeek Hugging Face directory to the files of DeepSeek's inference demo, and back. No value changes.

The demo's ModelArgs cannot express everything that a config.json can, nor the other way around. So the code that loads
models reads the new configuration again, and it has to mean the same.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.checkpoint.demo import (
    BLOCK,
    check_blocks,
    demo_axis,
    demo_tensors,
    find_config,
    joined,
    read_args,
)
from jaxllm.checkpoint.quantized import assemble
from jaxllm.checkpoint.safetensors import HFDirectory
from jaxllm.checkpoint.writing import Tensor, nth, pieces
from jaxllm.entries import read_json
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.formats.scaled import Scaled
from jaxllm.kernels.activations import rounds_to_powers
from jaxllm.models.deepseek.config import DEMO_DEFAULTS, MODEL_TYPES, DeepseekConfig
from jaxllm.models.deepseek.names import DEMO_EXPERT, demo_name, hf_ignored, name_of_demo
from jaxllm.placing import FileArray

_FIELDS = {  # of ModelArgs, and their names in a config.json
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "score_func": "scoring_func",
    "route_scale": "routed_scaling_factor",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "max_seq_len": "max_position_embeddings",
}
_YARN = {
    "original_seq_len": "original_max_position_embeddings",
    "rope_factor": "factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale_all_dim",
}

# What DeepSeek's config.json says about FP8.
DECLARATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(BLOCK)}


def to_demo(
    folder: HFDirectory, count: int, n_experts: int | None = None
) -> tuple[dict[str, list[Tensor]], dict[str, Any] | None]:
    """The demo's files and their tensors, and the model's ModelArgs; None if these cannot describe it.

    Args:
        count: the number of files, one per GPU.
        n_experts: the expected number of experts.

    Raises:
        InputError: the model is not a DeepSeek model, or cannot be split into `count` parts.
    """
    if folder.config["model_type"] not in MODEL_TYPES:
        raise InputError(f"model_type {folder.config['model_type']!r}: the demo knows {', '.join(MODEL_TYPES)} only")
    weights = assemble(folder)
    config = DeepseekConfig.from_hf(folder.config, weights)
    _check_counts(config, count, n_experts)
    if blocks := {w.block for w in weights.values() if isinstance(w, Scaled)} - {BLOCK}:
        raise InputError(f"FP8 with blocks of {min(blocks)}; the demo's are {BLOCK}")
    files: list[list[Tensor]] = [[] for _ in range(count)]
    names = []
    for name, weight in folder.tensors.items():
        if any(re.fullmatch(pattern, name) for pattern in hf_ignored(config)):
            continue
        new = demo_name(name)
        if new is None:
            raise InputError(f"tensor '{name}' has no place in the demo's files")
        names.append(new)
        whole = weights.get(name.removesuffix("_scale_inv"))
        for i, tensor in _parts(name, new, weight.values, count, config.n_routed_experts // count, whole):
            files[i].append(tensor)
    if "head.weight" not in names:
        raise InputError("no 'lm_head.weight', as it is the embedding; the demo needs one of its own")
    named = {f"model{i}-mp{count}.safetensors": tensors for i, tensors in enumerate(files)}
    return named, _args(config, folder.config, weights, names)


def to_huggingface(path: Path, config: Path | None = None) -> tuple[list[Tensor], dict[str, Any]]:
    """The tensors of a directory of the demo's files by Hugging Face's names, and the config.json.

    Args:
        config: ModelArgs, or a config.json to use unchanged; by default the ModelArgs in the directory.

    Raises:
        InputError: files are missing or damaged, or a config.json cannot describe the model.
    """
    tensors, config = demo_tensors(path), config or find_config(path)
    given = read_json(config)
    args = None if "model_type" in given else read_args(config)
    try:
        weights = joined(tensors, args or {})
        names = {name: new for name in tensors if (new := name_of_demo(name)) is not None}
        if unknown := [name for name in tensors if name not in names]:
            raise InputError(f"unknown tensor '{unknown[0]}'")
        given = given if args is None else _hf_config(args, weights, names.values())
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    arrays = {name: weight.values for name, weight in tensors.items()}
    return [Tensor(names[n], a.dtype, a.shape, pieces(n, a)) for n, a in arrays.items()], given


def _check_counts(config: DeepseekConfig, count: int, n_experts: int | None) -> None:
    if n_experts not in (None, config.n_routed_experts):
        raise InputError(f"n_experts {n_experts}: the model has {config.n_routed_experts}")
    if count < 1:
        raise InputError(f"model_parallel {count}: give a number of files, 1 or above")
    for what in ("num_attention_heads", "n_routed_experts"):
        if (size := getattr(config, what)) % count:
            raise InputError(f"model_parallel {count} does not divide the model's {what}, {size}")


def _parts(
    name: str, new: str, array: FileArray, count: int, experts: int, whole: Weight | None
) -> Iterator[tuple[int, Tensor]]:
    """Each file's number and its part of a tensor.

    Args:
        experts: the number of experts per file.
        whole: if the tensor holds the values or the scales of an FP8 matrix, that matrix.
    """
    if found := DEMO_EXPERT.fullmatch(new):
        if int(found[1]) >= experts * count:
            raise InputError(f"tensor '{name}': the model has {experts * count} experts only")
        yield int(found[1]) // experts, Tensor(new, array.dtype, array.shape, pieces(name, array))
        return
    axis = demo_axis(new)
    if axis is None or count == 1:
        for i in range(count):
            yield i, Tensor(new, array.dtype, array.shape, pieces(name, array))
        return
    if isinstance(whole, Scaled):
        check_blocks(f"tensor '{name.removesuffix('_scale_inv')}'", axis, whole.shape[axis], count)
    if axis >= array.ndim or array.shape[axis] % count:
        raise InputError(f"tensor '{name}' of shape {list(array.shape)}: {count} parts do not divide dimension {axis}")
    size = array.shape[axis] // count
    shape = (*array.shape[:axis], size, *array.shape[axis + 1 :])
    for i in range(count):
        values = pieces(name, nth(array, shape, i)) if axis == 0 else _columns(name, array, shape, i)
        yield i, Tensor(new, array.dtype, shape, values)


def _columns(name: str, array: FileArray, shape: tuple[int, ...], i: int) -> Iterator[np.ndarray]:
    columns = slice(i * shape[-1], (i + 1) * shape[-1])
    return (band.reshape(-1, array.shape[-1])[:, columns] for band in pieces(name, array, array.shape[-1]))


def _args(
    config: DeepseekConfig, given: Mapping[str, Any], weights: Mapping[str, Weight], names: Collection[str]
) -> dict[str, Any] | None:
    """ModelArgs for the model of a config.json; None if they cannot describe it."""
    args = {arg: getattr(config, key) for arg, key in _FIELDS.items()} | {"q_lora_rank": config.q_lora_rank or 0}
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    args["rope_theta"] = rope.get("rope_theta", given.get("rope_theta", DEMO_DEFAULTS["rope_theta"]))
    yarn = rope.get("rope_type", rope.get("type")) == "yarn"
    args["original_seq_len"] = config.max_position_embeddings
    args |= {arg: rope[key] for arg, key in _YARN.items() if yarn and rope.get(key)}
    scaled = [w for w in weights.values() if isinstance(w, Scaled)]
    args["dtype"] = "fp8" if scaled else "bf16"
    if any(map(rounds_to_powers, scaled)):
        args["scale_fmt"] = "ue8m0"
    if unlike := _unlike(DeepseekConfig.from_demo(args, names), config):
        said = ", ".join(unlike)
        warnings.warn(f"the demo's ModelArgs cannot say this model's {said}; none are written", stacklevel=4)
        return None
    return args


def _hf_config(args: Mapping[str, Any], weights: Mapping[str, Weight], names: Iterable[str]) -> dict[str, Any]:
    """A config.json for the model of `args`, which has all fields of ModelArgs."""
    model = DeepseekConfig.from_demo(args, weights)
    v3 = model.scoring_func == "sigmoid" or model.has_correction_bias
    version = 3 if v3 else 2
    config: dict[str, Any] = {"architectures": [f"DeepseekV{version}ForCausalLM"]}
    config |= {"model_type": f"deepseek_v{version}", "hidden_act": "silu", "attention_bias": False}
    config |= {key: args[arg] for arg, key in _FIELDS.items()} | {"q_lora_rank": model.q_lora_rank}
    grouped = "group_limited_greedy" if model.n_group > 1 else "greedy"
    config |= {"topk_method": "noaux_tc" if v3 else grouped, "norm_topk_prob": model.norm_topk_prob}
    config |= {"num_key_value_heads": model.num_attention_heads, "rms_norm_eps": model.rms_norm_eps}
    config |= {"tie_word_embeddings": False, "rope_theta": args["rope_theta"], "torch_dtype": "bfloat16"}
    if args["max_seq_len"] > args["original_seq_len"]:
        yarn = {key: args[arg] for arg, key in _YARN.items()}
        config["rope_scaling"] = {"type": "yarn", **yarn, "mscale": args["mscale"]}
    if any(isinstance(w, Scaled) for w in weights.values()):
        scale_fmt = {"scale_fmt": args["scale_fmt"]} if args["scale_fmt"] else {}
        config["quantization_config"] = DECLARATION | scale_fmt
    if unlike := _unlike(DeepseekConfig.from_hf(config, dict.fromkeys(names)), model):
        raise InputError(f"a config.json cannot say this model's {', '.join(unlike)}; give one with --config")
    return config


def _unlike(a: DeepseekConfig, b: DeepseekConfig) -> list[str]:
    """The fields in which two models differ."""

    def same(x: Any, y: Any) -> bool:
        return math.isclose(x, y) if isinstance(x, float) else x == y

    fields = (field.name for field in dataclasses.fields(a) if field.name != "model_type")
    return [name for name in fields if not same(getattr(a, name), getattr(b, name))]
