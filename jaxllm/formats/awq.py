"""AWQ: columns with large inputs are multiplied before they are rounded, and their inputs divided (Lin et al., 2023).

A larger column loses less by rounding, and `(W s) (x / s)` is the product that was asked for. How much larger is one
number per group of matrices, an exponent: `s = |x|^a`. It is searched for the smallest error of the product, which the
sums of x x^T give exactly; no input has to be kept. (AutoAWQ multiplies by powers of the weights too. That changes the
error by 1 or 2 % in either direction.)
"""

from collections.abc import Sequence

import numpy as np

from jaxllm.errors import InputError
from jaxllm.formats.affine import Affine
from jaxllm.formats.rtn import Grid, affine, grouped, round_groups, search_grid

EXPONENTS = np.arange(20) / 20
ROWS = 1024  # how many rows, evenly spaced, the exponent is searched on: rows do not influence each other


def awq_scales(weights: Sequence[np.ndarray], products: np.ndarray, bits: int = 4, group: int = 128) -> np.ndarray:
    """The factors `s`, float32 `[in]`, for the columns of all matrices `[out, in]` with the same inputs.

    Dividing the inputs is the caller's business. Whatever makes them can do it, at no cost later:

    - a norm: `norm.weight / s` (with a weight that counts from 1, `(1 + weight) / s - 1`), and its bias likewise;
    - another matrix, with nothing but products by a gate in between: its row `i` and its bias, divided by `s[i]`. So
      `up_proj` for `down_proj`; `v_proj` for `o_proj` only where every query head has a value head of its own.

    Args:
        products: sums of x x^T over inputs x, `[in, in]`.
    """
    rows = np.concatenate(weights)
    rows = rows[:: -(-len(rows) // ROWS)].astype(np.float32)
    squares = np.diagonal(products)
    if not squares.any():
        return np.ones(rows.shape[1], np.float32)
    sizes = np.sqrt(np.maximum(squares, 1e-8 * squares.max()))
    best, least = np.ones(rows.shape[1], np.float32), np.inf
    for exponent in EXPONENTS:
        s = sizes**exponent
        s = (s / np.sqrt(s.max() * s.min())).astype(np.float32)
        scaled = rows * s
        grid = search_grid(scaled, bits, group, False, squares / s**2)
        codes = grouped(round_groups(scaled, grid, bits, group), group)
        rounded = Grid(grid.scales[..., None], grid.zeros[..., None]).values(codes).reshape(len(rows), -1)
        error = rounded[:, : len(s)] / s - rows
        loss = np.vdot(error @ products, error)
        if loss < least:
            best, least = s, loss
    return best


def awq(
    w: np.ndarray, scales: np.ndarray, importance: np.ndarray | None = None, bits: int = 4, group: int = 128
) -> Affine:
    """Encode floats `[out, in]` multiplied by `scales` `[in]` of `awq_scales`: it is a weight for divided inputs.

    Args:
        importance: mean squares of the inputs before they were divided, `[in]`; None: all inputs are alike.

    Returns:
        The weight that an AWQ checkpoint would hold: scales float16, zeros uint8.

    Raises:
        InputError: groups that do not divide the rows, or what `rtn` refuses.
    """
    if w.shape[1] % group:
        raise InputError(f"groups of {group} do not divide rows of {w.shape[1]}, as AWQ needs it; use smaller groups")
    scaled = w * scales
    grid = search_grid(scaled, bits, group, False, None if importance is None else importance / scales**2)
    return affine(round_groups(scaled, grid, bits, group), grid, bits, group, "AWQ", grid.zeros.astype(np.uint8), 8)
