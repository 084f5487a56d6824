"""E2M1, the four-bit float: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. Bit 3 of a code is the sign.

XLA flushes subnormal numbers to zero, and a small block scale can make the product of an ordinary code subnormal. So
products with powers of two are assembled from bits here, not multiplied.

Source: OCP Microscaling Formats (MX) v1.0, sections 5.3 and 6.3.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.formats.ggml_bits import fields, flat

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def unpack(blocks: jax.Array) -> jax.Array:
    """Codes of bytes `[..., n]`, low nibbles first: uint8 `[..., 2n]`."""
    return flat(fields(blocks, 4, 2), 2)


def pack(codes: jax.Array) -> jax.Array:
    """The inverse of `unpack`."""
    pairs = codes.reshape(*codes.shape[:-1], -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def times_power(codes: jax.Array, exponents: jax.Array) -> jax.Array:
    """`value * 2^(exponent - 127)`, exactly, as float32; infinite where that is beyond float32.

    Args:
        codes: uint8; bits above the fourth are ignored.
        exponents: uint8, in a shape that broadcasts against codes.
    """
    code = codes.astype(jnp.int32)
    exponent, mantissa, sign = code >> 1 & 3, code & 1, (code & 8) << 28
    field = exponents.astype(jnp.int32) + exponent - 1  # the float32 exponent if code and result are normal
    ones = 2 + mantissa  # the significand, in halves
    # Code 1 is the subnormal 0.5: the next power of two below, with nothing behind the point.
    lone = exponent == 0
    field, ones = jnp.where(lone, exponents.astype(jnp.int32) - 1, field), jnp.where(lone, 2 * mantissa, ones)
    normal = field << 23 | (ones & 1) << 22
    subnormal = ones << 21 >> -jnp.minimum(field, 0)
    bits = jnp.where(field >= 255, 0x7F800000, jnp.where(field > 0, normal, subnormal))
    return lax.bitcast_convert_type(sign | jnp.where(ones == 0, 0, bits), jnp.float32)


def rounded(x: jax.Array) -> jax.Array:
    """The code nearest to each float32; ties go to the even code, and magnitudes beyond 6 become 6."""
    size = jnp.abs(x)
    # The midpoint goes to the even neighbour: 0.25 and 1.25 round down, 0.75 and 1.75 up, and so on.
    below, above = (0.25, 1.25, 2.5, 5.0), (0.75, 1.75, 3.5)
    code = sum((size > t).astype(jnp.uint8) for t in below) + sum((size >= t).astype(jnp.uint8) for t in above)
    return code | (jnp.signbit(x).astype(jnp.uint8) << 3)
