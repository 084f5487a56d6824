"""Writes tests/golden/ggml_encoder_rmse.json: how far llama.cpp's own encoders land from the weights they are given.

Run where llama-cpp-python 0.3.36, gguf 0.19 and numpy are installed (jaxllm is not needed):

    python tests/reference/ggml_encoder_rmse.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf

It calls `ggml_quantize_chunk` of libggml-base without an importance matrix, and decodes with gguf-py. The tests import
`synthetic` and `real` from here, so that both sides see the same weights; the golden's entry for zeros tells if they
did not.
"""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np

SEED = 20251122
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4"]
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


def rmse(decoded: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """The root mean square error, and the same with squares weighted by |w|: the searches favour large weights."""
    square = (decoded.astype(np.float64) - weights) ** 2
    return float(np.sqrt(square.mean())), float(np.sqrt((np.abs(weights) * square).mean()))


def llama_cpp_encode(weights: np.ndarray, type_name: str) -> np.ndarray:
    """Rows as llama.cpp quantizes them, uint8 [rows, bytes]."""
    import llama_cpp
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    lib = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    call = lib.ggml_quantize_chunk
    call.restype = ctypes.c_size_t
    call.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    kind = GGMLQuantizationType[type_name]
    weights = np.ascontiguousarray(weights)
    out = np.zeros(quant_shape_to_byte_shape(weights.shape, kind), np.uint8)
    written = call(kind, weights.ctypes.data, out.ctypes.data, 0, *weights.shape, None)
    assert written == out.nbytes, (type_name, written, out.nbytes)
    return out


def main() -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    golden = {}
    for name, weights in (synthetic() | real(Path(sys.argv[1]))).items():
        golden[name] = {"zeros": rmse(np.zeros_like(weights), weights)}
        for type_name in TYPES:
            decoded = dequantize(llama_cpp_encode(weights, type_name), GGMLQuantizationType[type_name])
            golden[name][type_name] = rmse(decoded, weights)
    path = Path(__file__).parent.parent / "golden" / "ggml_encoder_rmse.json"
    path.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
