"""Writes tests/golden/ggml_encoder_*.json: how far llama.cpp's own encoders land from the weights they are given.

Run where llama-cpp-python 0.3.36, gguf 0.19 and numpy are installed (jaxllm is not needed):

    python tests/reference/ggml_encoder_rmse.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf

It calls `ggml_quantize_chunk` of libggml-base and decodes with gguf-py. The tests import `synthetic`, `real` and
`mixture` from here, so that both sides see the same weights; the goldens' entries for zeros tell if they did not.

- ggml_encoder_rmse.json: the types that a language model is usually quantized to, without an importance matrix.
- ggml_encoder_importance.json: all types on `mixture`, with and without; and digests of the blocks of those that round.
"""

import ctypes
import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np

SEED = 20251122
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4"]
MIXTURE_TYPES = [
    *TYPES,
    *("TQ1_0", "TQ2_0", "NVFP4", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"),
]
REAL = ("blk.0.ffn_down.weight", "blk.20.ffn_down.weight")


def synthetic() -> dict[str, np.ndarray]:
    """Matrices float32 [256, 768] by name, each from its own stream of SEED."""
    shape = (256, 768)
    streams = iter(np.random.default_rng(SEED).spawn(8))
    outlier = 0.02 * next(streams).standard_normal(shape)
    outlier[:, 100] *= 10
    sparse = np.where(next(streams).random(shape) < 0.3, 0.02 * next(streams).standard_normal(shape), 0.0)
    sparse[::8] = 0
    matrices = {
        "gaussian": 0.02 * next(streams).standard_normal(shape),
        "heavy_tailed": 0.02 * next(streams).standard_t(3, shape),
        "outlier_column": outlier,
        "offset": 0.02 * next(streams).standard_normal(shape) + 0.02,
        "positive": next(streams).uniform(0.5, 1.5, shape),
        "subnormal_scales": 2e-4 * next(streams).standard_normal(shape),
        "sparse": sparse,
    }
    return {name: m.astype(np.float32) for name, m in matrices.items()}


def real(path: Path) -> dict[str, np.ndarray]:
    """The first 64 rows of two matrices of the demo model, decoded to float32 [64, 1536]."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensors = {t.name: t for t in GGUFReader(path).tensors}
    return {name: dequantize(tensors[name].data[:64], tensors[name].tensor_type) for name in REAL}


def mixture() -> tuple[np.ndarray, np.ndarray]:
    """Parts of the synthetic matrices, float32 [7, 12, 512]; and importance [7, 512], where a few columns lead."""
    weights = np.stack([m[:12, :512] for m in synthetic().values()])
    rng = np.random.default_rng(SEED + 1)
    importance = rng.chisquare(1, (len(weights), weights.shape[-1]))
    return weights, (importance * np.where(rng.random(importance.shape) < 0.02, 300, 10)).astype(np.float32)


def costs(decoded: np.ndarray, weights: np.ndarray, importance: np.ndarray) -> list[float]:
    """For each matrix of `mixture`, the root of the mean of importance * error^2, by that of importance * weight^2."""
    square = importance[:, None].astype(np.float64) * (decoded.astype(np.float64) - weights) ** 2
    norm = importance[:, None].astype(np.float64) * weights.astype(np.float64) ** 2
    return rounded(np.sqrt(square.mean((1, 2)) / norm.mean((1, 2))))


def rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def rmse(decoded: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """The root mean square error, and the same with squares weighted by |w|: the searches favour large weights."""
    square = (decoded.astype(np.float64) - weights) ** 2
    return float(np.sqrt(square.mean())), float(np.sqrt((np.abs(weights) * square).mean()))


def llama_cpp_encode(weights: np.ndarray, type_name: str, importance: np.ndarray | None = None) -> np.ndarray | None:
    """Rows as llama.cpp quantizes them, uint8 [rows, bytes]; None if it has to have an importance."""
    import llama_cpp
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    lib = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    call = lib.ggml_quantize_chunk
    call.restype = ctypes.c_size_t
    call.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    kind = GGMLQuantizationType[type_name]
    weights = np.ascontiguousarray(weights)
    out = np.zeros(quant_shape_to_byte_shape(weights.shape, kind), np.uint8)
    if importance is None and lib.ggml_quantize_requires_imatrix(kind):
        return None
    costs = importance.ctypes.data if importance is not None else None
    written = call(kind, weights.ctypes.data, out.ctypes.data, 0, *weights.shape, costs)
    assert written == out.nbytes, (type_name, written, out.nbytes)
    return out


def digests() -> dict[str, str]:
    """SHA-256 of the blocks of `mixture` in types that `ggml_quantize_chunk` leaves out, or gguf-py."""
    import llama_cpp

    lib = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    weights, _ = mixture()
    found = {}
    for name, function, size, nbytes in (
        ("Q8_1", lib.quantize_row_q8_1_ref, 32, 36),
        ("Q8_K", lib.quantize_row_q8_K_ref, 256, 292),
        ("NVFP4", lib.quantize_row_nvfp4_ref, 64, 36),
    ):
        out = np.zeros(weights.size // size * nbytes, np.uint8)
        function(ctypes.c_void_p(weights.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(weights.size))
        found[name] = hashlib.sha256(out.tobytes()).hexdigest()
    return found


def mixture_golden() -> dict[str, dict]:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    weights, importance = mixture()
    equal = np.ones_like(importance)
    golden: dict[str, dict] = {
        "sums": {"weights": rounded(weights.sum((1, 2))), "importance": rounded(importance.sum(1))},
        "digests": digests(),
        "none": {},
        "importance": {},
    }
    for name in MIXTURE_TYPES:
        for case, given in (("none", [None] * len(weights)), ("importance", list(importance))):
            blocks = [llama_cpp_encode(m, name, i) for m, i in zip(weights, given, strict=True)]
            if blocks[0] is not None:
                decoded = dequantize(np.stack(blocks), GGMLQuantizationType[name])
                golden[case][name] = costs(decoded, weights, equal if case == "none" else importance)
    return golden


def write(name: str, golden: dict) -> None:
    text = json.dumps(golden, indent=1)
    text = re.sub(r"\[[^][]*\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text)  # a list is a line
    (Path(__file__).parent.parent / "golden" / name).write_text(text + "\n")


def main() -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    golden = {}
    for name, weights in (synthetic() | real(Path(sys.argv[1]))).items():
        golden[name] = {"zeros": rmse(np.zeros_like(weights), weights)}
        for type_name in TYPES:
            decoded = dequantize(llama_cpp_encode(weights, type_name), GGMLQuantizationType[type_name])
            golden[name][type_name] = rmse(decoded, weights)
    write("ggml_encoder_rmse.json", golden)
    write("ggml_encoder_importance.json", mixture_golden())


if __name__ == "__main__":
    main()
