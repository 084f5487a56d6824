"""Where a device's memory is full: one line that says what was needed, what there is, and what would fit."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import psutil
from jax.sharding import Mesh

from jaxllm.errors import InputError


def device_bytes(tree: object) -> int:
    """The bytes that one device holds of a tree of arrays or shapes, which have shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@contextmanager
def room_for(what: str, mesh: Mesh, needed: Callable[[], float], advise: Callable[[float], str]) -> Iterator[None]:
    """Around what allocates memory of devices.

    Args:
        needed: computes the bytes that it takes on each device; 0: that is not known.
        advise: given how many times as much is needed as is free, says what would fit.

    Raises:
        InputError: a device's memory is too small.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        size, (total, free) = needed(), _memory(mesh)
        takes = f" of {_shown(size)} a device" if size else ""
        has = f", where {_shown(free)} of {_shown(total)} are free" if total else ""
        raise InputError(f"no room for {what}{takes}{has}: {advise(size / max(free, 1))}") from error


def _memory(mesh: Mesh) -> tuple[int, int]:
    """The bytes of a device's memory, and of what is free of it; 0 if it does not say."""
    [device, *_] = mesh.local_devices
    if device.platform == "cpu":
        return psutil.virtual_memory().total, psutil.virtual_memory().available
    told = device.memory_stats() or {}
    total = told.get("bytes_limit", 0)
    return total, total - told.get("bytes_in_use", 0)


def _shown(nbytes: float) -> str:
    return f"{nbytes / 2**30:,.2f} GiB"
