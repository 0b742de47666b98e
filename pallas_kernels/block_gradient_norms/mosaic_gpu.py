"""Block norms on Hopper: padding and the last, tiny reduction around the kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul import tuning
from pallas_kernels.block_sparse_matmul.mosaic_gpu import supports

__all__ = ["square_norms", "supports"]


def square_norms(
    x_EMK: jax.Array, dy_EMN: jax.Array, *, block_in: int, block_out: int, interpret=None, tile=None
) -> jax.Array:
    """float32 [E, R, C]: squared Frobenius norm of every block of x^T dy."""
    from pallas_kernels.block_gradient_norms.mosaic_gpu_kernel import NormsTile, row_square_sums

    tile = tile or NormsTile(band=8)
    missing = -x_EMK.shape[1] % tile.depth
    if missing:
        x_EMK, dy_EMN = (jnp.pad(a, ((0, 0), (0, missing), (0, 0))) for a in (x_EMK, dy_EMN))
    sums = row_square_sums(
        x_EMK,
        dy_EMN,
        block_in=block_in,
        block_out=block_out,
        tile=tile,
        multiprocessors=tuning.multiprocessors() if interpret is None else 3,
        interpret=interpret,
    )
    return sums.sum(axis=-1)
