"""Reorders codes into our layout, on the host, while a tensor is read. Nothing is dequantized: bits only move.

Everything is lazy: a function here returns an array that knows its shape and is computed when a device needs it.
"""

import math
from collections.abc import Callable

import numpy as np

from jaxllm.formats.affine import WORD, word_values
from jaxllm.formats.base import Axes, Weight, block_index
from jaxllm.placing import DerivedArray, HostArray

AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # the nibble of a word that each of its 8 columns is in


def derived(shape: tuple[int, ...], dtype: np.typing.DTypeLike, compute: Callable[[], np.ndarray]) -> DerivedArray:
    return DerivedArray(tuple(shape), np.dtype(dtype), compute)


def arranged(weight: Weight, rows: np.ndarray) -> Weight:
    """The weight whose row i is this one's row `rows[i]`. Raises InputError if that would split a block."""

    def moved(leaf: HostArray, axes: Axes) -> HostArray:
        [index, *_] = block_index(axes, rows, None)
        if index is None:
            return leaf
        axis = leaf.ndim - len(axes)
        shape = (*leaf.shape[:axis], len(index), *leaf.shape[axis + 1 :])
        return derived(shape, leaf.dtype, lambda: np.asarray(leaf).take(index, axis))

    return weight.with_leaves({name: moved(weight.leaf(name), axes) for name, axes in weight.axes.items()})


def bit_stream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` codes of each row of words `[rows, n]`, uint8; a row's codes are packed without gaps."""
    words = np.ascontiguousarray(words).view(np.uint32)
    start = np.arange(count) * bits
    first, shift = start // WORD, (start % WORD).astype(np.uint64)
    pairs = np.pad(words, ((0, 0), (0, 1))).astype(np.uint64)
    both = pairs[:, first] | pairs[:, first + 1] << np.uint64(WORD)
    return (both >> shift & np.uint64(2**bits - 1)).astype(np.uint8)


def into_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[rows, in]` as the words of `Affine`: uint32 `[rows, in / values, words]`."""
    if bits in (4, 8):
        stream = codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4
        return np.ascontiguousarray(stream).view(np.uint32)[..., None]
    values = word_values(bits)
    bit = codes.reshape(len(codes), -1, values)[..., None] >> np.arange(bits, dtype=np.uint8) & np.uint8(1)
    stream = np.packbits(bit.reshape(*bit.shape[:2], -1), axis=-1, bitorder="little")
    return stream.view(np.uint32)


def packed_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `bit_stream`: codes `[rows, n]` as uint32 `[rows, ceil(n * bits / 32)]`, zeros behind the last."""
    padded = np.pad(codes.astype(np.uint8), ((0, 0), (0, -codes.shape[1] % word_values(bits))))
    return into_stream(padded, bits).reshape(len(codes), -1)[:, : -(-codes.shape[1] * bits // WORD)]


def words_shape(out: int, in_: int, bits: int) -> tuple[int, int, int]:
    values = word_values(bits)
    return out, in_ // values, values * bits // WORD


def awq_columns(words: HostArray) -> np.ndarray:
    """Codes of AWQ's words `[rows, out / 8]`: uint8 `[rows, out]`."""
    stored = np.asarray(words)
    pairs = stored.view(np.uint8).reshape(*stored.shape, 4)
    nibbles = np.empty((*stored.shape, 8), np.uint8)
    nibbles[..., ::2], nibbles[..., 1::2] = pairs & 15, pairs >> 4
    return nibbles[..., AWQ_ORDER].reshape(len(stored), -1)


def awq_words(codes: np.ndarray) -> np.ndarray:
    """The inverse of `awq_columns`: codes `[rows, out]` as int32 `[rows, out / 8]`."""
    nibbles = np.empty((len(codes), codes.shape[1] // 8, 8), np.uint8)
    nibbles[..., AWQ_ORDER] = codes.reshape(nibbles.shape)
    return (nibbles[..., ::2] | nibbles[..., 1::2] << 4).view(np.int32)[..., 0]


def hqq_codes(packed: np.ndarray, bits: int, rows: int) -> np.ndarray:
    """Codes of HQQ's `W_q`, uint8 `[rows, n]`: the rows are in parts, one on top of the other, the first in the highest
    bits."""
    parts = 10 if bits == 3 else 8 // bits
    shifts = [bits * k for k in reversed(range(parts))]
    return np.concatenate([(packed >> shift & 2**bits - 1).astype(np.uint8) for shift in shifts])[:rows]


def group_size(in_: int, block: int) -> int:
    """The widest groups within a row that blocks over the flattened matrix never split."""
    return math.gcd(in_, block)


def by_rows(values: HostArray, shape: tuple[int, int], block: int) -> DerivedArray:
    """Values per block of a flattened matrix `[out, in]`, as values per group of its rows."""
    out, in_ = shape
    group = group_size(in_, block)

    def compute() -> np.ndarray:
        flat = np.asarray(values).reshape(-1)
        places = slice(None) if group == block else np.arange(out * in_ // group) * group // block
        return flat[places].reshape(out, -1)

    return derived((out, in_ // group), values.dtype, compute)
