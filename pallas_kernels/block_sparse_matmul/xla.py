"""Block-sparse products in plain XLA whose cost falls with density: the CPU path and the fallback everywhere.

For y and dx activations are turned feature-major once, so that the features of a block are contiguous. A loop over output
block columns then adds up one dot for each stored block; its bounds are read from the topology, so absent blocks cost
nothing and any pattern is served. (One dot for a group of blocks is hardly faster and takes several times longer to compile.)

Legend: E experts, M rows, K/N features, J stored blocks, R/C block rows and columns, k/n features inside a block.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_matmul.reference import block_columns_of
from pallas_kernels.block_sparse_matmul.topology import BlockTopology


def _accumulator(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def accumulating_dot(a, b, contraction, precision):
    """Contracts one dimension of `a` with one of `b`; products of 16-bit operands are added up in float32."""
    wide = _accumulator(a.dtype)

    def dot(a, b):
        dimensions = (contraction, ((), ()))
        return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=wide)

    if a.dtype == wide:
        return dot(a, b)
    # XLA's CPU backend has no 16-bit dot with a float32 result for some layouts; widening is what it does for others.
    return lax.platform_dependent(a, b, cpu=lambda a, b: dot(a.astype(wide), b.astype(wide)), default=dot)


def _column_products(x_RkM, values_Jkn, start_C1, inner_J, slot_J, *, transposed, precision):
    """For every output block column, the sum of its blocks' products, feature-major: [C, n, M]."""
    accumulator = _accumulator(x_RkM.dtype)
    contraction = ((1 if transposed else 0,), (0,))
    zeros = jnp.zeros((values_Jkn.shape[1 if transposed else 2], x_RkM.shape[2]), accumulator)
    # Zeros that vary over the mesh axes of the operands inside shard_map, as the sums do.
    like = x_RkM[0, 0, 0] + values_Jkn[0, 0, 0] + (start_C1[0] + inner_J[0]).astype(x_RkM.dtype)
    zeros = jnp.where(jnp.ones((), bool), zeros, like.astype(accumulator))

    def column(bounds):
        def add(position, acc):
            x = lax.dynamic_index_in_dim(x_RkM, inner_J[position], 0, keepdims=False)
            w = values_Jkn[position if slot_J is None else slot_J[position]]
            return acc + accumulating_dot(w, x, contraction, precision)

        return lax.fori_loop(*bounds, add, zeros).astype(x_RkM.dtype)

    return lax.map(column, (start_C1[:-1], start_C1[1:]))


def _one_expert(x_MK, values_Jkn, topology: BlockTopology, *, transposed, precision):
    m = x_MK.shape[0]
    if transposed:
        block_in, start, inner, slot = topology.block_out, topology.row_start, topology.column_index, topology.row_order
    else:
        block_in, start, inner, slot = topology.block_in, topology.column_start, topology.row_index, None
    x_RkM = x_MK.T.reshape(-1, block_in, m)
    y_CnM = _column_products(x_RkM, values_Jkn, start, inner, slot, transposed=transposed, precision=precision)
    return y_CnM.reshape(-1, m).T


def _over_experts(function, *arguments):
    if jax.tree.leaves(arguments[0])[0].shape[0] == 1:
        return function(*jax.tree.map(lambda a: a[0], arguments))[None]
    return lax.map(lambda expert: function(*expert), arguments)


def product(x_EMK: jax.Array, values_EJkn: jax.Array, topology: BlockTopology, precision=lax.Precision.HIGHEST):
    """y = x @ W per expert, accumulated in float32, in the dtype of x."""
    run = functools.partial(_one_expert, transposed=False, precision=precision)
    return _over_experts(run, x_EMK, values_EJkn, topology)


def product_transposed(
    dy_EMN: jax.Array, values_EJkn: jax.Array, topology: BlockTopology, precision=lax.Precision.HIGHEST
):
    """dx = dy @ W^T per expert, accumulated in float32, in the dtype of dy."""
    run = functools.partial(_one_expert, transposed=True, precision=precision)
    return _over_experts(run, dy_EMN, values_EJkn, topology)


def sampled_product(x_EMK: jax.Array, dy_EMN: jax.Array, topology: BlockTopology, precision=lax.Precision.HIGHEST):
    """The stored blocks of x^T dy per expert, accumulated in float32, in the dtype of x: one dot per block."""

    def one_expert(x_MK, dy_MN, topology):
        column_J = block_columns_of(topology.column_start, topology.row_index.shape[-1])

        def block(coordinates):
            row, column = coordinates
            x_Mk = lax.dynamic_slice_in_dim(x_MK, row * topology.block_in, topology.block_in, axis=1)
            dy_Mn = lax.dynamic_slice_in_dim(dy_MN, column * topology.block_out, topology.block_out, axis=1)
            return accumulating_dot(x_Mk, dy_Mn, ((0,), (0,)), precision).astype(x_MK.dtype)

        return lax.map(block, (topology.row_index, column_J))

    return _over_experts(one_expert, x_EMK, dy_EMN, topology)
