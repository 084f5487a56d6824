"""What a model needs on a mesh that need not exist: bytes per device and collectives, computed from shapes alone.

Every parameter is a `ShapeDtypeStruct` with its sharding, laid out by the code that loads real parameters. The decode
step is compiled (never run) for emulated devices. Layers of one kind have the same needs, so one of each kind is
enough: its needs are multiplied by the number of such layers.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.formats.scaled import Activations, Scaled
from jaxllm.layers.cache import KVCache
from jaxllm.layers.decoder import Decoder
from jaxllm.layers.parameter import parameters
from jaxllm.placing import Source, layout

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")

Format = Callable[[str, tuple[int, ...]], Weight]


@dataclass(frozen=True)
class Plan:
    """The needs of a model on a mesh.

    parameter_bytes: bytes of each parameter on one device, by dotted path.
    collectives: the number of collectives in one compiled decode step, by kind.
    """

    parameter_bytes: dict[str, int]
    collectives: Counter[str]


def dense(dtype: jax.typing.DTypeLike) -> Format:
    """The format where every matrix is unquantized, in one dtype."""
    return lambda name, shape: Dense(jax.ShapeDtypeStruct(shape, dtype))


def deepseek_fp8(activations: Activations | None = None) -> Format:
    """DeepSeek-V3's published format: FP8 in blocks of 128 x 128; embedding, head and routers are bfloat16."""

    def format(name: str, shape: tuple[int, ...]) -> Weight:
        if name in ("embed_tokens.weight", "lm_head.weight") or name.endswith("mlp.gate.weight"):
            return dense(jnp.bfloat16)(name, shape)
        *stack, out, in_ = shape
        scales = jax.ShapeDtypeStruct((*stack, -(-out // 128), -(-in_ // 128)), jnp.float32)
        return Scaled(jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn), scales, (128, 128), activations)

    return format


def fill_with_shapes(model: nnx.Module, mesh: Mesh, format: Format) -> dict[str, int]:
    """Replace every Declaration by shapes; returns the bytes of each parameter on one device.

    Args:
        format: given a parameter's path and its logical shape in the checkpoint, its weight, made of shapes. Vectors
            are always float32.
    """
    sizes = {}
    for name, param in parameters(model).items():
        declared = param.get_value()
        vector = len(declared.shape) == 1
        source = dense(jnp.float32)(name, declared.shape) if vector else format(name, declared.shape)
        weight = layout(Source(name, (source,)), declared, mesh).weight
        param.set_value(weight.leaf("values") if vector else weight)
        sizes[name] = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight)
        )
    return sizes


def plan(
    model: Decoder, mesh: Mesh, format: Format, *, batch: int, capacity: int, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> Plan:
    """Compile the decode step of a model whose parameters are still declarations.

    Args:
        batch, capacity: sizes of the cache.
        dtype: the dtype of activations and cache.
    """
    sizes = fill_with_shapes(model, mesh, format)
    return Plan(sizes, collectives(lower_decode(model, mesh, batch, capacity, dtype).compile().as_text() or ""))


def lower_decode(
    model: Decoder, mesh: Mesh, batch: int, capacity: int, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> jax.stages.Lowered:
    """The decode step of a model whose parameters are shapes, to be compiled for the devices of the mesh."""
    graph, state = nnx.split(model)
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    cache = model.cache(batch, capacity, dtype, mesh)

    def decode(state: nnx.State, cache: KVCache, tokens: jax.Array) -> tuple[jax.Array, KVCache]:
        model = nnx.merge(graph, state)
        hidden, cache = model(tokens, cache, jnp.ones_like(cache.lengths), capacity, dtype)
        return model.logits(hidden[:, 0]), cache

    with jax.set_mesh(mesh):
        return jax.jit(decode, donate_argnames="cache").lower(state, cache, tokens)


def collectives_of(layer: nnx.Module, *args: object) -> Counter[str]:
    """How often each kind of collective runs when `layer(*args)` is compiled for the mesh that `jax.set_mesh` has set.

    The layer's matrices must be placed on that mesh; nothing is run.
    """
    graph, state = nnx.split(layer)

    def call(state: nnx.State, *args: object) -> object:
        return nnx.merge(graph, state)(*args)

    return collectives(jax.jit(call).lower(state, *args).compile().as_text() or "")


def collectives(program: str) -> Counter[str]:
    """How often each kind of collective occurs in a compiled program's text."""
    return Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", program))
