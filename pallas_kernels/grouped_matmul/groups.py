"""Row ranges: what every backend of the grouped matmul works on.

Legend: A rows of the sorted space (assignments), E experts of the public call, G groups, W stored weights.

The public call has E contiguous groups, one per expert. Inside, a group is any range of rows with the index of its weight; so a batch of calls (`jax.vmap`) is one call
with more groups, and no kernel needs a batch axis.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class RowGroups(NamedTuple):
    """Group g owns rows `start_G[g] .. start_G[g] + size_G[g]` and multiplies them with weight `weight_G[g]`.

    Groups are in order of their rows and do not overlap; rows in no group give zeros.
    """

    start_G: jax.Array
    size_G: jax.Array
    weight_G: jax.Array


def contiguous(group_sizes_E: jax.Array) -> RowGroups:
    """Groups that follow one another from row 0, group e with weight e."""
    size_E = group_sizes_E.astype(jnp.int32)
    return RowGroups(jnp.cumsum(size_E, dtype=jnp.int32) - size_E, size_E, jnp.arange(size_E.shape[0], dtype=jnp.int32))


def group_of_row(groups: RowGroups, rows: int) -> jax.Array:
    """int32 [rows]: the group of each row, G for a row in no group."""
    row_A = jnp.arange(rows, dtype=jnp.int32)
    end_G = groups.start_G + groups.size_G
    group_A = jnp.searchsorted(
        end_G, row_A, side="right", method="compare_all" if end_G.shape[0] <= 64 else "scan"
    ).astype(jnp.int32)
    start_A = groups.start_G[jnp.minimum(group_A, end_G.shape[0] - 1)]
    return jnp.where((group_A < end_G.shape[0]) & (start_A <= row_A), group_A, end_G.shape[0])


def check_values(group_sizes_E, rows: int) -> None:
    """Raise ValueError for concrete group sizes that are negative or add up to more than `rows` (the `check` mode of the public call)."""
    sizes = np.asarray(group_sizes_E)
    if (sizes < 0).any():
        raise ValueError(f"group_sizes_E: sizes must not be negative, got {sizes.tolist()}")
    if sizes.sum(dtype=np.int64) > rows:
        raise ValueError(f"group_sizes_E: sizes add up to {sizes.sum(dtype=np.int64)}, more than the {rows} rows")
