"""The functions of `mosaic_gpu_rows.py` in plain Pallas, row by row: what the interpreter runs, and what they mean."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def row_indices(index_g, first, rows: int, width: int):
    """See `mosaic_gpu_rows.row_indices`; here [rows]."""
    del width
    return first + jnp.arange(rows, dtype=jnp.int32) if index_g is None else index_g[pl.ds(first, rows)]


def copy_rows(x_g, indices, slot_s, column, own=None) -> None:
    """See `mosaic_gpu_rows.copy_rows`; done when it returns."""
    rows, width = slot_s.shape
    first, end = (0, rows) if own is None else own
    for i in range(rows):
        row = jnp.clip(indices[i], 0, x_g.shape[0] - 1)
        value = x_g[pl.ds(row, 1), pl.ds(column, width)]
        slot_s[pl.ds(i, 1)] = jnp.where((first <= i) & (i < end), value, jnp.zeros_like(value))


def end_step() -> None:
    """Nothing to mark: copies are done."""


def landed(later: int) -> None:
    """See `mosaic_gpu_rows.landed`."""
    del later
    plgpu.commit_smem()


def store_rows(buffer_s, out_g, index_g, row, column, own, end) -> None:
    """See `mosaic_gpu_rows.store_rows`."""
    rows, width = buffer_s.shape

    def one(i, _):
        @pl.when((row + i >= own) & (row + i < end))
        def _():
            target = row + i if index_g is None else index_g[row + i]

            @pl.when((target >= 0) & (target < out_g.shape[0]))
            def _():
                out_g[pl.ds(target, 1), pl.ds(column, width)] = buffer_s[pl.ds(i, 1)]

    lax.fori_loop(0, rows, one, None)
