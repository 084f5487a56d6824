"""Statistics of the activations that matrices are multiplied by, collected while a model or a layer runs.

Encoders use them: importance matrices are mean squares (llama.cpp's imatrix), GPTQ and AWQ need the products. What is
collected is a result of the computation like any other, so it works under `jit` and on any mesh: layers `record` what
they multiply, and whoever traces them (`collecting`) gets the sums by the parameters' names.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.declaration import Declaration
from jaxllm.errors import InputError

Kind = Literal["squares", "products"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Statistics:
    """What is known of the activations that a matrix, or each matrix of a stack, was multiplied by.

    Attributes:
        squares: float32 `[in]` or `[experts, in]`, sums of squares over tokens.
        counts: int32 `[]` or `[experts]`, how many tokens these are.
        products: float32 `[in, in]` or `[experts, in, in]`, sums of outer products; None: not collected.
    """

    squares: np.ndarray | jax.Array
    counts: np.ndarray | jax.Array
    products: np.ndarray | jax.Array | None = None

    @property
    def importance(self) -> np.ndarray:
        """Mean squares, float32 like `squares`; zeros for a matrix that no token met."""
        return np.asarray(self.squares / np.maximum(self.counts, 1)[..., None], np.float32)

    def __add__(self, other: Self) -> Self:
        return jax.tree.map(lambda a, b: a + b, self, other)

    def restored(self, declared: Declaration) -> Self:
        """On the host, in the order and size of the checkpoint that `declared` states, from those on the mesh."""
        squares, counts = np.asarray(self.squares), np.asarray(self.counts)
        products = None if self.products is None else np.asarray(self.products)
        if declared.cols is not None:
            places = np.flatnonzero(declared.cols >= 0)
            places = places[np.argsort(declared.cols[places], kind="stable")]
            squares = squares[..., places]
            products = None if products is None else products[..., places[:, None], places]
        if declared.stack is not None:
            number = declared.shape[0]
            squares, counts = squares[:number], counts[:number]
            products = None if products is None else products[:number]
        return type(self)(squares, counts, products)


def added(before: Mapping[str, Statistics], more: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """Statistics by name, with those of more tokens: all the sums are one program."""
    known = {name: before[name] for name in more if name in before}
    return {**before, **more, **(_sums(known, {name: more[name] for name in known}) if known else {})}


@jax.jit
def _sums(some: dict[str, Statistics], others: dict[str, Statistics]) -> dict[str, Statistics]:
    return {name: each + others[name] for name, each in some.items()}


@dataclass
class Tracker:
    """What is collected while a module is traced.

    Attributes:
        kind: "squares", or "products" for these too.
        names: the names of the module's parameters by identity.
        real: bool `[batch, time]`, which tokens count; None: all.
        seen: the statistics so far, by the parameters' names.
    """

    kind: Kind
    names: Mapping[int, str]
    real: jax.Array | None = None
    seen: dict[str, Statistics] = field(default_factory=dict)

    def add(self, name: str, statistics: Statistics) -> None:
        self.seen[name] = self.seen[name] + statistics if name in self.seen else statistics


_tracker: ContextVar[Tracker | None] = ContextVar("tracker", default=None)


def tracked() -> Kind | None:
    """What is being collected here."""
    tracker = _tracker.get()
    return None if tracker is None else tracker.kind


@contextmanager
def collecting(module: nnx.Module, kind: Kind | None, real: jax.Array | None = None) -> Iterator[dict[str, Statistics]]:
    """Collect statistics of a module that runs inside; the dictionary is filled meanwhile.

    Args:
        kind: None: nothing is collected.
        real: bool `[batch, time]`, which of the tokens count; None: all.
    """
    tracker = None if kind is None else Tracker(kind, _names(module), real)
    token = _tracker.set(tracker)
    try:
        yield {} if tracker is None else tracker.seen
    finally:
        _tracker.reset(token)


def _parameters(module: nnx.Module) -> Iterator[tuple[str, nnx.Param]]:
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Param):
            yield ".".join(map(str, path)), node


def _names(module: nnx.Module) -> dict[int, str]:
    return {id(param): name for name, param in _parameters(module)}


def pass_on(prefix: str, seen: Mapping[str, Statistics]) -> None:
    """Hand what an inner module's tracker collected to the tracker around it."""
    tracker = _tracker.get()
    for name, statistics in seen.items():
        assert tracker is not None
        tracker.add(f"{prefix}.{name}", statistics)


def record(param: nnx.Param, x: jax.Array) -> None:
    """Note that `x[..., in]` is multiplied by a matrix."""
    tracker = _tracker_of(param)
    if tracker is None:
        return
    rows, real = x.reshape(-1, x.shape[-1]).astype(jnp.float32), tracker.real
    count = jnp.int32(len(rows))
    if real is not None:
        rows, count = jnp.where(real.reshape(-1, 1), rows, jnp.float32(0)), jnp.sum(real, dtype=jnp.int32)
    products = jnp.matmul(rows.T, rows, precision="highest") if tracker.kind == "products" else None
    tracker.add(tracker.names[id(param)], Statistics(jnp.sum(rows * rows, axis=0), count, products))


def record_stack(param: nnx.Param, statistics: Statistics) -> None:
    """Note the statistics of a stack of matrices."""
    if (tracker := _tracker_of(param)) is not None:
        tracker.add(tracker.names[id(param)], statistics)


def _tracker_of(param: nnx.Param) -> Tracker | None:
    tracker = _tracker.get()
    return tracker if tracker is not None and id(param) in tracker.names else _begun.get(id(param), (None, None))[1]


def real_tokens() -> jax.Array | None:
    """bool `[batch, time]`, which of the tokens count; None: all."""
    tracker = _tracker.get()
    return None if tracker is None else tracker.real


def kind_of(param: nnx.Param) -> Kind | None:
    """What is collected of a parameter here."""
    tracker = _tracker_of(param)
    return None if tracker is None else tracker.kind


class Tracked:
    """A layer whose activations can be tracked on their own, outside `jit`. In a model, use the model's methods."""

    def begin_track_stats(self, products: bool = False) -> None:
        """From now on, collect statistics of what the layer's matrices are multiplied by.

        Args:
            products: also the sums of outer products, which GPTQ and AWQ need.
        """
        assert isinstance(self, nnx.Module)
        begin(self, products)

    def end_track_stats(self) -> dict[str, Statistics]:
        """What was collected since then, by the names of the layer's parameters, in the checkpoint's order.

        Raises:
            InputError: it was not begun, or the layer was called under `jit`.
        """
        assert isinstance(self, nnx.Module)
        return end(self)


# Layers on their own, outside models: what is collected from `begin` to `end`, by the identity of each parameter.
_begun: dict[int, tuple[nnx.Param, Tracker]] = {}  # which holds the parameter, so that no other gets its identity


def begin(module: nnx.Module, products: bool = False) -> None:
    """Collect statistics of a layer's calls outside `jit` from now on."""
    tracker = Tracker("products" if products else "squares", _names(module))
    _begun.update({id(param): (param, tracker) for _, param in _parameters(module)})


def end(module: nnx.Module) -> dict[str, Statistics]:
    """What was collected since `begin`, on the host and in the order of the checkpoint, by the parameters' names.

    Raises:
        InputError: it was not begun, or the layer was called under `jit`.
    """
    params = dict(_parameters(module))
    trackers = [_begun.pop(id(param), (None, None))[1] for param in params.values()]
    if not trackers or (tracker := trackers[0]) is None or not tracker.seen:
        raise InputError("no statistics: call begin_track_stats(), then the layer, outside jit")
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tracker.seen)):
        raise InputError("statistics of a single layer are collected outside jit only, but it was called under jit")
    return {name: tracker.seen[name].restored(p.declared) for name, p in params.items() if name in tracker.seen}
