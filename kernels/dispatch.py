"""Chooses the implementation that multiplies by a weight, on one device's shards; `jaxllm.parallel` does the rest.

The choice is made while a program is traced, by the kind of weight and the platform of the ambient mesh. This machine
need not have that platform. If a format has no kernel, or its kernel refuses, the weight is dequantized and multiplied
(`dense`). If the kernel was requested by name (`using`), the refusal is an error.

Packed weights are frozen: only x has gradients, through the dequantized matrix, whichever implementation ran. Plain
weights (`Dense`) have gradients too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxllm.errors import InputError
from jaxllm.formats.adapted import base_of
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.formats.scaled import Activations, Scaled
from jaxllm.kernels import dense, norm, registry
from jaxllm.kernels.activations import Quantized, Rounded, Rows, not_rounding, of_whole_rows, rounded, rounded_tiles
from jaxllm.kernels.attention import Cached, Scoring, attend
from jaxllm.kernels.coded import Buffer
from jaxllm.kernels.registry import REFERENCE, Kernel

PRODUCT = "product"  # the name of results that are worth keeping for a backward pass, see `kept`
_named: ContextVar[str | None] = ContextVar("backend", default=None)


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Code that is traced inside uses this backend, for example "reference" or "pallas_tpu", wherever it has kernels.

    Raises:
        InputError: there is no such backend, or, while tracing inside, it cannot serve a matmul.
    """
    known = sorted({kernel.backend for kernel in registry.KERNELS})
    if backend not in known:
        raise InputError(f"kernel backend '{backend}': choose one of {', '.join(known)}")
    token = _named.set(backend)
    try:
        yield
    finally:
        _named.reset(token)


@dataclass(frozen=True)
class Choice:
    """A kernel, and why it was chosen."""

    kernel: Kernel
    why: str

    @property
    def backend(self) -> str:
        return self.kernel.backend


def choose(op: str, x: Any, weight: Weight | type, platform: str | None = None) -> Choice:
    """The kernel that serves the op with these operands, which may be shapes only.

    Args:
        op: "matmul" or "grouped_matmul"; or "act_quant" (`weight` is a class), "weight_dequant" (x is None), or
            "attention" (x is `Cached`, `weight` is `jax.Array`) or "rms_norm" (`weight` is `jax.Array`).
        platform: "cpu", "tpu" or "gpu"; by default that of the ambient mesh, or else JAX's default.

    Raises:
        InputError: there is no such op, or a backend requested by name cannot do it.
    """
    platform, named = platform or _platform(), _named.get()
    weight = weight if isinstance(weight, type) else base_of(weight)
    platform = "gpu" if platform == "cuda" else platform
    ops = dict.fromkeys(kernel.op for kernel in registry.KERNELS)
    if op not in ops:
        raise InputError(f"op '{op}': choose one of {', '.join(ops)}")
    if not isinstance(weight, type) and of_whole_rows(weight):  # the rows are rounded before the kernel runs
        x, weight = x if x is None else jax.ShapeDtypeStruct(x.shape, jnp.float32), not_rounding(weight)

    kernels = [kernel for kernel in registry.KERNELS if kernel.takes(op, weight)]
    special = [kernel for kernel in kernels if kernel.platform is not None]
    if named is not None:
        special = [kernel for kernel in special if kernel.backend == named]
    refused: dict[str, None] = {}  # a backend may have several kernels for a class of weights, with the same reason
    for kernel in special:
        here = None if kernel.platform == platform else f"these are {platform} devices"
        reason = here or kernel.missing() or kernel.refuses(op, x, weight)
        if reason is None:
            return Choice(kernel, "asked for" if named else "; ".join([f"made for {platform}", *refused]))
        if named:
            refused[reason] = None
        elif here is None:
            refused[f"{kernel.backend} cannot: {reason}"] = None
    if named and refused:
        raise InputError(f"kernel backend '{named}' cannot do {op} of {_format(weight)}: {'; '.join(refused)}")
    kernel = next(k for k in kernels if k.platform is None and k.refuses(op, x, weight) is None)
    if named and (special or named == REFERENCE):
        why = "asked for"
    elif not any(k.platform for k in kernels):
        why = f"{_format(weight)} has no kernels: it is dequantized"
    else:
        why = "; ".join(refused) or f"there are no kernels for {named or platform}"
    return Choice(kernel, why)


def choose_for(weight: Weight, dtype: jax.typing.DTypeLike, platform: str) -> Choice:
    """The kernel that each device will use to multiply rows of `dtype` by its shard of a placed weight."""
    shard = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype), weight)
    op = "grouped_matmul" if len(weight.shape) > 2 else "matmul"
    return choose(op, jax.ShapeDtypeStruct((1, shard.shape[-1]), dtype), shard, platform)


def choose_attention(
    keys: Buffer, values: Buffer, dtype: jax.typing.DTypeLike, platform: str, latent: bool = False
) -> Choice:
    """The kernel by which each device will attend to its share of a cache, whose leaves have shardings.

    Args:
        dtype: of the queries.
        latent: whether `values` are what the keys go on with, see `Cached.rope`.
    """
    struct: Any = jax.ShapeDtypeStruct
    shard = lambda leaf: struct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)  # noqa: E731
    keys, values = jax.tree.map(shard, (keys, values))
    q = struct((1, 1, keys.shape[1], keys.shape[3] + latent * values.shape[3]), dtype)
    given = Cached(q, keys, values, struct((1, 1), jnp.int32))
    given = given._replace(values=None, rope=values) if latent else given
    return choose("attention", given, jax.Array, platform)


def explain(op: str, x: Any, weight: Weight | type, platform: str | None = None) -> str:
    """Which kernel would do an op, and why, as a sentence; see `choose` for the arguments."""
    choice = choose(op, x, weight, platform)
    if isinstance(x, Cached):
        what, shape = f"{x.q.dtype.name} to keys in {x.keys.dtype.name}", x.keys.shape
    else:
        what, shape = _format(weight), () if isinstance(weight, type) else weight.shape
    return f"{op} of {what} {'x'.join(map(str, shape))}: {choice.backend} ({choice.why})"


def _format(weight: Weight | type[Weight]) -> str:
    return weight.__name__ if isinstance(weight, type) else weight.format


def _platform() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def matmul(x: Rows, weight: Weight) -> jax.Array:
    """`x[..., in] @ weight[out, in].T` -> float32 `[..., out]`.

    Floats are rounded if the weight requires it (`Scaled.activations`). If `in` is sharded, the scale of an entire row
    is not known here, so the caller must round (`activations.rounded`).

    Raises:
        InputError: x holds codes without scales.
    """
    return matmuls([x], [weight])[0]


def matmuls(rows: Sequence[Rows], weights: Sequence[Weight]) -> tuple[jax.Array, ...]:
    """`matmul` of each of `rows` with its weight. If they are all the same, a kernel may do it in one call."""
    given = [_operands(x, weight, rounded) for x, weight in zip(rows, weights, strict=True)]
    kernels = [choose("matmul", x, weight).kernel for x, weight in given]
    together, x = kernels[0].together, given[0][0]
    if together and all(k.together is together for k in kernels) and all(other is x for other, _ in given):
        trained = kernels[0].trained or together
        return _frozen(together, _matmuls_vjp, forward=trained)(*alike(x, *(weight for _, weight in given)))
    return tuple(_matmul(kernel, *operands) for kernel, operands in zip(kernels, given, strict=True))


def _matmul(kernel: Kernel, x: Any, weight: Weight) -> jax.Array:
    if kernel.differentiable and isinstance(weight, Dense) and weight.values.dtype == x.dtype:
        return kernel.function(x, weight)
    # Otherwise the dequantized matrix would be kept for the backward pass: of a model, all of them.
    return _frozen(kernel.function, _matmul_vjp)(*alike(x, weight))


def grouped_matmul(x: Rows, stack: Weight, expert: jax.Array) -> jax.Array:
    """Tiles of rows, each times its own matrix, see `dense.grouped_matmul`; rounds like `matmul`."""
    return grouped_matmuls([x], [stack], expert)[0]


def grouped_matmuls(rows: Sequence[Rows], stacks: Sequence[Weight], expert: jax.Array) -> tuple[jax.Array, ...]:
    """`grouped_matmul` of each of `rows` with its stack. If they are all the same, a kernel may do it in one call."""
    round_rows = lambda x, stack: rounded_tiles(x, stack, expert)  # noqa: E731
    given = [_operands(x, stack, round_rows) for x, stack in zip(rows, stacks, strict=True)]
    kernels = [choose("grouped_matmul", x, stack).kernel for x, stack in given]
    together, x = kernels[0].together, given[0][0]
    if together and all(k.together is together for k in kernels) and all(other is x for other, _ in given):
        return _frozen(together, _groups_vjp, _stacks_gradients)(*alike(x, expert, *(stack for _, stack in given)))
    return tuple(
        _frozen(kernel.function, _grouped_vjp, _stack_gradients)(*alike(x, stack, expert))
        for kernel, (x, stack) in zip(kernels, given, strict=True)
    )


def few_rows(x: Rows, stack: Weight) -> int:
    """How many rows of a tile cost `grouped_matmul` hardly more than one."""
    return choose("grouped_matmul", x, stack).kernel.few_rows


def kept(y: jax.Array) -> jax.Array:
    """y, marked as what a backward pass should not compute again, unlike what lies between two such results."""
    return checkpoint_name(y, PRODUCT)


def attention(given: Cached, scoring: Scoring) -> jax.Array:
    """Softmax attention over a cache on one device's heads, see `attention.attend`."""
    kernel = choose("attention", given, jax.Array).kernel
    given = alike(given)[0]
    run, definition = partial(kernel.function, scoring=scoring), partial(attend, scoring=scoring)
    if kernel.differentiable:
        return kept(run(given))
    function = jax.custom_vjp(run)
    function.defvjp(lambda given: (run(given), given), lambda given, g: jax.vjp(definition, given)[1](g))
    return kept(function(given))


def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """The norm of each row, see `norm.rms_norm`."""
    kernel, definition = choose("rms_norm", x, jax.Array).kernel, partial(norm.rms_norm, eps=eps)
    if kernel.differentiable:
        return definition(x, weight)
    run = partial(kernel.function, eps=eps)
    function = jax.custom_vjp(run)
    function.defvjp(lambda *given: (run(*given), given), lambda given, g: jax.vjp(definition, *given)[1](g))
    return function(x, weight)


def dequantize(weight: Weight, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The dequantized matrix `[*batch, out, in]`, for layers that multiply by it in their own way, such as MLA's kv_b.

    This is not the op "weight_dequant" of `choose`: XLA can fuse it with the following computation.
    """
    return weight.dequantize(dtype)


def _operands(x: Rows, weight: Weight, round_rows: Callable[[jax.Array, Weight], Any]) -> tuple[Any, Weight]:
    """x and the weight as kernels take them: floats, or codes with scales. Entire rows are already rounded."""
    if isinstance(x, Quantized):
        if not isinstance(weight, Scaled):
            return x.dequantize(), weight
        if x.codes.dtype != weight.values.dtype:
            raise InputError(
                f"x is of {x.codes.dtype.name} and the weight of {weight.values.dtype.name}: both must be the same"
            )
        return x, replace(weight, activations=Activations(x.group))
    if not isinstance(x, Rounded):
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize == 1:
            raise InputError(
                f"x is of {x.dtype.name}: codes need their scales, as activations.Quantized(codes, scales, group)"
            )
        x = round_rows(x, weight)
    return (x.values, not_rounding(weight)) if isinstance(x, Rounded) else (x, weight)


def alike(*trees: object) -> tuple:
    """The same values, each marked as varying over all mesh axes that any of them varies over, as gradients will."""
    axes = frozenset().union(*(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(trees)))

    def vary(leaf: jax.Array) -> jax.Array:
        missing = tuple(axes - jax.typeof(leaf).mat.varying)
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, trees)


def _frozen(
    f: Callable, backward: Callable, plain: Callable | None = None, forward: Callable | None = None
) -> Callable:
    """`f(x, weight, ...)` with gradients for x, `backward(g, x, weight, ...)`, and plain weights (`plain`, likewise).
    Codes have none. Where gradients are computed, `forward` replaces f."""

    def guarded(x: Any, *rest: Any) -> jax.Array:
        differentiable: Callable = f if isinstance(x, Quantized) else function
        return differentiable(x, *rest)

    function = jax.custom_vjp(f)
    function.defvjp(
        lambda x, *rest: ((forward or f)(x, *rest), (x, *rest)),
        lambda kept, g: (backward(g, *kept).astype(kept[0].dtype), *(plain or _plain_gradients)(g, *kept)),
    )
    return guarded


def _plain_gradients(g: jax.Array | tuple[jax.Array, ...], x: jax.Array, *rest: Any) -> list[Any]:
    """Gradients of what follows x: those of plain matrices, and None for what is packed."""
    each = g if isinstance(g, tuple) else (g,) * len(rest)
    return [
        weight.like(jnp.einsum("...o,...i->oi", y, x.astype(y.dtype), precision=lax.Precision.HIGHEST))
        if isinstance(weight, Dense)
        else None
        for y, weight in zip(each, rest, strict=True)
    ]


def _stack_gradients(g: jax.Array, x: jax.Array, stack: Weight, expert: jax.Array) -> list[Any]:
    """The same of a stack, and of the tiles' experts, which have none."""
    plain = isinstance(stack, Dense)
    return [stack.like(dense.outer_products(g, x, expert, stack.shape[0])) if plain else None, None]


def _stacks_gradients(g: tuple[jax.Array, ...], x: jax.Array, expert: jax.Array, *stacks: Weight) -> list[Any]:
    """The same of the tiles' experts and several stacks."""
    return [None, *(_stack_gradients(y, x, stack, expert)[0] for y, stack in zip(g, stacks, strict=True))]


def _matmul_vjp(g: jax.Array, x: jax.Array, weight: Weight) -> jax.Array:
    # The matrix is not dequantized before g is there, nor is the one of the forward pass kept for this.
    g, weight = lax.optimization_barrier((g, weight))
    return dense.product(g.astype(x.dtype), weight.dequantize(x.dtype), 0)


def _matmuls_vjp(g: tuple[jax.Array, ...], x: jax.Array, *weights: Weight) -> jax.Array:
    return sum(_matmul_vjp(each, x, weight) for each, weight in zip(g, weights, strict=True))  # type: ignore[return-value]


def _grouped_vjp(g: jax.Array, x: jax.Array, stack: Weight, expert: jax.Array) -> jax.Array:
    return dense.each_tile(g, stack, expert, lambda rows, weight: _matmul_vjp(rows, x, weight))


def _groups_vjp(g: tuple[jax.Array, ...], x: jax.Array, expert: jax.Array, *stacks: Weight) -> jax.Array:
    return sum(_grouped_vjp(y, x, stack, expert) for y, stack in zip(g, stacks, strict=True))  # type: ignore[return-value]
