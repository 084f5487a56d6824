"""Tiny GGUF files with random weights, and the same model written once more, in plain numpy."""

from dataclasses import dataclass, field

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

# Where the float16 scales of a K-quant block are: gguf-py cannot encode these, so blocks are random but for the scales.
SCALES = {T.Q2_K: (80, 82), T.Q3_K: (108,), T.Q4_K: (0, 2), T.Q5_K: (0, 2), T.Q6_K: (208,)}


@dataclass(frozen=True)
class Tiny:
    """Sizes of a tiny model. `types` gives the block type of matrices by the end of their name; others have `type`."""

    hidden: int = 64
    intermediate: int = 96
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int | None = None
    rotary_dim: int | None = None
    vocab: int = 50
    context: int = 128
    type: T = T.Q8_0
    types: dict[str, T] = field(default_factory=dict)
    tied: bool = False
    rope_freqs: bool = False
    seed: int = 0

    @property
    def values(self) -> int:
        return self.value_dim or self.head_dim

    @property
    def rotary(self) -> int:
        return self.rotary_dim or self.head_dim

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {"token_embd.weight": (self.vocab, self.hidden), "output_norm.weight": (self.hidden,)}
        if not self.tied:
            shapes["output.weight"] = (self.vocab, self.hidden)
        if self.rope_freqs:
            shapes["rope_freqs.weight"] = (self.rotary // 2,)
        for i in range(self.layers):
            shapes |= {
                f"blk.{i}.attn_norm.weight": (self.hidden,),
                f"blk.{i}.attn_q.weight": (self.heads * self.head_dim, self.hidden),
                f"blk.{i}.attn_k.weight": (self.kv_heads * self.head_dim, self.hidden),
                f"blk.{i}.attn_v.weight": (self.kv_heads * self.values, self.hidden),
                f"blk.{i}.attn_output.weight": (self.hidden, self.heads * self.values),
                f"blk.{i}.ffn_norm.weight": (self.hidden,),
                f"blk.{i}.ffn_gate.weight": (self.intermediate, self.hidden),
                f"blk.{i}.ffn_up.weight": (self.intermediate, self.hidden),
                f"blk.{i}.ffn_down.weight": (self.hidden, self.intermediate),
            }
        return shapes

    def metadata(self) -> dict[str, int | float]:
        return {
            "block_count": self.layers,
            "context_length": self.context,
            "embedding_length": self.hidden,
            "feed_forward_length": self.intermediate,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.values,
            "rope.dimension_count": self.rotary,
            "rope.freq_base": 500.0,
            "attention.layer_norm_rms_epsilon": 1e-5,
        }

    def type_of(self, name: str) -> T:
        return next((type for end, type in self.types.items() if name.endswith(end)), self.type)


def random_tensor(rng: np.random.Generator, shape: tuple[int, ...], type: T) -> np.ndarray:
    """A matrix in `type`, as the bytes (or floats) of a file."""
    if type in SCALES:
        size, nbytes = gguf.GGML_QUANT_SIZES[type]
        blocks = rng.integers(0, 256, (shape[0], shape[1] // size, nbytes), np.uint8)
        for offset in SCALES[type]:
            scale = rng.uniform(0.5, 1, blocks.shape[:2]) / (30 * 16 * size**0.5)
            blocks[..., offset : offset + 2] = scale.astype(np.float16)[..., None].view(np.uint8)
        return blocks.reshape(shape[0], -1)
    values = rng.normal(size=shape).astype(np.float32) / shape[-1] ** 0.5
    return gguf.quants.quantize(values, type)


def write(path, tiny: Tiny, tokenizer: dict[str, object] | None = None) -> dict[str, np.ndarray]:
    """Write the file; returns the tensors as gguf-py decodes them, float32."""
    rng = np.random.default_rng(tiny.seed)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in tiny.metadata().items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"llama.{key}", value)
    for key, value in (tokenizer or {}).items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
        add[value.__class__](key, value)
    decoded = {}
    for name, shape in tiny.shapes().items():
        if len(shape) == 1:
            data, type = rng.uniform(0.5, 2, shape).astype(np.float32), T.F32
        else:
            type = tiny.type_of(name)
            data = random_tensor(rng, shape, type)
        writer.add_tensor(name, data, raw_dtype=type)
        decoded[name] = np.asarray(gguf.quants.dequantize(data, type), np.float32).reshape(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return decoded


def reference_logits(tiny: Tiny, w: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """Llama in numpy, float64, one head after another, RoPE on neighbours: `[time, vocab]`."""
    w = {name: values.astype(np.float64) for name, values in w.items()}
    time, d = len(tokens), tiny.rotary
    freqs = 500.0 ** (-np.arange(0, d, 2) / d)
    if tiny.rope_freqs:
        freqs = freqs / w["rope_freqs.weight"]
    turn = np.exp(1j * np.outer(np.arange(time), freqs))

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

    def rope(x):
        pairs = (x[:, 0:d:2] + 1j * x[:, 1:d:2]) * turn
        return np.concatenate([np.stack([pairs.real, pairs.imag], -1).reshape(time, d), x[:, d:]], -1)

    x = w["token_embd.weight"][tokens]
    for i in range(tiny.layers):
        layer = {name.split(".")[2]: v for name, v in w.items() if name.startswith(f"blk.{i}.")}
        h = norm(x, layer["attn_norm"])
        q, k, v = (
            (h @ layer[f"attn_{n}"].T).reshape(time, -1, size).swapaxes(0, 1)
            for n, size in (("q", tiny.head_dim), ("k", tiny.head_dim), ("v", tiny.values))
        )
        heads = []
        for j in range(tiny.heads):
            shared = j * tiny.kv_heads // tiny.heads
            scores = rope(q[j]) @ rope(k[shared]).T / tiny.head_dim**0.5
            scores[np.triu_indices(time, 1)] = -np.inf
            p = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(p / p.sum(-1, keepdims=True) @ v[shared])
        x = x + np.concatenate(heads, -1) @ layer["attn_output"].T
        h = norm(x, layer["ffn_norm"])
        gate, up = h @ layer["ffn_gate"].T, h @ layer["ffn_up"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["ffn_down"].T
    return norm(x, w["output_norm.weight"]) @ w["token_embd.weight" if tiny.tied else "output.weight"].T
