"""How much a model has to compute and to read, counted from shapes.

XLA's own counts leave out loops (over tiles of experts) and kernels, so matrices are counted here. What is small beside
them is not: norms, rotary embeddings, routing, the rows of an embedding table, and what new tokens add to the cache. So
every number is too small rather than too large, and times computed from it are bounds from below.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from jaxllm.device_memory import device_bytes
from jaxllm.formats.base import Weight
from jaxllm.layers.cache import CacheShape
from jaxllm.layers.decoder import Decoder
from jaxllm.layers.experts import MoE
from jaxllm.layers.linear import Embedding
from jaxllm.layers.mla import LatentAttention


@dataclass(frozen=True)
class Cost:
    """What one device does: operations (a multiplication and an addition are two), and bytes that it reads."""

    flops: float = 0.0
    nbytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.nbytes + other.nbytes)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.flops * times, self.nbytes * times)


def decode_cost(layer: Any, cache: tuple[Any, Any], batch: int, positions: int, tp: int) -> Cost:
    """A decode step of one layer: each of `batch` sequences adds a token and attends to `positions` positions.

    Args:
        cache: the layer's keys and values as shapes, all of which are read.
    """
    pairs = batch * _window(layer, positions)
    return _matrices(layer, batch) + Cost(pairs * _attended(layer, tp, 1), device_bytes(cache))


def prefill_cost(layer: Any, cache: tuple[Any, Any], batch: int, positions: int, chunk: int, tp: int) -> Cost:
    """One layer on prompts of `positions` tokens, processed in chunks: all matrices are read once a chunk.

    A token attends to those before it, at most to its window: P(P + 1) / 2 pairs of a prompt of P tokens. At the end of
    the i-th of n chunks, i / n of the cache is read: (n + 1) / 2 of it in all.
    """
    window, chunks = _window(layer, positions), math.ceil(positions / chunk)
    pairs = batch * (window * (window + 1) / 2 + (positions - window) * window)
    attention = Cost(pairs * _attended(layer, tp, chunk), device_bytes(cache) * (chunks + 1) / 2)
    return _matrices(layer, batch * positions / chunks) * chunks + attention


def _window(layer: Any, positions: int) -> int:
    """How many of the positions a token attends to."""
    return min(positions, getattr(layer.self_attn, "sliding_window", None) or positions)


def head_cost(model: Decoder, batch: int) -> Cost:
    """The logits of one token of each sequence."""
    head = model.lm_head or model.embed_tokens
    return _matrices(head, batch)


def ends_cost(model: Decoder, rows: float) -> Cost:
    """What some models do with `rows` tokens before their first layer and after their last one."""
    return Cost() if model.ends is None else _matrices(model.ends, rows)


def _matrices(module: nnx.Module, rows: float) -> Cost:
    """Multiplying `rows` rows by every matrix of a module, but for tables of embeddings in it.

    A matrix `[out, in]` takes 2 out in operations a row. Of E experts, k are chosen for each row, all alike often: then
    each device multiplies k / E of its experts' matrices by a row, and reads all of those that some row chose, which is
    1 - (1 - k / E)^rows of them.
    """
    routed = {id(param): moe for _, moe in nnx.iter_modules(module) if isinstance(moe, MoE) for param in _stacks(moe)}
    inner = (part for _, part in nnx.iter_modules(module) if isinstance(part, Embedding) and part is not module)
    tables = {id(part.weight) for part in inner}
    cost = Cost()
    for _, param in nnx.iter_graph(module):
        if not isinstance(param, nnx.Param) or id(param) in tables:
            continue
        weight = param.get_value()
        nbytes = device_bytes(weight)
        if not isinstance(weight, Weight):
            cost += Cost(0.0, nbytes)
            continue
        flops = 2.0 * _device_size(param)
        if (moe := routed.get(id(param))) is None:
            cost += Cost(flops * rows, nbytes)
        else:
            route: Any = moe.route
            share = route.k / moe.num_experts
            cost += Cost(flops * rows * share, nbytes * (1 - (1 - share) ** rows))
    return cost


def _stacks(moe: MoE) -> Iterable[nnx.Param]:
    return (param for _, param in nnx.iter_graph(moe.experts) if isinstance(param, nnx.Param))


def _device_size(param: nnx.Param) -> int:
    """How many numbers of a matrix one device multiplies by: those of its placed shape, padding included."""
    weight, spec = param.get_value(), param.declared.spec
    leaf = jax.tree.leaves(weight)[0]
    mesh = leaf.sharding.mesh
    return math.prod(jax.NamedSharding(mesh, spec).shard_shape(weight.shape))


def _attended(layer: Any, tp: int, time: int) -> float:
    """Operations of attention for one token and one position that it attends to, on one device's heads.

    Scores take 2 key_dim operations a head, and the weighted sum of values 2 value_dim. Latents serve as the keys and
    values of all heads where `time` is 1; for longer prompts they are expanded to keys and values of each head.
    """
    module = layer.self_attn
    width = module.o_proj.weight.get_value().shape[-1] / tp
    if isinstance(module, LatentAttention) and not module.per_head_cache:
        s = module.sizes
        per_head = 2 * s.rank + s.rope if time == 1 else s.nope + s.rope + s.value
        return 2.0 * width / s.value * per_head
    shape: CacheShape = module.cache_shape
    return 2.0 * width / shape.value_dim * (shape.key_dim + shape.value_dim)
