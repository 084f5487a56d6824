"""Encoders of IQ2 and IQ3: groups of weights share a scale; their magnitudes, 8 or 4 at a time, a codebook's entry.

llama.cpp rounds to the lattice that holds the codebook and searches a list of neighbours where that is no entry. We
score all entries, which needs no lists and misses none. For weights w and an entry g, the error at the scale s is

    sum w (x - s g)^2 = sum w x^2 - 2 s (w x) . g + s^2 w . g^2

so two matrix products give (w x) . g and w . g^2 for all entries, and another scale costs no more than a minimum. The
scale of a group starts at the best one for the lattice. Then the best entries and their least-squares scale are found
in turn. The scales of a block become odd multiples of its unit, the entries are chosen once more for these, and the
unit is fitted to them.

Source of the signs, weights and units: `quantize_row_iq2_xxs_impl` and its like in llama.cpp's `ggml-quants.c`. (It
encodes with idealized entries, such as 1, 3, 5 for 8, 25, 43, and corrects the unit with factors.)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.formats.ggml_encode_bits import F32, U8, f16, flat, join, shaped, stream, words
from jaxllm.formats.ggml_grids import grid
from jaxllm.formats.ggml_search import divide, fit_scale, total, weigh

U16, U32 = jnp.uint16, jnp.uint32
ROUNDS = 2  # of choosing entries and fitting scales
CELLS = 32  # groups of entries, see `choose`


def scores(x: jax.Array, weights: jax.Array, entries: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(w x) . g and w . g^2 for all entries g `[m, width]`: vectors `[..., width]` -> two of `[..., m]`."""
    exact = lax.Precision.HIGHEST
    return jnp.matmul(weights * x, entries.T, precision=exact), jnp.matmul(
        weights, (entries * entries).T, precision=exact
    )


def choose(scale: jax.Array, gain: jax.Array, cost: jax.Array) -> jax.Array:
    """The index of the entry that is best at a scale, int32 `[...]`, from `scores` `[..., m]` and scales `[...]`.

    An argmin over all entries is slow on CPUs, so this takes the minima of CELLS groups first.
    """
    error = shaped(scale[..., None] * (scale[..., None] * cost - F32(2) * gain), CELLS, -1)
    cell = jnp.argmin(jnp.min(error, axis=-1), axis=-1)[..., None, None]
    inside = jnp.argmin(jnp.take_along_axis(error, cell, axis=-2)[..., 0, :], axis=-1)
    return cell[..., 0, 0] * error.shape[-1] + inside


def at(values: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def weights_of(x: jax.Array, importance: jax.Array | None, squares: float) -> jax.Array:
    """What an error costs. (Without importance llama.cpp uses x^2, which is too much where all entries compete.)"""
    return weigh(x, jnp.ones_like(x), 0.5) if importance is None else weigh(x, importance, squares)


def _magnitudes(x: jax.Array, weights: jax.Array, even: bool) -> tuple[jax.Array, jax.Array]:
    """Vectors of 8 as magnitudes, and their signs as uint8 `[..., 8]`.

    If the number of minus signs has to be `even`, the weight that matters least keeps the wrong sign where it is odd:
    its magnitude is negative.
    """
    minus = x < 0
    if even:
        odd = jnp.sum(minus, axis=-1, keepdims=True) % 2 == 1
        least = jnp.argmin(weights * x * x, axis=-1, keepdims=True) == jnp.arange(8)
        minus = minus ^ (odd & least)
    return jnp.where(minus, -x, x), minus.astype(U8)


def fit_block[Choice](
    fit: Callable[[jax.Array], tuple[Choice, jax.Array, jax.Array]], scale: jax.Array, top: int
) -> tuple[jax.Array, jax.Array, Choice]:
    """The unit d `[..., 1]` of a block's scales; the scales as odd multiples `1 .. top` of it `[..., n]`; the entries.

    `fit` chooses entries for given scales `[..., n]` and returns them, with sum w x g and sum w g^2 of each group.
    `scale`, `[..., n]`, is where the search starts.
    """

    def improve(_: jax.Array, scale: jax.Array) -> jax.Array:
        _entries, xq, q2 = fit(scale)
        return jnp.where(xq > 0, divide(xq, q2), scale)

    scale = lax.fori_loop(0, ROUNDS, improve, scale)
    d = jnp.max(scale, axis=-1, keepdims=True) * F32(1 / top)
    level = jnp.round(jnp.clip(F32(0.5) * (divide(scale, d) - F32(1)), F32(0), F32((top - 1) // 2)))
    multiples = F32(2) * level + F32(1)
    chosen, xq, q2 = fit(d * multiples)
    xq, q2 = total(multiples * xq), total(multiples * multiples * q2)
    return jnp.where(xq > 0, divide(xq, q2), d), multiples, chosen


def _encode(
    x: jax.Array, importance: jax.Array | None, name: str, groups: int, even: bool, squares: float, unit: float
) -> tuple[jax.Array, ...]:
    """The bytes of d; entries int32 `[..., 256 / width]`; signs uint8 `[..., 256]`; levels of scales `[..., groups]`.

    A block is decoded as d * unit * (2 * level + 1) * entry.
    """
    entries = jnp.asarray(grid(name), F32)
    weights = shaped(weights_of(x, importance, squares), groups, 256 // groups)
    magnitudes, signs = _magnitudes(shaped(x, 32, 8), weights.reshape(*x.shape[:-1], 32, 8), even)
    x = magnitudes.reshape(weights.shape)
    start = _lattice_scale(x, weights, np.unique(grid(name)).astype(np.float32))[..., 0]
    vectors = (256 // groups // entries.shape[-1], entries.shape[-1])
    gain, cost = scores(shaped(x, *vectors), shaped(weights, *vectors), entries)

    def fit(scale: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        index = choose(scale[..., None], gain, cost)
        return index, jnp.sum(at(gain, index), axis=-1), jnp.sum(at(cost, index), axis=-1)

    d, multiples, index = fit_block(fit, start, 31)
    return f16(d * F32(1 / unit))[0], flat(index), flat(signs), (multiples * F32(0.5)).astype(U8)


def _lattice_scale(x: jax.Array, weights: jax.Array, values: np.ndarray) -> jax.Array:
    """The best scale if every weight could have each of `values`. A negative magnitude counts as 0."""
    rises, midpoints = np.diff(values), (values[1:] + values[:-1]) / 2

    def snap(v: jax.Array) -> jax.Array:
        steps = zip(midpoints, rises, strict=True)
        return sum((jnp.where(v >= F32(t), F32(rise), F32(0)) for t, rise in steps), F32(values[0]))

    return fit_scale(jnp.maximum(x, F32(0)), weights, values[-1] * np.arange(0.7, 1.3, 0.05), snap)


def _sign_bytes(signs: jax.Array) -> jax.Array:
    return stream(signs, 1)


def _sign_words(signs: jax.Array, levels: jax.Array) -> jax.Array:
    """Words of 4 x 7 sign bits and a 4-bit scale, as bytes `[..., 32]`."""
    seven = shaped(_sign_bytes(signs) & U8(127), 8, 4).astype(U32)
    fields = jnp.bitwise_or.reduce(seven << jnp.arange(0, 28, 7, dtype=U32), axis=-1)
    return words(fields | levels.astype(U32) << 28)


def iq2_xxs(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    d, index, signs, levels = _encode(x, importance, "IQ2_XXS", 8, True, 1, 0.125)
    return join(d, flat(join(shaped(index.astype(U8), 8, 4), shaped(_sign_words(signs, levels), 8, 4))))


def iq2_xs(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    d, index, signs, levels = _encode(x, importance, "IQ2_XS", 16, True, 1, 0.125)
    seven = (_sign_bytes(signs) & U8(127)).astype(U16)
    return join(d, words(index.astype(U16) | seven << 9), stream(levels, 4))


def iq2_s(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    d, index, signs, levels = _encode(x, importance, "IQ2_S", 16, False, 2, 0.125)
    return join(d, index.astype(U8), _sign_bytes(signs), stream((index >> 8).astype(U8), 2), stream(levels, 4))


def iq3_xxs(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    d, index, signs, levels = _encode(x, importance, "IQ3_XXS", 8, True, 2, 0.25)
    return join(d, index.astype(U8), _sign_words(signs, levels))


def iq3_s(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    d, index, signs, levels = _encode(x, importance, "IQ3_S", 8, False, 2, 1)
    return join(d, index.astype(U8), stream((index >> 8).astype(U8), 1), _sign_bytes(signs), stream(levels, 4))
