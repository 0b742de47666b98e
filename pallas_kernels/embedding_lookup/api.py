"""embedding_lookup: rows of a large table, zeros for addresses that the table does not have.

The gradient of a table is as large as the table and zero nearly everywhere. It is given, for small tables and as an oracle; training
looks rows up outside the differentiated function, differentiates with respect to what came, and updates only those rows.

Legend: A addresses, R rows, D numbers of a row, W words of a packed row.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.custom_batching
import jax.numpy as jnp

from pallas_kernels.backend import Backend, dispatch, vary_together
from pallas_kernels.embedding_lookup import float8_rows, host, mosaic_tpu, reference, triton, xla


def _anything(shapes, dtypes, device_kind):
    return None


BACKENDS = (
    Backend("triton", ("cuda",), triton.supports, triton.lookup),
    # By name only: it has been compiled, but never timed beside XLA's gather.
    Backend("mosaic_tpu", ("tpu",), mosaic_tpu.supports, mosaic_tpu.lookup, False),
    Backend("xla", None, _anything, xla.lookup),
    Backend("reference", None, _anything, reference.lookup, False),
)
OF_HOST_TABLES = (
    Backend("triton", ("cuda",), triton.supports, triton.lookup),
    Backend("xla", None, _anything, host.lookup),
)


@functools.cache
def _operation(backend: str | None, on_host: bool):
    backends = OF_HOST_TABLES if on_host else BACKENDS

    @jax.custom_batching.custom_vmap
    def lookup(table_RD, address_A):
        shapes = {"table": table_RD.shape, "address": address_A.shape}
        dtypes = {"table": jnp.dtype(table_RD.dtype), "address": jnp.dtype(address_A.dtype)}
        return dispatch(
            "embedding_lookup", backends, (table_RD, address_A), shapes=shapes, dtypes=dtypes, backend=backend
        )

    @lookup.def_vmap
    def rule(axis_size, in_batched, table, address):
        if not in_batched[0]:
            return lookup(table, address.reshape(-1)).reshape(*address.shape, -1), True
        # Tables of their own: XLA gathers along both dimensions.
        return jax.vmap(xla.lookup, (0, 0 if in_batched[1] else None))(table, address), True

    @jax.custom_vjp
    def operation(table_RD, address_A):
        return lookup(table_RD, address_A)

    def forward(table_RD, address_A):
        return lookup(table_RD, address_A), (table_RD, address_A)

    def backward(kept, dy_AD):
        table_RD, address_A = kept
        if table_RD.dtype == jnp.uint32:
            return None, None
        zeros_RD = jnp.zeros(table_RD.shape, jnp.float32)
        options = {"mode": "drop", "wrap_negative_indices": False}
        return zeros_RD.at[address_A].add(dy_AD.astype(jnp.float32), **options).astype(table_RD.dtype), None

    operation.defvjp(forward, backward)
    return jax.jit(operation)


def embedding_lookup(table: jax.Array, address: jax.Array, *, backend: str | None = None) -> jax.Array:
    """Rows of a table.

    Args:
        table: [R, D] of a floating dtype, or uint32 [R, W]: float8 rows with scales, packed by :func:`float8_rows.pack`. It may lie in
            the memory of the host (``jax.device_put`` to a sharding of memory kind "pinned_host"): rows then travel as they are read, and
            there is no gradient.
        address: int32 [...]. Addresses below 0 and from R on are of no row.
        backend: "triton", "mosaic_tpu", "xla", "reference" (the first or third for a table of the host), or None for the best one on each
            platform.

    Returns:
        [..., D] in the table's dtype, bfloat16 for packed rows (exactly what is stored); zeros for addresses of no row. The gradient of a
        floating table adds up, in float32, those of the rows that were read; packed rows have none.

    Raises:
        ValueError: shapes or dtypes do not fit, or `backend` is unknown or unsupported.
    """
    table, address = table if isinstance(table, jax.Array) else jnp.asarray(table), jnp.asarray(address)
    if table.ndim != 2:
        raise ValueError(f"table has shape {table.shape}: expected [rows, width].")
    packed = table.dtype == jnp.uint32
    if not packed and not jnp.issubdtype(table.dtype, jnp.floating):
        raise ValueError(f"table has dtype {table.dtype}: expected a floating dtype, or uint32 for packed float8 rows.")
    if address.dtype != jnp.int32:
        raise ValueError(f"address has dtype {address.dtype}: expected int32.")
    width = float8_rows.row_width(table.shape[1]) if packed else table.shape[1]
    count = math.prod(address.shape)
    if not count or not table.shape[0]:
        return jnp.zeros((*address.shape, width), jnp.bfloat16 if packed else table.dtype)
    rows_AD = _operation(backend, host.lies_on_host(table))(*vary_together(table, address.reshape(-1)))
    return rows_AD.reshape(*address.shape, width)
