"""Rows of float8 numbers with their scales, as 32-bit words: what a table of float8 rows is made of.

A row of D numbers (a multiple of 4) is D / 4 words of float8_e4m3fn, lowest byte first, and ceil(D / 128) words of exponents, one byte
for each 32 numbers: the scale is 2**(exponent - 127), as in the OCP microscaling formats (arXiv 2310.10537), and exponent 0 is zero.
A row of 64 takes 68 bytes, one of 256 takes 264. A row of zero bytes reads zeros.

Why so. A scale of its own array would be a second random read, and memory gives 32 bytes at a time whatever the scale's size; beside
the row it comes along. A power of two suffices because float8 is itself a floating format: a finer scale gains no digits. It makes
products exact, so unpacked numbers are exact in bfloat16, and a row that is unpacked and packed again keeps its numbers. 32 numbers to
a scale keep one large number from pushing its row into the subnormal range.

Legend: D numbers of a row, W words of a row, G groups of 32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

GROUP = 32
LEAST = 27
"""Smallest exponent byte of a scale that is not zero: 2**-100, far from float32's own subnormal numbers."""


def row_words(width: int) -> int:
    """Words W of a row of `width` numbers.

    Raises:
        ValueError: width is no multiple of 4.
    """
    if width <= 0 or width % 4:
        raise ValueError(f"width={width}: rows of float8 have a multiple of 4 numbers.")
    return width // 4 + -(-width // (4 * GROUP))


def row_width(words: int) -> int:
    """Numbers D of a row of `words` words; the inverse of `row_words`."""
    return 4 * (words - -(-words // (GROUP + 1)))


def pack(x_D: jax.Array, bits_D: jax.Array | None = None) -> jax.Array:
    """Rounds rows to float8 with scales.

    Each group of 32 has the smallest scale at which its largest magnitude is at most 448.

    Args:
        x_D: float32 [..., D].
        bits_D: uint32 [..., D] random bits: round up with the probability that keeps the mean (stochastic rounding). None: to nearest.
            Numbers that float8 holds at their group's scale stay as they are either way.

    Returns:
        uint32 [..., W].
    """
    leading, width = x_D.shape[:-1], x_D.shape[-1]
    words = row_words(width)
    groups = -(-width // GROUP)
    padding = [(0, 0)] * len(leading)
    x_GK = jnp.pad(x_D, [*padding, (0, groups * GROUP - width)]).reshape(*leading, groups, GROUP)
    largest_G = lax.bitcast_convert_type(jnp.max(jnp.abs(x_GK), axis=-1), jnp.uint32)
    # 448 = 1.75 * 2**8: the scale is the exponent less 8, one more where the significand exceeds 1.75.
    exponent_G = jnp.clip(((largest_G + 0x1FFFFF) >> 23).astype(jnp.int32) - 8, LEAST, 254)
    y_GK = x_GK * _power(254 - exponent_G)[..., None]
    if bits_D is not None:
        bits_GK = jnp.pad(bits_D, [*padding, (0, groups * GROUP - width)]).reshape(x_GK.shape)
        y_GK = _round_stochastically(y_GK, bits_GK)
    values_B = lax.bitcast_convert_type(jnp.clip(y_GK, -448, 448).astype(jnp.float8_e4m3fn), jnp.uint8)
    values_B = values_B.reshape(*leading, groups * GROUP)[..., :width]
    scales_B = jnp.where(largest_G == 0, 0, exponent_G).astype(jnp.uint8)
    scales_B = jnp.pad(scales_B, [*padding, (0, 4 * words - width - groups)])
    whole = jnp.concatenate([values_B, scales_B], axis=-1).reshape(*leading, words, 4)
    return lax.bitcast_convert_type(whole, jnp.uint32)


def _power(exponent: jax.Array) -> jax.Array:
    """2**(exponent - 127), float32; 0 for exponent 0."""
    return lax.bitcast_convert_type(exponent.astype(jnp.uint32) << 23, jnp.float32)


def _round_stochastically(y: jax.Array, bits: jax.Array) -> jax.Array:
    """y between the two neighbours in float8_e4m3 that enclose it: up with the share of the way that it has gone."""
    magnitude = jnp.abs(y)
    exponent = jnp.maximum((lax.bitcast_convert_type(magnitude, jnp.uint32) >> 23).astype(jnp.int32), 127 - 6)
    unit = _power(exponent - 3)  # distance of the neighbours: three bits after the first, none below 2**-9
    # Below 16 units, so that 20 random bits behind the point are exact in float32.
    share = (bits >> 12).astype(jnp.float32) * jnp.float32(2.0**-20)
    return jnp.sign(y) * jnp.floor(magnitude * _power(254 - (exponent - 3)) + share) * unit


def unpack(words_W: jax.Array, dtype=jnp.bfloat16) -> jax.Array:
    """The numbers of packed rows, [..., D]; exact in bfloat16 and in float32."""
    width = row_width(words_W.shape[-1])
    bytes_B = lax.bitcast_convert_type(words_W, jnp.uint8).reshape(*words_W.shape[:-1], -1)
    groups = -(-width // GROUP)
    values_D = lax.bitcast_convert_type(bytes_B[..., :width], jnp.float8_e4m3fn).astype(jnp.float32)
    scales_D = jnp.repeat(_power(bytes_B[..., width : width + groups]), GROUP, axis=-1)[..., :width]
    return (values_D * scales_D).astype(dtype)
