"""Lookup by Triton kernels: narrow rows, where XLA's gather leaves bandwidth, and float8 rows, which are unpacked on the way.

Legend: A addresses, R rows, D numbers of a row, W words of a packed row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import triton_call
from pallas_kernels.backend import Dtypes, Shapes
from pallas_kernels.embedding_lookup import float8_rows

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.uint32)
WIDEST = 2048
"""Bytes of a row; a wider one is read well by XLA and takes many registers here."""


def supports(shapes: Shapes, dtypes: Dtypes, device_kind: str | None) -> str | None:
    """None if the Triton kernels take these arguments, else the reason; asked before anything is traced."""
    if (reason := triton_call.unavailable()) is not None:
        return reason
    dtype = jnp.dtype(dtypes["table"])
    if dtype not in DTYPES:
        return f"takes float32, bfloat16, float16 or packed float8, not {dtype}"
    if (row := shapes["table"][1] * dtype.itemsize) > WIDEST:
        return f"takes rows of at most {WIDEST} bytes, not {row}"
    return None


def lookup(table_RD: jax.Array, address_A: jax.Array) -> jax.Array:
    """[A, D]: rows, zeros for addresses outside the table."""
    from pallas_kernels.embedding_lookup import triton_kernels

    count, (rows, columns) = address_A.shape[0], table_RD.shape
    packed = table_RD.dtype == jnp.uint32
    width = float8_rows.row_width(columns) if packed else columns
    lanes = 1 << (width - 1).bit_length()
    # 16 KiB of rows a program of two warps; a single row of addresses less where rows are wide.
    taken = max(1, min(64, 4096 // lanes))
    return triton_call.call(
        triton_kernels.float8_lookup if packed else triton_kernels.lookup,
        table_RD,
        address_A,
        out_shape=jax.ShapeDtypeStruct((count, width), jnp.bfloat16 if packed else table_RD.dtype),
        grid=(-(-count // taken),),
        num_warps=2,
        num_stages=1,
        A=count,
        R=rows,
        D=width,
        LANES=lanes,
        TAKEN=taken,
    )
