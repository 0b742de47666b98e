"""Lookup written plainly: the oracle.

Legend: A addresses, R rows, D numbers of a row.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.embedding_lookup import float8_rows


def lookup(table_RD: jax.Array, address_A: jax.Array) -> jax.Array:
    """[A, D]: rows, zeros for addresses outside the table."""
    if table_RD.dtype == jnp.uint32:
        table_RD = float8_rows.unpack(table_RD)
    inside_A = (address_A >= 0) & (address_A < table_RD.shape[0])
    rows_AD = table_RD[jnp.where(inside_A, address_A, 0)]
    return jnp.where(inside_A[:, None], rows_AD, jnp.zeros((), table_RD.dtype))
