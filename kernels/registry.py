"""The list of kernels, in order of preference.

A `Kernel` does one op on one kind of weight on one platform. `dispatch` takes the first that does not refuse. The last
ones are the definitions: they run on every platform and never refuse. Another package adds its own with `register`.

Kernels are listed without importing their modules, because some need packages that most machines lack.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from jaxllm.formats.affine import Affine
from jaxllm.formats.base import Weight
from jaxllm.formats.codebook import Codebook
from jaxllm.formats.dense import Dense
from jaxllm.formats.ggml import GGML
from jaxllm.formats.mxfp4 import MXFP4
from jaxllm.formats.nvfp4 import NVFP4
from jaxllm.formats.planes import Planes
from jaxllm.formats.planes_of import PARTS, planes_of
from jaxllm.formats.scaled import Scaled
from jaxllm.kernels import attention, dense, norm

REFERENCE = "reference"
MATMULS = "matmul", "grouped_matmul"


@dataclass(frozen=True)
class Layout:
    """How a kernel needs the leaves of a weight stored on devices. The loader follows it.

    Attributes:
        row_major: whether leaves are stored in row-major order. (TPUs transpose narrow arrays by default, and XLA
            would transpose them back before every call.)
        repack: maps a weight as it was read to the weight to hold, which has the same logical shape and perhaps another
            class with its own kernels. It is traced, with leaves sharded over the mesh.
    """

    row_major: bool = False
    repack: Callable[[Any], Weight] | None = None


AS_READ = Layout()


def nothing() -> None:
    """The `missing` of a kernel that needs nothing."""


def packages(*names: str) -> Callable[[], str | None]:
    """The `missing` of a kernel that needs optional packages. (A broken package raises.)"""

    def missing() -> str | None:
        for name in names:
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name not in names:
                    raise
                package = error.name.replace("_", "-")
                return f"{package} is not installed: pip install 'jaxllm[gpu]'"
        return None

    return missing


def serves_all(op: str, x: Any, weight: Any) -> str | None:
    """The `refuses` of a kernel that refuses nothing."""
    return None


@dataclass(frozen=True)
class Kernel:
    """One way to do an op.

    Attributes:
        op: "matmul", "grouped_matmul", "act_quant", "weight_dequant", "attention" or "rms_norm", see `dense`,
            `block_fp8.reference`, `attention` and `norm`.
        weight: the class of weights that it takes, or several. `act_quant` takes none and is registered for `Scaled`,
            attention and norms for `jax.Array`.
        platform: "cpu", "tpu" or "gpu"; None: all of them.
        backend: its name in `dispatch.using` and in explanations.
        function: the op, on one device's shards.
        differentiable: whether gradients pass through the function, to plain weights too. Otherwise only x has
            gradients, and the function needs none.
        refuses: given `(op, x, weight)`, perhaps shapes only, why the kernel cannot serve them, in words for users, or
            None.
        layout: how the weight should be stored.
        missing: why it cannot run on this machine, or None.
        few_rows: of `grouped_matmul`, how many rows of a tile cost hardly more than one, which reads the expert too.
        together: the op with several weights that take the same x, if it has that: `f(x, *weights)` of `matmul`,
            `f(x, expert, *stacks)` of `grouped_matmul`.
        trained: the same as `together` where gradients are computed, if it does that in another way.
    """

    op: str
    weight: Any
    platform: str | None
    backend: str
    function: Callable
    refuses: Callable[[str, Any, Any], str | None] = serves_all
    layout: Layout = AS_READ
    missing: Callable[[], str | None] = nothing
    few_rows: int = 16
    together: Callable | None = None
    trained: Callable | None = None
    differentiable: bool = False

    def takes(self, op: str, weight: Weight | type[Weight]) -> bool:
        """Whether the kernel is for this op and this class of weight."""
        kind = weight if isinstance(weight, type) else type(weight)
        return self.op == op and issubclass(kind, self.weight)


def _late(module: str, name: str) -> Callable:
    """A function of one of our modules; the module is imported when the function is called."""
    return lambda *args, **options: getattr(importlib.import_module(f"jaxllm.kernels.{module}"), name)(*args, **options)


def _kernels(module: str, weight: Any, platform: str | None, *ops: str, **options: Any) -> list[Kernel]:
    """The kernels of one of our modules, named `format.backend`."""
    backend = module.rpartition(".")[2]
    refuses = _late(module, "refuses") if platform else serves_all
    return [Kernel(op, weight, platform, backend, _late(module, op), refuses, **options) for op in ops]


def _is_not_mxfp4(op: str, x: Any, weight: GGML) -> str | None:
    return None if weight.type == "MXFP4" else f"only MXFP4 is repacked, not {weight.type}"


TRITON = packages("triton", "jax_triton")
ROW_MAJOR = Layout(row_major=True)
TO_PLANES = tuple(PARTS)
TRANSPOSED, UPRIGHT = (Layout(repack=partial(planes_of, transposed=transposed)) for transposed in (True, False))
REORDERED = Layout(repack=MXFP4.from_ggml)  # puts the codes of a block in order, on all platforms
FP8_OPS = *MATMULS, "act_quant", "weight_dequant"
NATIVE = {"missing": _late("cpu.library", "missing")}
MATMUL = {"together": _late("cpu.native_cpu", "matmuls"), "trained": _late("cpu.native_cpu", "trained_matmuls")}
GROUPED = {"together": _late("cpu.native_cpu", "grouped_matmuls"), "few_rows": 1}
PACKED = GGML, Affine, Scaled, Codebook, MXFP4, NVFP4, Dense
KERNELS: list[Kernel] = [
    *_kernels("cpu.native_cpu", PACKED, "cpu", "matmul", **NATIVE, **MATMUL),
    *_kernels("cpu.native_cpu", PACKED, "cpu", "grouped_matmul", **NATIVE, **GROUPED),
    *_kernels("block_fp8.pallas_tpu", Scaled, "tpu", *FP8_OPS, layout=ROW_MAJOR),
    *_kernels("block_fp8.triton_gpu", Scaled, "gpu", *FP8_OPS, missing=TRITON),
    *_kernels("mxfp4.pallas_tpu", MXFP4, "tpu", *MATMULS, layout=ROW_MAJOR),
    *_kernels("mxfp4.triton_gpu", MXFP4, "gpu", *MATMULS, missing=TRITON),
    *_kernels("planes.pallas_tpu", Planes, "tpu", *MATMULS, layout=ROW_MAJOR),
    *_kernels("planes.pallas_tpu", TO_PLANES, "tpu", *MATMULS, layout=TRANSPOSED),
    *_kernels("planes.triton_gpu", Planes, "gpu", *MATMULS, missing=TRITON),
    *_kernels("planes.triton_gpu", TO_PLANES, "gpu", *MATMULS, layout=UPRIGHT, missing=TRITON),
    *_kernels("block_fp8.reference", Scaled, None, *FP8_OPS),
    *_kernels("mxfp4.reference", MXFP4, None, *MATMULS),
    Kernel("matmul", GGML, None, REFERENCE, dense.matmul, _is_not_mxfp4, REORDERED, differentiable=True),
    Kernel("grouped_matmul", GGML, None, REFERENCE, dense.grouped_matmul, _is_not_mxfp4, REORDERED),
    Kernel("matmul", Weight, None, REFERENCE, dense.matmul, differentiable=True),
    Kernel("grouped_matmul", Weight, None, REFERENCE, dense.grouped_matmul),
    Kernel("weight_dequant", Weight, None, REFERENCE, dense.weight_dequant),
    *_kernels("cpu.native_cpu", jax.Array, "cpu", "attention", **NATIVE, differentiable=True),
    *_kernels("cpu.native_cpu", jax.Array, "cpu", "rms_norm", **NATIVE),
    *_kernels("flash.pallas_tpu", jax.Array, "tpu", "attention"),
    *_kernels("flash.triton_gpu", jax.Array, "gpu", "attention", missing=TRITON),
    Kernel("attention", jax.Array, None, REFERENCE, attention.attend, differentiable=True),
    Kernel("rms_norm", jax.Array, None, REFERENCE, norm.rms_norm, differentiable=True),
]


def register(*kernels: Kernel) -> None:
    """Add kernels, which are preferred to the existing ones."""
    KERNELS[:0] = kernels


def row_major(weight: Weight, platform: str) -> bool:
    """Whether a kernel of the platform needs the leaves of such a weight in row-major order."""
    return any(k.platform == platform and isinstance(weight, k.weight) and k.layout.row_major for k in KERNELS)


def missing(weights: list[Weight | jax.Array], platform: str) -> str | None:
    """Why the platform's kernels for some of these weights cannot be imported, or None."""
    wanted = (k for k in KERNELS if k.platform == platform and any(isinstance(w, k.weight) for w in weights))
    return next(filter(None, (kernel.missing() for kernel in wanted)), None)
