"""Matrices of real models, for tests that compile and for benchmarks: `[out, in]` of one device's shard."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.formats.affine import Affine
from jaxllm.formats.base import Weight
from jaxllm.formats.codebook import Codebook
from jaxllm.formats.ggml import GGML
from jaxllm.formats.ggml_blocks import BLOCK_TYPES
from jaxllm.formats.mxfp4 import BLOCK, MXFP4
from jaxllm.formats.nvfp4 import NVFP4
from jaxllm.formats.planes_of import planes_of
from jaxllm.formats.scaled import Activations, Scaled
from jaxllm.kernels.attention import Cached, Scoring
from jaxllm.kernels.coded import Buffer, stored


class Shape(NamedTuple):
    """A matmul `[m, k] @ [n, k].T`; with `experts`, tiles of rows choose among that many matrices."""

    m: int
    n: int
    k: int
    experts: int = 0
    kind: str = ""  # of codes in planes: the format that they were made of, see `quantized`


# Rows: a decode step of 1 or 16 sequences, and a prompt.
DECODE, BATCH, PREFILL = 1, 16, 4096

DEEPSEEK_V3 = {  # 671B, tp=8 (experts: ep=8, not split)
    "q_a_proj": (1536, 7168),
    "q_b_proj": (24576 // 8, 1536),
    "kv_a_proj": (576, 7168),
    "o_proj": (7168, 16384 // 8),
    "gate_proj": (18432 // 8, 7168),
    "down_proj": (7168, 18432 // 8),
}
DEEPSEEK_V3_EXPERTS = {"expert_gate_proj": (2048, 7168), "expert_down_proj": (7168, 2048)}
DEEPSEEK_V3_HELD = 256 // 8

GPT_OSS_120B_EXPERTS = {"expert_gate_proj": (2880, 2880), "expert_down_proj": (2880, 2880)}
GPT_OSS_120B_HELD = 128 // 8

QWEN3_235B_EXPERTS = {"expert_gate_proj": (1536, 4096), "expert_down_proj": (4096, 1536)}
QWEN3_235B_HELD = 128 // 8

LLAMA_70B = {  # tp=8
    "q_proj": (8192 // 8, 8192),
    "o_proj": (8192, 8192 // 8),
    "gate_proj": (28672 // 8, 8192),
    "down_proj": (8192, 28672 // 8),
}


# Matrices and rows for which others have published speeds.
PUBLISHED = {
    "DeepSeek-V3 o_proj, whole": (7168, 16384, (64, PREFILL)),
    "DeepSeek-V3 q_a and kv_a": (2112, 7168, (128, PREFILL)),
}


class Heads(NamedTuple):
    """Attention of one device's heads; `rope` is what keys are longer by, and `value_dim` 0: latents are the values."""

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    rope: int = 0
    sliding_window: int | None = None
    score_cap: float | None = None
    sinks: bool = False


LENGTH, CHUNK = 8192, 512  # positions of the cache; of them, a prompt's newest ones that are processed together
RING = 64  # positions that a ring has beyond its window

ATTENTION = {  # name: for a token, for a chunk of a prompt; tp=8
    "Llama-70B": Heads(8, 1, 128, 128),
    "Qwen3-235B tp=4": Heads(16, 1, 128, 128),
    "gpt-oss-120b": Heads(8, 1, 64, 64, sinks=True),
    "gpt-oss-120b window": Heads(8, 1, 64, 64, sliding_window=128, sinks=True),
    "Gemma 2 9B": Heads(2, 1, 256, 256, score_cap=50.0),
    "Gemma 3 12B window": Heads(2, 1, 256, 256, sliding_window=1024),
    "DeepSeek-V3": Heads(16, 1, 512, 0, rope=64),
}
EXPANDED = {"DeepSeek-V3": Heads(16, 16, 128, 128, rope=64)}  # what is another function of the cache for many tokens


def attention(
    name: str,
    time: int,
    batch: int = 1,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    cache_dtype: jax.typing.DTypeLike | None = None,
) -> tuple[Cached, Scoring]:
    """The operands, as shapes, of attention for `time` tokens of `batch` sequences at the end of a cache."""
    at = EXPANDED.get(name, ATTENTION[name]) if time > 1 else ATTENTION[name]
    length = LENGTH
    if at.sliding_window:
        length = at.sliding_window + RING + (time if time > 1 else 0)

    def struct(*shape: int, dtype: jax.typing.DTypeLike = dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def held(heads: int, dim: int) -> Buffer | None:
        shape = batch, heads, length, dim
        return jax.eval_shape(lambda: stored(jnp.zeros(shape), cache_dtype or dtype)) if dim else None

    keys = held(at.kv_heads, at.dim)
    assert keys is not None
    given = Cached(
        q=struct(batch, time, at.heads, at.dim + at.rope),
        keys=keys,
        values=held(at.kv_heads, at.value_dim),
        positions=struct(batch, time, dtype=jnp.int32),
        key_positions=struct(batch, length, dtype=jnp.int32) if at.sliding_window else None,
        sinks=struct(at.heads, dtype=jnp.float32) if at.sinks else None,
        rope=held(1, at.rope),
    )
    return given, Scoring(LENGTH, at.sliding_window, at.score_cap)


def named() -> dict[str, dict[str, Shape]]:
    """The shapes with which each op is compiled and measured."""
    dense = {f"DeepSeek-V3 {name}": shape for name, shape in DEEPSEEK_V3.items()}
    dense |= {f"Llama-70B {name}": shape for name, shape in LLAMA_70B.items()}
    llama = {f"Llama-70B {name}": shape for name, shape in LLAMA_70B.items()}
    qwen = {f"Qwen3-235B {name}": shape for name, shape in QWEN3_235B_EXPERTS.items()}
    gate = {"Llama-70B gate_proj": LLAMA_70B["gate_proj"]}
    gpt_oss = {f"gpt-oss-120b {name}": shape for name, shape in GPT_OSS_120B_EXPERTS.items()}
    deepseek = {f"DeepSeek-V3 {name}": shape for name, shape in DEEPSEEK_V3_EXPERTS.items()}
    return {
        "block_fp8.matmul": _with_rows(dense)
        | {f"{name} x {m}": Shape(m, n, k) for name, (n, k, rows) in PUBLISHED.items() for m in rows},
        "block_fp8.grouped_matmul": _with_rows(deepseek, DEEPSEEK_V3_HELD),
        "mxfp4.matmul": _with_rows(llama),
        "mxfp4.grouped_matmul": _with_rows(gpt_oss, GPT_OSS_120B_HELD),
        "planes.matmul": _with_rows(llama, kinds=("Q4_K", "GPTQ 4-bit"))
        | _with_rows(gate, kinds=("Q3_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_XS", "MLX 4-bit", "NF4", "NVFP4")),
        "planes.grouped_matmul": _with_rows(qwen, QWEN3_235B_HELD, ("MLX 4-bit", "Q4_K")),
    }


def _with_rows(
    matrices: dict[str, tuple[int, int]], experts: int = 0, kinds: tuple[str, ...] = ("",)
) -> dict[str, Shape]:
    return {
        " ".join(filter(None, (name, kind, f"x {m}"))): Shape(m, n, k, experts, kind)
        for name, (n, k) in matrices.items()
        for kind in kinds
        for m in (DECODE, BATCH, PREFILL)
    }


def quantized(kind: str, n: int, k: int, batch: tuple[int, ...] = ()) -> Weight:
    """A weight `[*batch, n, k]` without values, in a format by name: as checkpoints in that format mostly are."""

    def leaf(*shape: int, dtype: jax.typing.DTypeLike = jnp.uint8) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*batch, *shape), dtype)

    if kind in BLOCK_TYPES and kind != "NVFP4":
        size, nbytes = BLOCK_TYPES[kind][:2]
        return GGML(leaf(n, k // size, nbytes), kind)
    words = leaf(n, k // 8, 1, dtype=jnp.uint32)
    if kind in ("GPTQ 4-bit", "AWQ 4-bit"):
        scales = leaf(n, k // 128, dtype=jnp.float16)
        return Affine(words, scales, 4, 128, kind.split()[0], zeros=leaf(n, k // 128))
    if kind == "MLX 4-bit":
        scales = leaf(n, k // 64, dtype=jnp.bfloat16)
        return Affine(words, scales, 4, 64, "MLX", biases=scales)
    if kind == "NF4":
        return Codebook(leaf(n, k // 2), leaf(n, k // 64, dtype=jnp.float32), leaf(16, dtype=jnp.float32), 64, "NF4")
    assert kind == "NVFP4", kind
    return NVFP4(leaf(n, k // 2), leaf(n, k // 16, dtype=jnp.float8_e4m3fn), leaf(1, dtype=jnp.float32))


def abstract_weight(format: str, shape: Shape, group: int | None = None, transposed: bool = False) -> Weight:
    """A weight of `shape` without values; `transposed`: see `Planes`."""
    batch = (shape.experts,) if shape.experts else ()
    if format == "planes":
        return jax.eval_shape(partial(planes_of, transposed=transposed), quantized(shape.kind, shape.n, shape.k, batch))

    def leaf(columns: int, dtype: jax.typing.DTypeLike, rows: int = shape.n) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*batch, rows, columns), dtype)

    if format == "mxfp4":
        return MXFP4(leaf(shape.k // 2, jnp.uint8), leaf(shape.k // BLOCK, jnp.uint8))
    scales = leaf(-(-shape.k // 128), jnp.float32, rows=-(-shape.n // 128))
    activations = None if group is None else Activations(group)
    return Scaled(leaf(shape.k, jnp.float8_e4m3fn), scales, (128, 128), activations)
