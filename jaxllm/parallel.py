"""The mesh and everything that happens across it.

This is the only module with `shard_map`, collectives and axis names. A layer states how its matrix is sharded (COLUMN,
ROW or REPLICATED, over the logical `[out, in]`) and calls `linear` or `lookup`. Kernels see only one device's shards. A
single device is a mesh of shape (1, 1) and runs the same code: a collective over one device is only a copy.

Functions here use the ambient mesh (`jax.set_mesh`), so that neither layers nor models carry one around.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from jaxllm.errors import InputError
from jaxllm.formats.base import Weight, shards
from jaxllm.kernels import dispatch, norm
from jaxllm.kernels.activations import Peak, unchanged
from jaxllm.kernels.adapted import products
from jaxllm.kernels.dispatch import few_rows, kept
from jaxllm.kernels.experts import Activation, Gated, Tiles, grouped_mlp, hidden, tile_size

DP = "dp"  # data parallelism: rows of a batch on different devices
TP = "tp"  # tensor parallelism: one matrix over several devices
EP = "ep"  # expert parallelism: different experts on different devices

AXES = DP, EP, TP

COLUMN = PartitionSpec(TP, None)  # outputs are sharded; nothing is communicated
ROW = PartitionSpec(None, TP)  # inputs are sharded; partial products are summed over tp
REPLICATED = PartitionSpec(None, None)
HEAD_STACK = PartitionSpec(TP, None, None)  # a matrix per head [heads, out, in]: heads are sharded over tp

EXPERT_COLUMN = PartitionSpec(EP, TP, None)  # a stack [experts, out, in]: experts are sharded over ep,
EXPERT_ROW = PartitionSpec(EP, None, TP)  # and each expert's matrix over tp
EXPERT_REPLICATED = PartitionSpec(EP, None, None)  # each expert's matrix is complete on its device
SHARED_COLUMN = PartitionSpec((EP, TP), None)  # a block beside the experts, sharded over all devices
SHARED_ROW = PartitionSpec(None, (EP, TP))

HEADS = PartitionSpec(DP, None, TP, None)  # activations [batch, time, heads, head_dim]
CACHE = PartitionSpec(DP, TP, None, None)  # cached keys and values [batch, kv_heads, capacity, head_dim]
ROWS = PartitionSpec(DP)  # whatever has rows of a batch


def make_mesh(mesh: Mesh | str | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes (dp, ep, tp) from text such as "tp=4,ep=2"; axes left out have size 1.

    Raises:
        InputError: the text is not `axis=size` pairs, or asks for more devices than there are.
    """
    if isinstance(mesh, Mesh):
        if not set(mesh.axis_names) <= set(AXES):
            raise InputError(f"mesh axes {mesh.axis_names}: only {', '.join(map(repr, AXES))} have a meaning here")
        order = sorted(range(len(mesh.axis_names)), key=lambda i: AXES.index(mesh.axis_names[i]))
        return _mesh(mesh.devices.transpose(order), {axis: mesh.shape.get(axis, 1) for axis in AXES})
    sizes = parse_mesh(mesh or "")
    devices = jax.devices() if devices is None else devices
    count = math.prod(sizes.values())
    if count > len(devices):
        raise InputError(
            f"mesh {mesh} needs {count} devices, but there are {len(devices)}; on a CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count} before Python starts"
        )
    return _mesh(np.array(devices[:count]), sizes)


def _mesh(devices: np.ndarray, sizes: Mapping[str, int]) -> Mesh:
    return Mesh(devices.reshape([sizes[axis] for axis in AXES]), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse_mesh(text: str) -> dict[str, int]:
    """`"tp=4,ep=2"` as `{"dp": 1, "ep": 2, "tp": 4}`."""
    sizes = dict.fromkeys(AXES, 1)
    for part in filter(None, text.replace(" ", "").split(",")):
        axis, _, size = part.partition("=")
        if axis not in sizes or not size.isdecimal() or int(size) < 1:
            raise InputError(f"mesh '{text}': expected axis=size pairs such as 'tp=4,ep=2'")
        sizes[axis] = int(size)
    return sizes


def ambient_mesh() -> AbstractMesh:
    """The shape of the mesh that `jax.set_mesh` has set.

    Raises:
        InputError: no mesh is set, or its axes are not those of `make_mesh`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise InputError("no mesh is set: call jax.set_mesh(jaxllm.make_mesh('tp=8')) first, or use it in a with block")
    if set(mesh.axis_names) != set(AXES) or AxisType.Explicit in mesh.axis_types:
        raise InputError(f"the mesh {mesh} is not for this: set jaxllm.make_mesh('tp=8'), or make_mesh(your_mesh)")
    return mesh


def placing_mesh() -> Mesh:
    """The mesh that `jax.set_mesh` has set, with its devices. Raises InputError as `ambient_mesh` does."""
    ambient_mesh()
    return jax.sharding.get_mesh()


def local(f: Callable, in_specs: object, out_specs: object, check_vma: bool = True) -> Callable:
    """`f` applied to each device's own shards, which the PartitionSpecs define."""
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)


def local_specs(weight: Weight, spec: PartitionSpec) -> Weight:
    """How each leaf of a weight is sharded, for `local`."""
    return weight.shard_specs(spec, ambient_mesh())


def of_batch(spec: PartitionSpec, rows: int, mesh: Mesh | AbstractMesh | None = None) -> PartitionSpec:
    """How something is sharded whose first axis is the rows of a batch, if there are this many: over dp as `spec` says,
    or, where dp does not divide them, complete on every device."""
    divides = rows % (mesh or ambient_mesh()).shape[DP] == 0
    return spec if divides else PartitionSpec(None, *spec[1:])


def linear(x: jax.Array, weight: Weight, spec: PartitionSpec, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """`x[..., in] @ weight[out, in].T` -> `[..., out]` in `dtype` (x's by default), for a weight sharded by `spec`.

    COLUMN leaves the last axis of the result sharded over tp. ROW expects x sharded that way and replicates its result.
    The sum over devices is taken in float32 and rounded once, so that N devices round where one device does.
    """
    return linears(x, [weight], spec, dtype)[0]


def linears(
    x: jax.Array, weights: Sequence[Weight], spec: PartitionSpec, dtype: jax.typing.DTypeLike | None = None
) -> tuple[jax.Array, ...]:
    """`linear` with several weights that take the same x and are sharded alike."""
    out_axis, in_axis = spec
    lead = of_batch(PartitionSpec(DP, *(None,) * (x.ndim - 2)), x.shape[0]) if x.ndim > 1 else ()

    def shard(x: jax.Array, weights: list[Weight]) -> tuple[jax.Array, ...]:
        ys = products(x, weights, _whole_rows(in_axis))
        if in_axis is not None:
            ys = jax.lax.psum(ys, in_axis)
        return tuple(kept(y.astype(dtype or x.dtype)) for y in ys)

    specs = [local_specs(weight, spec) for weight in weights]
    outputs = (PartitionSpec(*lead, out_axis),) * len(weights)
    return local(shard, (PartitionSpec(*lead, in_axis), specs), outputs)(x, list(weights))


def _whole_rows(axis: str | tuple[str, ...] | None) -> Peak:
    """A function from the peaks of a device's parts of rows, sharded over `axis`, to the peaks of complete rows."""
    return unchanged if axis is None else partial(jax.lax.pmax, axis_name=axis)


def lookup(ids: jax.Array, weight: Weight, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rows `ids` of an embedding table `[vocab, hidden]`, sharded by COLUMN, as `[*ids.shape, hidden]`.

    Every device looks up the ids that it holds and contributes zeros for the others. This costs one reduce of
    activations; in exchange, no device holds the entire vocabulary.
    """

    def shard(ids: jax.Array, weight: Weight) -> jax.Array:
        held = weight.shape[0]
        here = ids - jax.lax.axis_index(TP) * held
        mine = (here >= 0) & (here < held)
        rows = weight.take(jnp.clip(here, 0, held - 1)).dequantize(dtype)
        return jax.lax.psum(jnp.where(mine[..., None], rows, jnp.zeros((), dtype)), TP)

    rows = of_batch(ROWS, ids.shape[0]) if ids.ndim else PartitionSpec()
    return local(shard, (rows, local_specs(weight, COLUMN)), rows)(ids, weight)


def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """The norm over the last axis, which is on every device. On one device a kernel may do it; on several, each does
    what it has of x, and XLA knows what that is."""
    mesh = jax.sharding.get_abstract_mesh()
    whole = not mesh.empty and mesh.size == 1
    return dispatch.rms_norm(x, weight, eps) if whole else norm.rms_norm(x, weight, eps)


def sums_of_squares(*xs: jax.Array) -> jax.Array:
    """The sum of squares over the last axis of each `x[batch, time, features]`, whose features are sharded over tp.

    Returns:
        float32 `[batch, time, arrays]`, replicated. All arrays take one sum over devices.
    """

    def shard(*xs: jax.Array) -> jax.Array:
        return jax.lax.psum(jnp.stack([jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1) for x in xs], axis=-1), TP)

    return local(shard, (PartitionSpec(None, None, TP),) * len(xs), PartitionSpec())(*xs)


def gated_specs(block: Gated, column: PartitionSpec, row: PartitionSpec) -> Gated:
    """How each leaf of a gated block is sharded when its matrices are sharded by `column` and `row`."""
    bias = None
    if block.bias is not None:
        bias = gated_specs(block.bias, column, PartitionSpec(*row[:-1], None))  # the last is replicated: see `_once`
    return Gated(local_specs(block.gate, column), local_specs(block.up, column), local_specs(block.down, row), bias)


def experts(
    x: jax.Array,
    scores: jax.Array,
    chosen: jax.Array,
    stack: Gated,
    num_experts: int,
    activation: Activation,
    shared: tuple[Gated, jax.Array] | None = None,
) -> jax.Array:
    """Send every token through its chosen experts; sum the results, weighted by the scores, over all devices.

    Args:
        x: `[tokens, hidden]`.
        scores, chosen: `[tokens, k]`; expert numbers are int32.
        stack: sharded by EXPERT_COLUMN and EXPERT_ROW.
        shared: a block, sharded by SHARED_COLUMN and SHARED_ROW, that every token goes through, and its scores,
            `[tokens, 1]` or `[]`.

    Returns:
        `[tokens, hidden]` in x's dtype.
    """
    rows, uncut = of_batch(ROWS, len(x)), PartitionSpec()
    here = chosen.size // shards(rows[0], ambient_mesh())
    tile = tile_size(here, num_experts, few_rows(x, stack.gate))

    def shard(
        x: jax.Array, scores: jax.Array, chosen: jax.Array, stack: Gated, shared: tuple[Gated, jax.Array] | None
    ) -> jax.Array:
        first = jax.lax.axis_index(EP) * stack.gate.shape[0]
        y = grouped_mlp(x, scores, chosen - first, _once(stack), tile, activation, _whole_rows(TP))
        if shared is not None:
            block, score = shared
            h = activation(*products(x, (block.gate, block.up))).astype(x.dtype)
            y = y + score * products(h, (block.down,), _whole_rows((EP, TP)))[0]
        return jax.lax.psum(y, (EP, TP)).astype(x.dtype)

    shared_specs = None
    if shared is not None:
        shared_specs = gated_specs(shared[0], SHARED_COLUMN, SHARED_ROW), rows if shared[1].ndim else uncut
    specs = rows, rows, rows, gated_specs(stack, EXPERT_COLUMN, EXPERT_ROW), shared_specs
    # check_vma cannot follow a loop whose number of rounds depends on how much work the device has.
    return local(shard, specs, rows, check_vma=False)(x, scores, chosen, stack, shared)


def expert_sums(
    x: jax.Array, chosen: jax.Array, stack: Gated, num_experts: int, activation: Activation, products: bool
) -> tuple[tuple, tuple]:
    """What the experts' matrices are multiplied by, see `Tiles.sums`: of gate and up, and of down.

    Args:
        x, chosen, stack, num_experts, activation: see `experts`; numbers of no expert are not counted.
    """
    tile = tile_size(chosen.size, num_experts, few_rows(x, stack.gate))

    def shard(x: jax.Array, chosen: jax.Array, stack: Gated) -> tuple[tuple, tuple]:
        count = stack.gate.shape[0]
        tiles = Tiles.of(chosen - jax.lax.axis_index(EP) * count, count, tile)
        rows = tiles.spread(x)
        inner = jax.lax.all_gather(hidden(tiles, rows, stack, activation), TP, axis=1, tiled=True)
        return tiles.sums(rows, count, products), tiles.sums(inner, count, products)

    uncut, of_experts = PartitionSpec(), PartitionSpec(EP)
    specs = uncut, uncut, gated_specs(stack, EXPERT_COLUMN, EXPERT_ROW)
    return local(shard, specs, (of_experts, of_experts), check_vma=False)(x, chosen, stack)


def _once(stack: Gated) -> Gated:
    """The stack with down's bias kept on one device of tp and zero on the others, so that the sum adds it once."""
    if stack.bias is None:
        return stack
    first = jax.lax.axis_index(TP) == 0
    down = jax.tree.map(lambda leaf: jnp.where(first, leaf, jnp.zeros((), leaf.dtype)), stack.bias.down)
    return replace(stack, bias=replace(stack.bias, down=down))


def gather(x: jax.Array) -> jax.Array:
    """A sharded array, replicated on every device."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec())
