"""A table of what was loaded: every matrix, its format, its sharding, and what one device holds."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxllm.checkpoint.filling import Placed
from jaxllm.device_memory import device_bytes
from jaxllm.formats.base import Weight
from jaxllm.kernels import dispatch
from jaxllm.kernels.registry import REFERENCE
from jaxllm.layers.cache import KVCache
from jaxllm.parallel import COLUMN, DP, ROW
from jaxllm.tables import table

HEADERS = (
    "parameter",
    "file format",
    "bits",
    "held as",
    "multiplied by",
    "shape",
    "cut",
    "on each device",
    "bytes",
    "note",
)


@dataclass(frozen=True)
class Summary:
    """Prints as a text table; a notebook shows HTML. `rows` has one tuple, as in HEADERS, per group of like layers."""

    title: str
    rows: list[tuple]

    def __str__(self) -> str:
        return f"{self.title}\n{table(self.rows, HEADERS)}"

    def _repr_html_(self) -> str:
        return f"<p>{self.title}</p>{table(self.rows, HEADERS, 'html')}"


def summarize(placed: Sequence[Placed], cache: KVCache, mesh: Mesh, name: str, dtype: jax.typing.DTypeLike) -> Summary:
    """Group equal layers and add up bytes.

    Args:
        cache: the shapes of a sequence's. Where no kernel attends to it, the title says why.
        dtype: the dtype of the activations; the choice of kernels depends on it.
    """
    groups: dict[tuple, list[int]] = {}
    for p in placed:
        found = re.search(r"\blayers\.(\d+)\.", p.name)
        generic = re.sub(r"\blayers\.\d+\.", "layers.*.", p.name)
        index = int(found[1]) if found else -1
        groups.setdefault((generic, *_row(p, dtype)), []).append(index)
    rows = [(generic.replace("*", _ranges(layers), 1), *row) for (generic, *row), layers in groups.items()]
    parameters = sum(math.prod(p.declaration.shape) for p in placed)
    source = sum(p.source.nbytes for p in placed)
    held = sum(device_bytes(p.weight) for p in placed)
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if axis != DP or size > 1)
    title = (
        f"{name}: {parameters:,} parameters, {source / 2**20:.1f} MiB in the file, "
        f"{held / 2**20:.1f} MiB on each device of the mesh {axes}"
    )
    platform = mesh.devices.flat[0].platform
    layers_held = zip(cache.keys, cache.values, cache.shapes, strict=True)
    choices = (dispatch.choose_attention(k, v, dtype, platform, shape.latent) for k, v, shape in layers_held)
    if reasons := dict.fromkeys(choice.why for choice in choices if choice.backend == REFERENCE):
        title += f"; no kernel attends to the cache: {'; '.join(reasons)}"
    return Summary(title, rows)


def _row(p: Placed, dtype: jax.typing.DTypeLike) -> tuple[str, ...]:
    leaves = jax.tree.leaves(p.weight)
    held = "float32" if isinstance(p.weight, jax.Array) else p.weight.format
    shards = " + ".join(f"{list(leaf.sharding.shard_shape(leaf.shape))} {leaf.dtype}" for leaf in leaves)
    same = p.source.format == p.encoded.format
    return (
        p.source.format if same else f"{p.source.format} as {p.encoded.format}",
        f"{p.encoded.bits_per_weight:.4g}",
        held,
        _kernel(p.weight, dtype),
        " x ".join(map(str, p.declaration.shape)),
        _cut(p.declaration.spec),
        shards,
        f"{device_bytes(p.weight):,}",
        _note(p),
    )


def _kernel(weight: Weight | jax.Array, dtype: jax.typing.DTypeLike) -> str:
    """The backend that multiplies by a matrix; empty for vectors."""
    if isinstance(weight, jax.Array):
        return ""
    platform = next(iter(jax.tree.leaves(weight)[0].devices())).platform
    return dispatch.choose_for(weight, dtype, platform).backend


def _cut(spec: PartitionSpec) -> str:
    return {COLUMN: "column", ROW: "row"}.get(spec, "replicated" if not any(spec) else str(spec))


def _note(p: Placed) -> str:
    notes = []
    d = p.declaration
    stack = [(d.stack, d.shape[0], "matrices")] if len(d.shape) == 3 else []
    axes = zip((d.rows, d.cols), d.shape[-2:], ("rows", "columns"), strict=False)
    for index, size, what in [*axes, *stack]:
        if index is None:
            continue
        zeros = int((index < 0).sum())
        if copies := (len(index) - zeros) // size - 1:
            notes.append(f"{what} held {copies + 1} times")
        if zeros:
            notes.append(f"{zeros} zero {what} added")
    return ", ".join(notes)


def _ranges(layers: list[int]) -> str:
    """`[0, 1, 2, 5]` as `{0-2,5}`."""
    starts = np.flatnonzero(np.diff(layers, prepend=layers[0] - 2) != 1)
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in np.split(np.array(layers), starts[1:])]
    return parts[0] if len(parts) == 1 and "-" not in parts[0] else "{" + ",".join(parts) + "}"
