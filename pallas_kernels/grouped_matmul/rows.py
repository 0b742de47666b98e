"""Gathers and scatters of rows around the kernels that take rows in sorted order only.

Legend: R rows of a stored operand, A rows of the sorted space, O output rows, T tokens, S rows of a token, N columns.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.groups import RowGroups, group_of_row


def gather(x_RK: jax.Array, index_A: jax.Array | None) -> jax.Array:
    """Rows in sorted order."""
    return x_RK if index_A is None else jnp.take(x_RK, index_A, axis=0, mode="clip")


def scatter(y_AN: jax.Array, index_A: jax.Array | None, output_rows: int, groups: RowGroups) -> jax.Array:
    """Sorted rows to their places; rows in no group go nowhere, places without a row are zero."""
    if index_A is None:
        return y_AN
    inside_A = group_of_row(groups, y_AN.shape[0]) < groups.size_G.shape[0]
    target_A = jnp.where(inside_A, index_A, output_rows)
    return jnp.zeros((output_rows, y_AN.shape[1]), y_AN.dtype).at[target_A].set(y_AN, mode="drop")


def sum_rows(y_AN: jax.Array, row_TS: jax.Array, weight_TS: jax.Array | None = None) -> jax.Array:
    """The (weighted) sum of each token's rows, [T, N] in float32 or wider, in a fixed order; a row index of A or more counts as zero."""
    wide = jnp.promote_types(y_AN.dtype, jnp.float32)
    total_TN = jnp.zeros((row_TS.shape[0], y_AN.shape[1]), wide)
    for s in range(row_TS.shape[1]):
        y_TN = y_AN.at[row_TS[:, s]].get(mode="fill", fill_value=0).astype(wide)
        total_TN = total_TN + (y_TN if weight_TS is None else y_TN * weight_TS[:, s, None])
    return total_TN
