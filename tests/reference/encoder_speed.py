"""Prints how fast matrices are encoded as K-quants, beside llama.cpp's own quantizer on the same two cores.

Eight matrices of 1024 x 2048, two at a time, as loading and converting do it; llama.cpp quantizes half of the rows of
one in each of two threads. Alternating, the best of five rounds each. With the library of llama-cpp-python's ggml:

    python tests/reference/encoder_speed.py SITE_PACKAGES/llama_cpp/lib/libggml-base.so
"""

import ctypes
import itertools
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from jaxllm.requantize import quantize

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
ROWS, COLUMNS, COUNT = 1024, 2048, 8


def theirs(path: str) -> Callable[[np.ndarray, str, np.ndarray | None], None]:
    call = ctypes.CDLL(path).ggml_quantize_chunk
    call.restype = ctypes.c_size_t
    call.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def encode(w: np.ndarray, type: str, importance: np.ndarray | None) -> None:
        kind = GGMLQuantizationType[type]
        size, nbytes = GGML_QUANT_SIZES[kind]
        out = np.empty((ROWS, COLUMNS // size * nbytes), np.uint8)
        known = None if importance is None else importance.ctypes.data

        def part(first: int) -> None:
            call(kind, w.ctypes.data, out.ctypes.data, first * COLUMNS, ROWS // 2, COLUMNS, known)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(part, (0, ROWS // 2)))

    return encode


def seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def main(library: str) -> None:
    rng, peer = np.random.default_rng(0), theirs(library)
    matrices = [(0.02 * rng.standard_normal((ROWS, COLUMNS))).astype(np.float32) for _ in range(COUNT)]
    matters = rng.chisquare(3, COLUMNS).astype(np.float32)
    print("million weights a second    jaxllm  llama.cpp  ratio")
    for type, importance in itertools.product(TYPES, (None, matters)):
        ours, other = compared(type, importance, matrices, peer)
        kind = "" if importance is None else "with importance"
        print(f"{type:8}{kind:18}{ours:8.1f}{other:11.1f}{ours / other:7.2f}", flush=True)


def compared(
    type: str, importance: np.ndarray | None, matrices: list[np.ndarray], peer: Callable[..., None]
) -> tuple[float, float]:
    """Million weights a second, ours and llama.cpp's."""

    def one(w: np.ndarray) -> None:
        jax.block_until_ready(quantize(w, type, importance))

    def all_of_ours() -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(one, matrices))

    one(matrices[0])  # compiles
    rounds = [(seconds(all_of_ours), seconds(lambda: peer(matrices[0], type, importance))) for _ in range(5)]
    ours, other = (min(column) for column in zip(*rounds, strict=True))
    return COUNT * matrices[0].size / ours / 1e6, matrices[0].size / other / 1e6


if __name__ == "__main__":
    main(sys.argv[1])
