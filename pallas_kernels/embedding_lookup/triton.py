"""Lookup by Triton kernels: narrow rows, where XLA's gather leaves bandwidth, and float8 rows, which are unpacked on the way.

Legend: A addresses, R rows, D numbers of a row, W words of a packed row.
"""

from __future__ import annotations

from typing import Any

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

    packed = table_RD.dtype == jnp.uint32
    count, (rows, columns) = address_A.shape[0], table_RD.shape
    width = float8_rows.row_width(columns) if packed else columns
    # A program takes about 4096 numbers: 64 rows, fewer of wide ones.
    taken = max(1, min(64, 4096 // _power_of_two(width)))
    own: dict[str, Any] = {"LANES": _power_of_two(width), "num_warps": 2}
    if packed:
        # Twice the warps hold half of the registers each, so as many as a device takes wait for memory at a time.
        own = {
            "LANES": max(2, _power_of_two(width // 4)),
            "WORDS": columns,
            "CONVERTS": triton_call.converts_float8(),
            "num_warps": 4,
        }
    return triton_call.call(
        triton_kernels.float8_lookup if packed else triton_kernels.lookup,
        table_RD,
        address_A,
        out_shape=jax.ShapeDtypeStruct((count, width), jnp.bfloat16 if packed else table_RD.dtype),
        grid=(-(-count // taken),),
        num_stages=1,
        A=count,
        R=rows,
        D=width,
        TAKEN=taken,
        **own,
    )


def _power_of_two(size: int) -> int:
    """The smallest one that is at least `size`."""
    return 1 << (size - 1).bit_length()
