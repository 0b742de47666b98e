"""The TPU kernel: each program copies the rows of its addresses, which it reads in scalar memory, from HBM into its block of the result.

Legend: A addresses, N programs, T addresses of one, R rows, D numbers of a row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

INTERPRET = False  # tests set it: run the kernel in Pallas's TPU interpreter

TAKEN = 256
"""Addresses of a program: with rows of 512 bytes, two blocks of 128 KiB in vector memory."""
FLIGHT = 16
"""Copies under way at a time."""


def lookup(table_RD: jax.Array, address_A: jax.Array) -> jax.Array:
    """[A, D]: rows, zeros for addresses outside the table."""
    (rows, width), count = table_RD.shape, address_A.shape[0]
    programs = -(-count // TAKEN)
    address_N1T = jnp.pad(address_A, (0, programs * TAKEN - count), constant_values=-1).reshape(programs, 1, TAKEN)

    def kernel(address, table, out, arrived):
        def copy(i):
            row = jnp.clip(address[0, i], 0, rows - 1)
            return pltpu.make_async_copy(table.at[pl.ds(row, 1)], out.at[pl.ds(i, 1)], arrived.at[lax.rem(i, FLIGHT)])

        def start(i, _):
            copy(i).start()

        def finish(i, _):
            copy(i).wait()

            @pl.when((address[0, i] < 0) | (address[0, i] >= rows))
            def _():
                out[pl.ds(i, 1), :] = jnp.zeros((1, width), out.dtype)

            @pl.when(i + FLIGHT < TAKEN)
            def _():
                copy(i + FLIGHT).start()

        lax.fori_loop(0, FLIGHT, start, None)
        lax.fori_loop(0, TAKEN, finish, None)

    rows_AD = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((programs * TAKEN, width), table_RD.dtype),
        grid=(programs,),
        in_specs=[
            pl.BlockSpec((None, 1, TAKEN), lambda n: (n, 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec((TAKEN, width), lambda n: (n, 0)),
        scratch_shapes=[pltpu.SemaphoreType.DMA((FLIGHT,))],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=INTERPRET,
    )(address_N1T, table_RD)
    return rows_AD[:count]
