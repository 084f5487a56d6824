"""Which implementation multiplies by a weight. One device's shards only: see `jaxllm.parallel` for the rest.

The choice is made while a program is traced, by the kind of weight and by the platform of the ambient mesh, which may
be one that this machine does not have. A format without kernels of its own is decoded and multiplied (`dense`), and so
is what a kernel refuses, unless the kernel was asked for by name (`using`): then the refusal is an error.

Packed weights are frozen: gradients are those of x alone, through the decoded matrix, whichever implementation ran.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import ModuleType

import jax
from jax import lax
from jaxllm.kernels import dense

from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.formats.mxfp4 import MXFP4
from jaxllm.formats.scaled import Scaled

REFERENCE = "reference"
OPS = {Scaled: "block_fp8", MXFP4: "mxfp4"}  # packages here, each with a module for every backend
BACKENDS = {"tpu": "pallas_tpu", "gpu": "triton_gpu", "cuda": "triton_gpu"}  # by platform

_named: ContextVar[str | None] = ContextVar("backend", default=None)


@contextmanager
def using(backend: str) -> Iterator[None]:
    """What is traced inside uses this backend, "reference", "pallas_tpu" or "triton_gpu", wherever there is a choice.

    Raises:
        InputError: there is no such backend; inside: it cannot serve a matmul.
    """
    known = sorted({REFERENCE, *BACKENDS.values()})
    if backend not in known:
        raise InputError(f"kernel backend '{backend}': choose one of {', '.join(known)}")
    token = _named.set(backend)
    try:
        yield
    finally:
        _named.reset(token)


@dataclass(frozen=True)
class Choice:
    """A module that has the op, what it is called, and why it was chosen."""

    module: ModuleType
    backend: str
    why: str


def choose(op: str, x: jax.Array, weight: Weight, platform: str | None = None) -> Choice:
    """What multiplies these, which may be shapes only.

    Args:
        op: "matmul" or "grouped_matmul".
        platform: "cpu", "tpu" or "gpu"; by default that of the ambient mesh, or else JAX's own default.

    Raises:
        InputError: a backend asked for by name cannot.
    """
    platform, named = platform or _platform(), _named.get()
    kind = OPS.get(type(weight))
    if kind is None:
        return Choice(dense, REFERENCE, f"{weight.format} has no kernels: it is decoded")
    reference = importlib.import_module(f"jaxllm.kernels.{kind}.{REFERENCE}")
    backend = named or BACKENDS.get(platform, REFERENCE)
    if backend == REFERENCE:
        return Choice(reference, REFERENCE, "asked for" if named else f"there are no kernels for {platform}")
    module, reason = _loaded(kind, backend, platform)
    reason = reason or module.refuses(op, x, weight)
    if reason is None:
        return Choice(module, backend, "asked for" if named else f"made for {platform}")
    if named:
        raise InputError(f"kernel backend '{backend}' cannot do {kind}.{op}: {reason}")
    return Choice(reference, REFERENCE, f"{backend} cannot: {reason}")


def explain(op: str, x: jax.Array, weight: Weight, platform: str | None = None) -> str:
    """What `choose` says, in a sentence."""
    choice = choose(op, x, weight, platform)
    return f"{op} of {weight.format} {'x'.join(map(str, weight.shape))}: {choice.backend} ({choice.why})"


def _platform() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def _loaded(kind: str, backend: str, platform: str) -> tuple[ModuleType | None, str | None]:
    """The module of a backend, or why it cannot run."""
    if BACKENDS.get(platform) != backend:
        return None, f"these are {platform} devices"
    try:
        return importlib.import_module(f"jaxllm.kernels.{kind}.{backend}"), None
    except ImportError as error:
        return None, f"{error.name} is not installed"


def matmul(x: jax.Array, weight: Weight) -> jax.Array:
    """`x[..., in] @ weight[out, in].T` -> float32 `[..., out]`."""
    weight = _as_seen(weight)
    choice = choose("matmul", x, weight)
    if choice.module is dense:
        return dense.matmul(x, weight)
    return _frozen(choice.module.matmul, _matmul_vjp)(*_alike(x, weight))


def grouped_matmul(x: jax.Array, stack: Weight, expert: jax.Array) -> jax.Array:
    """Tiles of rows, each times a matrix of its own, see `dense.grouped_matmul`."""
    stack = _as_seen(stack)
    choice = choose("grouped_matmul", x, stack)
    return _frozen(choice.module.grouped_matmul, _grouped_vjp)(*_alike(x, stack, expert))


def _as_seen(weight: Weight) -> Weight:
    """Where whole rows of x are rounded, they are already (`activations.seen`)."""
    if isinstance(weight, Scaled) and weight.activation_group == -1:
        return replace(weight, activation_group=None, input_scale=None)
    return weight


def _alike(*trees: object) -> tuple:
    """The same values, each varying over all mesh axes that one of them varies over, as gradients will."""
    axes = frozenset().union(*(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(trees)))

    def vary(leaf: jax.Array) -> jax.Array:
        missing = tuple(axes - jax.typeof(leaf).mat.varying)
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, trees)


def _frozen(f: Callable, backward: Callable) -> Callable:
    """`f(x, weight, ...)` with a gradient for x alone: `backward(g, x, weight, ...)`."""
    function = jax.custom_vjp(f)
    function.defvjp(
        lambda x, *rest: (f(x, *rest), (x, *rest)),
        lambda kept, g: (backward(g, *kept).astype(kept[0].dtype), *(None for _ in kept[1:])),
    )
    return function


def _matmul_vjp(g: jax.Array, x: jax.Array, weight: Weight) -> jax.Array:
    return dense.product(g, weight.dequantize(), 0)


def _grouped_vjp(g: jax.Array, x: jax.Array, stack: Weight, expert: jax.Array) -> jax.Array:
    return dense.each_tile(g, stack, expert, lambda rows, weight: dense.product(rows, weight.dequantize(), 0))
