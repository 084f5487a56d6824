"""Weights in llama.cpp's block types, as GGUF and GGML files hold them."""

from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.formats.base import Axes, Cut, Leaf, Weight, static_field
from jaxllm.formats.ggml_blocks import BLOCK_TYPES, EXPONENTS
from jaxllm.formats.ggml_encode import encode


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GGML(Weight):
    """Blocks along `in`: `blocks` is uint8 `[*batch, out, in / block, block_bytes]`, the file's own bytes.

    The bytes of a block have their own axis, so that sharding the matrix never splits a block.
    """

    blocks: Leaf
    type: str = static_field()

    @property
    def format(self) -> str:
        return self.type

    @property
    def axes(self) -> dict[str, Axes]:
        return {"blocks": (Cut("out"), Cut("in", BLOCK_TYPES[self.type].size), None)}

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        values = BLOCK_TYPES[self.type].decode(self.blocks)
        return values.reshape(*values.shape[:-2], -1).astype(dtype)

    def not_finite(self, name: str, part: np.ndarray) -> int:
        blocks, count = part.reshape(-1, part.shape[-1]), 0
        for bits in EXPONENTS.get(self.type, ()):
            byte, mask = bits[0]
            found = blocks[(blocks[:, byte] & mask) == mask]
            count += sum(all(block[byte] & mask == mask for byte, mask in bits) for block in found)
        return count

    @classmethod
    def from_dense(cls, values: jax.Array, type: str, importance: jax.Array | None = None) -> Self:
        """Encode floats `[*batch, out, in]`, as `ggml_encode.encode` does: with its errors, and not under `jit`."""
        return cls(encode(values, type, importance), type)

    def like(self, w: jax.Array) -> Self:
        return self.from_dense(w, self.type)
