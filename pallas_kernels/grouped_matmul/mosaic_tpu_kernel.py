"""The TPU kernels: `pallas_call` over (column tile, visit, contraction step), what each visit does read from scalar memory.

Row tiles lie on a fixed grid. A tile that several groups share is visited once for each, in row order, and a visit stores its own rows only; rows in no group are
visits without work, which store zeros. Consecutive visits of one output block keep it in vector memory. Gathers and scatters of rows are XLA's, around the kernel.

Legend: R rows of a stored operand, A rows of the sorted space, G groups, W stored weights, J ranges of rows, V visits, K contraction, N outer dim; bm, bk, bn tiles.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.groups import RowGroups

INTERPRET = False  # tests set it: run the kernels in Pallas's TPU interpreter


def _divisor(size: int, most: int) -> int:
    return next(d for d in (1024, 512, 384, 256, 128) if d <= most and size % d == 0)


def _height(rows: int) -> int:
    return 256 if rows >= 256 else -(-rows // 16) * 16


def _visits(start_J, end_J, label_J, height: int, count: int, at_least_one: bool):
    """Entries [6, V]: row tile, range label, first own row, end of own rows, whether the visit is the first, the last of its label; and how many are real.

    Ranges are in row order. With `at_least_one` an empty range still gets one visit (its output must be zeroed).
    """
    tile_J = start_J // height
    visits_J = jnp.where(end_J > start_J, (end_J - 1) // height - tile_J + 1, 1 if at_least_one else 0)
    upto_J = jnp.cumsum(visits_J, dtype=jnp.int32)
    visit_V = jnp.minimum(jnp.arange(count, dtype=jnp.int32), upto_J[-1] - 1)
    range_V = jnp.sum(upto_J[None, :] <= visit_V[:, None], axis=1, dtype=jnp.int32)
    range_V = jnp.clip(range_V, 0, start_J.shape[0] - 1)
    nth_V = visit_V - (upto_J - visits_J)[range_V]
    first_V, last_V = nth_V == 0, nth_V == visits_J[range_V] - 1
    columns = tile_J[range_V] + nth_V, label_J[range_V], start_J[range_V], end_J[range_V], first_V, last_V
    return jnp.stack([c.astype(jnp.int32) for c in columns]), upto_J[-1:]


def _row_visits(groups: RowGroups, rows: int, height: int):
    """Visits that cover every row tile: groups and the gaps between them; label is the weight, -1 for gaps."""
    end_G = groups.start_G + groups.size_G
    bounds = jnp.stack([groups.start_G, end_G], 1).reshape(-1)
    start_J = jnp.concatenate([jnp.zeros((1,), jnp.int32), bounds])
    end_J = jnp.concatenate([bounds, jnp.full((1,), rows, jnp.int32)])
    gap = jnp.full_like(groups.weight_G, -1)
    label_J = jnp.concatenate([gap[:1], jnp.stack([groups.weight_G, gap], 1).reshape(-1)])
    count = -(-rows // height) + start_J.shape[0]
    return _visits(start_J, end_J, label_J, height, count, at_least_one=False)


def _own_rows(visits, v, height: int):
    row = visits[0, v] * height + lax.broadcasted_iota(jnp.int32, (height, 1), 0)
    return (row >= visits[2, v]) & (row < visits[3, v])


def grouped_product(x_AK, weights, groups: RowGroups, *, transpose: bool, outs: int, precision):
    """One product, or SwiGLU of two (h, or h and both products): [A, N] arrays."""
    rows, inner = x_AK.shape
    outer = weights[0].shape[1 if transpose else 2]
    bm, bk, bn = _height(rows), _divisor(inner, 512), _divisor(outer, 512)
    parts = len(weights)
    visits, real = _row_visits(groups, rows, bm)

    def kernel(visits, real, x, *refs):
        ws, out_refs, sums = refs[:parts], refs[parts : parts + outs], refs[parts + outs :]
        v, k = pl.program_id(1), pl.program_id(2)
        works = visits[1, v] >= 0

        @pl.when(k == 0)
        def _():
            for total in sums:
                total[...] = jnp.zeros_like(total)

        @pl.when(works & (v < real[0]))
        def _():
            for w, total in zip(ws, sums):
                dims = (((1,), (1 if transpose else 0,)), ((), ()))
                total[...] += lax.dot_general(
                    x[...], w[0], dims, precision=precision, preferred_element_type=jnp.float32
                )

        @pl.when((k == pl.num_programs(2) - 1) & (v < real[0]))
        def _():
            own = _own_rows(visits, v, bm)
            values = [total[...] for total in sums]
            if parts == 2:
                values = [jax.nn.silu(values[0]) * values[1], *values]
            opens = (v == 0) | (visits[0, v] != visits[0, jnp.maximum(v - 1, 0)])
            for out, value in zip(out_refs, values):
                old = jnp.where(opens, jnp.zeros_like(out), out[...])
                out[...] = jnp.where(own, value.astype(out.dtype), old)

    def weight_block(n, v, k, visits, real):
        del real
        g = jnp.maximum(visits[1, v], 0)
        return (g, n, k) if transpose else (g, k, n)

    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((rows, outer), x_AK.dtype)] * outs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(outer // bn, visits.shape[1], inner // bk),
            in_specs=[
                pl.BlockSpec((bm, bk), lambda n, v, k, visits, real: (visits[0, v], k)),
                *[pl.BlockSpec((1, bn, bk) if transpose else (1, bk, bn), weight_block) for _ in weights],
            ],
            out_specs=[pl.BlockSpec((bm, bn), lambda n, v, k, visits, real: (visits[0, v], n))] * outs,
            scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)] * parts,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=INTERPRET,
    )(visits, real, x_AK, *weights)


def grouped_weight_gradient(x_AK, dy_AN, groups: RowGroups, *, precision=None):
    """dw[g] = x(rows of g)^T dy(rows of g), one matrix per group."""
    (rows, inner), outer = x_AK.shape, dy_AN.shape[1]
    count = groups.size_G.shape[0]
    bm, bk, bn = _height(rows), _divisor(inner, 512), _divisor(outer, 512)
    ranges = groups.start_G, groups.start_G + groups.size_G, jnp.arange(count, dtype=jnp.int32)
    visits, real = _visits(*ranges, bm, -(-rows // bm) + 2 * count, at_least_one=True)
    visits = visits.at[0].set(jnp.minimum(visits[0], (rows - 1) // bm))  # an empty group may start behind the last row

    def kernel(visits, real, x, dy, out, total):
        v = pl.program_id(2)

        @pl.when(v < real[0])
        def _():
            @pl.when(visits[4, v] == 1)
            def _():
                total[...] = jnp.zeros_like(total)

            @pl.when(visits[3, v] > visits[2, v])
            def _():
                own = _own_rows(visits, v, bm)
                x_own, dy_own = (jnp.where(own, a[...], jnp.zeros_like(a)) for a in (x, dy))
                dims = (((0,), (0,)), ((), ()))
                total[...] += lax.dot_general(
                    x_own, dy_own, dims, precision=precision, preferred_element_type=jnp.float32
                )

            @pl.when(visits[5, v] == 1)
            def _():
                out[0] = total[...].astype(out.dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((count, inner, outer), x_AK.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(inner // bk, outer // bn, visits.shape[1]),
            in_specs=[
                pl.BlockSpec((bm, bk), lambda k, n, v, visits, real: (visits[0, v], k)),
                pl.BlockSpec((bm, bn), lambda k, n, v, visits, real: (visits[0, v], n)),
            ],
            out_specs=pl.BlockSpec((1, bk, bn), lambda k, n, v, visits, real: (visits[1, v], k, n)),
            scratch_shapes=[pltpu.VMEM((bk, bn), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=INTERPRET,
    )(visits, real, x_AK, dy_AN)
