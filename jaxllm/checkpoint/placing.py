"""Host tensors onto a mesh: each device's part is read on its own, straight from the file."""

import dataclasses
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.formats.base import Weight, block_index


def place(
    weight: Weight,
    spec: PartitionSpec,
    mesh: Mesh,
    rows: np.ndarray | None = None,
    cols: np.ndarray | None = None,
    name: str = "weight",
) -> Weight:
    """`weight.arrange(rows, cols)` cut over the mesh, reading from its host arrays only what each device holds.

    Args:
        weight: leaves are host arrays, which may be memory-mapped.
        spec: of the logical matrix.
        name: for errors.

    Raises:
        InputError: a part would not be whole blocks.
    """
    sources, abstract = {}, {}
    for leaf_name, axes in weight.axes.items():
        leaf = getattr(weight, leaf_name)
        index = [None] * (leaf.ndim - len(axes)) + block_index(axes, rows, cols)
        shape = tuple(n if i is None else len(i) for n, i in zip(leaf.shape, index, strict=True))
        sources[leaf_name] = leaf, index
        abstract[leaf_name] = jax.ShapeDtypeStruct(shape, leaf.dtype)
    specs = dataclasses.replace(weight, **abstract).shard_specs(spec, mesh, name)
    placed = {
        leaf_name: jax.make_array_from_callback(
            shape.shape, NamedSharding(mesh, getattr(specs, leaf_name)), partial(_read, *sources[leaf_name])
        )
        for leaf_name, shape in abstract.items()
    }
    return dataclasses.replace(weight, **placed)


def _read(leaf: np.ndarray, index: list[np.ndarray | None], part: tuple[slice, ...]) -> np.ndarray:
    """The `part` of the rearranged leaf, as an array of its own (never a view of a mapped file)."""
    for axis, (positions, section) in enumerate(zip(index, part, strict=True)):
        if positions is None:
            leaf = leaf[(slice(None),) * axis + (section,)]
            continue
        positions = positions[section]
        here = np.maximum(positions, 0)
        if np.array_equal(here, np.arange(here[0], here[0] + len(here))):
            leaf = leaf[(slice(None),) * axis + (slice(here[0], here[0] + len(here)),)]
        else:
            leaf = leaf.take(here, axis=axis)
        if (positions < 0).any():
            leaf = np.array(leaf)
            leaf[(slice(None),) * axis + (positions < 0,)] = 0
    return np.array(leaf, order="C")
