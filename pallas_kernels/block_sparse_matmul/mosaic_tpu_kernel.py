"""Block-sparse products on TPU: ``pallas_call`` with the lists prefetched into scalar memory.

The grid walks a list of visits: one for the start of every output block column, then one for each of its blocks.
Index maps read the list, so the pipeline of the compiler fetches exactly the blocks that exist; the extra visit at
the start of a column clears the accumulator (empty columns become zeros) and fetches nothing new.

Values are checked in interpret mode and the kernels compile ahead of time for v5e, v5p and v6e; no TPU timing has
been measured.

Legend: E experts, M rows, K/N features, J stored blocks, V visits = J + output block columns.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_matmul.topology import BlockTopology

ROWS = 1024  # rows of an output tile


def _row_tile(m: int) -> int:
    return min(ROWS, -(-m // 16) * 16)


def _pad_rows(x_EMK, multiple: int):
    missing = -x_EMK.shape[1] % multiple
    return jnp.pad(x_EMK, ((0, 0), (0, missing), (0, 0))) if missing else x_EMK


def _precision(dtype):
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _visits(start_C1, inner_J, slot_J):
    """The visit list of one expert: int32 [4, V] of output column, input block, stored block, flags (1 first, 2 last)."""
    columns, blocks = start_C1.shape[0] - 1, inner_J.shape[0]
    visit = jnp.arange(blocks + columns, dtype=jnp.int32)
    header = start_C1[:-1] + jnp.arange(columns, dtype=jnp.int32)
    column = jnp.searchsorted(header, visit, side="right").astype(jnp.int32) - 1
    position = jnp.maximum(visit - column - 1, 0)
    first = visit == header[column]
    last = jnp.concatenate([first[1:], jnp.ones((1,), bool)])
    flags = first.astype(jnp.int32) + 2 * last.astype(jnp.int32)
    return jnp.stack([column, inner_J[position], slot_J[position], flags])


def _product_kernel(list_ref, x_ref, w_ref, y_ref, acc_ref, *, transposed, precision):
    visit = pl.program_id(1)
    flags = list_ref[3, visit]
    is_first = flags % 2 == 1

    @pl.when(is_first)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(jnp.logical_not(is_first))
    def _():
        contraction = ((1,), (1,)) if transposed else ((1,), (0,))
        acc_ref[...] += lax.dot_general(
            x_ref[...], w_ref[...], (contraction, ((), ())), precision=precision, preferred_element_type=jnp.float32
        )

    @pl.when(flags >= 2)
    def _():
        y_ref[...] = acc_ref[...].astype(y_ref.dtype)


def _product(x_EMK, values_EJkn, topology: BlockTopology, *, transposed: bool, interpret: bool = False):
    m = x_EMK.shape[1]
    rows = _row_tile(m)
    block_in, block_out = topology.block_in, topology.block_out
    columns = topology.block_columns
    start, inner, slot = topology.column_start, topology.row_index, None
    if transposed:
        block_in, block_out, columns = block_out, block_in, topology.block_rows
        start, inner, slot = topology.row_start, topology.column_index, topology.row_order
    if slot is None:
        slot = jnp.broadcast_to(jnp.arange(topology.blocks, dtype=jnp.int32), inner.shape)
    padded = _pad_rows(x_EMK, rows)
    visits = topology.blocks + columns

    def one_expert(arguments):
        x_MK, values_Jkn, start, inner, slot = arguments
        return pl.pallas_call(
            functools.partial(_product_kernel, transposed=transposed, precision=_precision(x_MK.dtype)),
            out_shape=jax.ShapeDtypeStruct((x_MK.shape[0], columns * block_out), x_MK.dtype),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(x_MK.shape[0] // rows, visits),
                in_specs=[
                    pl.BlockSpec((rows, block_in), lambda i, v, lists: (i, lists[1, v])),
                    pl.BlockSpec(
                        (None, topology.block_in, topology.block_out), lambda i, v, lists: (lists[2, v], 0, 0)
                    ),
                ],
                out_specs=pl.BlockSpec((rows, block_out), lambda i, v, lists: (i, lists[0, v])),
                scratch_shapes=[pltpu.VMEM((rows, block_out), jnp.float32)],
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            interpret=interpret,
        )(_visits(start, inner, slot), x_MK, values_Jkn)

    arguments = (padded, values_EJkn, start, inner, slot)
    if padded.shape[0] == 1:
        y = one_expert(jax.tree.map(lambda a: a[0], arguments))[None]
    else:
        y = lax.map(one_expert, arguments)
    return y[:, :m]


def product(x_EMK, values_EJkn, topology: BlockTopology, interpret: bool = False) -> jax.Array:
    """y = x @ W per expert."""
    return _product(x_EMK, values_EJkn, topology, transposed=False, interpret=interpret)


def product_transposed(dy_EMN, values_EJkn, topology: BlockTopology, interpret: bool = False) -> jax.Array:
    """dx = dy @ W^T per expert."""
    return _product(dy_EMN, values_EJkn, topology, transposed=True, interpret=interpret)


def _sampled_kernel(list_ref, x_ref, dy_ref, out_ref, acc_ref, *, precision):
    del list_ref
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    acc_ref[...] += lax.dot_general(
        x_ref[...], dy_ref[...], (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = acc_ref[...].astype(out_ref.dtype)


def sampled_product(x_EMK, dy_EMN, topology: BlockTopology, interpret: bool = False) -> jax.Array:
    """The stored blocks of x^T dy per expert."""
    rows = _row_tile(x_EMK.shape[1])
    block_in, block_out = topology.block_in, topology.block_out
    x, dy = _pad_rows(x_EMK, rows), _pad_rows(dy_EMN, rows)

    def one_expert(arguments):
        x_MK, dy_MN, row, column = arguments
        lists = jnp.stack([row, column])
        return pl.pallas_call(
            functools.partial(_sampled_kernel, precision=_precision(x_MK.dtype)),
            out_shape=jax.ShapeDtypeStruct((topology.blocks, block_in, block_out), x_MK.dtype),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(topology.blocks, x_MK.shape[0] // rows),
                in_specs=[
                    pl.BlockSpec((rows, block_in), lambda j, i, lists: (i, lists[0, j])),
                    pl.BlockSpec((rows, block_out), lambda j, i, lists: (i, lists[1, j])),
                ],
                out_specs=pl.BlockSpec((None, block_in, block_out), lambda j, i, lists: (j, 0, 0)),
                scratch_shapes=[pltpu.VMEM((block_in, block_out), jnp.float32)],
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            interpret=interpret,
        )(lists, x_MK, dy_MN)

    arguments = (x, dy, topology.row_index, topology.block_column)
    if x.shape[0] == 1:
        return one_expert(jax.tree.map(lambda a: a[0], arguments))[None]
    return lax.map(one_expert, arguments)
