"""The TPU backend: what it supports, and the three products on its kernels (imported when first traced); rows are gathered and scattered by XLA around them.

Legend: R rows of a stored operand, A rows of the sorted space, O output rows, G groups, W stored weights, K contraction, N outer dim.
"""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.grouped_matmul.groups import RowGroups
from pallas_kernels.grouped_matmul.rows import gather, scatter


def supports(operation: str, transpose: bool, shapes, dtypes, kind: str | None) -> str | None:
    """None, or why these arguments cannot run on the TPU kernels."""
    del transpose, kind
    if dtypes["x"] not in (jnp.bfloat16, jnp.float32):
        return f"float32 and bfloat16 only, not {dtypes['x']}"
    if operation == "weight_gradient":
        dims = shapes["x"][1], shapes["dy"][1]
    else:
        dims = shapes["gate" if operation == "swiglu" else "w"][1:]
    if any(d % 128 for d in dims):
        return f"dims must be multiples of 128, not {dims[0]} and {dims[1]}"
    rows = shapes.get("row_index", shapes["x"])[0]
    return None if rows >= 16 else f"needs at least 16 rows, not {rows}"


def product(
    x_RK, w_WKN, groups: RowGroups, row_index_A, output_index_A, *, transpose: bool, output_rows: int, precision=None
):
    """y[out(a)] = x[in(a)] @ w[group of a] (or its transpose); rows of no group are zero."""
    from pallas_kernels.grouped_matmul.mosaic_tpu_kernel import grouped_product

    x_AK = gather(x_RK, row_index_A)
    (y_AN,) = grouped_product(x_AK, (w_WKN,), groups, transpose=transpose, outs=1, precision=precision)
    return scatter(y_AN, output_index_A, output_rows, groups)


def summed_product(x_AK, x2_AK, w_WKN, w2_WKN, groups: RowGroups, *, transpose: bool, precision=None):
    """y[a] = x[a] @ w[group of a] + x2[a] @ w2[group of a] (or the transposes), each product rounded to the dtype of x."""
    options = {"transpose": transpose, "output_rows": x_AK.shape[0], "precision": precision}
    return product(x_AK, w_WKN, groups, None, None, **options) + product(x2_AK, w2_WKN, groups, None, None, **options)


def weight_gradient(x_RK, dy_ON, groups: RowGroups, row_index_A, output_index_A, *, precision=None):
    """dw[g] = x(rows of g)^T dy(rows of g), one matrix per group."""
    from pallas_kernels.grouped_matmul.mosaic_tpu_kernel import grouped_weight_gradient

    operands = gather(x_RK, row_index_A), gather(dy_ON, output_index_A)
    return grouped_weight_gradient(*operands, groups, precision=precision)


def swiglu(x_RK, gate_WKN, up_WKN, groups: RowGroups, row_index_A, *, save: bool, precision=None):
    """h = silu(x @ gate) * (x @ up) per group in one kernel; with `save` also both products."""
    from pallas_kernels.grouped_matmul.mosaic_tpu_kernel import grouped_product

    options = {"transpose": False, "outs": 3 if save else 1, "precision": precision}
    return tuple(grouped_product(gather(x_RK, row_index_A), (gate_WKN, up_WKN), groups, **options))
