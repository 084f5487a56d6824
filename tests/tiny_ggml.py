"""Tiny files from before GGUF, as llama.cpp wrote them."""

import struct

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from tiny_gguf import Tiny, random_tensor

# What a file begins with; how llama.cpp's source spells the word is the other way round.
BEGINNINGS = {
    "ggml": b"lmgg",
    "ggmf 1": b"fmgg" + struct.pack("<I", 1),
    "ggjt 1": b"tjgg" + struct.pack("<I", 1),
    "ggjt 2": b"tjgg" + struct.pack("<I", 2),
    "ggjt 3": b"tjgg" + struct.pack("<I", 3),
}

NAMES = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
    "attn_norm": "attention_norm",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
}

# Unknown, begin and end have no text of their own; then 256 bytes, and pieces by falling score.
VOCABULARY = [
    (" \u2047 ".encode(), 0.0),
    (b"", 0.0),
    (b"", 0.0),
    *((bytes([i]), 0.0) for i in range(256)),
    *((piece.encode(), -float(i)) for i, piece in enumerate([" a", "bc", " abc", "é", " ", "a", "b", "c", "ab", ""])),
]


def write(path, kind: str, tiny: Tiny) -> dict[str, np.ndarray]:
    """Write a file of the `kind`, a key of `BEGINNINGS`; returns the tensors by their names in GGUF, as float32."""
    content = bytearray(BEGINNINGS[kind])
    content += struct.pack("<7I", tiny.vocab, tiny.hidden, 256, tiny.heads, tiny.layers, tiny.head_dim, 0)
    for token, score in VOCABULARY[: tiny.vocab]:
        content += struct.pack("<I", len(token)) + token + (b"" if kind == "ggml" else struct.pack("<f", score))
    rng = np.random.default_rng(tiny.seed)
    decoded = {}
    for name, shape in tiny.shapes().items():
        *layer, part, _ = name.split(".")
        old = ".".join([*(f"layers.{i}" for i in layer[1:]), NAMES[part], "weight"]).encode()
        type = T.F32 if len(shape) == 1 else tiny.type_of(name)
        data = rng.uniform(0.5, 2, shape).astype(np.float32) if len(shape) == 1 else random_tensor(rng, shape, type)
        content += struct.pack(f"<3I{len(shape)}I", len(shape), len(old), type, *shape[::-1]) + old
        if kind.startswith("ggjt"):
            content += bytes(-len(content) % 32)
        content += data.tobytes()
        decoded[name] = np.asarray(gguf.quants.dequantize(data, type), np.float32).reshape(shape)
    path.write_bytes(content)
    return decoded
