"""Rotary frequencies as checkpoints describe them, the same way for most families."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxllm.entries import Entries
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.layers import rope
from jaxllm.layers.rope import Rope
from jaxllm.models.config import POSITIONS


@np.errstate(all="ignore")
def gguf_rope(get: Callable[..., Any], tensors: Mapping[str, Weight], head_dim: int, truncate: bool = True) -> Rope:
    """Frequencies from a GGUF file's metadata.

    Args:
        get: the value of a key without the architecture's prefix, or a default.
        truncate: whether the ends of YaRN's ramp are rounded, which no key says.
    """
    theta, dim = get("rope.freq_base", 10000.0), get("rope.dimension_count", head_dim)
    base = rope.frequencies(dim, theta)

    def factors(name: str) -> np.ndarray | None:
        return np.asarray(tensors[name].dequantize(), np.float64) if name in tensors else None

    if (short := factors("rope_factors_short.weight")) is not None:
        long, original = factors("rope_factors_long.weight"), get("rope.scaling.original_context_length")
        scale = get("rope.scaling.attn_factor", rope.longrope_scale(get("context_length") / original, original))
        stretched = Rope(_fixed(rope.divided(base, long)), scale)
        return Rope(_fixed(rope.divided(base, short)), scale, stretched, original)
    if (given := factors("rope_freqs.weight")) is not None:
        base = rope.divided(base, given)
    kind, factor = get("rope.scaling.type", "none"), get("rope.scaling.factor", 1.0)
    if kind == "linear":
        return Rope(_fixed(rope.divided(base, factor)))
    if kind == "yarn":
        original = get("rope.scaling.original_context_length", get("context_length"))
        ramp = get("rope.scaling.yarn_beta_fast", 32.0), get("rope.scaling.yarn_beta_slow", 1.0)
        scale = get("rope.scaling.attn_factor", 1.0) * rope.yarn_scale(factor)
        return Rope(_fixed(rope.yarn(base, factor, theta, original, *ramp, truncate)), scale)
    if kind not in ("none", "longrope"):
        raise InputError(f"rope scaling '{kind}' is not supported")
    return Rope(_fixed(base))


@np.errstate(all="ignore")
def hf_rope(config: Entries, head_dim: int) -> Rope:
    """Frequencies from a config.json in either spelling: `rope_parameters` of transformers 5, or `rope_theta` and
    `rope_scaling`."""
    name = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
    values = config.get(name, {}, lambda value: isinstance(value, dict), "a JSON object")
    given = Entries(values, f"{config.where}: {name}")
    if any(isinstance(value, dict) for value in values.values()):
        raise InputError(f"{given.where} by kind of layer is not supported")
    kind = values.get("rope_type") or values.get("type") or "default"

    def having(key: str) -> Entries:
        return given if key in given else config

    def need(key: str, above: float = 0.0) -> float:
        if key not in given:
            raise InputError(f"{given.where}: rope scaling '{kind}' without '{key}'")
        return given.number(key, above=above)

    dim = int(head_dim * having("partial_rotary_factor").number("partial_rotary_factor", 1.0, most=1.0))
    if dim < 2 or dim % 2:
        raise InputError(f"{config.where}: rotary embeddings of {dim} of {head_dim} dimensions, which must be even")
    theta = having("rope_theta").number("rope_theta", 10000.0, above=1.0)
    base = rope.frequencies(dim, theta)
    context = config.whole("max_position_embeddings", 2048, most=POSITIONS)
    before = having("original_max_position_embeddings")
    original = before.whole("original_max_position_embeddings", max(context, 2), 2, POSITIONS)

    if kind == "default":
        return Rope(_fixed(base))
    if kind == "linear":
        return Rope(_fixed(rope.divided(base, need("factor"))))
    if kind == "llama3":
        factor, low = need("factor"), need("low_freq_factor")
        return Rope(_fixed(rope.llama3(base, factor, low, need("high_freq_factor", above=low), original)))
    if kind == "yarn":
        factor, ramp = need("factor"), (given.number("beta_fast", 32), given.number("beta_slow", 1))
        mscale, over = (given.number(key, 0.0, above=-math.inf) for key in ("mscale", "mscale_all_dim"))
        scale = rope.yarn_scale(factor)
        if mscale and over:
            scale = rope.yarn_scale(factor, mscale) / rope.yarn_scale(factor, over)
        scale = given.number("attention_factor", scale)
        return Rope(_fixed(rope.yarn(base, factor, theta, original, *ramp, given.flag("truncate", True))), scale)
    if kind in ("longrope", "su"):
        stretch = context / original if "original_max_position_embeddings" in before else given.number("factor", 1)
        scale = given.number("attention_factor", rope.longrope_scale(stretch, original))
        stretched = Rope(_fixed(rope.divided(base, given.numbers("long_factor", len(base)))), scale)
        short = _fixed(rope.divided(base, given.numbers("short_factor", len(base))))
        return Rope(short, scale, stretched, original)
    raise InputError(f"{given.where}: rope scaling {kind!r} is not supported")


def _fixed(inv_freq: np.ndarray) -> tuple[float, ...]:
    if not all(map(math.isfinite, inv_freq)):
        raise InputError("rotary frequencies are not finite: factors of zero?")
    return tuple(inv_freq.tolist())
