"""The blocks of x^T dy that exist (the weight gradient of a block-sparse matmul) on Hopper.

One work item is a pair of blocks, one for each consumer warpgroup. The topology pairs blocks of one column (or of one
row), so that a ring slot holds three tiles for two products; the few pairs that share nothing take two slots a step.
The contraction runs over all tokens, so items are long and few, and two things decide the speed:

* All programs walk the tokens in step, so what they load meets in the L2 cache; items that run together touch a
  compact part of x and dy (the topology orders them by bands).
* When the last round would leave at least half of the multiprocessors idle, its items are cut: programs take turns
  at the token steps of an item (they stay in step), and their float32 parts are added in a fixed order by a second
  kernel. The result stays deterministic.

Legend: E experts, M tokens, K/N features, P pairs per expert, J stored blocks, b block size, Q cut items.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_matmul.mosaic_gpu_product import (
    CONSUMER_REGISTERS,
    EPILOGUE,
    INT,
    PRODUCER_REGISTERS,
    SMEM_BYTES,
    SMEM_RESERVED,
    SWIZZLED,
)

TILES = 3  # per ring slot: the shared tile and one for each consumer


@dataclasses.dataclass(frozen=True)
class SampledTile:
    """How the sampled product is cut.

    Attributes:
        depth: Tokens per ring slot.
        split: Cut the items of the last round where that fills the machine better.
    """

    depth: int = 64
    split: bool = True

    def stages(self, block: int, itemsize: int = 2) -> int:
        """Ring slots that fit shared memory."""
        store = 2 * EPILOGUE * block * itemsize
        return min(8, (SMEM_BYTES - SMEM_RESERVED - store) // (TILES * block * self.depth * itemsize))


@dataclasses.dataclass(frozen=True)
class Rounds:
    """`whole` items run on one program each; the `rest` are shared by `parts` programs each."""

    whole: int
    rest: int
    parts: int


def plan_rounds(items: int, steps: int, workers: int, split: bool) -> Rounds:
    """Decides which items are cut."""
    rest = items % workers
    parts = min(workers // rest, steps, 8) if rest else 1
    if not split or parts < 2:
        return Rounds(items, 0, 1)
    return Rounds(items - rest, rest, parts)


def sampled_product(
    x_EMK: jax.Array,
    dy_EMN: jax.Array,
    pairs_E6P: jax.Array,
    *,
    blocks: int,
    block: int,
    tile: SampledTile,
    multiprocessors: int,
    interpret=None,
) -> jax.Array:
    """Computes block j = x[:, rows of j]^T dy[:, columns of j] for every stored block.

    Args:
        x_EMK: [experts, tokens, features in], bfloat16 or float16; tokens divisible by ``tile.depth``.
        dy_EMN: [experts, tokens, features out], same dtype.
        pairs_E6P: int32 [experts, 6, ceil(blocks / 2)]: block row, block column and slot of two blocks.
        blocks: Stored blocks per expert.
        block: Rows and columns of a block, 64 or 128.
        tile: Tiling.
        multiprocessors: Programs to run.
        interpret: ``plgpu.InterpretGPUParams`` to run on a CPU.

    Returns:
        [experts, blocks, block, block], dtype of `x_EMK`.
    """
    experts, m, _ = x_EMK.shape
    dtype, depth, stages = x_EMK.dtype, tile.depth, tile.stages(block)
    pairs, steps = pairs_E6P.shape[2], m // depth
    assert m % depth == 0, (m, tile)
    plan = plan_rounds(experts * pairs, steps, multiprocessors, tile.split)

    def body(x_g, d_g, p_g, o_g, part_g, t_s, o_s, full, free):
        group, worker = lax.axis_index("group"), lax.axis_index("worker")
        rounds = lax.div(INT(plan.whole) - worker + (multiprocessors - 1), INT(multiprocessors))
        part = lax.div(worker, INT(max(1, plan.rest)))  # part p of cut item q runs on program p * rest + q
        part_steps = jnp.where(part < plan.parts, lax.div(steps - part + plan.parts - 1, INT(plan.parts)), 0)
        cut_item = plan.whole + lax.rem(worker, INT(max(1, plan.rest)))

        def locate(item):
            e, p = lax.div(item, INT(pairs)), lax.rem(item, INT(pairs))
            return e, [p_g[e, field, p] for field in range(6)]

        def ring_slot(step):
            return lax.rem(step, INT(stages))

        @pl.when(group == 2)
        def _produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def fetch(item, first, stride, count, step):
                """Fills ring slots with steps first, first + stride, ... of an item; returns the next ring step."""
                e, (row0, column0, _, row1, column1, _) = locate(item)

                def x_tile(i, row):
                    return x_g.at[e, pl.ds((first + i * stride) * depth, depth), pl.ds(row * block, block)]

                def d_tile(i, column):
                    return d_g.at[e, pl.ds((first + i * stride) * depth, depth), pl.ds(column * block, block)]

                def fill(step, *tiles):
                    s = ring_slot(step)

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(free.at[s])

                    for place in range(TILES):
                        if place < len(tiles):
                            plgpu.copy_gmem_to_smem(tiles[place], t_s.at[s, place], full.at[s])
                        else:
                            plgpu.barrier_arrive(full.at[s])  # keeps the count of arrivals

                same_column, same_row = column0 == column1, row0 == row1

                @pl.when(same_column)
                def _():
                    lax.fori_loop(
                        0,
                        count,
                        lambda i, _: fill(step + i, d_tile(i, column0), x_tile(i, row0), x_tile(i, row1)),
                        None,
                    )

                @pl.when(jnp.logical_not(same_column) & same_row)
                def _():
                    lax.fori_loop(
                        0,
                        count,
                        lambda i, _: fill(step + i, x_tile(i, row0), d_tile(i, column0), d_tile(i, column1)),
                        None,
                    )

                @pl.when(jnp.logical_not(same_column | same_row))
                def _():
                    def two_slots(i, _):
                        fill(step + 2 * i, x_tile(i, row0), d_tile(i, column0))
                        fill(step + 2 * i + 1, x_tile(i, row1), d_tile(i, column1))

                    lax.fori_loop(0, count, two_slots, None)

                return step + count * jnp.where(same_column | same_row, 1, 2)

            def whole(t, step):
                return fetch(t * multiprocessors + worker, INT(0), 1, INT(steps), step)

            step = lax.fori_loop(0, rounds, whole, INT(0))
            if plan.rest:
                step = fetch(cut_item, part, plan.parts, part_steps, step)
            lax.fori_loop(
                jnp.maximum(step - stages, 0), step, lambda i, _: plgpu.barrier_wait(free.at[ring_slot(i)]), None
            )

        @pl.when(group < 2)
        def _consume():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")

            def multiply(item, count, step):
                """Contracts `count` steps of an item: expert, slot of this group's block, the product, next ring step."""
                e, (row0, column0, slot0, row1, column1, slot1) = locate(item)
                same_column, same_row = column0 == column1, row0 == row1
                shared = same_column | same_row
                x_place = jnp.where(same_column, 1 + group, 0)
                d_place = jnp.where(same_column, 0, 1 + group)

                def scope(acc):
                    def one_slot(i, _):
                        s = ring_slot(step + i)
                        plgpu.barrier_wait(full.at[s])
                        plgpu.wgmma(acc, t_s.at[s, x_place].transpose((1, 0)), t_s.at[s, d_place])
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(free.at[s])

                    def two_slots(i, _):
                        first, second = ring_slot(step + 2 * i), ring_slot(step + 2 * i + 1)
                        plgpu.barrier_wait(full.at[first])
                        plgpu.barrier_wait(full.at[second])
                        s = jnp.where(group == 0, first, second)
                        plgpu.wgmma(acc, t_s.at[s, 0].transpose((1, 0)), t_s.at[s, 1])
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(free.at[first])
                        plgpu.barrier_arrive(free.at[second])

                    lax.fori_loop(0, jnp.where(shared, count, 0), one_slot, None)
                    lax.fori_loop(0, jnp.where(shared, 0, count), two_slots, None)
                    return acc[...]

                product = pl.run_scoped(scope, plgpu.ACC((block, block), jnp.float32))
                slot = jnp.where(group == 0, slot0, slot1)
                return e, slot, product, step + count * jnp.where(shared, 1, 2)

            def whole(t, step):
                e, slot, product, step = multiply(t * multiprocessors + worker, INT(steps), step)
                product = product.astype(dtype)
                for r in range(0, block, EPILOGUE):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    o_s[group] = product[r : r + EPILOGUE]
                    plgpu.commit_smem()

                    @pl.when(slot < blocks)
                    def _(r=r):
                        plgpu.copy_smem_to_gmem(o_s.at[group], o_g.at[e, slot, pl.ds(r, EPILOGUE)])

                return step

            step = lax.fori_loop(0, rounds, whole, INT(0))
            if plan.rest:

                @pl.when(part < plan.parts)
                def _():
                    _, _, product, _ = multiply(cut_item, part_steps, step)
                    part_g[cut_item - plan.whole, part, group] = product

            plgpu.wait_smem_to_gmem(0)

    body.__name__ = "block_sampled_product"
    part_shape = (plan.rest, plan.parts, 2, block, block) if plan.rest else (1,)
    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((experts, blocks, block, block), dtype),
            jax.ShapeDtypeStruct(part_shape, jnp.float32),
        ),
        grid=(multiprocessors,),
        grid_names=("worker",),
        num_threads=3,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((stages, TILES, depth, block), dtype, transforms=SWIZZLED),
            plgpu.SMEM((2, EPILOGUE, block), dtype, transforms=SWIZZLED),
            plgpu.Barrier(num_arrivals=TILES, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    out_EJbb, parts = kernel(x_EMK, dy_EMN, pairs_E6P)
    return add_parts(out_EJbb, parts, pairs_E6P, plan, interpret) if plan.rest else out_EJbb


def add_parts(
    out_EJbb: jax.Array, parts_QPgbb: jax.Array, pairs_E6P: jax.Array, plan: Rounds, interpret=None
) -> jax.Array:
    """Adds the parts of the cut items in order and writes them into their slots of `out_EJbb`, in place."""
    _, blocks, block, _ = out_EJbb.shape
    pairs, pieces = pairs_E6P.shape[2], block // EPILOGUE
    out_ref = jax.new_ref(out_EJbb)

    def body(part_g, p_g, out_g, _):
        program = lax.axis_index("program")
        item, group = lax.div(program, INT(2 * pieces)), lax.rem(lax.div(program, INT(pieces)), INT(2))
        rows = pl.ds(lax.rem(program, INT(pieces)) * EPILOGUE, EPILOGUE)
        e, p = lax.div(plan.whole + item, INT(pairs)), lax.rem(plan.whole + item, INT(pairs))
        slot = jnp.where(group == 0, p_g[e, 2, p], p_g[e, 5, p])

        @pl.when(slot < blocks)
        def _():
            total = part_g[item, 0, group, rows]
            for part in range(1, plan.parts):
                total = total + part_g[item, part, group, rows]
            out_g[e, slot, rows] = total.astype(out_g.dtype)

    body.__name__ = "block_sampled_product_parts"
    plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((1,), jnp.int32),),  # the result is written through the reference
        grid=(plan.rest * 2 * pieces,),
        grid_names=("program",),
        num_threads=1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(parts_QPgbb, pairs_E6P, out_ref)
    return jax.freeze(out_ref)
