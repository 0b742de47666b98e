"""Grouped products in plain XLA: the fast path on CPU, the fallback everywhere. Cost is that of the rows present, not groups x rows.

One loop over groups, inside it one loop over row tiles of the group; a tile may start at any row, so groups need no alignment. Two tile heights: tall tiles
while they fit, short ones for the rest, so a group wastes less than one short tile. Trip counts are read from the group sizes: an empty group costs one weight read.
A last tile that would stick out of the buffer is moved back; the mask keeps the rows that are its own.

Legend: R rows of a stored operand, A rows of the sorted space, O output rows, G groups, W stored weights, K inner dim, N outer dim, T rows of a tile.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.groups import RowGroups


def tile_heights(rows: int, groups: int) -> tuple[int, ...]:
    """Tall and short tile for a mean group size; measured on 2 CPU cores in float32 (docs/kernels_grouped.md)."""
    mean = rows / max(groups, 1)
    ladder = (1024, 128) if mean >= 8192 else (256, 64) if mean >= 512 else (128, 32) if mean >= 48 else (32, 8)
    return tuple(min(height, rows) for height in ladder)


def _for_each_tile(groups: RowGroups, g, rows: int, heights, body, carry):
    """Run `body(carry, first, own_T)` over the tiles of group g: the tile holds rows first..first+T, `own_T` says which of them are its own."""
    base, left = groups.start_G[g], groups.size_G[g]
    end = base + left
    for i, height in enumerate(heights):
        is_last = i == len(heights) - 1
        count = lax.div(left + (height - 1 if is_last else 0), jnp.int32(height))

        def step(j, carry, base=base, height=height):
            lo = base + j * height
            first = jnp.minimum(lo, rows - height)
            row_T = first + lax.iota(jnp.int32, height)
            return body(carry, first, (row_T >= lo) & (row_T < end), height)

        carry = lax.fori_loop(0, count, step, carry)
        base, left = base + count * height, left - count * height
    return carry


def _gathered(x_RK, index_A):
    """Rows in sorted order. One gather runs on all cores; one per tile, inside the loop, made a whole training step 13% slower."""
    return x_RK if index_A is None else jnp.take(x_RK, index_A, axis=0, mode="clip")


def _write(out_ON, index_A, first, own_T, y_TN):
    height = own_T.shape[0]
    if index_A is None:
        old_TN = lax.dynamic_slice_in_dim(out_ON, first, height)
        return lax.dynamic_update_slice_in_dim(
            out_ON, jnp.where(own_T[:, None], y_TN.astype(out_ON.dtype), old_TN), first, 0
        )
    target_T = jnp.where(own_T, lax.dynamic_slice_in_dim(index_A, first, height), out_ON.shape[0])
    return out_ON.at[target_T].set(y_TN.astype(out_ON.dtype), mode="drop")


def _dot(a, b, contract, precision):
    return lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32)
    )


def product(
    x_RK, w_WKN, groups: RowGroups, row_index_A, output_index_A, *, transpose: bool, output_rows: int, precision=None
):
    """y[out(a)] = x[in(a)] @ w[group of a] (or its transpose); rows of no group are zero."""
    x_AK = _gathered(x_RK, row_index_A)
    rows = x_AK.shape[0]
    out_ON = jnp.zeros((output_rows, w_WKN.shape[1 if transpose else 2]), x_AK.dtype)
    if rows == 0:
        return out_ON
    heights = tile_heights(rows, groups.size_G.shape[0])

    def group(g, out_ON):
        w_KN = lax.dynamic_index_in_dim(w_WKN, groups.weight_G[g], keepdims=False)

        def tile(out_ON, first, own_T, height):
            y_TN = _dot(
                lax.dynamic_slice_in_dim(x_AK, first, height), w_KN, ((1,), (1 if transpose else 0,)), precision
            )
            return _write(out_ON, output_index_A, first, own_T, y_TN)

        return _for_each_tile(groups, g, rows, heights, tile, out_ON)

    return lax.fori_loop(0, groups.size_G.shape[0], group, out_ON)


def summed_product(x_AK, x2_AK, w_WKN, w2_WKN, groups: RowGroups, *, transpose: bool, precision=None):
    """y[a] = x[a] @ w[group of a] + x2[a] @ w2[group of a] (or the transposes), each product rounded to the dtype of x."""
    options = {"transpose": transpose, "output_rows": x_AK.shape[0], "precision": precision}
    return product(x_AK, w_WKN, groups, None, None, **options) + product(x2_AK, w2_WKN, groups, None, None, **options)


def weight_gradient(x_RK, dy_ON, groups: RowGroups, row_index_A, output_index_A, *, precision=None):
    """dw[g] = x(rows of g)^T dy(rows of g), one matrix per group, accumulated in float32."""
    x_AK, dy_AN = _gathered(x_RK, row_index_A), _gathered(dy_ON, output_index_A)
    rows, count = x_AK.shape[0], groups.size_G.shape[0]
    out_GKN = jnp.zeros((count, x_AK.shape[1], dy_AN.shape[1]), x_AK.dtype)
    if rows == 0:
        return out_GKN
    heights = tile_heights(rows, count)

    def group(g, out_GKN):
        def tile(sum_KN, first, own_T, height):
            x_TK = jnp.where(own_T[:, None], lax.dynamic_slice_in_dim(x_AK, first, height), 0)
            dy_TN = jnp.where(own_T[:, None], lax.dynamic_slice_in_dim(dy_AN, first, height), 0)
            return sum_KN + _dot(x_TK, dy_TN, ((0,), (0,)), precision)

        zero_KN = jnp.zeros(out_GKN.shape[1:], jnp.promote_types(x_AK.dtype, jnp.float32))
        sum_KN = _for_each_tile(groups, g, rows, heights, tile, zero_KN)
        return lax.dynamic_update_index_in_dim(out_GKN, sum_KN.astype(out_GKN.dtype), g, 0)

    return lax.fori_loop(0, count, group, out_GKN)


def swiglu(x_RK, gate_WKN, up_WKN, groups: RowGroups, row_index_A, *, save: bool, precision=None):
    """h = silu(x @ gate) * (x @ up) per group, both products of a tile while its rows are at hand; with `save` also the products."""
    x_AK = _gathered(x_RK, row_index_A)
    rows = x_AK.shape[0]
    outs = tuple(jnp.zeros((rows, gate_WKN.shape[2]), x_AK.dtype) for _ in range(3 if save else 1))
    if rows == 0:
        return outs
    heights = tile_heights(rows, groups.size_G.shape[0])

    def group(g, outs):
        gate_KN, up_KN = (lax.dynamic_index_in_dim(w, groups.weight_G[g], keepdims=False) for w in (gate_WKN, up_WKN))

        def tile(outs, first, own_T, height):
            x_TK = lax.dynamic_slice_in_dim(x_AK, first, height)
            g_TN, u_TN = (_dot(x_TK, w, ((1,), (0,)), precision) for w in (gate_KN, up_KN))
            values = (jax.nn.silu(g_TN) * u_TN, g_TN, u_TN)[: len(outs)]
            return tuple(_write(o, None, first, own_T, v) for o, v in zip(outs, values))

        return _for_each_tile(groups, g, rows, heights, tile, outs)

    return lax.fori_loop(0, groups.size_G.shape[0], group, outs)
