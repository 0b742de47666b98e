"""The Triton backend: any row count and dims, float32 too, rows gathered and scattered inside the kernels.

Legend: R rows of a stored operand, A rows of the sorted space, O output rows, G groups, W stored weights, K contraction, N outer dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import triton_call
from pallas_kernels.grouped_matmul.groups import RowGroups
from pallas_kernels.grouped_matmul.schedule import row_tiles

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
SLAB = 8  # row tiles per slab


def supports(shapes, dtypes, kind: str | None) -> str | None:
    """None, or why these arguments cannot run on the Triton kernels."""
    if (reason := triton_call.unavailable()) is not None:
        return reason
    if jnp.dtype(dtypes["x"]) not in DTYPES:
        return f"bfloat16, float16 or float32, not {dtypes['x']}"
    return None if shapes["x"][0] > 0 else "no rows"


def _side(size: int, most: int) -> int:
    """The smallest power of two that holds `size`, from 16 to `most`."""
    return max(16, min(most, 1 << (size - 1).bit_length()))


def _tile(dtype, columns: int) -> tuple[int, int, int]:
    """Columns of a tile, contraction of a step, warps."""
    if jnp.dtype(dtype).itemsize == 4:
        return _side(columns, 64), 32, 4
    return _side(columns, 256 if triton_call.large_tiles() else 128), 64, 8


def _height(rows: int, groups: RowGroups) -> int:
    """Rows of a tile, by the mean group."""
    mean = rows // groups.size_G.shape[0]
    return 128 if mean > 64 else 64 if mean > 32 else 32 if mean > 16 else 16


def product(
    x_RK, w_WKN, groups: RowGroups, row_index_A, output_index_A, *, transpose: bool, output_rows: int, precision=None
):
    """y[out(a)] = x[in(a)] @ w[group of a] (or its transpose); rows of no group are zero."""
    from pallas_kernels.grouped_matmul import triton_kernels

    rows = (x_RK if row_index_A is None else row_index_A).shape[0]
    inner, outer = (w_WKN.shape[2], w_WKN.shape[1]) if transpose else w_WKN.shape[1:]
    height = _height(rows, groups)
    columns, depth, warps = _tile(x_RK.dtype, outer)
    listed = row_tiles(groups, rows, height, align=1)
    tiles = listed.entries_4V.shape[1]
    scatter = output_index_A is not None
    return triton_call.call(
        triton_kernels.grouped_product,
        x_RK,
        w_WKN,
        *listed,
        row_index_A if row_index_A is not None else listed.count_2,
        output_index_A if scatter else listed.count_2,
        out_shape=jax.ShapeDtypeStruct((output_rows, outer), x_RK.dtype),
        grid=tiles * -(-outer // columns),
        num_warps=warps,
        num_stages=3,
        zeroed_outputs=(0,) if scatter else (),
        V=tiles,
        K=inner,
        N=outer,
        ROWS=height,
        COLUMNS=columns,
        DEPTH=_side(inner, depth),
        TRANSPOSED=transpose,
        GATHER=row_index_A is not None,
        SCATTER=scatter,
        WIDTH=SLAB,
        PRECISION=triton_call.dot_precision(x_RK.dtype, precision),
    )


def summed_product(x_AK, x2_AK, w_WKN, w2_WKN, groups: RowGroups, *, transpose: bool, precision=None):
    """y[a] = x[a] @ w[group of a] + x2[a] @ w2[group of a] (or the transposes), each product rounded to the dtype of x."""
    options = {"transpose": transpose, "output_rows": x_AK.shape[0], "precision": precision}
    return product(x_AK, w_WKN, groups, None, None, **options) + product(x2_AK, w2_WKN, groups, None, None, **options)


def weight_gradient(x_RK, dy_ON, groups: RowGroups, row_index_A, output_index_A, *, precision=None):
    """dw[g] = x(rows of g)^T dy(rows of g), one matrix per group."""
    from pallas_kernels.grouped_matmul import triton_kernels

    inner, outer = x_RK.shape[1], dy_ON.shape[1]
    count = groups.size_G.shape[0]
    columns, depth, warps = _tile(x_RK.dtype, outer)
    side = _side(inner, 128 if columns > 64 else 64)
    return triton_call.call(
        triton_kernels.grouped_weight_gradient,
        x_RK,
        dy_ON,
        groups.start_G,
        groups.start_G + groups.size_G,
        row_index_A if row_index_A is not None else groups.start_G,
        output_index_A if output_index_A is not None else groups.start_G,
        out_shape=jax.ShapeDtypeStruct((count, inner, outer), x_RK.dtype),
        grid=(-(-inner // side) * -(-outer // columns), count),
        num_warps=warps,
        num_stages=3,
        K=inner,
        N=outer,
        IN=side,
        OUT=columns,
        DEPTH=depth,
        GATHER=row_index_A is not None,
        SCATTER=output_index_A is not None,
        PRECISION=triton_call.dot_precision(x_RK.dtype, precision),
    )


def swiglu(x_RK, gate_WKN, up_WKN, groups: RowGroups, row_index_A, *, save: bool, precision=None):
    """h = silu(x @ gate) * (x @ up) per group; with `save` also both products."""
    from pallas_kernels.grouped_matmul import triton_kernels

    rows = (x_RK if row_index_A is None else row_index_A).shape[0]
    inner, outer = gate_WKN.shape[1:]
    height = _height(rows, groups)
    columns, depth, warps = _tile(x_RK.dtype, outer)
    columns = min(columns, 128 if x_RK.dtype.itemsize == 2 else 32)
    listed = row_tiles(groups, rows, height, align=1)
    tiles = listed.entries_4V.shape[1]
    hidden = jax.ShapeDtypeStruct((rows, outer), x_RK.dtype)
    outs = triton_call.call(
        triton_kernels.grouped_swiglu,
        x_RK,
        gate_WKN,
        up_WKN,
        *listed,
        row_index_A if row_index_A is not None else listed.count_2,
        out_shape=[hidden, *([hidden] * 2 if save else [jax.ShapeDtypeStruct((1,), x_RK.dtype)] * 2)],
        grid=tiles * -(-outer // columns),
        num_warps=warps,
        num_stages=3 if triton_call.large_tiles() else 2,
        V=tiles,
        K=inner,
        N=outer,
        ROWS=height,
        COLUMNS=columns,
        DEPTH=_side(inner, depth),
        GATHER=row_index_A is not None,
        SAVE=save,
        WIDTH=SLAB,
        PRECISION=triton_call.dot_precision(x_RK.dtype, precision),
    )
    return tuple(outs) if save else (outs[0],)
