"""GPTQ and AWQ for a loaded model, layer by layer: each layer is encoded for the inputs that the encoded ones before it
give, and only one layer's statistics are in memory.

Only the matrices of the blocks are encoded. Embedding tables and heads stay as they are, as such checkpoints have it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.errors import InputError
from jaxllm.formats.awq import awq, awq_scales
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.formats.gptq import gptq
from jaxllm.language_model import LanguageModel
from jaxllm.layers.cache import KVCache, LayerCache
from jaxllm.layers.context import Context
from jaxllm.layers.decoder import apply
from jaxllm.layers.held import dequantized
from jaxllm.layers.parameter import parameters
from jaxllm.placing import Source, place
from jaxllm.tracking import Statistics, added

GROUPS = 128, 64, 32
# AWQ: matrices that take the same input, and the norm or the matrix that makes it.
_AWQ = (
    (tuple(f"self_attn.{each}_proj.weight" for each in "qkv"), "input_layernorm.weight"),
    (("mlp.gate_proj.weight", "mlp.up_proj.weight"), "post_attention_layernorm.weight"),
    (("mlp.down_proj.weight",), "mlp.up_proj.weight"),
)
_DENSE = {name for names, _ in _AWQ for name in names} | {"self_attn.o_proj.weight"}


@dataclass
class Calibrated:
    """What a model's checkpoint has instead of its own.

    made: encoded weights by parameter.
    changed: other parameters' values, float32.
    """

    made: dict[str, Weight] = field(default_factory=dict)
    changed: dict[str, np.ndarray] = field(default_factory=dict)


def common_group(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The largest usual group that divides the columns of all matrices. Raises InputError if none does."""
    for group in GROUPS:
        if all(shape[-1] % group == 0 for name, shape in shapes.items() if _is_matrix(name, shape)):
            return group
    raise InputError(f"the columns of some matrices are no multiple of {GROUPS[-1]}, which GPTQ and AWQ need")


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith("layers.") and len(shape) > 1 and shape[-1] > 1


def with_gptq(model: LanguageModel, tokens: np.ndarray, bits: int, group: int, symmetric: bool) -> Calibrated:
    """Encode the matrices of a model's layers by GPTQ (Frantar et al., 2022), in the model too.

    Args:
        tokens: int32 `[chunks, chunk]`, what it is calibrated on.
    """
    result = Calibrated()
    for i, layer, statistics in _by_layer(model, tokens):
        params = {name: p for name, p in parameters(layer).items() if name in statistics and not p.declared.keep}
        for names in _with_same_inputs(params, statistics):
            values = [np.asarray(dequantized(params[name])) for name in names]
            products = statistics[names[0]].products
            assert products is not None
            weight = gptq(np.concatenate(values, axis=-2), np.asarray(products), bits, group, symmetric)
            ends = np.cumsum([w.shape[-2] for w in values])
            for name, end, w in zip(names, ends, values, strict=True):
                own = slice(end - w.shape[-2], end)
                result.made[f"layers.{i}.{name}"] = part = weight.arrange(rows=np.arange(own.start, own.stop))
                _replace(params[name], part, model)
    return result


def _with_same_inputs(names: Iterable[str], statistics: Mapping[str, Statistics]) -> list[list[str]]:
    """The matrices in groups that take the same input, as queries, keys and values do: GPTQ then inverts once."""
    groups: list[list[str]] = []
    for name in names:
        for group in groups:
            if np.array_equal(statistics[group[0]].squares, statistics[name].squares):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def with_awq(model: LanguageModel, tokens: np.ndarray, group: int) -> Calibrated:
    """Encode the matrices of a model's layers by AWQ (Lin et al., 2023), in the model too.

    Raises:
        InputError: the model has other blocks than dense Llamas, whose norms and matrices can take up the factors.
    """
    for layer in model.model.layers:
        matrices = {name for name, p in parameters(layer).items() if len(p.declared.shape) > 1}
        if unknown := sorted(matrices - _DENSE):
            raise InputError(f"AWQ is for dense models like Llama, whose layers do not have {unknown[0]}")
    result = Calibrated()
    for i, layer, statistics in _by_layer(model, tokens):
        params = parameters(layer)
        values = {name: np.asarray(dequantized(p)) for name, p in params.items() if len(p.declared.shape) > 1}
        vectors, factors = {}, {name: np.ones(w.shape[1], np.float32) for name, w in values.items()}
        for names, before in _AWQ:
            products = statistics[names[0]].products
            s = awq_scales([values[name] for name in names], np.asarray(products), 4, group)
            factors |= dict.fromkeys(names, s)
            if before in values:
                values[before] = values[before] / s[:, None]
            else:
                vectors[before] = np.asarray(_vector(params[before])) / s
            if (bias := before.removesuffix("weight") + "bias") in params:
                vectors[bias] = np.asarray(_vector(params[bias])) / s
        for name, w in values.items():
            weight = awq(w, factors[name], statistics[name].importance, 4, group)
            result.made[f"layers.{i}.{name}"] = weight
            _replace(params[name], weight, model)
        for name, vector in vectors.items():
            result.changed[f"layers.{i}.{name}"] = vector
            _replace(params[name], Dense(vector), model)
    return result


def _vector(param: nnx.Param) -> jax.Array:
    """A vector in the order and size of the checkpoint."""
    return param.declared.restore(param.get_value())


def _replace(param: nnx.Param, weight: Weight, model: LanguageModel) -> None:
    placed = place(Source("calibrated", (weight,)), param.declared, model.mesh)
    param.set_value(placed.dequantize() if len(param.declared.shape) == 1 else placed)


def _by_layer(model: LanguageModel, tokens: np.ndarray) -> Iterator[tuple[int, Any, dict[str, Statistics]]]:
    """Each layer with the statistics of its inputs. The caller may change it; later ones see what it then does."""
    decoder, length = model.model, tokens.shape[1]
    with jax.set_mesh(model.mesh):
        cache = decoder.cache(1, length, model.dtype, model.mesh)
        empty = jax.jit(cache.zeros, out_shardings=cache.shardings)()
        empty = replace(empty, limits=empty.limits + length)
        positions = jnp.arange(length, dtype=jnp.int32)[None]
        states = [np.asarray(_embed(decoder.embed_tokens, row[None], model.dtype)) for row in tokens]
        states = [x * x.dtype.type(decoder.embedding_scale) for x in states]
        own = [i for i, layer in enumerate(decoder.layers) if layer.cache_of is None]
        if len(own) < len(decoder.layers) or decoder.ends is not None:
            raise InputError(
                "layers that are given more than the previous one's output cannot be calibrated one by one"
            )
        for i, layer in enumerate(decoder.layers):
            angles = layer.rope.angles(positions, empty.limits) if layer.rope else None
            context = Context(positions, jnp.full(1, length, jnp.int32), angles, length, False)
            seen: dict[str, Statistics] = {}
            for x in states:
                _, _, more = apply(layer, jnp.asarray(x), _cache(empty, i), context, "products")
                seen = added(seen, more)
            declared = {name: param.declared for name, param in parameters(layer).items()}
            yield i, layer, {name: each.restored(declared[name]) for name, each in seen.items()}
            states = [np.asarray(apply(layer, jnp.asarray(x), _cache(empty, i), context, None)[0]) for x in states]


@partial(jax.jit, static_argnums=2)
def _embed(table: Any, ids: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    return table(ids, dtype)


def _cache(empty: KVCache, i: int) -> LayerCache:
    return empty.keys[i], empty.values[i]
