"""Grouped product and grouped SwiGLU on Hopper: persistent CTAs over (row tile, column tile) items, flat ring, wgmma, copies by the tensor copy engine.

A CTA multiplies a row tile of one group with a column tile of its weight; both consumers read the same weight tile. The transposed product (dx) reads the same
weights through the transposing operand of wgmma. SwiGLU keeps two accumulators of half the width and writes silu(gate) * up. The sum of two products (dx of SwiGLU)
contracts one after the other into one accumulator.

A consumer stores its part of a tile while it multiplies the next one. The two products that SwiGLU saves, for which there are no registers, it stores at once.

Legend: A rows, W weights, K contraction, N outer dim; bm, bn, bk tile sizes; V row tiles.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul import mosaic_gpu_rows, mosaic_gpu_rows_plain
from pallas_kernels.grouped_matmul.groups import RowGroups
from pallas_kernels.grouped_matmul.mosaic_gpu_ring import (
    TILED,
    Tile,
    acquire,
    hand_over,
    no_tile,
    row_stores,
    run_ring,
    tiled_buffers,
)
from pallas_kernels.grouped_matmul.schedule import row_tiles
from pallas_kernels.hopper_overlap import during_first_step, multiply_while_storing


@dataclasses.dataclass(frozen=True)
class ProductTiles:
    """Tile sizes of one product: CTA tile bm x bn, contraction step bk, ring slots, the walk over items (`width` tiles of dimension `minor`, 0 rows, 1 columns)."""

    bm: int = 128
    bn: int = 256
    bk: int = 64
    slots: int = 4
    minor: int = 0
    width: int = 8


def grouped_product(
    rows,
    weights,
    groups: RowGroups,
    index_A=None,
    output_index_A=None,
    *,
    tiles: ProductTiles,
    transpose=False,
    save=False,
    output_rows=None,
    ctas=132,
    interpret=None,
):
    """One product, the sum of two, or SwiGLU, of every row tile.

    Args:
        rows: one or two [A, K] in sorted order, 16-bit floats; A a multiple of 8 and at least bm; K a multiple of bk. With `index_A` one [R, K] in any order.
        weights: one or two [W, K, N], or [W, N, K] with `transpose`; N a multiple of bn. As many as rows: products are added. Two and one: gate and up of SwiGLU.
        groups: row ranges.
        index_A: int32 [A], which row of `rows` stands at a place of the sorted order; None: they are sorted.
        output_index_A: int32 [A], for one product: the row of the output, of `output_rows`, that a row of the sorted order goes to; those that none goes to are zero.
        tiles: tile sizes; for SwiGLU bn counts the columns of one weight.
        transpose: contract the last dim of the weights.
        save: for SwiGLU, also return both products.
        output_rows: with `output_index_A`.
        ctas: number of persistent CTAs (multiprocessors).
        interpret: interpreter parameters for tests.

    Returns:
        Tuple of [A, N] ([output_rows, N]) arrays: the product, or h, or h, gate product, up product.
    """
    inner, terms = rows[0].shape[1], len(rows)
    sorted_rows = (rows[0] if index_A is None else index_A).shape[0]
    gathered, scattered = index_A is not None, output_index_A is not None
    outer = weights[0].shape[1 if transpose else 2]
    bm, bn, bk, slots = tiles.bm, tiles.bn, tiles.bk, tiles.slots
    dtype, parts = rows[0].dtype, len(weights) if terms == 1 else 1  # accumulators
    outs = 3 if save else 1
    steps, columns, wm = inner // bk, outer // bn, bm // 2
    listed = row_tiles(groups, sorted_rows, bm)
    threads = mosaic_gpu_rows if interpret is None else mosaic_gpu_rows_plain

    def body(tiles_g, count_g, *refs):
        index_g, refs = (refs[0], refs[1:]) if gathered else (None, refs)
        output_index_g, refs = (refs[0], refs[1:]) if scattered else (None, refs)
        x_gs, w_gs, out_gs = refs[:terms], refs[terms:][: len(weights)], refs[terms + len(weights) :][:outs]
        x_s, w_s, tiled_s, full, free = refs[terms + len(weights) + outs :]
        warpgroup = lax.axis_index("wg")
        with_steps, all_tiles = count_g[0], count_g[1]

        def leave(tile):
            return row_stores(tile, out_gs[0], tiled_s, threads, output_index_g)

        def locate(item):
            v, n = plgpu.planar_snake(item, (all_tiles, columns), tiles.minor, tiles.width)
            length = jnp.where(v < with_steps, jnp.int32(steps), jnp.int32(0))
            first, own, end, weight = (tiles_g[i, v] for i in range(4))
            if scattered:  # rows of no group go nowhere
                end = jnp.where(v < with_steps, end, own)
            return (first, own, end, weight), n, length

        def produce(place, step, owed):
            (row, _, _, weight), n, length = place
            row = pl.multiple_of(row, 8)
            indices = threads.row_indices(index_g, row, bm, bk) if gathered else None

            def load(x_g, w_gs):
                def one(k, step):
                    slot = acquire(step, slots, free)
                    if not gathered:
                        source = x_g.at[pl.ds(row, bm), pl.ds(k * bk, bk)]
                        plgpu.copy_gmem_to_smem(source, x_s.at[slot], full.at[slot])
                    for part, w_g in enumerate(w_gs):
                        ks, ns = pl.ds(k * bk, bk), pl.ds(n * bn, bn)
                        source = w_g.at[weight, ns, ks] if transpose else w_g.at[weight, ks, ns]
                        plgpu.copy_gmem_to_smem(source, w_s.at[slot, part], full.at[slot])
                    if gathered:
                        threads.copy_rows(x_g, indices, x_s.at[slot], k * bk)
                        threads.end_step()
                        hand_over(step, jnp.minimum(step, 1), slots, full, threads)
                    return step + 1

                return one

            for x_g, term_weights in zip(x_gs, [w_gs] if terms == 1 else [(w_g,) for w_g in w_gs], strict=True):
                step = lax.fori_loop(0, length, load(x_g, term_weights), step)
            return step, owed

        def consume(place, ahead, step, held):
            (first_row, own, end, _), n, length = place
            row = first_row + warpgroup * wm
            length = length * terms

            def multiply(*accumulators):
                def one(i, store):
                    slot = lax.rem(step + i, jnp.int32(slots))
                    plgpu.barrier_wait(full.at[slot])
                    for part, accumulator in enumerate(accumulators):
                        w = w_s.at[slot, part]
                        plgpu.wgmma(
                            accumulator,
                            x_s.at[slot, pl.ds(warpgroup * wm, wm)],
                            w.transpose((1, 0)) if transpose else w,
                        )
                    if store is not None:
                        store()
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[slot])

                upcoming = during_first_step(length, one, ahead, place)
                later = jnp.maximum(length - 1, 0)
                multiply_while_storing(later, lambda i, store: one(i + 1, store), leave(held))
                return upcoming, tuple(a[...] for a in accumulators)

            upcoming, products = pl.run_scoped(multiply, *(plgpu.ACC((wm, bn), jnp.float32) for _ in range(parts)))

            def finished(value):
                return Tile(value.astype(dtype), row, n * bn, own, end)

            for value, out_g in zip(products, out_gs[1:]):
                for store in row_stores(finished(value), out_g, tiled_s, threads):
                    store()
            result = products[0] / (1 + jnp.exp(-products[0])) * products[1] if parts == 2 else products[0]
            return upcoming, (step + length, finished(result))

        def finish(held):
            for store in leave(held):
                store()

        first_held = functools.partial(no_tile, wm, bn, dtype)
        items = all_tiles * columns
        last = (lambda step, _: hand_over(step, jnp.minimum(step, 1), slots, full, threads, 0)) if gathered else None
        run_ring(items, ctas, slots, free, locate, produce, consume, first_held, finish, hand_over_last=last)

    kind = "swiglu" if parts == 2 else "summed_product" if terms == 2 else "product"
    body.__name__ = f"grouped_{kind}{'_transposed' if transpose else ''}"  # shown by profilers
    # Scattered rows are written into zeros, in place.
    zeros = jax.new_ref(jnp.zeros((output_rows, outer), dtype)) if scattered else None
    out = plgpu.kernel(
        body,
        out_type=[] if scattered else [jax.ShapeDtypeStruct((sorted_rows, outer), dtype)] * outs,
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="wg",
        interpret=interpret,
        scratch_types=[
            plgpu.SMEM((slots, bm, bk), dtype, transforms=TILED),
            plgpu.SMEM((slots, parts, *((bn, bk) if transpose else (bk, bn))), dtype, transforms=TILED),
            tiled_buffers(dtype),
            plgpu.Barrier(num_arrivals=1 + parts, num_barriers=slots),
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        ],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=True),
    )(
        *listed,
        *[a for a in (index_A, output_index_A) if a is not None],
        *rows,
        *weights,
        *([zeros] if scattered else []),
    )
    return (jax.freeze(zeros),) if scattered else tuple(out)
