"""GPTQ: rounds column by column, and lets the columns that are left make up for each error (Frantar et al., 2022).

What counts is the error of the product, `|(W - Q) X|^2`. It needs nothing of the inputs but `H = X X^T`. Once a column
is rounded, the best change of all others follows from the inverse of H; the Cholesky factor of that inverse has what
each step needs in its rows, since later steps only ever need the part of the columns that are left.

Columns with large inputs are rounded first, while many others can still make up for them. The groups stay where they
are, so nobody who reads the weight has to know of it (llm-compressor calls this static activation ordering), and their
grids are those of the original values. Alternatives: grids from the changed values, one group after the other, in the
paper's order or by importance (gptqmodel's default). On inputs that are all alike they are 1 to 10 % better; with a few
large inputs, as language models have, the error is 1.4 to 6 times as large.
"""

import jax
import numpy as np

from jaxllm.errors import InputError
from jaxllm.formats.affine import Affine
from jaxllm.formats.rtn import Grid, affine, search_grid

BLOCK = 128  # columns whose changes reach the others by one matrix product


def gptq(
    w: np.ndarray, products: np.ndarray, bits: int = 4, group: int = 128, symmetric: bool = False, damp: float = 0.01
) -> Affine:
    """Encode floats `[out, in]`, or a stack `[experts, out, in]`, for inputs whose products are known.

    Rows do not influence each other: matrices with the same inputs can be encoded as one, which is faster.

    Args:
        products: sums of x x^T over inputs x, `[in, in]` or `[experts, in, in]`. All zero: nothing is known, and values
            are only rounded.
        group: columns that share a scale and a zero point; the last group may be smaller.
        symmetric: all zero points are half of the range.
        damp: what to add to the diagonal, as a share of its mean. More of it trusts the products less.

    Returns:
        The weight that a GPTQ checkpoint would hold: scales float16, zeros uint8 (int16 for 8 bits). No zero point is
        0, which the first version of that format cannot say.

    Raises:
        InputError: what `rtn` refuses, or products that no inputs can have.
    """
    if w.ndim == 3:
        pairs = zip(w, products, strict=True)
        return jax.tree.map(lambda *leaves: np.stack(leaves), *(gptq(*p, bits, group, symmetric, damp) for p in pairs))
    importance = np.diagonal(products)
    order = np.argsort(-importance, kind="stable")
    factor = _factor(products[np.ix_(order, order)], damp)
    grid = search_grid(w, bits, group, symmetric, importance, least=1)
    codes = np.empty(w.T.shape, np.uint8)
    scales, zeros = np.ascontiguousarray(grid.scales.T), np.ascontiguousarray(grid.zeros.T)
    left = w.T[order].astype(np.float32)  # a row for each column: [in, out]
    for begin in range(0, len(left), BLOCK):
        block = left[begin : begin + BLOCK]
        near, far = np.split(factor[begin : begin + BLOCK, begin:], [len(block)], axis=1)
        errors = np.empty_like(block)
        for i, column in enumerate(order[begin : begin + BLOCK]):
            at = Grid(scales[column // group], zeros[column // group])
            code = at.nearest(block[i], bits)
            codes[column] = code
            errors[i] = (block[i] - at.values(code)) / near[i, i]
            block[i + 1 :] -= np.outer(near[i, i + 1 :], errors[i])
        left[begin + BLOCK :] -= far.T @ errors
    kind = np.uint8 if bits < 8 else np.int16  # as GPTQ checkpoints are read
    return affine(codes.T, grid, bits, group, "GPTQ", grid.zeros.astype(kind), 0)


def _factor(products: np.ndarray, damp: float) -> np.ndarray:
    """The upper U with `U^T U = H^-1`, float32, where H is the damped products `[in, in]`.

    H = V V^T with an upper V is the usual factorization read backwards, and U = V^-1: H itself is never inverted.
    """
    h = products.astype(np.float64)
    diagonal = np.diagonal(h)
    unknown = diagonal == 0  # inputs that were always zero: they change nothing
    h[unknown, unknown] = 1
    h[np.diag_indices_from(h)] += damp * diagonal.mean()
    if not np.isfinite(h).all():
        raise InputError("products of inputs that are not finite; calibrate anew")
    try:
        lower = np.linalg.cholesky(h[::-1, ::-1])
    except np.linalg.LinAlgError as error:
        raise InputError("products that no inputs can have; calibrate anew, or raise damp") from error
    return np.linalg.inv(lower)[::-1, ::-1].astype(np.float32)
