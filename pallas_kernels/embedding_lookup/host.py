"""Lookup in a table that lies in the memory of the host: its processors copy the rows while the device's program runs.

On NVIDIA GPUs the Triton kernel reads such a table itself, over the bus. XLA gives a gather in host memory to the host.

Legend: A addresses, R rows, D numbers of a row.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.embedding_lookup import float8_rows


def lies_on_host(table: jax.Array) -> bool:
    """Whether an array, concrete or traced, lies in host memory (memory kind "pinned_host")."""
    return jax.typeof(table).memory_space == jax.memory.Space.Host


def lookup(table_RD: jax.Array, address_A: jax.Array) -> jax.Array:
    """[A, D], on the device: rows, zeros for addresses outside the table."""
    inside_A = (address_A >= 0) & (address_A < table_RD.shape[0])
    place_A = jax.device_put(jnp.where(inside_A, address_A, 0), jax.memory.Space.Host)
    rows_AD = jax.device_put(jnp.take(table_RD, place_A, axis=0, mode="clip"), jax.memory.Space.Device)
    rows_AD = jnp.where(inside_A[:, None], rows_AD, 0)
    return float8_rows.unpack(rows_AD) if table_RD.dtype == jnp.uint32 else rows_AD
