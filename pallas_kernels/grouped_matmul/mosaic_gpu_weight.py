"""Weight gradient of the grouped product on Hopper: dw[g] = x(rows of g)^T dy(rows of g), contraction over the rows of the group.

The ring of the forward product with both operands read row by row: x through the transposing operand of wgmma, so nothing is copied or transposed. A step takes
`bk` rows from a multiple of 8. At the ends of a group, where some of them are its neighbours', threads copy the step and leave those rows zero, in both operands (zeros
in one would let a NaN through). Groups are taken largest first, so the persistent CTAs end together.

Legend: A rows, G groups, K x features (rows of dw), N dy features (columns of dw); bm, bn, bk tile sizes.
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
    run_ring,
    stores,
    tiled_buffers,
)
from pallas_kernels.grouped_matmul.schedule import ALIGN
from pallas_kernels.hopper_overlap import during_first_step, multiply_while_storing


@dataclasses.dataclass(frozen=True)
class WeightTiles:
    """Tile sizes: CTA tile bm x bn of dw, bk rows a step, ring slots, the walk over tiles of a group.

    A CTA ends after `life` items and the device starts the next one where an SM is free, which evens out groups of very different sizes; 0: as many CTAs as SMs,
    which deal all items among themselves in turn.
    """

    bm: int = 256
    bn: int = 128
    bk: int = 64
    slots: int = 4
    minor: int = 0
    width: int = 4
    life: int = 0


def _largest_first(size_G):
    """The groups by falling size, as comparisons: one small fused kernel instead of a sort."""
    index_G = jnp.arange(size_G.shape[0], dtype=jnp.int32)
    before_GG = (size_G[:, None] > size_G) | ((size_G[:, None] == size_G) & (index_G[:, None] < index_G))
    rank_G = jnp.sum(before_GG, axis=0, dtype=jnp.int32)
    return jnp.sum(jnp.where(rank_G[None, :] == index_G[:, None], index_G[None, :], 0), axis=1, dtype=jnp.int32)


def grouped_weight_gradient(
    x_AK,
    dy_AN,
    groups: RowGroups,
    x_index_A=None,
    dy_index_A=None,
    *,
    tiles: WeightTiles,
    ctas=132,
    interpret=None,
):
    """dw of every group.

    Args:
        x_AK, dy_AN: [A, K] and [A, N] in sorted order, same 16-bit float; A a multiple of 8 and at least bk; K a multiple of bm, N of bn.
        groups: row ranges.
        x_index_A, dy_index_A: int32 [A], which row of x_AK (then [R, K]) or dy_AN stands at a place of the sorted order; None: they are sorted.
        tiles: tile sizes.
        ctas: number of persistent CTAs (multiprocessors).
        interpret: interpreter parameters for tests.

    Returns:
        [G, K, N] in the dtype of x, accumulated in float32; zeros for empty groups.
    """
    width, outer, dtype = x_AK.shape[1], dy_AN.shape[1], x_AK.dtype
    rows = (x_AK if x_index_A is None else x_index_A).shape[0]
    gathered = [index_A for index_A in (x_index_A, dy_index_A) if index_A is not None]
    bm, bn, bk, slots = tiles.bm, tiles.bn, tiles.bk, tiles.slots
    m_tiles, n_tiles = width // bm, outer // bn
    wm = bm // 2
    count = groups.size_G.shape[0]
    threads = mosaic_gpu_rows if interpret is None else mosaic_gpu_rows_plain
    order_G = _largest_first(groups.size_G)
    start_G = groups.start_G[order_G]
    ranges_3G = jnp.stack([start_G, start_G + groups.size_G[order_G], order_G])

    items = count * m_tiles * n_tiles
    launched = ctas * -(-items // (ctas * tiles.life)) if tiles.life else ctas

    def body(ranges_g, x_g, dy_g, *refs):
        indices_g = list(refs[: len(gathered)])
        out_g, x_s, dy_s, tiled_s, full, free = refs[len(gathered) :]
        indexed = [None if index_A is None else indices_g.pop(0) for index_A in (x_index_A, dy_index_A)]
        sides = list(zip(indexed, (bm, bn), strict=True))
        warpgroup = lax.axis_index("wg")

        def locate(item):
            g = lax.div(item, jnp.int32(m_tiles * n_tiles))
            m, n = plgpu.planar_snake(
                lax.rem(item, jnp.int32(m_tiles * n_tiles)), (m_tiles, n_tiles), tiles.minor, tiles.width
            )
            return ranges_g[0, g], ranges_g[1, g], ranges_g[2, g] * width + m * bm, n * bn

        def steps_of(start, end):
            first = lax.div(start, jnp.int32(ALIGN)) * ALIGN
            return first, jnp.where(end > start, lax.div(end - first + (bk - 1), jnp.int32(bk)), 0)

        def produce(place, step, owed):
            start, end, row, column = place
            first, length = steps_of(start, end)
            x_column, dy_column = pl.multiple_of(lax.rem(row, jnp.int32(width)), bm), pl.multiple_of(column, bn)

            def begin(i):
                return pl.multiple_of(jnp.minimum(first + i * bk, rows - bk), ALIGN)

            def indices(i):  # of a step: asked for while the step before is copied
                return [None if g is None else threads.row_indices(g, begin(i), bk, n) for g, n in sides]

            def load(i, carry):
                step, owed, at = carry
                slot = acquire(step, slots, free)
                ahead = indices(i + 1)
                own = jnp.maximum(first + i * bk, start) - begin(i), end - begin(i)
                foreign = (own[0] > 0) | (own[1] < bk)

                def fetch(source_g, at, slot_s, column):
                    if at is not None:
                        threads.copy_rows(source_g, at, slot_s, column, own)
                        return

                    @pl.when(foreign)
                    def _():
                        at = threads.row_indices(None, begin(i), bk, slot_s.shape[1])
                        threads.copy_rows(source_g, at, slot_s, column, own)

                    @pl.when(jnp.logical_not(foreign))
                    def _():
                        source = source_g.at[pl.ds(begin(i), bk), pl.ds(column, slot_s.shape[1])]
                        plgpu.copy_gmem_to_smem(source, slot_s, full.at[slot])

                fetch(x_g, at[0], x_s.at[slot], x_column)
                fetch(dy_g, at[1], dy_s.at[slot], dy_column)
                threads.end_step()
                hand_over(step, owed, slots, full, threads)
                return step + 1, jnp.where(foreign, jnp.int32(2), jnp.int32(len(gathered))), ahead

            return lax.fori_loop(0, length, load, (step, owed, indices(0)))[:2]

        def consume(place, ahead, step, held):
            start, end, row, column = place
            _, length = steps_of(start, end)

            def multiply(accumulator):
                def one(i, store):
                    slot = lax.rem(step + i, jnp.int32(slots))
                    plgpu.barrier_wait(full.at[slot])
                    x = x_s.at[slot, :, pl.ds(warpgroup * wm, wm)]
                    plgpu.wgmma(accumulator, x.transpose((1, 0)), dy_s.at[slot])
                    if store is not None:
                        store()
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[slot])

                upcoming = during_first_step(length, one, ahead, place)
                later = jnp.maximum(length - 1, 0)
                multiply_while_storing(later, lambda i, store: one(i + 1, store), stores(held, out_g, tiled_s))
                return upcoming, accumulator[...].astype(dtype)

            own_row = row + warpgroup * wm
            upcoming, value = pl.run_scoped(multiply, plgpu.ACC((wm, bn), jnp.float32))
            return upcoming, (step + length, Tile(value, own_row, column, own_row, own_row + wm))

        def finish(held):
            for store in stores(held, out_g, tiled_s):
                store()

        first_held = functools.partial(no_tile, wm, bn, dtype)
        last = lambda step, owed: hand_over(step, owed, slots, full, threads, 0)  # noqa: E731
        run_ring(items, ctas, slots, free, locate, produce, consume, first_held, finish, tiles.life, last)

    body.__name__ = "grouped_weight_gradient"  # shown by profilers
    dw = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((count * width, outer), dtype),
        grid=(launched,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="wg",
        interpret=interpret,
        scratch_types=[
            plgpu.SMEM((slots, bk, bm), dtype, transforms=TILED),
            plgpu.SMEM((slots, bk, bn), dtype, transforms=TILED),
            tiled_buffers(dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        ],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(ranges_3G, x_AK, dy_AN, *gathered)
    return dw.reshape(count, width, outer)
