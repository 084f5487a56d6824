"""Round to nearest: integers with a scale and a whole zero point per group. GPTQ and AWQ begin with it.

A group's smallest and largest value could be exact, as in the first papers. It is better to lose a little there: all
other values get a finer grid. So the range is shrunk step by step, and the one with the smallest squared error is kept,
weighted by the mean squares of inputs where these are known. (AutoAWQ weights by the products of inputs within a group:
that takes a matrix product for each step, and saves another few percent of the error.)

This module, `gptq` and `awq` are numpy on the host: they walk over columns, in float64 where it matters.
"""

from typing import NamedTuple

import jax
import numpy as np

from jaxllm.errors import InputError
from jaxllm.formats.affine import Affine, pack, word_values

SHARES = (1 - 0.5 * np.linspace(0, 1, 16) ** 2).astype(np.float32)  # of the range: denser at 1, which 8 bits need
PIECE = 1 << 18  # about how many values are searched at a time
TINY, LARGEST = np.float32(2**-24), np.float32(65504)  # of float16

_packed = jax.jit(pack, static_argnums=1)


class Grid(NamedTuple):
    """Scales and zero points of groups, float32 of one shape. Scales are values of float16, zeros whole numbers."""

    scales: np.ndarray
    zeros: np.ndarray

    def nearest(self, w: np.ndarray, bits: int) -> np.ndarray:
        """The codes of floats, one group for each scale (or broadcast against the scales): float32."""
        return np.clip(np.rint(w / self.scales) + self.zeros, 0, 2**bits - 1)

    def values(self, codes: np.ndarray) -> np.ndarray:
        return (codes - self.zeros) * self.scales


def rtn(w: np.ndarray, bits: int, group: int, symmetric: bool = False, importance: np.ndarray | None = None) -> Affine:
    """Round floats `[out, in]` to the nearest integers, in groups of `group` columns.

    Args:
        symmetric: all zero points are half of the range, and are not stored.
        importance: mean squares of the inputs, or a multiple of them, `[in]`; None: all inputs are alike.

    Returns:
        The weight that a compressed-tensors checkpoint would hold: name "INT", scales float16, zeros uint8 or None.

    Raises:
        InputError: less than 2 bits or more than 8, values that are not finite or beyond float16, or rows that are not
            whole words of codes.
    """
    grid = search_grid(w, bits, group, symmetric, importance)
    zeros = None if symmetric else grid.zeros.astype(np.uint8)
    return affine(round_groups(w, grid, bits, group), grid, bits, group, "INT", zeros, 2 ** (bits - 1))


def search_grid(
    w: np.ndarray, bits: int, group: int, symmetric: bool, importance: np.ndarray | None, least: int = 0
) -> Grid:
    """The grid for each group of floats `[out, in]`, as `[out, groups]`; see `rtn`.

    Args:
        least: the smallest zero point.
    """
    if not 2 <= bits <= 8:
        raise InputError(f"integers of {bits} bits are not supported; 2 to 8 bits are")
    if not -LARGEST <= w.min() <= w.max() <= LARGEST:
        raise InputError(f"a matrix with values that are not finite, or larger than {LARGEST:.0f}")
    costs = grouped(np.ones(w.shape[1], np.float32) if importance is None else importance.astype(np.float32), group)
    costs = np.where(costs.any(-1, keepdims=True), costs, np.float32(1))  # a group whose inputs were always zero
    values, rows = grouped(w, group), max(PIECE // w.shape[1], 1)
    found = [_search(values[begin : begin + rows], bits, symmetric, costs, least) for begin in range(0, len(w), rows)]
    return Grid(*map(np.concatenate, zip(*found, strict=True)))


def _search(w: np.ndarray, bits: int, symmetric: bool, costs: np.ndarray, least: int) -> Grid:
    """The grid of groups `[rows, groups, columns]`, as `[rows, groups]`, for errors that cost `[groups, columns]`."""
    most = 2**bits - 1
    low, high = np.minimum(w.min(-1), 0), np.maximum(w.max(-1), 0)
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    low = np.minimum(low, -high * np.float32(least / (most - least)))  # what the codes below the zero point stand for
    best = np.full(low.shape, np.inf, np.float32)
    scales, zeros = np.ones_like(best), np.zeros_like(best)
    for share in SHARES:
        scale = np.maximum((high - low) * share / np.float32(most), TINY).astype(np.float16).astype(np.float32)
        zero = np.clip(np.rint(-low * share / scale), least, most)
        if symmetric:
            zero = np.full_like(scale, 2 ** (bits - 1))
        tried = Grid(scale[..., None], zero[..., None])
        error = np.einsum("rgc,gc->rg", (tried.values(tried.nearest(w, bits)) - w) ** 2, costs)
        better = error < best
        for kept, new in ((best, error), (scales, scale), (zeros, zero)):
            np.copyto(kept, new, where=better)
    return Grid(scales, zeros)


def round_groups(w: np.ndarray, grid: Grid, bits: int, group: int) -> np.ndarray:
    """The codes of floats `[out, in]` on the grid of their groups, uint8."""
    codes = Grid(grid.scales[..., None], grid.zeros[..., None]).nearest(grouped(w, group), bits)
    return codes.reshape(len(w), -1)[:, : w.shape[1]].astype(np.uint8)


def grouped(array: np.ndarray, group: int) -> np.ndarray:
    """The last axis as groups, `[..., groups, group]`. Zeros fill up the last one: every grid has a zero."""
    padded = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, -array.shape[-1] % group)])
    return padded.reshape(*array.shape[:-1], -1, group)


def affine(
    codes: np.ndarray, grid: Grid, bits: int, group: int, name: str, zeros: np.ndarray | None, zero: int
) -> Affine:
    """The weight of codes uint8 `[out, in]`.

    Raises:
        InputError: rows are not whole words of codes.
    """
    if codes.shape[1] % word_values(bits):
        raise InputError(f"rows of {codes.shape[1]} are not whole words of {word_values(bits)} {bits}-bit codes")
    words = np.asarray(_packed(codes.astype(np.uint32), bits))
    return Affine(words, grid.scales.astype(np.float16), bits, group, name, zero, zeros=zeros)
