"""Block-sparse products by dense arithmetic in float32: the oracle that every fast path is compared with.

Legend: E experts, M rows, K/N features, J stored blocks, k/n features inside a block, R/C block rows and columns.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_matmul.dense_form import gather_blocks, to_dense
from pallas_kernels.block_sparse_matmul.topology import BlockTopology


def product(x_EMK: jax.Array, values_EJkn: jax.Array, topology: BlockTopology, precision=lax.Precision.HIGHEST):
    """y = x @ W per expert; float32 arithmetic, result in the dtype of x."""
    w_EKN = to_dense(values_EJkn.astype(jnp.float32), topology)
    y = jnp.einsum("emk,ekn->emn", x_EMK.astype(jnp.float32), w_EKN, precision=precision)
    return y.astype(x_EMK.dtype)


def product_transposed(
    dy_EMN: jax.Array, values_EJkn: jax.Array, topology: BlockTopology, precision=lax.Precision.HIGHEST
):
    """dx = dy @ W^T per expert; float32 arithmetic, result in the dtype of dy."""
    w_EKN = to_dense(values_EJkn.astype(jnp.float32), topology)
    dx = jnp.einsum("emn,ekn->emk", dy_EMN.astype(jnp.float32), w_EKN, precision=precision)
    return dx.astype(dy_EMN.dtype)


def sampled_product(x_EMK: jax.Array, dy_EMN: jax.Array, topology: BlockTopology, precision=lax.Precision.HIGHEST):
    """The stored blocks of x^T dy per expert; float32 arithmetic, result in the dtype of x."""
    dense = jnp.einsum("emk,emn->ekn", x_EMK.astype(jnp.float32), dy_EMN.astype(jnp.float32), precision=precision)
    return gather_blocks(dense, topology).astype(x_EMK.dtype)
