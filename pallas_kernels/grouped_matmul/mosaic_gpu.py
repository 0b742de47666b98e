"""The Hopper backend: what it supports, and the grouped products on its kernels.

Rows are gathered and scattered inside the kernels, by threads (`mosaic_gpu_rows.py`): Hopper's copy engine has no row gather, and a copy of one row cannot place it in
the swizzled tiles that wgmma reads.

Legend: R rows of a stored operand, A rows of the sorted space, O output rows, G groups, W stored weights, K contraction, N outer dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.backend import device_kind, jax_version
from pallas_kernels.grouped_matmul.groups import RowGroups

HOPPER = ("H100", "H200", "H800", "H20", "GH200")


def supports(operation: str, transpose: bool, shapes, dtypes, kind: str | None) -> str | None:
    """None, or why these arguments cannot run on the Hopper kernels."""
    if jax_version() < (0, 11, 0):
        return "needs JAX 0.11 or newer"
    if kind is not None and not any(name in kind for name in HOPPER):
        return f"written for Hopper (wgmma), not for {kind}"
    if dtypes["x"] not in (jnp.bfloat16, jnp.float16):
        return f"16-bit floats only, not {dtypes['x']}"
    rows = shapes.get("row_index", shapes["x"])[0]
    if rows % 8 or rows < 128:
        return f"rows must be a multiple of 8 and at least 128, not {rows}"
    if operation == "weight_gradient":
        inner, outer = shapes["x"][1], shapes["dy"][1]
        ok = inner % 128 == 0 and outer % 128 == 0
    else:
        weight = shapes["gate" if operation == "swiglu" else "w"]
        inner, outer = (weight[2], weight[1]) if transpose else (weight[1], weight[2])
        ok = inner % 64 == 0 and outer % 128 == 0
    return None if ok else f"dims must be multiples of 128 (contraction of 64), not {inner} and {outer}"


def _multiprocessors() -> int:
    try:
        return jax.devices("cuda")[0].core_count
    except RuntimeError:
        return 132  # ahead of time: every full Hopper has 132


def product(
    x_RK, w_WKN, groups: RowGroups, row_index_A, output_index_A, *, transpose: bool, output_rows: int, precision=None
):
    """y[out(a)] = x[in(a)] @ w[group of a] (or its transpose); rows of no group are zero."""
    from pallas_kernels.grouped_matmul.mosaic_gpu_product import grouped_product
    from pallas_kernels.grouped_matmul.tiles import product_tiles

    del precision
    rows = (x_RK if row_index_A is None else row_index_A).shape[0]
    inner, outer = (w_WKN.shape[2], w_WKN.shape[1]) if transpose else w_WKN.shape[1:]
    launch: dict[str, Any] = {
        "tiles": product_tiles(device_kind("cuda"), rows, inner, outer),
        "ctas": _multiprocessors(),
    }
    launch |= {"transpose": transpose, "output_rows": output_rows}
    (y_ON,) = grouped_product((x_RK,), (w_WKN,), groups, row_index_A, output_index_A, **launch)
    return y_ON


def summed_product(x_AK, x2_AK, w_WKN, w2_WKN, groups: RowGroups, *, transpose: bool, precision=None):
    """y[a] = x[a] @ w[group of a] + x2[a] @ w2[group of a] (or the transposes), one accumulator."""
    from pallas_kernels.grouped_matmul.mosaic_gpu_product import grouped_product
    from pallas_kernels.grouped_matmul.tiles import product_tiles

    del precision
    inner, outer = (w_WKN.shape[2], w_WKN.shape[1]) if transpose else w_WKN.shape[1:]
    tiles = product_tiles(device_kind("cuda"), x_AK.shape[0], inner, outer)
    rows, weights = (x_AK, x2_AK), (w_WKN, w2_WKN)
    (y_AN,) = grouped_product(rows, weights, groups, tiles=tiles, transpose=transpose, ctas=_multiprocessors())
    return y_AN


def weight_gradient(x_RK, dy_ON, groups: RowGroups, row_index_A, output_index_A, *, precision=None):
    """dw[g] = x(rows of g)^T dy(rows of g), one matrix per group."""
    from pallas_kernels.grouped_matmul.mosaic_gpu_weight import grouped_weight_gradient
    from pallas_kernels.grouped_matmul.tiles import weight_tiles

    del precision
    only_dy = row_index_A is None and output_index_A is not None
    tiles = weight_tiles(device_kind("cuda"), x_RK.shape[1], dy_ON.shape[1], only_dy)
    launch: dict[str, Any] = {"tiles": tiles, "ctas": _multiprocessors()}
    return grouped_weight_gradient(x_RK, dy_ON, groups, row_index_A, output_index_A, **launch)


def swiglu(x_RK, gate_WKN, up_WKN, groups: RowGroups, row_index_A, *, save: bool, precision=None):
    """h = silu(x @ gate) * (x @ up) per group in one kernel; with `save` also both products."""
    from pallas_kernels.grouped_matmul.mosaic_gpu_product import grouped_product
    from pallas_kernels.grouped_matmul.tiles import product_tiles

    del precision
    rows = (x_RK if row_index_A is None else row_index_A).shape[0]
    inner, outer = gate_WKN.shape[1:]
    launch: dict[str, Any] = {
        "tiles": product_tiles(device_kind("cuda"), rows, inner, outer, parts=2),
        "ctas": _multiprocessors(),
    }
    return grouped_product((x_RK,), (gate_WKN, up_WKN), groups, row_index_A, save=save, **launch)
