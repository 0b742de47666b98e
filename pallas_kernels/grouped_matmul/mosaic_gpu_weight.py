"""Weight gradient of the grouped product on Hopper: dw[g] = x(rows of g)^T dy(rows of g), contraction over the rows of the group.

The ring of the forward product with both operands read row by row: x through the transposing operand of wgmma, so nothing is copied or transposed. A step takes
`bk` rows from a multiple of 8; at the ends of a group rows of its neighbours come along and both operands are cleared there in shared memory (clearing one would
let a NaN through). Groups are taken largest first, so the persistent CTAs end together.

Legend: A rows, G groups, K x features (rows of dw), N dy features (columns of dw); bm, bn, bk tile sizes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.groups import RowGroups
from pallas_kernels.grouped_matmul.mosaic_gpu_ring import (
    TILED,
    acquire,
    free_barriers,
    out_buffers,
    ring_grid,
    run_ring,
    shared_by_cluster,
    store_rows,
)
from pallas_kernels.grouped_matmul.schedule import ALIGN


@dataclasses.dataclass(frozen=True)
class WeightTiles:
    """Tile sizes: CTA tile bm x bn of dw, bk rows a step, ring slots, the walk over tiles of a group, CTAs that share the x tile.

    A CTA ends after `life` items and the device starts the next one where an SM is free, which evens out groups of very different sizes; 0: as many CTAs as SMs,
    which deal all items among themselves in turn.
    """

    bm: int = 256
    bn: int = 128
    bk: int = 64
    slots: int = 4
    minor: int = 0
    width: int = 4
    cluster: int = 1
    life: int = 0


def _largest_first(size_G):
    """The groups by falling size, as comparisons: one small fused kernel instead of a sort."""
    index_G = jnp.arange(size_G.shape[0], dtype=jnp.int32)
    before_GG = (size_G[:, None] > size_G) | ((size_G[:, None] == size_G) & (index_G[:, None] < index_G))
    rank_G = jnp.sum(before_GG, axis=0, dtype=jnp.int32)
    return jnp.sum(jnp.where(rank_G[None, :] == index_G[:, None], index_G[None, :], 0), axis=1, dtype=jnp.int32)


def grouped_weight_gradient(x_AK, dy_AN, groups: RowGroups, *, tiles: WeightTiles, ctas=132, interpret=None):
    """dw of every group.

    Args:
        x_AK, dy_AN: [A, K] and [A, N] in sorted order, same 16-bit float; A a multiple of 8 and at least bk; K a multiple of bm, N of bn.
        groups: row ranges.
        tiles: tile sizes.
        ctas: number of persistent CTAs (multiprocessors).
        interpret: interpreter parameters for tests.

    Returns:
        [G, K, N] in the dtype of x, accumulated in float32; zeros for empty groups.
    """
    rows, dtype = x_AK.shape[0], x_AK.dtype
    bm, bn, bk, slots = tiles.bm, tiles.bn, tiles.bk, tiles.slots
    m_tiles, n_tiles = x_AK.shape[1] // bm, dy_AN.shape[1] // (bn * tiles.cluster)
    wm, half = bm // 2, bn // 2
    count = groups.size_G.shape[0]
    order_G = _largest_first(groups.size_G)
    start_G, size_G = groups.start_G[order_G], groups.size_G[order_G]
    first_G = start_G // ALIGN * ALIGN
    end_G = start_G + size_G
    steps_G = jnp.where(size_G > 0, (end_G - first_G + bk - 1) // bk, 0)
    ranges_5G = jnp.stack([start_G, end_G, first_G, steps_G, order_G])

    items, lanes = count * m_tiles * n_tiles, ctas // tiles.cluster
    launched = lanes * -(-items // (lanes * tiles.life)) if tiles.life else lanes

    def body(ranges_g, x_g, dy_g, out_g, x_s, dy_s, buffers0, buffers1, full, free, both):
        warpgroup = lax.axis_index("wg")

        def place(item):
            g = lax.div(item, jnp.int32(m_tiles * n_tiles))
            m, n = plgpu.planar_snake(
                lax.rem(item, jnp.int32(m_tiles * n_tiles)), (m_tiles, n_tiles), tiles.minor, tiles.width
            )
            return g, m, n * tiles.cluster + (lax.axis_index("pair") if tiles.cluster > 1 else 0)

        def produce(item, step):
            g, m, n = place(item)
            first, length = ranges_g[2, g], ranges_g[3, g]

            def load(i, step):
                slot = acquire(step, slots, free)
                row = pl.ds(pl.multiple_of(jnp.minimum(first + i * bk, rows - bk), ALIGN), bk)
                source = x_g.at[row, pl.ds(m * bm, bm)]
                plgpu.copy_gmem_to_smem(source, x_s.at[slot], full.at[slot], **shared_by_cluster(tiles.cluster))
                plgpu.copy_gmem_to_smem(dy_g.at[row, pl.ds(n * bn, bn)], dy_s.at[slot], full.at[slot])
                return step + 1

            return lax.fori_loop(0, length, load, step)

        def consume(item, step):
            g, m, n = place(item)
            start, end, first, length = (ranges_g[i, g] for i in range(4))

            def clear(ref, own, stop):
                value = ref[...]
                row = lax.broadcasted_iota(jnp.int32, value.shape, 0)
                ref[...] = jnp.where((row >= own) & (row < stop), value, jnp.zeros_like(value))

            def multiply(accumulator):
                def one(i, _):
                    slot = lax.rem(step + i, jnp.int32(slots))
                    begin = first + i * bk
                    base = jnp.minimum(begin, rows - bk)
                    own, stop = jnp.maximum(begin, start) - base, end - base
                    plgpu.barrier_wait(full.at[slot])

                    @pl.when((own > 0) | (stop < bk))
                    def _():
                        clear(x_s.at[slot, :, pl.ds(warpgroup * wm, wm)], own, stop)
                        clear(dy_s.at[slot, :, pl.ds(warpgroup * half, half)], own, stop)
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(both)
                        plgpu.barrier_wait(both)

                    x = x_s.at[slot, :, pl.ds(warpgroup * wm, wm)]
                    plgpu.wgmma(accumulator, x.transpose((1, 0)), dy_s.at[slot])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[slot])

                lax.fori_loop(0, length, one, None)
                return accumulator[...].astype(dtype)

            value = pl.run_scoped(multiply, plgpu.ACC((wm, bn), jnp.float32))
            row = m * bm + warpgroup * wm
            store_rows(value, out_g.at[ranges_g[4, g]], row, n * bn, 0, x_g.shape[1], (buffers0, buffers1), 0)
            return step + length

        run_ring(items, lanes, slots, free, produce, consume, life=tiles.life)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((count, x_AK.shape[1], dy_AN.shape[1]), dtype),
        **ring_grid(launched, tiles.cluster),
        num_threads=3,
        thread_name="wg",
        interpret=interpret,
        scratch_types=[
            plgpu.SMEM((slots, bk, bm), dtype, transforms=TILED),
            plgpu.SMEM((slots, bk, bn), dtype, transforms=TILED),
            *out_buffers(dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            free_barriers(slots, tiles.cluster),
            plgpu.Barrier(num_arrivals=2),
        ],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(ranges_5G, x_AK, dy_AN)
