"""Rows of a table by index, with a gradient that has the same bits on every run.

The plain gradient of a gather adds rows where indices repeat. On CUDA those additions are atomic and come in any order, so two
runs of one program differ in the last bits; here equal indices are brought together by a stable sort and summed by a segmented
scan, in an order that the indices alone decide.

Legend: T lookups, V rows, D columns.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def row_lookup(table_VD: jax.Array, index: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns table_VD[index] in `dtype`, [*index.shape, D]; indices past the table give its last row."""
    return table_VD.at[index].get(mode="clip").astype(dtype)


def _forward(table_VD, index, dtype):
    return row_lookup(table_VD, index, dtype), (index, table_VD)


def _backward(dtype, residuals, dy):
    index, table_VD = residuals
    rows = table_VD.shape[0]
    index_T = jnp.clip(index.reshape(-1), 0, rows - 1)
    dy_TD = dy.reshape(-1, dy.shape[-1])
    by_sorting, by_scattering = (functools.partial(f, rows=rows) for f in (sum_by_sorting, sum_by_scattering))
    sums_VD = jax.lax.platform_dependent(index_T, dy_TD, cuda=by_sorting, default=by_scattering)
    return sums_VD.astype(table_VD.dtype), None


row_lookup.defvjp(_forward, _backward)


def sum_by_scattering(index_T: jax.Array, values_TD: jax.Array, *, rows: int) -> jax.Array:
    """Returns the float32 sum of the values of each index, [rows, D]; CPU and TPU add in the order of T."""
    return jnp.zeros((rows, values_TD.shape[1]), jnp.float32).at[index_T].add(values_TD.astype(jnp.float32))


def sum_by_sorting(index_T: jax.Array, values_TD: jax.Array, *, rows: int) -> jax.Array:
    """Returns what `sum_by_scattering` does up to rounding, without an addition whose order is left open."""
    order_T = jnp.argsort(index_T, stable=True)
    sorted_T = index_T[order_T]
    changes = sorted_T[1:] != sorted_T[:-1]
    first_T1 = jnp.concatenate([jnp.ones(1, bool), changes])[:, None]
    last_T = jnp.concatenate([changes, jnp.ones(1, bool)])

    def add(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return left[0] | right[0], jnp.where(right[0], right[1], left[1] + right[1])

    _, running_TD = jax.lax.associative_scan(add, (first_T1, values_TD[order_T].astype(jnp.float32)))
    # Only the last row of a segment holds its sum; the others aim past the table, each at a place of its own.
    target_T = jnp.where(last_T, sorted_T, rows + jnp.arange(sorted_T.size))
    return (
        jnp.zeros((rows, values_TD.shape[1]), jnp.float32)
        .at[target_T]
        .set(running_TD, mode="drop", unique_indices=True)
    )
