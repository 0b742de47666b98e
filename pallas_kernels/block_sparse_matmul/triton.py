"""Block-sparse products by Triton kernels: GPUs other than Hopper, blocks of 16 and 32, float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import triton_call
from pallas_kernels.backend import Dtypes, Shapes
from pallas_kernels.block_sparse_matmul.topology import BlockTopology

BLOCKS = (16, 32, 64, 128)
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
SLAB = 8  # row tiles per slab


def supports(shapes: Shapes, dtypes: Dtypes, device_kind: str | None) -> str | None:
    """None if the Triton kernels take these arguments, else the reason; asked before anything is traced."""
    if (reason := triton_call.unavailable()) is not None:
        return reason
    if jnp.dtype(dtypes["values"]) not in DTYPES:
        return f"takes bfloat16, float16 or float32, not {dtypes['values']}"
    block = tuple(shapes["values"][-2:])
    if any(side not in BLOCKS for side in block):
        return f"takes blocks of {BLOCKS}, not {block[0]} x {block[1]}"
    return None


def _depth(inner: int, dtype) -> int:
    return min(inner, 32 if jnp.dtype(dtype).itemsize == 4 else 64)


def _product(x_EMK, values_EJkn, topology: BlockTopology, precision, *, transposed: bool):
    from pallas_kernels.block_sparse_matmul import triton_kernels

    experts, m, k = x_EMK.shape
    inner, out = topology.block_in, topology.block_out
    schedule, index = topology.column_schedule, topology.row_index
    if transposed:
        inner, out, schedule, index = out, inner, topology.row_schedule, topology.column_index
    columns = schedule.shape[-1]
    rows = 128 if m > 64 else 64 if m > 32 else 32
    wide = rows * out >= 128 * 128
    return triton_call.call(
        triton_kernels.block_product,
        x_EMK,
        values_EJkn,
        schedule,
        index,
        topology.row_order,
        out_shape=jax.ShapeDtypeStruct((experts, m, columns * out), x_EMK.dtype),
        grid=(-(-m // rows) * columns, experts),
        num_warps=8 if wide else 4,
        num_stages=3,
        M=m,
        K=k,
        J=topology.blocks,
        C=columns,
        ROWS=rows,
        INNER=inner,
        OUT=out,
        DEPTH=_depth(inner, x_EMK.dtype),
        TRANSPOSED=transposed,
        WIDTH=SLAB,
        PRECISION=triton_call.dot_precision(x_EMK.dtype, precision),
    )


def product(x_EMK: jax.Array, values_EJkn: jax.Array, topology: BlockTopology, precision=lax.Precision.HIGHEST):
    """y = x @ W per expert, accumulated in float32."""
    return _product(x_EMK, values_EJkn, topology, precision, transposed=False)


def product_transposed(
    dy_EMN: jax.Array, values_EJkn: jax.Array, topology: BlockTopology, precision=lax.Precision.HIGHEST
):
    """dx = dy @ W^T per expert, accumulated in float32."""
    return _product(dy_EMN, values_EJkn, topology, precision, transposed=True)


def sampled_product(x_EMK: jax.Array, dy_EMN: jax.Array, topology: BlockTopology, precision=lax.Precision.HIGHEST):
    """The stored blocks of x^T dy per expert, accumulated in float32."""
    from pallas_kernels.block_sparse_matmul import triton_kernels

    experts, m, k = x_EMK.shape
    block = topology.block_in, topology.block_out
    return triton_call.call(
        triton_kernels.block_sampled_product,
        x_EMK,
        dy_EMN,
        topology.row_index,
        topology.block_column,
        out_shape=jax.ShapeDtypeStruct((experts, topology.blocks, *block), x_EMK.dtype),
        grid=(topology.blocks, experts),
        num_warps=8 if min(block) == 128 else 4,
        num_stages=3,
        M=m,
        K=k,
        N=dy_EMN.shape[2],
        J=topology.blocks,
        IN=block[0],
        OUT=block[1],
        DEPTH=_depth(64, x_EMK.dtype),
        PRECISION=triton_call.dot_precision(x_EMK.dtype, precision),
    )
