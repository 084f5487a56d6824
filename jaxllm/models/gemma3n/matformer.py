"""Gemma 3n's MatFormer slices: narrower feed-forward blocks and fewer layers."""

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from jaxllm.errors import InputError
from jaxllm.models.gemma3n.config import Gemma3nConfig


def sliced(config: Gemma3nConfig, kept: Sequence[int], widths: Sequence[int]) -> Gemma3nConfig:
    """The configuration of a slice, see `MatFormer.config`.

    Layers without keys and values of their own stay without, and read those of the same layer as before.

    Raises:
        InputError: a layer that others read from is not kept, or a width exceeds the layer's.
    """
    layers = []
    for i, width in zip(kept, widths, strict=True):
        if not 1 <= width <= config.layers[i].intermediate_size:
            own = config.layers[i].intermediate_size
            raise InputError(f"layer {i}: its feed-forward block is {own} wide, so that {width} cannot be kept")
        if (source := config.keys_from(i)) is not None and source not in kept:
            raise InputError(f"layer {source} cannot be skipped: layer {i} reads its keys and values")
        layers.append(replace(config.layers[i], intermediate_size=width))
    shared = sum(i >= config.first_shared for i in kept)
    return replace(config, layers=tuple(layers), num_kv_shared_layers=shared)


def places(
    config: Gemma3nConfig, small: Gemma3nConfig, kept: Sequence[int], path: str
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The rows and columns of a parameter that a slice keeps, see `MatFormer.places`."""
    if m := re.fullmatch(r"layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight", path):
        first = np.arange(small.layers[kept.index(int(m[1]))].intermediate_size)
        return (None, first) if m[2] == "down" else (first, None)
    size = config.hidden_size_per_layer_input
    own = np.concatenate([np.arange(i * size, (i + 1) * size) for i in kept])
    if path == "ends.embed_tokens_per_layer.weight":
        return None, own
    return (own, None) if path == "ends.per_layer_model_projection.weight" else (None, None)
