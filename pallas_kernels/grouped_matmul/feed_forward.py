"""The feed-forward of a mixture of experts as one differentiable operation: rows by index, grouped SwiGLU, down product, weighted sum of each token's rows.

What it stores for the backward pass does not grow with the number of experts a token visits: the tokens, the gate and up products, and the plan. Sorted copies of the
tokens and of the expert outputs ([A, D], experts-per-token times larger than the tokens) exist only while one product needs them:

    forward    h = silu(x[token] @ gate) * (x[token] @ up);   out[t] = sum_s weight[t, s] * (h @ down)[row[t, s]]
    backward   q = dout[token] @ down^T;   dweight = <h, q> (equal to <h @ down, dout[token]>, so the expert outputs are not needed);   dh = weight * q
               dx = sum over rows of (dgate_out @ gate^T + dup_out @ up^T), one kernel

The gradient of the weights by <h, q> is that of SonicMoE (Guo et al., 2025, arXiv 2512.14080, section 3).

Legend: T tokens, D model, A assignments (rows sorted by expert), S assignments of a token, E experts, F ffn dim.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.grouped_matmul import groups as row_groups
from pallas_kernels.grouped_matmul.batching import batched
from pallas_kernels.grouped_matmul.checks import check_rows
from pallas_kernels.grouped_matmul.rows import sum_rows


def grouped_feed_forward(
    x_TD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    group_sizes_E: jax.Array,
    token_A: jax.Array,
    row_TS: jax.Array,
    weight_TS: jax.Array,
    *,
    precision: Any = None,
    backend: str | None = None,
    check: bool = False,
) -> jax.Array:
    """SwiGLU experts on routed tokens: `out[t] = sum_s weight[t, s] * expert(row[t, s])(x[t])`.

    Differentiable in x, the three weights and `weight_TS`; works under jit, grad, vmap, remat, scan and inside shard_map. The gate and up products carry the names
    "gate" and "up" for checkpoint policies (`jax.ad_checkpoint.checkpoint_name`).

    Args:
      x_TD: [T, D] tokens in any order; float32, bfloat16 or float16.
      gate_EDF, up_EDF: [E, D, F] weights, same dtype.
      down_EFD: [E, F, D] weights, same dtype.
      group_sizes_E: [E] int, rows of each expert; sum at most A.
      token_A: [A] int, the token of each row in the order of the experts; in range for rows inside groups.
      row_TS: [T, S] int, the rows of each token: `token_A[row_TS[t, s]] == t`, every row inside a group listed once; A or more where there is none.
      weight_TS: [T, S] float32, weight of each row; ignored where there is none.
      precision, backend, check: as in `grouped_matmul`.

    Returns:
      [T, D] in the dtype of x; zeros for tokens without rows. Products accumulate in float32; each expert's output is rounded to the dtype of x before the weighted sum.

    Raises:
      ValueError: shapes or dtypes do not fit; the message names the argument. With `check`, sizes that are negative or exceed the rows.
    """
    weights = {"gate_EDF": gate_EDF, "up_EDF": up_EDF}
    rows = check_rows("grouped_feed_forward", "x_TD", x_TD, weights, group_sizes_E, "token_A", token_A, check)
    if up_EDF.shape != gate_EDF.shape:
        raise ValueError(f"up_EDF: expected the shape of gate_EDF, {gate_EDF.shape}, got {up_EDF.shape}")
    experts, inner, outer = gate_EDF.shape
    if down_EFD.shape != (experts, outer, inner) or down_EFD.dtype != x_TD.dtype:
        wanted = f"{x_TD.dtype}{[experts, outer, inner]}"
        raise ValueError(f"down_EFD: expected {wanted}, got {down_EFD.dtype}{list(down_EFD.shape)}")
    if row_TS.ndim != 2 or row_TS.shape[0] != x_TD.shape[0] or not jnp.issubdtype(row_TS.dtype, jnp.integer):
        raise ValueError(f"row_TS: expected integers [{x_TD.shape[0]}, S], got {row_TS.dtype}{list(row_TS.shape)}")
    if weight_TS.shape != row_TS.shape or weight_TS.dtype != jnp.float32:
        wanted = f"float32{list(row_TS.shape)}"
        raise ValueError(f"weight_TS: expected {wanted}, got {weight_TS.dtype}{list(weight_TS.shape)}")
    if rows == 0 or row_TS.size == 0:
        return jnp.zeros_like(x_TD)
    plan = group_sizes_E, token_A.astype(jnp.int32), row_TS.astype(jnp.int32)
    return _feed_forward((precision, backend), x_TD, gate_EDF, up_EDF, down_EFD, weight_TS, *plan)


def _operation(static, name, **options):
    precision, backend = static
    return batched(name, precision=precision, backend=backend, **options)


def _down(static, h_AF, down_EFD, groups):
    op = _operation(static, "product", transpose=False, output_rows=h_AF.shape[0])
    return op(h_AF, down_EFD, groups, None, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _feed_forward(static, x_TD, gate_EDF, up_EDF, down_EFD, weight_TS, sizes_E, token_A, row_TS):
    groups = row_groups.contiguous(sizes_E)
    (h_AF,) = _operation(static, "swiglu", save=False)(x_TD, gate_EDF, up_EDF, groups, token_A)
    return sum_rows(_down(static, h_AF, down_EFD, groups), row_TS, weight_TS).astype(x_TD.dtype)


def _forward(static, x_TD, gate_EDF, up_EDF, down_EFD, weight_TS, sizes_E, token_A, row_TS):
    groups = row_groups.contiguous(sizes_E)
    h_AF, gate_AF, up_AF = _operation(static, "swiglu", save=True)(x_TD, gate_EDF, up_EDF, groups, token_A)
    gate_AF, up_AF = checkpoint_name(gate_AF, "gate"), checkpoint_name(up_AF, "up")
    out_TD = sum_rows(_down(static, h_AF, down_EFD, groups), row_TS, weight_TS).astype(x_TD.dtype)
    return out_TD, (x_TD, gate_EDF, up_EDF, down_EFD, weight_TS, sizes_E, token_A, row_TS, gate_AF, up_AF)


def _backward(static, residuals, dout_TD):
    x_TD, gate_EDF, up_EDF, down_EFD, weight_TS, sizes_E, token_A, row_TS, gate_AF, up_AF = residuals
    groups, rows, dtype = row_groups.contiguous(sizes_E), token_A.shape[0], x_TD.dtype
    q_AF = _operation(static, "product", transpose=True, output_rows=rows)(dout_TD, down_EFD, groups, token_A, None)

    wide = jnp.promote_types(dtype, jnp.float32)
    weight_A = jnp.zeros((rows,), jnp.float32).at[row_TS].set(weight_TS, mode="drop")
    gate, up, q = (a.astype(wide) for a in (gate_AF, up_AF, q_AF))
    silu, silu_vjp = jax.vjp(jax.nn.silu, gate)
    h_AF = silu * up
    dweight_A = jnp.sum(h_AF * q, axis=1)
    dh_AF = weight_A[:, None] * q
    dgate_AF, dup_AF = silu_vjp(dh_AF * up)[0].astype(dtype), (dh_AF * silu).astype(dtype)
    weighted_AF = (weight_A[:, None] * h_AF).astype(dtype)

    weight_gradient = _operation(static, "weight_gradient")
    ddown_EFD = weight_gradient(weighted_AF, dout_TD, groups, None, token_A)
    dgate_EDF = weight_gradient(x_TD, dgate_AF, groups, token_A, None)
    dup_EDF = weight_gradient(x_TD, dup_AF, groups, token_A, None)
    dx_AD = _operation(static, "summed_product", transpose=True)(dgate_AF, dup_AF, gate_EDF, up_EDF, groups)
    dx_TD = sum_rows(dx_AD, row_TS).astype(dtype)
    # Without the barrier XLA computes the sum over F inside whatever scatters the result: 3.2 ms instead of some 0.5 at the shape of OLMoE.
    dweight_A = jax.lax.optimization_barrier(dweight_A.astype(jnp.float32))
    dweight_TS = dweight_A.at[row_TS].get(mode="fill", fill_value=0)
    return dx_TD, dgate_EDF, dup_EDF, ddown_EFD, dweight_TS, None, None, None


_feed_forward.defvjp(_forward, _backward)
