"""What the public grouped operations check of their arguments.

Legend: R rows of a stored operand, A assignments (rows of the sorted space), E experts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from pallas_kernels.grouped_matmul import groups as row_groups


def check_rows(operation, x_name, x_RK, weights, group_sizes_E, index_name, row_index_A, check) -> int:
    """Checks what the shapes and dtypes of rows, weights, sizes and row index show, and with `check` the values of the sizes.

    Args:
      operation, x_name, index_name: names for messages.
      x_RK: rows.
      weights: name -> [E, K, N].
      group_sizes_E: sizes.
      row_index_A: row index, or None.
      check: also check values.

    Returns:
      A, the rows of the sorted space.

    Raises:
      ValueError: something does not fit; names the argument.
    """
    if x_RK.ndim != 2:
        raise ValueError(f"{x_name}: {operation} expects [rows, inner], got shape {x_RK.shape}")
    if x_RK.dtype not in (jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16):
        raise ValueError(f"{x_name}: {operation} expects float32, bfloat16 or float16, got {x_RK.dtype}")
    for key, w in weights.items():
        if w.ndim != 3 or w.shape[1] != x_RK.shape[1] or w.shape[0] < 1:
            raise ValueError(
                f"{key}: expected [experts, {x_RK.shape[1]}, outer] to fit {x_name} {x_RK.shape}, got shape {w.shape}"
            )
        if w.dtype != x_RK.dtype:
            raise ValueError(f"{key}: expected the dtype of {x_name}, {x_RK.dtype}, got {w.dtype}")
        if group_sizes_E.shape != w.shape[:1] or not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
            raise ValueError(
                f"group_sizes_E: expected {w.shape[0]} integers, one per expert, got {group_sizes_E.dtype}{list(group_sizes_E.shape)}"
            )
    if row_index_A is not None and (row_index_A.ndim != 1 or not jnp.issubdtype(row_index_A.dtype, jnp.integer)):
        raise ValueError(
            f"{index_name}: expected a vector of integers, got {row_index_A.dtype}{list(row_index_A.shape)}"
        )
    rows = x_RK.shape[0] if row_index_A is None else row_index_A.shape[0]
    if check:
        if isinstance(group_sizes_E, jax.core.Tracer):
            checkify.debug_check(jnp.all(group_sizes_E >= 0), "group_sizes_E: sizes must not be negative")
            checkify.debug_check(jnp.sum(group_sizes_E) <= rows, "group_sizes_E: sizes add up to more than the rows")
        else:
            row_groups.check_values(group_sizes_E, rows)
    return rows
