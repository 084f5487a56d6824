"""The compiled programs of training: sums of gradients over rows of texts, and what an optimizer does with them.

Only the two factors of each low-rank change are trained. The base is an argument like any other and stays packed: a
backward pass dequantizes one matrix at a time, and again when it needs it again.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.compilation_cache import damaged_entries_removed
from jaxllm.declaration import Declaration
from jaxllm.finetuning.loss import answer_loss
from jaxllm.formats.adapted import Adapted, LowRank, base_of
from jaxllm.formats.base import take
from jaxllm.language_model import LanguageModel
from jaxllm.layers.decoder import Decoder
from jaxllm.layers.parameter import parameters
from jaxllm.programs import runs_ahead


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factors:
    """What is trained of one matrix, or of a stack of them, in the checkpoint's order and size, whatever the mesh.

    a: float32 `[*batch, rank, in]`.
    b: float32 `[*batch, out, rank]`.
    """

    a: jax.Array
    b: jax.Array


Trained = dict[str, Factors]  # by the parameters' names


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows of texts, each int32 `[rows, time]`.

    tokens: what is read.
    segments: which of several texts in its row each token belongs to, see `layers.context`.
    targets: the token that has to follow; -1 where any may.
    """

    tokens: np.ndarray
    segments: np.ndarray
    targets: np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """Sums over the tokens that have a target: of the losses, of their gradients, and how many there are."""

    loss: jax.Array
    count: jax.Array
    gradients: Trained

    @classmethod
    def zeros(cls, trained: Trained) -> Self:
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, trained))


@dataclass(frozen=True)
class Place:
    """Where the factors of one parameter go."""

    declaration: Declaration
    scale: float

    def sharding(self, factors: Factors, mesh: Mesh) -> Factors:
        """How the trained factors lie on the mesh: sharded like their matrix, or, where the mesh needs rows or columns in
        another order, replicated."""
        if any(index is not None for index in self.index):
            specs = Factors(PartitionSpec(), PartitionSpec())
        else:
            low = self._low_rank(factors).shard_specs(self.declaration.spec, mesh)
            specs = Factors(low.a, low.b)
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    @property
    def index(self) -> tuple[np.ndarray | None, ...]:
        """See `Declaration.index`; None also where all are in order."""
        sizes = zip(self.declaration.index, self.declaration.shape, strict=True)
        return tuple(None if i is None or np.array_equal(i, np.arange(size)) else i for i, size in sizes)

    def arranged(self, factors: Factors) -> LowRank:
        """On the mesh. Copies of a row (a key head on several devices) get the sum of their gradients."""
        *stack, rows, cols = self.index
        low = self._low_rank(factors).arrange(rows, cols)
        for index in stack:
            low = low if index is None else jax.tree.map(lambda leaf, index=index: take(leaf, index, 0), low)
        return low

    def _low_rank(self, factors: Factors) -> LowRank:
        *batch, rank, _ = factors.a.shape
        return LowRank(factors.a, factors.b, jnp.full((*batch, rank), self.scale, jnp.float32))


class Steps:
    """The programs for one model.

    Attributes:
        compile_seconds: spent on compiling so far.
        compiled: the programs by name and shape.
    """

    def __init__(
        self,
        model: LanguageModel,
        places: Mapping[str, Place],
        optimizer: optax.GradientTransformation,
        remat: bool,
    ) -> None:
        self.mesh, self.compile_seconds, self.compiled = model.mesh, 0.0, dict[Any, jax.stages.Compiled]()
        graph, state = nnx.split(model.model)
        self.leaves, tree = jax.tree.flatten(state)
        dtype = model.dtype

        def hidden_states(trained: Trained, leaves: list[jax.Array], batch: Batch) -> tuple[jax.Array, Decoder]:
            decoder = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
            held = parameters(decoder)
            for name, factors in trained.items():
                base = base_of(held[name].get_value())
                held[name].set_value(Adapted(base, places[name].arranged(factors)))
            rows, length = batch.tokens.shape
            counts = jnp.full(rows, length, jnp.int32)
            shapes = decoder.cache(rows, length, dtype, model.mesh)
            cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            cache = jax.tree_util.tree_map(lambda leaf: leaf, cache)
            return decoder(batch.tokens, cache, counts, length, dtype, batch.segments, remat)[0], decoder

        def add(into: Sums, trained: Trained, leaves: list[jax.Array], batch: Batch) -> Sums:
            hidden, backward, decoder = jax.vjp(lambda t: hidden_states(t, leaves, batch), trained, has_aux=True)
            loss, gradient = answer_loss(decoder.logits, hidden, batch.targets)
            more = Sums(loss, jnp.sum(batch.targets >= 0, dtype=jnp.int32), backward(gradient)[0])
            return jax.tree.map(jnp.add, into, more)

        self._add = add

    def add(self, into: Sums, trained: Trained, batch: Batch) -> Sums:
        return self._run("add", self._add, into, trained, self.leaves, batch)

    def _run(self, name, function, *args):
        key = name
        program = self.compiled.get(key)
        if program is None:
            begun = time.perf_counter()
            with jax.set_mesh(self.mesh), damaged_entries_removed():
                program = self.compiled[key] = jax.jit(function, donate_argnums=0).lower(*args).compile()
            self.compile_seconds += time.perf_counter() - begun
        return program(*args)
