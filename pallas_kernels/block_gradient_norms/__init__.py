"""Norms of the gradient of every block of a weight matrix: see :func:`block_gradient_norms`."""

from pallas_kernels.block_gradient_norms.api import block_gradient_norms, gradient_slab, slab_square_norms

__all__ = ["block_gradient_norms", "gradient_slab", "slab_square_norms"]
