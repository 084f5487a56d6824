"""Rotary frequencies as checkpoints describe them, the same way for most families."""

from collections.abc import Collection, Mapping

import numpy as np

from jaxllm.entries import Entries
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.layers import rope
from jaxllm.layers.rope import Rope
from jaxllm.models.config import POSITIONS

GGUF_KINDS = ("none", "linear", "yarn", "longrope")
MSCALE = 1000.0  # upper limit for YaRN's temperature
HF_KINDS = ("default", "linear", "llama3", "yarn", "longrope", "su")
FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers
_THETAS = {FULL: 1e6, SLIDING: 1e4}  # Gemma's, where a file gives none


@np.errstate(all="ignore")
def gguf_rope(
    given: Entries,
    tensors: Mapping[str, Weight],
    head_dim: int,
    truncate: bool = True,
    supported: Collection[str] = GGUF_KINDS,
) -> Rope:
    """Frequencies from a GGUF file's metadata.

    Args:
        given: entries without the architecture's prefix.
        truncate: whether the ends of YaRN's ramp are rounded; GGUF has no key for this.
        supported: the supported kinds of scaling, from GGUF_KINDS.

    Raises:
        InputError: a key is missing, has an impossible value, or asks for something that is not supported.
    """
    theta = given.number("rope.freq_base", 10000.0, above=1.0)
    dim = given.integer_up_to("rope.dimension_count", head_dim, "attention.key_length", head_dim)
    if dim % 2:
        raise InputError(f"{given.where}: 'rope.dimension_count' is {dim}, which must be even")
    context = given.integer("context_length", most=POSITIONS)
    original = given.integer("rope.scaling.original_context_length", max(context, 2), 2, POSITIONS)
    extra = given.number("rope.scaling.attn_factor", 1.0)
    base = rope.frequencies(dim, theta)

    def divided(name: str) -> tuple[float, ...]:
        if name not in tensors:
            raise InputError(f"tensor '{name}' is missing")
        if (shape := tensors[name].shape) != base.shape:
            raise InputError(f"tensor '{name}' has shape {list(shape)}, expected {list(base.shape)}")
        return _fixed(rope.divided(base, np.asarray(tensors[name].dequantize(), np.float64)), f"tensor '{name}'")

    if "rope_factors_short.weight" in tensors:
        scale = extra
        if "rope.scaling.attn_factor" not in given:
            scale = rope.longrope_scale(context / original, original)
        stretched = Rope(divided("rope_factors_long.weight"), scale)
        return Rope(divided("rope_factors_short.weight"), scale, stretched, original)
    if "rope_freqs.weight" in tensors:
        base = np.asarray(divided("rope_freqs.weight"))
    kind, factor = given.choice("rope.scaling.type", GGUF_KINDS, "none"), given.number("rope.scaling.factor", 1.0)
    if kind not in supported:
        raise InputError(f"{given.where}: rope scaling '{kind}' is not supported ('rope.scaling.type')")
    if kind == "linear":
        base = rope.divided(base, factor)
    if kind == "yarn":
        ramp = (
            given.number("rope.scaling.yarn_beta_fast", 32.0),
            given.number("rope.scaling.yarn_beta_slow", 1.0),
        )
        base = rope.yarn(base, factor, theta, original, *ramp, truncate)
    return Rope(_fixed(base, given.where), extra * rope.yarn_scale(factor) if kind == "yarn" else 1.0)


def hf_rope_entries(config: Entries) -> tuple[str, Entries]:
    """The kind of scaling of rotary embeddings in a config.json, and the entries for it.

    Both spellings are read: `rope_parameters` of transformers 5, and `rope_scaling` with `rope_theta` beside it.
    """
    name = next((n for n in ("rope_parameters", "rope_scaling") if config.values.get(n) not in (None, {})), None)
    if name is None:
        return "default", Entries({}, config.where)
    values = config.get(name, None, lambda value: isinstance(value, dict), "a JSON object")
    given = Entries(values, f"{config.where}: {name}")
    if nested := [key for key, value in given.values.items() if isinstance(value, dict)]:
        raise InputError(f"{given.where}: {nested[0]!r} is an object; settings by kind of layer are not supported")
    key = "rope_type" if "rope_type" in given else "type"
    return given.text(key, "default"), given


@np.errstate(all="ignore")
def hf_rope(config: Entries, head_dim: int, key: str = "head_dim", supported: Collection[str] = HF_KINDS) -> Rope:
    """Frequencies from a config.json, see `hf_rope_entries`.

    Args:
        head_dim, key: how many dimensions of a head may be rotary, and the entry that says so.
        supported: the supported kinds of scaling, from HF_KINDS.

    Raises:
        InputError: a key is missing, has an impossible value, or asks for something that is not supported.
    """
    kind, given = hf_rope_entries(config)
    if kind not in supported:
        raise InputError(
            f"{given.where}: rope scaling {kind!r} is not supported; 'rope_type' can be {', '.join(supported)}"
        )

    def having(key: str) -> Entries:
        return given if key in given else config

    def need(key: str) -> float:
        if key not in given:
            raise InputError(f"{given.where}: rope scaling '{kind}' without '{key}'")
        return given.number(key)

    dim = int(head_dim * having("partial_rotary_factor").number("partial_rotary_factor", 1.0, most=1.0))
    if dim < 2 or dim % 2:
        raise InputError(
            f"{config.where}: rotary embeddings of {dim} of {head_dim} dimensions, which must be even ('{key}', "
            "'partial_rotary_factor')"
        )
    theta = having("rope_theta").number("rope_theta", 10000.0, above=1.0)
    base = rope.frequencies(dim, theta)
    context = config.integer("max_position_embeddings", 2048, most=POSITIONS)
    before = having("original_max_position_embeddings")
    original = before.integer("original_max_position_embeddings", max(context, 2), 2, POSITIONS)
    scale = 1.0

    if kind in ("longrope", "su"):
        stretch = context / original if "original_max_position_embeddings" in before else given.number("factor", 1)
        scale = given.number("attention_factor", rope.longrope_scale(stretch, original))
        long, short = (given.numbers(f"{length}_factor", len(base)) for length in ("long", "short"))
        stretched = Rope(_fixed(rope.divided(base, long), f"{given.where}: 'long_factor'"), scale)
        return Rope(_fixed(rope.divided(base, short), f"{given.where}: 'short_factor'"), scale, stretched, original)
    if kind == "linear":
        base = rope.divided(base, need("factor"))
    if kind == "llama3":
        factor, low, high = (need(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        if low >= high:
            raise InputError(f"{given.where}: 'low_freq_factor' {low:g} is not below 'high_freq_factor' {high:g}")
        base = rope.llama3(base, factor, low, high, original)
    if kind == "yarn":
        factor, ramp = need("factor"), (given.number("beta_fast", 32), given.number("beta_slow", 1))
        mscale, over = (given.number(key, 0.0, least=0.0, most=MSCALE) for key in ("mscale", "mscale_all_dim"))
        scale = rope.yarn_scale(factor)
        if mscale and over:
            scale = rope.yarn_scale(factor, mscale) / rope.yarn_scale(factor, over)
        scale = given.number("attention_factor", scale)
        base = rope.yarn(base, factor, theta, original, *ramp, given.flag("truncate", True))
    return Rope(_fixed(base, f"{given.where}: 'factor'"), scale)


def hf_ropes_by_kind(
    config: Entries, head_dim: int, key: str = "head_dim", supported: Collection[str] = HF_KINDS
) -> dict[str, Rope]:
    """Frequencies of FULL and SLIDING layers, which differ in a model; see `hf_entries_by_kind` and `hf_rope`."""
    return {kind: hf_rope(own, head_dim, key, supported) for kind, own in hf_entries_by_kind(config).items()}


def hf_entries_by_kind(config: Entries) -> dict[str, Entries]:
    """A config.json as it would be if all layers were FULL, or all SLIDING.

    Transformers 5 has `rope_parameters` for each kind. Older files have `rope_theta` and `rope_scaling` for FULL layers
    and `rope_local_base_freq` for SLIDING ones.

    Raises:
        InputError: `rope_parameters` are not by kind.
    """
    nested = config.get("rope_parameters", {}, lambda value: isinstance(value, dict), "a JSON object")
    if unknown := sorted(set(nested) - set(_THETAS)):
        raise InputError(
            f"{config.where}: rope_parameters: {unknown[0]!r} is no kind of layer; there have to be settings for "
            f"{FULL!r} and for {SLIDING!r}"
        )
    full = {"rope_theta": config.values.get("rope_theta"), "rope_scaling": config.values.get("rope_scaling")}
    sliding = {"rope_theta": config.values.get("rope_local_base_freq"), "rope_scaling": None}
    found = {}
    for kind, own in ((FULL, full), (SLIDING, sliding)):
        if own["rope_theta"] is None:
            own["rope_theta"] = _THETAS[kind]
        values = {**config.values, **own, "rope_parameters": nested.get(kind)}
        found[kind] = Entries(values, f"{config.where}: {kind}")
    return found


def _fixed(inv_freq: np.ndarray, what: str) -> tuple[float, ...]:
    if not np.isfinite(inv_freq.astype(np.float32)).all():
        raise InputError(f"{what} makes rotary frequencies that are not finite: is a factor zero or tiny?")
    return tuple(inv_freq.tolist())
