"""Block-sparse products in plain XLA whose cost falls with density: the CPU path and the fallback everywhere.

One loop over the stored blocks, each step a dot of token-major slices: absent blocks cost nothing and any pattern is served.
(Feature-major copies of the activations, or one dot for several blocks of a column, are slower: docs/log.md.)

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


def _zeros(shape, dtype, *operands):
    """Zeros that vary over the mesh axes of the operands inside shard_map, as sums over them do."""
    like = sum(a[(0,) * a.ndim].astype(dtype) for a in operands)
    return jnp.where(jnp.ones((), bool), jnp.zeros(shape, dtype), like)


def _one_expert(x_MK, values_Jkn, topology: BlockTopology, *, transposed, precision):
    blocks = values_Jkn.shape[0]
    if transposed:
        inner_J, slot_J, start_C1 = topology.column_index, topology.row_order, topology.row_start
        inner, outer, columns = topology.block_out, topology.block_in, topology.block_rows
    else:
        inner_J, slot_J, start_C1 = topology.row_index, None, topology.column_start
        inner, outer, columns = topology.block_in, topology.block_out, topology.block_columns
    column_J = block_columns_of(start_C1, blocks)
    contraction = ((1,), (1 if transposed else 0,))

    def add(j, y_MN):
        x_Mk = lax.dynamic_slice_in_dim(x_MK, inner_J[j] * inner, inner, axis=1)
        w_kn = values_Jkn[j if slot_J is None else slot_J[j]]
        place = column_J[j] * outer
        sum_Mn = lax.dynamic_slice_in_dim(y_MN, place, outer, axis=1)
        sum_Mn = sum_Mn + accumulating_dot(x_Mk, w_kn, contraction, precision)
        return lax.dynamic_update_slice_in_dim(y_MN, sum_Mn, place, axis=1)

    zeros_MN = _zeros((x_MK.shape[0], columns * outer), _accumulator(x_MK.dtype), x_MK, values_Jkn, start_C1, inner_J)
    return lax.fori_loop(0, start_C1[-1], add, zeros_MN).astype(x_MK.dtype)


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
        start_C1, row_J = topology.column_start, topology.row_index
        block_in, block_out = topology.block_in, topology.block_out

        def column(c, out_Jkn):
            dy_Mn = lax.dynamic_slice_in_dim(dy_MN, c * block_out, block_out, axis=1)

            def block(j, out_Jkn):
                x_Mk = lax.dynamic_slice_in_dim(x_MK, row_J[j] * block_in, block_in, axis=1)
                return out_Jkn.at[j].set(accumulating_dot(x_Mk, dy_Mn, ((0,), (0,)), precision).astype(x_MK.dtype))

            return lax.fori_loop(start_C1[c], start_C1[c + 1], block, out_Jkn)

        zeros_Jkn = _zeros((row_J.shape[0], block_in, block_out), x_MK.dtype, x_MK, dy_MN, start_C1, row_J)
        return lax.fori_loop(0, topology.block_columns, column, zeros_Jkn)

    return _over_experts(one_expert, x_EMK, dy_EMN, topology)
