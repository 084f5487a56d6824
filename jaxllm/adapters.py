"""`Adapters`: what is attached to a loaded model beside its weights, and how strongly."""

import os
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, replace

import numpy as np
from jax.sharding import Mesh

from jaxllm.checkpoint.adapter_files import read_adapter
from jaxllm.checkpoint.adapting import EMBEDDING, HEAD, Adapter, adapter
from jaxllm.checkpoint.filling import Placed
from jaxllm.errors import InputError
from jaxllm.formats.adapted import Adapted, LowRank, base_of
from jaxllm.formats.base import Weight
from jaxllm.layers.decoder import Decoder
from jaxllm.layers.parameter import parameters
from jaxllm.placing import Source, place

ROOM = 8  # ranks are rounded up to a multiple of this, so that adapters of other ranks fit without compiling anew


@dataclass(frozen=True)
class _Attached:
    adapter: Adapter
    scale: float


class Adapters(MutableMapping[str, float]):
    """The adapters of a loaded model by name, each with its scale.

        name = model.adapters.add("path/to/adapter", scale=0.5)
        model.adapters[name] = 1.0
        del model.adapters[name]

    The base is never changed. Programs are compiled anew only if a matrix needs more room than it has: when it is
    adapted for the first time, and when the ranks of its adapters add up to more than ever before (rounded up to a
    multiple of 8). Room stays when adapters are taken off.
    """

    def __init__(self, model: Decoder, placed: list[Placed], mesh: Mesh, changed: Callable[[], None]) -> None:
        self._model, self._placed, self._mesh, self._changed = model, placed, mesh, changed
        self._attached: dict[str, _Attached] = {}

    def add(self, path: str | os.PathLike, scale: float = 1.0) -> str:
        """Attach an adapter. Returns its name: that of its directory or file, with a number if the name is taken.

        Args:
            path: a directory of PEFT's or mlx-lm's, or a GGUF file.
            scale: what it adds is multiplied by this, besides its own scale.

        Raises:
            InputError: it cannot be read, is for another model, or trained parameters as a whole, which only `load` can
                replace.
        """
        file = read_adapter(path)
        read = adapter(file, self._model.config, {p.name: p.declaration for p in self._placed})
        if read.replaced:
            raise InputError(
                f"{read.where}: it trained {next(iter(read.replaced))} as a whole, which takes the place of the "
                "model's own: give it to load(adapters=...)"
            )
        if self._model.lm_head is None and EMBEDDING in read.changes:
            raise InputError(
                f"{read.where}: it changes the embedding table, which is the head too: give it to load(adapters=...), "
                f"which holds {HEAD} on its own then"
            )
        return self.attach(read, scale)

    def attach(self, read: Adapter, scale: float) -> str:
        """Attach an adapter that was read and matched, multiplied by `scale`. Returns its name, as `add` does."""
        taken = sum(name == read.name or name.startswith(f"{read.name}-") for name in self._attached)
        name = f"{read.name}-{taken + 1}" if taken else read.name
        self._attached[name] = _Attached(read, float(scale))
        self._place(read)
        return name

    def __getitem__(self, name: str) -> float:
        return self._named(name).scale

    def __setitem__(self, name: str, scale: float) -> None:
        self._attached[name] = replace(self._named(name), scale=float(scale))
        self._place(self._attached[name].adapter)

    def __delitem__(self, name: str) -> None:
        read = self._named(name).adapter
        del self._attached[name]
        self._place(read)

    def __iter__(self) -> Iterator[str]:
        return iter(self._attached)

    def __len__(self) -> int:
        return len(self._attached)

    def __repr__(self) -> str:
        return f"Adapters({dict(self)})"

    def _named(self, name: str) -> _Attached:
        if name not in self._attached:
            raise InputError(f"no adapter '{name}'; attached: {', '.join(self._attached) or 'none'}")
        return self._attached[name]

    def _place(self, changed: Adapter) -> None:
        """Place anew what is added to the parameters that an adapter changes."""
        held = parameters(self._model)
        for i, p in enumerate(self._placed):
            if p.name in changed.changes:
                weight = self._adapted(p, held[p.name].get_value())
                held[p.name].set_value(weight)
                self._placed[i] = replace(p, weight=weight)
        self._changed()

    def _adapted(self, p: Placed, weight: Weight) -> Weight:
        parts = [
            _scaled(a.adapter.changes[p.name], a.scale) for a in self._attached.values() if p.name in a.adapter.changes
        ]
        room = weight.delta.rank if isinstance(weight, Adapted) else 0
        if not parts:
            assert isinstance(weight, Adapted)
            return replace(weight, delta=replace(weight.delta, scale=weight.delta.scale * 0))
        needed = -(-sum(part.rank for part in parts) // ROOM) * ROOM
        joined = Source(p.name, (LowRank.joined(parts, max(room, needed)),))
        delta = place(joined, p.declaration, self._mesh)
        assert isinstance(delta, LowRank)
        return Adapted(base_of(weight), delta)


def _scaled(change: LowRank, scale: float) -> LowRank:
    return replace(change, scale=np.float32(scale) * change.scale)
