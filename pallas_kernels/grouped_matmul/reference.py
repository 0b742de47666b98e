"""The oracle: grouped products as masked dense products in float32, one per group. Cost is G times that of the real backends.

Legend: R rows of a stored operand, A rows of the sorted space, O output rows, G groups, W stored weights, K inner dim, N outer dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.groups import RowGroups


def _sorted_rows(x_RK: jax.Array, index_A: jax.Array | None) -> jax.Array:
    return x_RK if index_A is None else jnp.take(x_RK, index_A, axis=0, mode="clip")


def _masks(groups: RowGroups, rows: int) -> jax.Array:
    row_A = jnp.arange(rows)
    return (row_A >= groups.start_G[:, None]) & (row_A < (groups.start_G + groups.size_G)[:, None])


def product(
    x_RK, w_WKN, groups: RowGroups, row_index_A, output_index_A, *, transpose: bool, output_rows: int, precision=None
):
    """y[out(a)] = x[in(a)] @ w[group of a] (or its transpose); rows of no group are zero. Accumulates in float32 at highest precision."""
    del precision
    x_AK = _sorted_rows(x_RK, row_index_A).astype(jnp.float32)
    mask_GA = _masks(groups, x_AK.shape[0])
    y = jnp.zeros((x_AK.shape[0], w_WKN.shape[1 if transpose else 2]), jnp.float32)
    for g in range(mask_GA.shape[0]):
        w = w_WKN[groups.weight_G[g]].astype(jnp.float32)
        y += jnp.dot(jnp.where(mask_GA[g][:, None], x_AK, 0), w.T if transpose else w, precision="highest")
    y = y.astype(x_RK.dtype)
    if output_index_A is None:
        return y
    target_A = jnp.where(mask_GA.any(0), output_index_A, output_rows)
    return jnp.zeros((output_rows, y.shape[1]), y.dtype).at[target_A].set(y, mode="drop")


def summed_product(x_AK, x2_AK, w_WKN, w2_WKN, groups: RowGroups, *, transpose: bool, precision=None):
    """y[a] = x[a] @ w[group of a] + x2[a] @ w2[group of a] (or the transposes)."""
    dtype = x_AK.dtype
    x_AK, x2_AK = x_AK.astype(jnp.float32), x2_AK.astype(jnp.float32)
    options = {"transpose": transpose, "output_rows": x_AK.shape[0], "precision": precision}
    y_AN = product(x_AK, w_WKN, groups, None, None, **options) + product(x2_AK, w2_WKN, groups, None, None, **options)
    return y_AN.astype(dtype)


def weight_gradient(x_RK, dy_ON, groups: RowGroups, row_index_A, output_index_A, *, precision=None):
    """dw[g] = x(rows of g)^T dy(rows of g), one matrix per group."""
    del precision
    x_AK = _sorted_rows(x_RK, row_index_A).astype(jnp.float32)
    dy_AN = _sorted_rows(dy_ON, output_index_A).astype(jnp.float32)
    mask_GA = _masks(groups, x_AK.shape[0])
    dw = [
        jnp.dot(jnp.where(m[:, None], x_AK, 0).T, jnp.where(m[:, None], dy_AN, 0), precision="highest") for m in mask_GA
    ]
    return jnp.stack(dw).astype(x_RK.dtype)


def swiglu(x_RK, gate_WKN, up_WKN, groups: RowGroups, row_index_A, *, save: bool, precision=None):
    """h = silu(x @ gate) * (x @ up) per group; with `save` also both products."""
    kw = {"transpose": False, "output_rows": (x_RK if row_index_A is None else row_index_A).shape[0]}
    x32, gate32, up32 = (a.astype(jnp.float32) for a in (x_RK, gate_WKN, up_WKN))
    g_AN = product(x32, gate32, groups, row_index_A, None, **kw)
    u_AN = product(x32, up32, groups, row_index_A, None, **kw)
    h_AN = (jax.nn.silu(g_AN) * u_AN).astype(x_RK.dtype)
    return (h_AN, g_AN.astype(x_RK.dtype), u_AN.astype(x_RK.dtype)) if save else (h_AN,)
