"""The compiled half of the native kernels: found, started and registered with XLA once, when it is first needed.

It is compiled when the package is installed, if there is a compiler (`building.py`). Without it everything works, more
slowly.

Environment:
    JAXLLM_CPU: the instruction set to use, "avx512", "avx2", "dotprod" or "portable"; "off": no native kernels. By
        default the best one that the processor has.
    JAXLLM_THREADS: how many threads work on a matrix; by default as many as the process has cores.
"""

import ctypes
import functools
import os
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import jax
import numpy as np

from jaxllm.errors import InputError
from jaxllm.formats.ggml_grids import grid

GRIDS = ("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
TARGETS = (
    "jaxllm_matmul",
    "jaxllm_grouped_matmul",
    "jaxllm_attention",
    "jaxllm_attention_gradients",
    "jaxllm_rms_norm",
)


@dataclass(frozen=True)
class Native:
    """The instruction set that the kernels use, or why there are none."""

    instructions: str | None
    missing: str | None = None


@functools.cache
def native() -> Native:
    """The library, started when this is first called.

    Raises:
        InputError: the environment asks for an instruction set that is not there.
    """
    wanted = os.environ.get("JAXLLM_CPU", "")
    if wanted == "off":
        return Native(None, "the native kernels are switched off (JAXLLM_CPU=off)")
    # Of this Python: another's, in the same folder, may have been compiled from an older source.
    file = Path(__file__).with_name(f"_native{EXTENSION_SUFFIXES[0]}")
    if not file.exists():
        # The demo decodes 3.5 times as fast with them (AMD EPYC with AVX2, two cores).
        cause = "there was no C++ compiler at installation; decoding takes about three times as long"
        return Native(None, f"the native kernels were not compiled, because {cause}")
    library = ctypes.CDLL(str(file))
    start = library.jaxllm_start
    start.argtypes, start.restype = (ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p), ctypes.c_char_p
    addresses = np.array([_grid(name).ctypes.data for name in GRIDS], np.uintp)
    name = start(wanted.encode(), threads(), addresses.ctypes.data)
    if name is None:
        raise InputError(f"JAXLLM_CPU={wanted}: this processor has no such instruction set; choose portable, or none")
    try:
        for target in TARGETS:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    except jax.errors.JaxRuntimeError:
        return Native(None, "the native kernels were compiled for a newer jaxlib: install jaxllm again")
    return Native(name.decode())


@functools.cache
def _grid(name: str) -> np.ndarray:
    """A codebook, kept for as long as the process lives."""
    return np.ascontiguousarray(grid(name))


def threads() -> int:
    """How many threads work on a matrix. Raises InputError if the environment says no positive number."""
    asked = os.environ.get("JAXLLM_THREADS")
    if asked is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not asked.isdecimal() or int(asked) < 1:
        raise InputError(f"JAXLLM_THREADS={asked}: must be 1 or above")
    return int(asked)


def missing() -> str | None:
    """Why there are no native kernels, or None."""
    return native().missing
