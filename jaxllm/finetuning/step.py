"""The compiled programs of training: sums of gradients over rows of texts, and what an optimizer does with them.

Only the two factors of each low-rank change are trained. The base is an argument like any other and stays packed: a
backward pass dequantizes one matrix at a time, and again when it needs it again.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.compilation_cache import damaged_entries_removed
from jaxllm.declaration import Declaration
from jaxllm.errors import InputError
from jaxllm.finetuning.loss import answer_loss
from jaxllm.formats.adapted import Adapted, LowRank, base_of
from jaxllm.formats.base import take
from jaxllm.language_model import LanguageModel
from jaxllm.layers.decoder import Decoder
from jaxllm.layers.parameter import parameters
from jaxllm.programs import runs_ahead

try:
    import optax
except ModuleNotFoundError as error:
    raise InputError("training needs optax: pip install 'jaxllm[finetune]'") from error


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factors:
    """What is trained of one matrix, or of a stack of them, in the checkpoint's order and size, whatever the mesh.

    a: float32 `[*batch, rank, in]`.
    b: float32 `[*batch, out, rank]`.
    """

    a: Any
    b: Any


Trained = Mapping[str, Factors]  # by the parameters' names


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows of texts, each int32 `[rows, time]`.

    tokens: what is read.
    segments: which of several texts in its row each token belongs to, see `Context`.
    targets: the token that has to follow; -1 where any may.
    """

    tokens: Any
    segments: Any
    targets: Any

    @property
    def answers(self) -> int:
        """How many tokens have a target."""
        return int((self.targets >= 0).sum())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """Sums over tokens that have a target: of their losses (float32), of the gradients, and their number (int32)."""

    loss: jax.Array
    count: jax.Array
    gradients: Trained


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Progress:
    """What training changes: the factors, and the optimizer's state."""

    trained: Trained
    optimizer: optax.OptState


@dataclass(frozen=True)
class Place:
    """Where the factors of one parameter go on a mesh.

    scale: what `b @ a` is multiplied by.
    """

    declaration: Declaration
    scale: float

    @property
    def index(self) -> tuple[np.ndarray | None, ...]:
        """See `Declaration.index`; None also where everything is in order."""
        sizes = zip(self.declaration.index, self.declaration.shape, strict=True)
        return tuple(None if i is None or np.array_equal(i, np.arange(size)) else i for i, size in sizes)

    def shardings(self, factors: Factors, mesh: Mesh) -> Factors:
        """How the factors lie: sharded like their matrix; or replicated, where that has another order."""
        specs: Any = Factors(PartitionSpec(), PartitionSpec())
        if all(index is None for index in self.index):
            specs = self.low_rank(factors).shard_specs(self.declaration.spec, mesh)
        return Factors(NamedSharding(mesh, specs.a), NamedSharding(mesh, specs.b))

    def low_rank(self, factors: Factors) -> LowRank:
        """The change, in the checkpoint's order."""
        numpy: Any = np if isinstance(factors.a, np.ndarray) else jnp
        return LowRank(factors.a, factors.b, numpy.full(factors.a.shape[:-1], self.scale, np.float32))

    def arranged(self, factors: Factors) -> LowRank:
        """The change, in the order on the mesh. So the copies of a row that several devices hold (of a key head) are
        trained as one, and what is padding stays zero."""
        *stack, rows, cols = self.index
        low = self.low_rank(factors).arrange(rows, cols)
        for index in stack:
            low = low if index is None else jax.tree.map(lambda leaf, index=index: take(leaf, index, 0), low)
        return low


class Steps:
    """The programs of one training, each compiled when it is first called. Arguments that have
    a successor among the results are donated.

    Attributes:
        compiled: the programs by name.
        compile_seconds: time spent on compiling so far.
    """

    def __init__(
        self,
        model: LanguageModel,
        places: Mapping[str, Place],
        optimizer: optax.GradientTransformation,
        remat: bool,
    ) -> None:
        self.mesh, self.compiled, self.compile_seconds = model.mesh, dict[str, jax.stages.Compiled](), 0.0
        self._everywhere = NamedSharding(model.mesh, PartitionSpec())
        self._optimizer, self._runs_ahead = optimizer, runs_ahead(model.mesh)
        graph, state = nnx.split(model.model)
        self._leaves, tree = jax.tree.flatten(state)

        def hidden_states(trained: Trained, leaves: list[jax.Array], batch: Batch) -> tuple[jax.Array, Decoder]:
            decoder = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
            held = parameters(decoder)
            for name, factors in trained.items():
                base = base_of(held[name].get_value())
                held[name].set_value(Adapted(base, places[name].arranged(factors)))
            rows, length = batch.tokens.shape
            whole = jnp.full(rows, length, jnp.int32)
            shapes = decoder.cache(rows, length, model.dtype, model.mesh)  # rows are complete: it is not used
            cache = replace(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), limits=whole)
            hidden, _ = decoder(batch.tokens, cache, whole, length, model.dtype, segments=batch.segments, remat=remat)
            return hidden, decoder

        def add(into: Sums, trained: Trained, leaves: list[jax.Array], batch: Batch) -> Sums:
            hidden, backward, decoder = jax.vjp(lambda t: hidden_states(t, leaves, batch), trained, has_aux=True)
            loss, gradient = answer_loss(decoder.logits, hidden, batch.targets)
            more = Sums(loss, jnp.sum(batch.targets >= 0, dtype=jnp.int32), backward(gradient)[0])
            return jax.tree.map(jnp.add, into, more)

        def evaluate(trained: Trained, leaves: list[jax.Array], batch: Batch) -> jax.Array:
            hidden, decoder = hidden_states(trained, leaves, batch)
            return answer_loss(decoder.logits, hidden, batch.targets)[0]

        def update(now: Progress, sums: Sums) -> tuple[Progress, Sums, jax.Array, jax.Array]:
            count = jnp.maximum(sums.count, 1).astype(jnp.float32)
            mean = jax.tree.map(lambda gradient: gradient / count, sums.gradients)
            with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
                changes, state = optimizer.update(mean, now.optimizer, now.trained)
            trained = optax.apply_updates(now.trained, changes)
            nothing = jax.tree.map(jnp.zeros_like, sums)
            return Progress(trained, state), nothing, sums.loss / count, optax.tree.norm(mean)

        self._add, self._evaluate, self._update = add, evaluate, update

    def begin(self, trained: Trained) -> Progress:
        """The factors, placed, before the first step."""
        state = jax.tree.map(
            lambda leaf: self.replicated(leaf) if leaf.ndim == 0 else leaf, self._optimizer.init(trained)
        )
        return Progress(trained, state)

    def zeros(self, trained: Trained) -> Sums:
        """Sums over nothing."""
        gradients = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), trained)
        return Sums(self.replicated(np.float32(0)), self.replicated(np.int32(0)), gradients)

    def add(self, into: Sums, trained: Trained, batch: Batch) -> Sums:
        """The sums with those of a batch added."""
        outputs = _shardings(into)
        return self._run("add", self._add, outputs, (0,), into, trained, self._leaves, self.replicated(batch))

    def evaluate(self, trained: Trained, batch: Batch) -> jax.Array:
        """The sum of a batch's losses."""
        args = trained, self._leaves, self.replicated(batch)
        return self._run("evaluate", self._evaluate, self._everywhere, (), *args)

    def update(self, now: Progress, sums: Sums) -> tuple[Progress, Sums, jax.Array, jax.Array]:
        """One step of the optimizer; then sums over nothing, the mean loss, and the norm of the gradient."""
        outputs = _shardings(now), _shardings(sums), self._everywhere, self._everywhere
        return self._run("update", self._update, outputs, (0, 1), now, sums)

    def replicated(self, tree: Any) -> Any:
        """Arrays of the host on every device."""
        return jax.device_put(tree, self._everywhere)

    def _run(self, name: str, function: Callable, outputs: Any, donated: tuple[int, ...], *args: Any) -> Any:
        """The results of `function`, which is compiled when it is first called.

        Args:
            outputs: the shardings of the results.
            donated: the numbers of the arguments that are updated in place.
        """
        program = self.compiled.get(name)
        if program is None:
            begun = time.perf_counter()
            with jax.set_mesh(self.mesh), damaged_entries_removed():
                jitted = jax.jit(function, out_shardings=outputs, donate_argnums=donated)
                program = self.compiled[name] = jitted.lower(*args).compile()
            self.compile_seconds += time.perf_counter() - begun
        results = program(*args)
        return results if self._runs_ahead else jax.block_until_ready(results)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
