"""Rotary settings of one kind of file in the words of another: the inverse of rope_config.py.

A `Rope` holds frequencies, from which the settings cannot be told. So those that a file gives are translated: into
what a config.json calls `rope_parameters` ("rotary settings" here), and from there into either kind of file.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxllm.entries import Entries
from jaxllm.formats.base import Weight
from jaxllm.layers import rope
from jaxllm.layers.rope import Rope
from jaxllm.models.config import gguf_entries
from jaxllm.models.rope_config import hf_rope_entries

ORIGINAL = "original_max_position_embeddings"
LOW = 1.0  # Llama 3.1's low_freq_factor, which all models with its scaling share
_ELSEWHERE = ("type", "rope_type", "rope_theta", "partial_rotary_factor")


def hf_rotary(description: Mapping[str, object], tensors: Collection[str] = ()) -> dict[str, Any]:
    """The rotary settings in a config.json, with `rope_type` and `rope_theta`, all in one place."""
    config = Entries(description, "config.json")
    kind, given = hf_rope_entries(config)
    theta = (given if "rope_theta" in given else config).number("rope_theta", 10000.0, above=1.0)
    settings = {"rope_type": "longrope" if kind == "su" else kind, "rope_theta": theta}
    settings |= {key: given.values[key] for key in given.values if key in given and key not in _ELSEWHERE}
    if kind != "default" and ORIGINAL in config:
        settings.setdefault(ORIGINAL, config.integer(ORIGINAL))
    return settings


def hf_rope_settings(settings: Mapping[str, Any], frequencies: Rope, head_dim: int) -> dict[str, Any]:
    """Entries of a config.json for rotary settings, in the spelling that transformers 4 and 5 both read."""
    scaling = {key: value for key, value in settings.items() if key != "rope_theta"}
    entries: dict[str, Any] = {"rope_theta": settings["rope_theta"]}
    if frequencies.rotary_dim != head_dim:
        entries["partial_rotary_factor"] = frequencies.rotary_dim / head_dim
    if scaling["rope_type"] == "longrope":
        entries |= {ORIGINAL: frequencies.short_context}
    return entries if scaling == {"rope_type": "default"} else entries | {"rope_scaling": scaling}


def gguf_rotary(metadata: Mapping[str, object], tensors: Mapping[str, Weight]) -> dict[str, Any]:
    """The rotary settings in a GGUF file's metadata and tensors. Factors for frequencies that are not Llama 3.1's
    become LongRoPE's, which are as free as they are."""
    _, given = gguf_entries(metadata, [Entries(metadata, "metadata").text("general.architecture")])
    settings: dict[str, Any] = {"rope_type": "default", "rope_theta": given.number("rope.freq_base", 10000.0)}
    extra = given.number("rope.scaling.attn_factor", 1.0)
    original = given.integer("rope.scaling.original_context_length", given.integer("context_length"))
    kind, factor = given.text("rope.scaling.type", "none"), given.number("rope.scaling.factor", 1.0)

    def factors(name: str) -> list[float]:
        return np.asarray(tensors[name].dequantize(), np.float32).tolist()

    if "rope_factors_short.weight" in tensors:
        settings |= {"rope_type": "longrope", ORIGINAL: original}
        settings |= {f"{size}_factor": factors(f"rope_factors_{size}.weight") for size in ("short", "long")}
        return settings | ({"attention_factor": extra} if "rope.scaling.attn_factor" in given else {})
    if "rope_freqs.weight" in tensors:
        free = factors("rope_freqs.weight")
        found = _llama3(np.array(free), settings["rope_theta"])
        longrope = {"rope_type": "longrope", "short_factor": free, "long_factor": free, ORIGINAL: original}
        return settings | (found or longrope | {"attention_factor": extra})
    if kind == "linear":
        settings |= {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        settings |= {"rope_type": "yarn", "factor": factor, ORIGINAL: original}
        for beta in ("fast", "slow"):
            if (key := f"rope.scaling.yarn_beta_{beta}") in given:
                settings[f"beta_{beta}"] = given.number(key)
        if mscale := given.number("rope.scaling.yarn_log_multiplier", 0.0, least=0.0) / 0.1:
            settings |= dict.fromkeys(("mscale", "mscale_all_dim"), round(mscale, 6))
        elif "rope.scaling.attn_factor" in given:
            settings["attention_factor"] = extra * rope.yarn_scale(factor)
    return settings


def gguf_rope_settings(settings: Mapping[str, Any], frequencies: Rope) -> dict[str, Any]:
    """GGUF metadata for rotary settings, without the architecture's prefix."""
    kind, factor = settings["rope_type"], float(settings.get("factor", 1.0))
    entries: dict[str, Any] = {
        "rope.dimension_count": frequencies.rotary_dim,
        "rope.freq_base": float(settings["rope_theta"]),
    }
    if kind in ("linear", "yarn"):
        entries |= {"rope.scaling.type": kind, "rope.scaling.factor": factor}
    if kind in ("yarn", "longrope") and ORIGINAL in settings:
        entries["rope.scaling.original_context_length"] = settings[ORIGINAL]
    if kind == "yarn":
        betas = [beta for beta in ("beta_fast", "beta_slow") if beta in settings]
        entries |= {f"rope.scaling.yarn_{beta}": float(settings[beta]) for beta in betas}
    extra = frequencies.scale / (rope.yarn_scale(factor) if kind == "yarn" else 1.0)
    if kind == "longrope" or abs(extra - 1) > 1e-6:
        entries["rope.scaling.attn_factor"] = extra
    return entries


def gguf_rope_tensors(settings: Mapping[str, Any], frequencies: Rope) -> dict[str, np.ndarray]:
    """What a GGUF file has as tensors: factors, float32 `[rotary_dim / 2]`, that divide frequencies."""
    base = rope.frequencies(frequencies.rotary_dim, settings["rope_theta"])
    if settings["rope_type"] == "llama3":
        return {"rope_freqs.weight": (base / frequencies.inv_freq).astype(np.float32)}
    if frequencies.long is not None:
        pairs = {"long": frequencies.long.inv_freq, "short": frequencies.inv_freq}
        return {f"rope_factors_{size}.weight": (base / of).astype(np.float32) for size, of in pairs.items()}
    return {}


def _llama3(factors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """Llama 3.1's settings that lead to these factors; None if none do, or too few factors are left to tell.

    Between the ends, 1 / factor is a line over a wavelength's turns in the original context, see `rope.llama3`.
    """
    factor, base = float(factors.max()), rope.frequencies(2 * len(factors), theta)
    between = (factors > 1 + 1e-4) & (factors < factor * (1 - 1e-4))
    if between.sum() < 2:
        return None
    smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
    slope, offset = np.polyfit(base[between] / (2 * np.pi), smooth, 1)
    if offset >= 0:
        return None
    high = round(LOW * (1 - 1 / offset), 3)
    original = round(slope * (high - LOW))
    again = base / rope.llama3(base, factor, LOW, high, original)
    if not np.allclose(again, factors, rtol=1e-4):
        return None
    found = {"factor": factor, "low_freq_factor": LOW, "high_freq_factor": high, ORIGINAL: original}
    return {"rope_type": "llama3", **found}
