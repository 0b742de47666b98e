"""Block norms of x^T dy by the dense gradient in float32: the oracle.

Legend: E experts, M tokens, K/N features, R/C block rows and columns.
"""

import jax
import jax.numpy as jnp
from jax import lax


def square_norms(
    x_EMK: jax.Array, dy_EMN: jax.Array, *, block_in: int, block_out: int, precision=lax.Precision.HIGHEST
):
    """float32 [E, R, C]: squared Frobenius norm of every block of x^T dy."""
    dense = jnp.einsum("emk,emn->ekn", x_EMK.astype(jnp.float32), dy_EMN.astype(jnp.float32), precision=precision)
    experts, k, n = dense.shape
    blocks = dense.reshape(experts, k // block_in, block_in, n // block_out, block_out)
    return jnp.sum(blocks * blocks, axis=(2, 4))
