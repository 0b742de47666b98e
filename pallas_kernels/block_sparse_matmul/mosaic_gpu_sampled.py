"""The blocks of x^T dy that exist (the weight gradient of a block-sparse matmul) on Hopper.

One work item is a pair of blocks, one for each consumer warpgroup. The topology pairs blocks of one column or of one
row, so a ring slot holds three tiles for two products; a block that shares nothing is an item by itself.
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
    """`whole` items run on one program each, the next `rest` are shared by `parts` programs each.

    Items after these are not expected to exist; if they do, they run on one program each.
    """

    whole: int
    rest: int
    parts: int


def expected_items(blocks: int, columns: int, listed: int) -> int:
    """Items that exist if the columns are equally full (a list without single blocks), else all that are listed."""
    return blocks // 2 if blocks % (2 * columns) == 0 else listed


def plan_rounds(items: int, steps: int, workers: int, split: bool) -> Rounds:
    """Decides which of the expected items are cut."""
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
        pairs_E6P: int32 [experts, 6, pairs]: block row, block column and slot of two blocks that share a column or row.
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
    items = experts * pairs
    expected = items if experts > 1 else expected_items(blocks, dy_EMN.shape[2] // block, pairs)
    plan = plan_rounds(expected, steps, multiprocessors, tile.split)
    surplus = items - plan.whole - plan.rest

    def body(x_g, d_g, p_g, o_g, part_g, t_s, o_s, full, free):
        group, worker = lax.axis_index("group"), lax.axis_index("worker")
        rounds = lax.div(INT(plan.whole) - worker + (multiprocessors - 1), INT(multiprocessors))
        part = lax.div(worker, INT(max(1, plan.rest)))  # part p of cut item q runs on program p * rest + q
        part_steps = jnp.where(part < plan.parts, lax.div(steps - part + plan.parts - 1, INT(plan.parts)), 0)
        cut_item = plan.whole + lax.rem(worker, INT(max(1, plan.rest)))

        def locate(item):
            e, p = lax.div(item, INT(pairs)), lax.rem(item, INT(pairs))
            return e, [p_g[e, field, p] for field in range(6)]

        def surplus_item(t):
            return plan.whole + plan.rest + t * multiprocessors + worker

        surplus_rounds = lax.div(INT(surplus) - worker + (multiprocessors - 1), INT(multiprocessors))

        def ring_slot(step):
            return lax.rem(step, INT(stages))

        @pl.when(group == 2)
        def _produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def fetch(item, first, stride, count, step):
                """Fills ring slots with steps first, first + stride, ... of an item; returns the next ring step."""
                e, (row0, column0, slot0, row1, column1, slot1) = locate(item)
                count = jnp.where(slot0 < blocks, count, 0)
                same_column = column0 == column1

                def one(i, step):
                    s = ring_slot(step)

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(free.at[s])

                    tokens = pl.ds((first + i * stride) * depth, depth)

                    def load(source, index, place):
                        tile_ = source.at[e, tokens, pl.ds(index * block, block)]
                        plgpu.copy_gmem_to_smem(tile_, t_s.at[s, place], full.at[s])

                    @pl.when(same_column)
                    def _():
                        load(d_g, column0, 0)
                        load(x_g, row0, 1)

                    @pl.when(jnp.logical_not(same_column))
                    def _():
                        load(x_g, row0, 0)
                        load(d_g, column0, 1)
                        load(d_g, column1, 2)

                    @pl.when(same_column & (slot1 < blocks))
                    def _():
                        load(x_g, row1, 2)

                    @pl.when(slot1 == blocks)
                    def _():
                        plgpu.barrier_arrive(full.at[s])  # nothing to load, but the barrier counts three arrivals

                    return step + 1

                return lax.fori_loop(0, count, one, step)

            def whole(t, step):
                return fetch(t * multiprocessors + worker, INT(0), 1, INT(steps), step)

            step = lax.fori_loop(0, rounds, whole, INT(0))
            if plan.rest:
                step = fetch(cut_item, part, plan.parts, part_steps, step)
            if surplus:
                step = lax.fori_loop(
                    0, surplus_rounds, lambda t, step: fetch(surplus_item(t), INT(0), 1, INT(steps), step), step
                )
            lax.fori_loop(
                jnp.maximum(step - stages, 0), step, lambda i, _: plgpu.barrier_wait(free.at[ring_slot(i)]), None
            )

        @pl.when(group < 2)
        def _consume():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")

            def multiply(item, count, step):
                """Contracts `count` steps of an item: expert, slot of this group's block, the product, next ring step."""
                e, (_, column0, slot0, _, column1, slot1) = locate(item)
                count = jnp.where(slot0 < blocks, count, 0)
                same_column = column0 == column1
                mine = jnp.where(slot1 < blocks, 1 + group, 1)  # of a single block both groups make the same product
                x_place, d_place = jnp.where(same_column, mine, 0), jnp.where(same_column, 0, mine)

                def scope(acc):
                    def one(i, _):
                        s = ring_slot(step + i)
                        plgpu.barrier_wait(full.at[s])
                        plgpu.wgmma(acc, t_s.at[s, x_place].transpose((1, 0)), t_s.at[s, d_place])
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(free.at[s])

                    lax.fori_loop(0, count, one, None)
                    return acc[...]

                product = pl.run_scoped(scope, plgpu.ACC((block, block), jnp.float32))
                return e, jnp.where(group == 0, slot0, slot1), product, step + count

            def finish(item, step):
                """One item from its first token to its last, and the store of its blocks."""
                e, slot, product, step = multiply(item, INT(steps), step)
                product = product.astype(dtype)
                for r in range(0, block, EPILOGUE):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    o_s[group] = product[r : r + EPILOGUE]
                    plgpu.commit_smem()

                    @pl.when(slot < blocks)
                    def _(r=r):
                        plgpu.copy_smem_to_gmem(o_s.at[group], o_g.at[e, slot, pl.ds(r, EPILOGUE)])

                return step

            step = lax.fori_loop(0, rounds, lambda t, step: finish(t * multiprocessors + worker, step), INT(0))
            if plan.rest:
                _, _, product, step = multiply(cut_item, part_steps, step)

                @pl.when(part < plan.parts)
                def _():
                    part_g[cut_item - plan.whole, part, group] = product

            if surplus:
                lax.fori_loop(0, surplus_rounds, lambda t, step: finish(surplus_item(t), step), step)

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
