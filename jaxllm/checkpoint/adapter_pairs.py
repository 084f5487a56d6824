"""Low-rank adapters (LoRA) as their files have them, whatever kind of file: which tensors change, and by what."""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from jaxllm.errors import InputError
from jaxllm.formats.adapted import LowRank
from jaxllm.placing import FileArray


def low_rank(name: str, a: np.ndarray, b: np.ndarray, rank: int, scale: float) -> LowRank:
    """The change of the tensor `name`, which is `scale * b @ a`.

    A matrix is meant as it multiplies, `y = x W^T`; its checkpoint may store it the other way round (`Rule.present`).

    Args:
        a: `[*batch, rank, in]`.
        b: `[*batch, out, rank]`.

    Raises:
        InputError: the two do not fit together, or their rank is not the announced one, which `scale` is for.
    """
    if a.ndim != b.ndim or a.shape[:-2] != b.shape[:-2] or a.shape[-2] != b.shape[-1]:
        raise InputError(f"'{name}': A of shape {[*a.shape]} and B of shape {[*b.shape]} do not fit together")
    if a.shape[-2] != rank:
        raise InputError(f"'{name}': the rank is {a.shape[-2]}, but should be {rank} by its configuration")
    scales = np.full(a.shape[:-1], scale, np.float32)
    return LowRank(np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32), scales)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as its file has it.

    Attributes:
        name: that of the directory, or of the file without its suffix.
        where: the path, for messages.
        dialect: the dialect of its names; see `models.family`.
        changes: what is added, by the full name that the adapted tensor has in a checkpoint.
        replaced: tensors that stand in for those of the checkpoint, by name, as stored: biases, norms and whole modules
            that were trained as well.
        kind: the architecture that it says it is for; empty if it does not say.
    """

    name: str
    where: str
    dialect: str
    changes: Mapping[str, LowRank]
    replaced: Mapping[str, np.ndarray]
    kind: str = ""


@dataclass
class Pairs[Target: Hashable]:
    """The tensors of a file, collected by what they adapt: for each target, its `a` and its `b`."""

    found: dict[Target, dict[str, tuple[str, np.ndarray | FileArray]]] = field(default_factory=dict)

    def add(self, target: Target, side: str, name: str, array: np.ndarray | FileArray) -> None:
        """`side` is "a" or "b"; `name` is the tensor's own. Raises InputError if it cannot be one of a pair."""
        usable(name, array, 2)
        if side in (pair := self.found.setdefault(target, {})):
            raise InputError(f"tensors '{pair[side][0]}' and '{name}' are for the same matrix")
        pair[side] = name, array

    def complete(self) -> Iterator[tuple[Target, np.ndarray, np.ndarray]]:
        """Each target with its `a` and `b`, as float32. Raises InputError if one is missing."""
        for target, pair in self.found.items():
            if len(pair) < 2:
                ((side, (name, _)),) = pair.items()
                raise InputError(f"tensor '{name}' has no partner {'B' if side == 'a' else 'A'}; is the file complete?")
            a, b = (np.asarray(pair[side][1]).astype(np.float32) for side in "ab")
            yield target, a, b


def usable(name: str, array: np.ndarray | FileArray, least: int = 1) -> None:
    """Raises InputError unless a tensor has floats, and `least` axes or more."""
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.ndim < least or 0 in array.shape:
        shape = [*array.shape]
        raise InputError(f"tensor '{name}' of {array.dtype} and shape {shape} cannot be a part of an adapter")


def not_plain(name: str) -> InputError:
    return InputError(f"tensor '{name}' is not of plain LoRA: merge the adapter where it was trained, and load that")
