"""Lookup on TPUs by one copy for each row, several in flight: what is supported; the kernel is imported when first traced.

Legend: A addresses, R rows, D numbers of a row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Dtypes, Shapes

LANES = 128
"""Numbers of a vector register's row."""


def supports(shapes: Shapes, dtypes: Dtypes, device_kind: str | None) -> str | None:
    """None if the kernel takes these arguments, else the reason; asked before anything is traced."""
    del device_kind
    if (dtype := jnp.dtype(dtypes["table"])) != jnp.float32:
        # Narrower numbers lie several rows to a word, of which no single row can be copied.
        return f"takes float32, not {dtype}"
    if (width := shapes["table"][1]) % LANES:
        # XLA lays narrow tables out by columns, and the kernel would begin with a copy of the table.
        return f"takes rows of a multiple of {LANES} numbers, not {width}"
    return None


def lookup(table_RD: jax.Array, address_A: jax.Array) -> jax.Array:
    """[A, D]: rows, zeros for addresses outside the table."""
    from pallas_kernels.embedding_lookup import mosaic_tpu_kernel

    return mosaic_tpu_kernel.lookup(table_RD, address_A)
