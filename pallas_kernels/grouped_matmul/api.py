"""Grouped matmul: rows sorted by expert, each range of rows times its own weight; forward, both gradients, gather, scatter and SwiGLU.

Legend: R rows of a stored operand, A assignments (rows of the sorted space), O output rows, T tokens, S assignments of a token, E experts, G groups, W weights,
K inner dim, N outer dim, F ffn dim, P members of a batch.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import groups as row_groups
from pallas_kernels.grouped_matmul.batching import batched
from pallas_kernels.grouped_matmul.checks import check_rows
from pallas_kernels.grouped_matmul.groups import RowGroups
from pallas_kernels.grouped_matmul.rows import sum_rows


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is fixed at trace time."""

    output_rows: int
    precision: Any = None
    backend: str | None = None


def grouped_matmul(
    x_RK: jax.Array,
    w_EKN: jax.Array,
    group_sizes_E: jax.Array,
    *,
    row_index_A: jax.Array | None = None,
    inverse_TS: jax.Array | None = None,
    output_index_A: jax.Array | None = None,
    output_rows: int | None = None,
    precision: Any = None,
    backend: str | None = None,
    check: bool = False,
) -> jax.Array:
    """Multiply each range of rows with its own weight: `y[a] = x[a] @ w[expert of a]`.

    The dropless mixture-of-experts product of MegaBlocks (Gale et al., 2022, arXiv 2211.15841). Group e owns the `group_sizes_E[e]` rows that follow those of the
    groups before it; sizes may be anything, zero included, and need no alignment. Rows past the sum of the sizes give zero output and receive zero gradient.
    Differentiable in x and w; works under jit, vmap (a batch of calls becomes one call with more groups), grad, remat, scan and inside shard_map.

    Args:
      x_RK: [R, K] rows, sorted by expert (R = A), or in any order with `row_index_A`. float32, bfloat16 or float16.
      w_EKN: [E, K, N] weights, same dtype as x.
      group_sizes_E: [E] int, rows of each expert; sum at most A.
      row_index_A: [A] int, fused gather: sorted row a is `x[row_index_A[a]]`; the sorted copy is not stored for the backward pass. In range for rows inside groups.
      inverse_TS: [R, S] int, only with `row_index_A`: where the rows a that read x row t are (A or more: none). Makes the gradient of the gather a gather-sum;
        without it the gradient is a scatter-add, which on GPU is not deterministic when an x row is read twice.
      output_index_A: [A] int, fused scatter: sorted row a is written to `y[output_index_A[a]]`; distinct for rows inside groups. Rows not written are zero.
      output_rows: rows O of y, only with `output_index_A`; default A.
      precision: `jax.lax.Precision` of the XLA path for float32 (None: the platform's default, which on GPU may be tf32).
      backend: "reference", "xla", "mosaic_gpu", "triton", "mosaic_tpu", or None to choose when the program is lowered.
      check: also check the values of `group_sizes_E`: at once when they are concrete, through `jax.experimental.checkify` when traced.

    Returns:
      [O, N] products in the dtype of x, accumulated in float32.

    Raises:
      ValueError: shapes or dtypes do not fit; the message names the argument. With `check`, sizes that are negative or exceed the rows.
    """
    rows = check_rows(
        "grouped_matmul", "x_RK", x_RK, {"w_EKN": w_EKN}, group_sizes_E, "row_index_A", row_index_A, check
    )
    _check_inverse(x_RK, row_index_A, inverse_TS)
    if output_index_A is None and output_rows is not None:
        raise ValueError("output_rows: given without output_index_A")
    if output_index_A is not None and output_index_A.shape != (rows,):
        raise ValueError(
            f"output_index_A: expected shape ({rows},), one entry per sorted row, got {output_index_A.shape}"
        )
    static = _Static(rows if output_rows is None else output_rows, precision, backend)
    return _grouped(static, x_RK, w_EKN, group_sizes_E, row_index_A, inverse_TS, output_index_A)


def grouped_swiglu(
    x_RK: jax.Array,
    gate_EKF: jax.Array,
    up_EKF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    row_index_A: jax.Array | None = None,
    inverse_TS: jax.Array | None = None,
    precision: Any = None,
    backend: str | None = None,
    check: bool = False,
) -> jax.Array:
    """Gate and up products with SwiGLU: `h[a] = silu(x[a] @ gate[e]) * (x[a] @ up[e])`, e the expert of row a (Shazeer, 2020, arXiv 2002.05202, eq. 6).

    Outside differentiation neither product is stored. Under differentiation both are (they are the residuals, as in a dense SwiGLU).

    Args:
      x_RK: [R, K] rows as in `grouped_matmul`.
      gate_EKF, up_EKF: [E, K, F] weights, same dtype as x.
      group_sizes_E, row_index_A, inverse_TS, precision, backend, check: as in `grouped_matmul`.

    Returns:
      [A, F] activations in the dtype of x; rows in no group are zero.

    Raises:
      ValueError: as `grouped_matmul`.
    """
    weights = {"gate_EKF": gate_EKF, "up_EKF": up_EKF}
    rows = check_rows("grouped_swiglu", "x_RK", x_RK, weights, group_sizes_E, "row_index_A", row_index_A, check)
    _check_inverse(x_RK, row_index_A, inverse_TS)
    if gate_EKF.shape != up_EKF.shape:
        raise ValueError(f"up_EKF: expected the shape of gate_EKF, {gate_EKF.shape}, got {up_EKF.shape}")
    return _swiglu(_Static(rows, precision, backend), x_RK, gate_EKF, up_EKF, group_sizes_E, row_index_A, inverse_TS)


def _check_inverse(x_RK, row_index_A, inverse_TS) -> None:
    if inverse_TS is not None and (row_index_A is None or inverse_TS.ndim != 2 or inverse_TS.shape[0] != x_RK.shape[0]):
        raise ValueError(
            f"inverse_TS: expected shape ({x_RK.shape[0]}, S) together with row_index_A, got {inverse_TS.shape}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(static, x_RK, w_EKN, sizes_E, row_index_A, inverse_TS, output_index_A):
    groups = row_groups.contiguous(sizes_E)
    return batched("product", transpose=False, **dataclasses.asdict(static))(
        x_RK, w_EKN, groups, _int32(row_index_A), _int32(output_index_A)
    )


def _grouped_fwd(static, *args):
    return _grouped(static, *args), args


def _grouped_bwd(static, residuals, dy_ON):
    x_RK, w_EKN, sizes_E, row_index_A, inverse_TS, output_index_A = residuals
    groups, row_index_A, output_index_A = row_groups.contiguous(sizes_E), _int32(row_index_A), _int32(output_index_A)
    dx_AK = _input_gradient(static, dy_ON, w_EKN, groups, output_index_A, _rows(x_RK, row_index_A))
    dw_EKN = _weight_gradient(static, x_RK, dy_ON, groups, row_index_A, output_index_A)
    return _to_stored_rows(dx_AK, x_RK.shape[0], row_index_A, inverse_TS), dw_EKN, None, None, None, None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(static, x_RK, gate_EKF, up_EKF, sizes_E, row_index_A, inverse_TS):
    (h_AF,) = _swiglu_products(
        static, False, x_RK, gate_EKF, up_EKF, row_groups.contiguous(sizes_E), _int32(row_index_A)
    )
    return h_AF


def _swiglu_fwd(static, x_RK, gate_EKF, up_EKF, sizes_E, row_index_A, inverse_TS):
    h_AF, g_AF, u_AF = _swiglu_products(
        static, True, x_RK, gate_EKF, up_EKF, row_groups.contiguous(sizes_E), _int32(row_index_A)
    )
    return h_AF, (x_RK, gate_EKF, up_EKF, sizes_E, row_index_A, inverse_TS, g_AF, u_AF)


def _swiglu_bwd(static, residuals, dh_AF):
    x_RK, gate_EKF, up_EKF, sizes_E, row_index_A, inverse_TS, g_AF, u_AF = residuals
    groups, row_index_A = row_groups.contiguous(sizes_E), _int32(row_index_A)
    g32, u32, dh32 = (a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (g_AF, u_AF, dh_AF))
    silu, silu_vjp = jax.vjp(jax.nn.silu, g32)
    dg_AF, du_AF = silu_vjp(dh32 * u32)[0].astype(x_RK.dtype), (dh32 * silu).astype(x_RK.dtype)
    both = batched("summed_product", transpose=True, precision=static.precision, backend=static.backend)
    dx_AK = both(dg_AF, du_AF, gate_EKF, up_EKF, groups)
    dgate_EKF, dup_EKF = (_weight_gradient(static, x_RK, d, groups, row_index_A, None) for d in (dg_AF, du_AF))
    return _to_stored_rows(dx_AK, x_RK.shape[0], row_index_A, inverse_TS), dgate_EKF, dup_EKF, None, None, None


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def _swiglu_products(static, save, x_RK, gate_EKF, up_EKF, groups, row_index_A):
    return batched("swiglu", save=save, precision=static.precision, backend=static.backend)(
        x_RK, gate_EKF, up_EKF, groups, row_index_A
    )


def _input_gradient(static, dy_ON, w_EKN, groups, output_index_A, rows):
    """dx in sorted order: the grouped product with the transposed weights, read in place."""
    op = batched("product", transpose=True, output_rows=rows, precision=static.precision, backend=static.backend)
    return op(dy_ON, w_EKN, groups, output_index_A, None)


def _weight_gradient(static, x_RK, dy_ON, groups, row_index_A, output_index_A):
    return batched("weight_gradient", precision=static.precision, backend=static.backend)(
        x_RK, dy_ON, groups, row_index_A, output_index_A
    )


def _to_stored_rows(dx_AK, rows, row_index_A, inverse_TS):
    """The transpose of the row gather: each stored row sums the gradients of the sorted rows that read it."""
    if row_index_A is None:
        return dx_AK
    wide = jnp.promote_types(dx_AK.dtype, jnp.float32)
    if inverse_TS is not None:
        return sum_rows(dx_AK, inverse_TS).astype(dx_AK.dtype)
    return (
        jnp.zeros((rows, dx_AK.shape[1]), wide).at[row_index_A].add(dx_AK.astype(wide), mode="drop").astype(dx_AK.dtype)
    )


def _rows(x_RK: jax.Array, row_index_A: jax.Array | None) -> int:
    return x_RK.shape[0] if row_index_A is None else row_index_A.shape[0]


def _int32(index_A):
    return None if index_A is None else index_A.astype(jnp.int32)


__all__ = ["RowGroups", "grouped_matmul", "grouped_swiglu"]
