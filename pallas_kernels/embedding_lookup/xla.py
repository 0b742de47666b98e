"""Lookup by XLA's gather, whose fill is zero outside the table.

Legend: A addresses, R rows, D numbers of a row.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.embedding_lookup import float8_rows


def lookup(table_RD: jax.Array, address_A: jax.Array) -> jax.Array:
    """[A, D]: rows, zeros for addresses outside the table."""
    rows_AD = table_RD.at[address_A].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return float8_rows.unpack(rows_AD) if table_RD.dtype == jnp.uint32 else rows_AD
