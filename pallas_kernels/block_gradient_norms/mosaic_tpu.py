"""Block norms on TPU: the kernel language is imported when the kernel is traced."""

from __future__ import annotations

import jax

from pallas_kernels.block_sparse_matmul.mosaic_tpu import supports

__all__ = ["square_norms", "supports"]


def square_norms(x_EMK: jax.Array, dy_EMN: jax.Array, *, block_in: int, block_out: int) -> jax.Array:
    """float32 [E, R, C]: squared Frobenius norm of every block of x^T dy."""
    from pallas_kernels.block_gradient_norms import mosaic_tpu_kernel

    return mosaic_tpu_kernel.square_norms(x_EMK, dy_EMN, block_in=block_in, block_out=block_out)
