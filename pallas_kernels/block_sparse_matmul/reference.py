"""Block-sparse products by dense arithmetic in float32: the oracle that every fast path is compared with.

Legend: E experts, M rows, K/N features, J stored blocks, k/n features inside a block, R/C block rows and columns.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_matmul.topology import BlockTopology


def block_columns_of(column_start: jax.Array, blocks: int) -> jax.Array:
    """int32 [J], the block column of each stored block, from int32 [C + 1] column starts."""
    return jnp.searchsorted(column_start, jnp.arange(blocks, dtype=jnp.int32), side="right").astype(jnp.int32) - 1


def scatter_blocks(values_Jkn: jax.Array, topology: BlockTopology) -> jax.Array:
    """The dense [K, N] matrix of one expert: stored blocks in their place, zeros elsewhere."""
    rows, columns = topology.block_rows, topology.block_columns
    column = block_columns_of(topology.column_start, values_Jkn.shape[0])
    blocks_RCkn = jnp.zeros((rows, columns, *values_Jkn.shape[1:]), values_Jkn.dtype)
    blocks_RCkn = blocks_RCkn.at[topology.row_index, column].set(values_Jkn)
    return blocks_RCkn.transpose(0, 2, 1, 3).reshape(topology.features_in, topology.features_out)


def gather_blocks(dense_KN: jax.Array, topology: BlockTopology) -> jax.Array:
    """The stored blocks [J, k, n] of a dense [K, N] matrix of one expert."""
    rows, columns = topology.block_rows, topology.block_columns
    blocks = dense_KN.reshape(rows, topology.block_in, columns, topology.block_out).transpose(0, 2, 1, 3)
    return blocks[topology.row_index, block_columns_of(topology.column_start, topology.row_index.shape[-1])]


def product(x_EMK: jax.Array, values_EJkn: jax.Array, topology: BlockTopology, precision=lax.Precision.HIGHEST):
    """y = x @ W per expert; float32 arithmetic, result in the dtype of x."""
    w_EKN = jax.vmap(scatter_blocks)(values_EJkn.astype(jnp.float32), topology)
    y = jnp.einsum("emk,ekn->emn", x_EMK.astype(jnp.float32), w_EKN, precision=precision)
    return y.astype(x_EMK.dtype)


def product_transposed(
    dy_EMN: jax.Array, values_EJkn: jax.Array, topology: BlockTopology, precision=lax.Precision.HIGHEST
):
    """dx = dy @ W^T per expert; float32 arithmetic, result in the dtype of dy."""
    w_EKN = jax.vmap(scatter_blocks)(values_EJkn.astype(jnp.float32), topology)
    dx = jnp.einsum("emn,ekn->emk", dy_EMN.astype(jnp.float32), w_EKN, precision=precision)
    return dx.astype(dy_EMN.dtype)


def sampled_product(x_EMK: jax.Array, dy_EMN: jax.Array, topology: BlockTopology, precision=lax.Precision.HIGHEST):
    """The stored blocks of x^T dy per expert; float32 arithmetic, result in the dtype of x."""
    dense = jnp.einsum("emk,emn->ekn", x_EMK.astype(jnp.float32), dy_EMN.astype(jnp.float32), precision=precision)
    return jax.vmap(gather_blocks)(dense, topology).astype(x_EMK.dtype)
