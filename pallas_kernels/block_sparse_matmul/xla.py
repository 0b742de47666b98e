"""Block-sparse products in plain XLA whose cost falls with density: the CPU path and the fallback everywhere.

A loop over the blocks of the input's features takes each slice of the activations once; an inner loop over the stored blocks of that slice is one
dot a block: absent blocks cost nothing and any pattern is served. (What was slower: docs/log.md.)

Legend: E experts, M rows, K/N features, J stored blocks, R/C block rows and columns, k/n features inside a block.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

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


def _slice(x_MK, i, width: int):
    return lax.dynamic_slice_in_dim(x_MK, i * width, width, axis=1)


def _one_expert(x_MK, values_Jkn, topology: BlockTopology, *, transposed, precision):
    if transposed:
        start_R1, outer_J, slot_J = topology.column_start, topology.row_index, None
        inner, outer, outers = topology.block_out, topology.block_in, topology.block_rows
    else:
        start_R1, outer_J, slot_J = topology.row_start, topology.column_index, topology.row_order
        inner, outer, outers = topology.block_in, topology.block_out, topology.block_columns
    contraction = ((1,), (1 if transposed else 0,))

    def block_row(r, y_MN):
        x_Mk = _slice(x_MK, r, inner)

        def add(j, y_MN):
            w_kn = values_Jkn[j if slot_J is None else slot_J[j]]
            sum_Mn = _slice(y_MN, outer_J[j], outer) + accumulating_dot(x_Mk, w_kn, contraction, precision)
            return lax.dynamic_update_slice_in_dim(y_MN, sum_Mn, outer_J[j] * outer, axis=1)

        return lax.fori_loop(start_R1[r], start_R1[r + 1], add, y_MN)

    zeros_MN = _zeros((x_MK.shape[0], outers * outer), _accumulator(x_MK.dtype), x_MK, values_Jkn, start_R1, outer_J)
    return lax.fori_loop(0, start_R1.shape[0] - 1, block_row, zeros_MN).astype(x_MK.dtype)


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
        start_R1, column_J, slot_J = topology.row_start, topology.column_index, topology.row_order

        def block_row(r, out_Jkn):
            x_kM = _slice(x_MK, r, topology.block_in).T

            def block(j, out_Jkn):
                dy_Mn = _slice(dy_MN, column_J[j], topology.block_out)
                dw_kn = accumulating_dot(x_kM, dy_Mn, ((1,), (0,)), precision)
                return out_Jkn.at[slot_J[j]].set(dw_kn.astype(x_MK.dtype))

            return lax.fori_loop(start_R1[r], start_R1[r + 1], block, out_Jkn)

        shape = (slot_J.shape[0], topology.block_in, topology.block_out)
        zeros_Jkn = _zeros(shape, x_MK.dtype, x_MK, dy_MN, start_R1, column_J)
        return lax.fori_loop(0, topology.block_rows, block_row, zeros_Jkn)

    return _over_experts(one_expert, x_EMK, dy_EMN, topology)
