"""Block norms on TPU: the dense gradient product tile by tile in VMEM, of which only squared sums leave the chip.

Legend: E experts, M tokens, K/N features, R/C block rows and columns.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

TILE = 512  # rows and columns of the gradient held at a time
TOKENS = 512


def _kernel(x_ref, dy_ref, out_ref, acc_ref, *, block_in, precision):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    acc_ref[...] += lax.dot_general(
        x_ref[...], dy_ref[...], (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        squares = acc_ref[...] * acc_ref[...]
        out_ref[...] = jnp.sum(squares.reshape(-1, block_in, squares.shape[1]), axis=1)


def square_norms(
    x_EMK: jax.Array, dy_EMN: jax.Array, *, block_in: int, block_out: int, interpret: bool = False
) -> jax.Array:
    """float32 [E, R, C]: squared Frobenius norm of every block of x^T dy."""
    experts, m, k = x_EMK.shape
    n = dy_EMN.shape[2]
    tokens = min(TOKENS, -(-m // 16) * 16)
    missing = -m % tokens
    if missing:
        x_EMK, dy_EMN = (jnp.pad(a, ((0, 0), (0, missing), (0, 0))) for a in (x_EMK, dy_EMN))
    tile_k = next(t for t in range(max(TILE, block_in) // block_in * block_in, 0, -block_in) if k % t == 0)
    tile_n = next(t for t in range(max(TILE, block_out) // block_out * block_out, 0, -block_out) if n % t == 0)
    precision = lax.Precision.HIGHEST if x_EMK.dtype == jnp.float32 else None

    def one_expert(arguments):
        x_MK, dy_MN = arguments
        return pl.pallas_call(
            functools.partial(_kernel, block_in=block_in, precision=precision),
            out_shape=jax.ShapeDtypeStruct((k // tile_k, tile_k // block_in, n), jnp.float32),
            grid=(k // tile_k, n // tile_n, x_MK.shape[0] // tokens),
            in_specs=[
                pl.BlockSpec((tokens, tile_k), lambda i, j, t: (t, i)),
                pl.BlockSpec((tokens, tile_n), lambda i, j, t: (t, j)),
            ],
            out_specs=pl.BlockSpec((None, tile_k // block_in, tile_n), lambda i, j, t: (i, 0, j)),
            scratch_shapes=[pltpu.VMEM((tile_k, tile_n), jnp.float32)],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            interpret=interpret,
        )(x_MK, dy_MN)

    sums = lax.map(one_expert, (x_EMK, dy_EMN))
    return sums.reshape(experts, k // block_in, n // block_out, block_out).sum(axis=-1)
