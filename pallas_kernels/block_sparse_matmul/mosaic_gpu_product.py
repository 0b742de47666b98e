"""y = x @ W and dx = dy @ W^T for a block-sparse W on Hopper: one persistent Pallas Mosaic GPU kernel.

Every output tile is 256 (or 128) rows by one block column. A streaming multiprocessor runs three warpgroups for its
whole life: a producer that walks the lists of blocks and fills a ring of shared-memory slots by TMA, and two
consumers that multiply out of the ring with wgmma, each on half of the rows. The ring knows nothing of tiles, so the
producer already fetches the next tile while the consumers store the last one; at low density a tile is only a few
steps long and this overlap decides the speed.

Balance. Block columns are visited in the order of their load, forth and back (work_order.py), so that neighbours in a
round cost nearly the same and their differences cancel, whatever the pattern, without atomics: deterministic.

Legend: E experts (or population), M rows, K/N in and out features, J stored blocks, C block columns of the output,
k/n features inside a block.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_matmul.work_order import plan_order
from pallas_kernels.hopper_overlap import multiply_while_storing

INT = jnp.int32
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # 16-bit operands, 128-byte rows
SMEM_BYTES = 232_448  # what one Hopper multiprocessor lets one program use
SMEM_RESERVED = 2_048  # barriers and alignment
# A program starts with 168 registers a thread. What its three warpgroups ask for may not add up to more, or they wait forever.
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232
EPILOGUE = 64  # rows and columns of one store


@dataclasses.dataclass(frozen=True)
class ProductTile:
    """How one product is cut; found by the autotuner (see tuning.py).

    Attributes:
        rows: Rows of an output tile, shared by two consumer warpgroups (128 or 256).
        depth: Contracted features per ring slot; divides the block.
        stages: Ring slots.
        width: Row tiles in a slab; a slab of x should fit in the L2 cache while W streams by.
        swapped: Multiply as y^T = W^T x^T: each consumer takes half of the columns and all rows of a tile, which
            reads shared memory less often (wgmma of 64 x 256 instead of 2 of 64 x 128) but stores through a transpose.
        stores: Store buffers per consumer.
    """

    rows: int = 256
    depth: int = 64
    stages: int = 4
    width: int = 4
    swapped: bool = False
    stores: int = 2

    def smem_bytes(self, block_out: int, itemsize: int = 2) -> int:
        """Shared memory of one program for output blocks of `block_out` columns."""
        ring = self.stages * (self.rows + block_out) * self.depth * itemsize
        return ring + 2 * self.stores * EPILOGUE * EPILOGUE * itemsize + SMEM_RESERVED


def deal(n_items: int, workers: int, worker: jax.Array, mirror: bool):
    """Deals items round by round, every other round backwards if `mirror`: a worker's count, and round -> item."""
    rounds, rest = divmod(n_items, workers)
    place = workers - 1 - worker if mirror and rounds % 2 else worker
    count = rounds + (place < rest).astype(INT)

    def item(t):
        lane = jnp.where(lax.rem(t, INT(2)) == 0, worker, workers - 1 - worker) if mirror else worker
        return jnp.minimum(t * workers + lane, n_items - 1)

    return count, item


def block_product(
    x_EMK: jax.Array,
    values_EJkn: jax.Array,
    schedule_E3C: jax.Array,
    inner_EJ: jax.Array,
    slot_EJ: jax.Array,
    *,
    transposed: bool,
    tile: ProductTile,
    multiprocessors: int,
    interpret=None,
) -> jax.Array:
    """Multiplies rows by the stored blocks of each output block column.

    Args:
        x_EMK: [experts, rows, features in], bfloat16 or float16; rows divisible by ``tile.rows``.
        values_EJkn: [experts, blocks, k, n], same dtype; k and n are 64 or 128.
        schedule_E3C: int32 [experts, 3, output block columns]: column, first and one-past-last position in
            `inner_EJ`, by descending number of blocks.
        inner_EJ: int32 [experts, blocks], the input block of each position.
        slot_EJ: int32 [experts, blocks], the stored block of each position; read only if `transposed`.
        transposed: Contract the n side of the blocks instead (dx = dy @ W^T).
        tile: Tiling.
        multiprocessors: Programs to run.
        interpret: ``plgpu.InterpretGPUParams`` to run on a CPU.

    Returns:
        [experts, rows, features out], dtype of `x_EMK`.
    """
    experts, m, _ = x_EMK.shape
    block_in, block_out = values_EJkn.shape[2:]
    if transposed:
        block_in, block_out = block_out, block_in
    columns = schedule_E3C.shape[2]
    dtype, rows, depth, stages = x_EMK.dtype, tile.rows, tile.depth, tile.stages
    half, half_out = rows // 2, block_out // 2
    row_tiles = m // rows
    assert m % rows == 0 and block_in % depth == 0, (m, tile, block_in)
    workers = multiprocessors
    order = plan_order(row_tiles, columns, workers, tile.width)
    width = order.width
    slabs = row_tiles // width
    per_block = block_in // depth
    items = experts * row_tiles * columns

    def body(x_g, w_g, s_g, i_g, j_g, y_g, x_s, w_s, y_s, full, free):
        group, worker = lax.axis_index("group"), lax.axis_index("worker")
        count, item = deal(items, workers, worker, order.mirror)

        def locate(t):
            """Round -> expert, row tile, and the schedule's (column, first, last), three independent loads."""
            e, r = lax.div(item(t), INT(row_tiles * columns)), lax.rem(item(t), INT(row_tiles * columns))
            slab, r = lax.div(r, INT(width * columns)), lax.rem(r, INT(width * columns))
            position, row = lax.div(r, INT(width)), slab * width + lax.rem(r, INT(width))
            if order.reverse:
                position = jnp.where(lax.rem(slab, INT(2)) == (slabs - 1) % 2, position, columns - 1 - position)
            return e, row, s_g[e, 0, position], s_g[e, 1, position], s_g[e, 2, position]

        def ring_slot(step):
            return lax.rem(step, INT(stages))

        @pl.when(group == 2)
        def _produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def tile_(t, carry):
                step, (e, row, _, first, last) = carry
                upcoming = locate(t + 1)

                def block(j, step):
                    inner = i_g[e, j]
                    stored = j_g[e, j] if transposed else j
                    for d in range(per_block):
                        s = ring_slot(step)

                        @pl.when(step >= stages)
                        def _(s=s):
                            plgpu.barrier_wait(free.at[s])

                        x_src = x_g.at[e, pl.ds(row * rows, rows), pl.ds(inner * block_in + d * depth, depth)]
                        plgpu.copy_gmem_to_smem(x_src, x_s.at[s], full.at[s])
                        if transposed:
                            w_src = w_g.at[e, stored, :, pl.ds(d * depth, depth)]
                        else:
                            w_src = w_g.at[e, stored, pl.ds(d * depth, depth), :]
                        plgpu.copy_gmem_to_smem(w_src, w_s.at[s], full.at[s])
                        step = step + 1
                    return step

                return lax.fori_loop(first, last, block, step), upcoming

            step, _ = lax.fori_loop(0, count, tile_, (INT(0), locate(INT(0))))
            # Every completion of a barrier must be waited for before the program ends.
            lax.fori_loop(
                jnp.maximum(step - stages, 0), step, lambda i, _: plgpu.barrier_wait(free.at[ring_slot(i)]), None
            )

        @pl.when(group < 2)
        def _consume():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")

            shape = (half_out, rows) if tile.swapped else (half, block_out)
            first_row, first_feature = (0, group * half_out) if tile.swapped else (group * half, 0)
            height, breadth = shape[::-1] if tile.swapped else shape
            pieces = list(itertools.product(range(0, height, EPILOGUE), range(0, breadth, EPILOGUE)))

            def store(number, y, place):
                """Sends piece `number` of a finished tile on its way, if there is one."""
                e, row, column, finished = place
                r, c = pieces[number]
                plgpu.wait_smem_to_gmem(tile.stores - 1, wait_read_only=True)
                buffer = y_s.at[group, number % tile.stores]
                if tile.swapped:
                    buffer.transpose((1, 0))[...] = y[c : c + EPILOGUE, r : r + EPILOGUE]
                else:
                    buffer[...] = y[r : r + EPILOGUE, c : c + EPILOGUE]
                plgpu.commit_smem()
                target_rows = pl.ds(row * rows + first_row + r, EPILOGUE)
                target_columns = pl.ds(column * block_out + first_feature + c, EPILOGUE)

                @pl.when(finished)
                def _():
                    plgpu.copy_smem_to_gmem(buffer, y_g.at[e, target_rows, target_columns])

            def tile_(t, carry):
                step, (e, row, column, first, last), y, place = carry
                upcoming = locate(t + 1)  # these loads fly while this tile is multiplied
                n = (last - first) * per_block

                def multiply(acc):
                    def one(i, store_piece):
                        s = ring_slot(step + i)
                        plgpu.barrier_wait(full.at[s])
                        w = w_s.at[s].transpose((1, 0)) if transposed else w_s.at[s]
                        if tile.swapped:
                            features = pl.ds(group * half_out, half_out)
                            w = w_s.at[s, features] if transposed else w_s.at[s, :, features].transpose((1, 0))
                            plgpu.wgmma(acc, w, x_s.at[s].transpose((1, 0)))
                        else:
                            plgpu.wgmma(acc, x_s.at[s, pl.ds(group * half, half)], w)
                        if store_piece is not None:
                            store_piece()
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(free.at[s])

                    before = [functools.partial(store, number, y, place) for number in range(len(pieces))]
                    multiply_while_storing(n, one, before)
                    return acc[...].astype(dtype)

                y = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
                return step + n, upcoming, y, (e, row, column, jnp.bool_(True))

            nothing = jnp.zeros(shape, dtype), (INT(0), INT(0), INT(0), jnp.bool_(False))
            _, _, y, place = lax.fori_loop(0, count, tile_, (INT(0), locate(INT(0)), *nothing))
            for number in range(len(pieces)):
                store(number, y, place)
            plgpu.wait_smem_to_gmem(0)

    body.__name__ = "block_product_transposed" if transposed else "block_product"  # shown by profilers
    w_slot = (stages, block_out, depth) if transposed else (stages, depth, block_out)
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((experts, m, columns * block_out), dtype),
        grid=(workers,),
        grid_names=("worker",),
        num_threads=3,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((stages, rows, depth), dtype, transforms=SWIZZLED),
            plgpu.SMEM(w_slot, dtype, transforms=SWIZZLED),
            plgpu.SMEM((2, tile.stores, EPILOGUE, EPILOGUE), dtype, transforms=SWIZZLED),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    return kernel(x_EMK, values_EJkn, schedule_E3C, inner_EJ, slot_EJ)
