"""Block-sparse products on TPU: what the kernels support; the kernel language is imported when they are traced."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Dtypes, Shapes, jax_version
from pallas_kernels.block_sparse_matmul.topology import BlockTopology

LANES = 128
SCALAR_BYTES = 256 * 1024  # scalar memory that the lists of one call may take
MIN_JAX = (0, 10, 2)


def supports(shapes: Shapes, dtypes: Dtypes, device_kind: str | None) -> str | None:
    """None if the TPU kernels take these arguments, else the reason."""
    if jax_version() < MIN_JAX:
        return f"needs jax >= {'.'.join(map(str, MIN_JAX))}, found {jax.__version__}"
    dtype = jnp.dtype(dtypes["values"])
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 or float32, not {dtype}"
    _, blocks, block_in, block_out = shapes["values"]
    if block_in % LANES or block_out % LANES:
        return f"takes blocks that are multiples of {LANES}, not {block_in} x {block_out}"
    if 16 * blocks > SCALAR_BYTES:
        return f"the lists of {blocks} blocks exceed {SCALAR_BYTES} bytes of scalar memory"
    return None


def product(x_EMK: jax.Array, values_EJkn: jax.Array, topology: BlockTopology) -> jax.Array:
    """y = x @ W per expert."""
    from pallas_kernels.block_sparse_matmul import mosaic_tpu_kernel

    return mosaic_tpu_kernel.product(x_EMK, values_EJkn, topology)


def product_transposed(dy_EMN: jax.Array, values_EJkn: jax.Array, topology: BlockTopology) -> jax.Array:
    """dx = dy @ W^T per expert."""
    from pallas_kernels.block_sparse_matmul import mosaic_tpu_kernel

    return mosaic_tpu_kernel.product_transposed(dy_EMN, values_EJkn, topology)


def sampled_product(x_EMK: jax.Array, dy_EMN: jax.Array, topology: BlockTopology) -> jax.Array:
    """The stored blocks of x^T dy per expert."""
    from pallas_kernels.block_sparse_matmul import mosaic_tpu_kernel

    return mosaic_tpu_kernel.sampled_product(x_EMK, dy_EMN, topology)
