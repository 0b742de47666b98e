"""Block-sparse matrices to and from dense ones, and their patterns as masks and pictures.

Legend: K, N features in and out; R, C block rows and columns; J stored blocks; k, n features inside a block.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_matmul.topology import BlockTopology, check_geometry, topology_from_mask


def dense_mask(topology: BlockTopology, elements: bool = False) -> jax.Array:
    """Renders the pattern as a bool array.

    Args:
        topology: Any topology; batch dimensions are kept.
        elements: One entry per weight, [..., K, N], instead of one per block, [..., R, C].

    Returns:
        True where a block exists.
    """
    if topology.batch_shape:
        return jax.vmap(functools.partial(dense_mask, elements=elements))(topology)
    mask = jnp.zeros((topology.block_rows, topology.block_columns), bool)
    mask = mask.at[topology.row_index, topology.block_column].set(True)
    if elements:
        mask = jnp.repeat(jnp.repeat(mask, topology.block_in, axis=0), topology.block_out, axis=1)
    return mask


def _blocks(dense_KN: jax.Array, block_in: int, block_out: int) -> jax.Array:
    """[R, C, block_in, block_out]."""
    rows, columns = dense_KN.shape[0] // block_in, dense_KN.shape[1] // block_out
    return dense_KN.reshape(rows, block_in, columns, block_out).transpose(0, 2, 1, 3)


def from_dense(
    dense: jax.Array, block_in: int, block_out: int, mask: np.ndarray | None = None
) -> tuple[jax.Array, BlockTopology]:
    """Packs a dense matrix; runs outside jit.

    Args:
        dense: [K, N].
        block_in: Rows of a block.
        block_out: Columns of a block.
        mask: bool [R, C], the blocks to keep; None keeps every block with a nonzero in it.

    Returns:
        values [J, block_in, block_out] and the topology.

    Raises:
        ValueError: `dense` is no matrix, its blocks do not tile it, or `mask` has another shape.
    """
    if dense.ndim != 2:
        raise ValueError(f"dense has shape {dense.shape}: expected [features_in, features_out].")
    check_geometry(dense.shape[0], dense.shape[1], block_in, block_out)
    blocks_RCkn = _blocks(jnp.asarray(dense), block_in, block_out)
    if mask is None:
        mask = np.asarray((blocks_RCkn != 0).any((2, 3)))
    mask = np.asarray(mask)
    if mask.shape != blocks_RCkn.shape[:2]:
        raise ValueError(f"mask has shape {mask.shape}: expected {blocks_RCkn.shape[:2]}, one entry per block.")
    topology = topology_from_mask(mask, block_in, block_out)
    column, row = np.nonzero(mask.T)
    return blocks_RCkn[row, column], topology


def to_dense(values: jax.Array, topology: BlockTopology) -> jax.Array:
    """Unpacks values [*experts, J, block_in, block_out] into [*experts, K, N], zeros where no block exists."""
    if values.ndim == 4:
        return jax.vmap(to_dense, in_axes=(0, 0 if topology.batch_shape else None))(values, topology)
    blocks_RCkn = jnp.zeros((topology.block_rows, topology.block_columns, *values.shape[1:]), values.dtype)
    blocks_RCkn = blocks_RCkn.at[topology.row_index, topology.block_column].set(values)
    return blocks_RCkn.transpose(0, 2, 1, 3).reshape(topology.features_in, topology.features_out)


def gather_blocks(dense: jax.Array, topology: BlockTopology) -> jax.Array:
    """The stored blocks [*experts, J, block_in, block_out] of dense matrices [*experts, K, N] whose pattern is known."""
    if dense.ndim == 3:
        return jax.vmap(gather_blocks, in_axes=(0, 0 if topology.batch_shape else None))(dense, topology)
    return _blocks(dense, topology.block_in, topology.block_out)[topology.row_index, topology.block_column]


def picture(topology: BlockTopology, width: int = 64) -> str:
    """Draws the pattern of one matrix in text: '#' for a block, '.' for none; at most `width` blocks each way."""
    mask = np.asarray(dense_mask(topology))[:width, :width]
    return "\n".join("".join("#" if block else "." for block in row) for row in mask)
