"""Block norms of x^T dy in plain XLA: slabs of block columns, so the dense gradient is never stored.

Legend: E experts, M tokens, K/N features, R/C block rows and columns, W columns of a slab.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_matmul.xla import accumulating_dot

SLAB = 512  # columns of the gradient held at a time


def norms_of_slab(slab_KW: jax.Array, block_in: int, block_out: int) -> jax.Array:
    """float32 [R, W / block_out]: squared norms of the blocks of a slab of the gradient."""
    k, width = slab_KW.shape
    blocks = slab_KW.astype(jnp.float32).reshape(k // block_in, block_in, width // block_out, block_out)
    return jnp.sum(blocks * blocks, axis=(1, 3))


def square_norms(
    x_EMK: jax.Array, dy_EMN: jax.Array, *, block_in: int, block_out: int, precision=lax.Precision.HIGHEST
) -> jax.Array:
    """float32 [E, R, C]: squared Frobenius norm of every block of x^T dy."""
    columns = dy_EMN.shape[2] // block_out
    per_slab = next(c for c in range(max(1, min(columns, SLAB // block_out)), 0, -1) if columns % c == 0)

    def one_expert(arguments):
        x_MK, dy_MN = arguments
        x_KM = x_MK.T

        def slab(first):
            dy = lax.dynamic_slice_in_dim(dy_MN, first * block_out, per_slab * block_out, 1)
            gradient = accumulating_dot(x_KM, dy, ((1,), (0,)), precision)
            return norms_of_slab(gradient, block_in, block_out)

        norms_SRc = lax.map(slab, jnp.arange(0, columns, per_slab))
        return norms_SRc.transpose(1, 0, 2).reshape(-1, columns)

    return lax.map(one_expert, (x_EMK, dy_EMN))
