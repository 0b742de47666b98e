"""The blocks of x^T dy that exist (weight gradient of a block-sparse matmul) on Hopper, and all their norms.

One work item is a pair of blocks, one for each consumer warpgroup; a pair is usually taken from one block row, so
both share a slab of x and a step loads 3 tiles for 2 products. The contraction runs over all tokens, so items are
long and few, and two things decide the speed: which items run at the same time (the topology orders pairs by bands
of block rows, so that they share x and dy in the L2 cache) and how the last, incomplete round is dealt. That round
is cut along the tokens into equal shares, one for each multiprocessor; the shares go to a float32 buffer and are
added in a fixed order afterwards, so the result stays deterministic.

Legend: E experts, M tokens, K/N features, P pairs per expert, J stored blocks, k/n features inside a block,
W shares (two per multiprocessor).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_matmul.mosaic_gpu_product import (
    CONSUMER_REGISTERS,
    EPILOGUE,
    INT,
    PRODUCER_REGISTERS,
    SMEM_RESERVED,
    SWIZZLED,
)


@dataclasses.dataclass(frozen=True)
class SampledTile:
    """How the sampled product is cut.

    Attributes:
        depth: Tokens per ring slot.
        stages: Ring slots.
        split: Cut the last round along the tokens when it would fill at most this fraction of the machine.
    """

    depth: int = 64
    stages: int = 3
    split: float = 0.85
    shared_only: bool = False

    def smem_bytes(self, block_in: int, block_out: int, itemsize: int = 2) -> int:
        """Shared memory of one program."""
        ring = self.stages * 2 * (block_in + block_out) * self.depth * itemsize
        return ring + 2 * EPILOGUE * block_out * itemsize + SMEM_RESERVED


@dataclasses.dataclass(frozen=True)
class Shares:
    """The plan of the last round: `items` whole items first, then `rest` items of `steps` steps cut into shares."""

    items: int
    rest: int
    steps: int
    workers: int

    def bounds(self, worker):
        """First and one-past-last step of a worker, counted over the steps of all `rest` items."""
        total = self.rest * self.steps
        low, extra = divmod(total, self.workers)
        return worker * low + jnp.minimum(worker, extra), (worker + 1) * low + jnp.minimum(worker + 1, extra)

    def table(self) -> np.ndarray:
        """int32 [rest, longest]: rows of the share buffer that add up to each item, -1 for none."""
        total = self.rest * self.steps
        low, extra = divmod(total, self.workers)
        found: list[list[int]] = [[] for _ in range(self.rest)]
        for worker in range(self.workers):
            begin = worker * low + min(worker, extra)
            end = begin + low + (worker < extra)
            if begin == end:
                continue
            first = begin // self.steps
            found[first].append(2 * worker)
            if end > (first + 1) * self.steps:
                found[first + 1].append(2 * worker + 1)
        longest = max(map(len, found))
        return np.array([rows + [-1] * (longest - len(rows)) for rows in found], np.int32)


def plan_shares(items: int, steps: int, workers: int, split: float) -> Shares:
    """Decides which items run whole and which are cut into shares."""
    rest = items % workers
    # A share must not span more than two items, which holds because rest < workers.
    cut = 0 < rest <= split * workers and steps > 1
    return Shares(items - rest if cut else items, rest if cut else 0, steps, workers)


def sampled_product(
    x_EMK: jax.Array,
    dy_EMN: jax.Array,
    pairs_E6P: jax.Array,
    *,
    blocks: int,
    block_in: int,
    block_out: int,
    tile: SampledTile,
    multiprocessors: int,
    out_dtype=None,
    interpret=None,
) -> jax.Array:
    """Computes block j = x[:, rows of j]^T dy[:, columns of j] for every stored block.

    Args:
        x_EMK: [experts, tokens, features in], bfloat16 or float16; tokens divisible by ``tile.depth``.
        dy_EMN: [experts, tokens, features out], same dtype.
        pairs_E6P: int32 [experts, 6, ceil(blocks / 2)]: block row, block column and slot of two blocks.
        blocks: Stored blocks per expert.
        block_in: Rows of a block, 64 or 128.
        block_out: Columns of a block, 64 or 128.
        tile: Tiling.
        multiprocessors: Programs to run.
        out_dtype: Dtype of the result, by default that of `x_EMK`; 16-bit.
        interpret: ``plgpu.InterpretGPUParams`` to run on a CPU.

    Returns:
        [experts, blocks, block_in, block_out].
    """
    experts, m, _ = x_EMK.shape
    dtype, depth, stages = x_EMK.dtype, tile.depth, tile.stages
    out_dtype = jnp.dtype(out_dtype or dtype)
    pairs = pairs_E6P.shape[2]
    assert m % depth == 0 and out_dtype.itemsize == 2, (m, tile, out_dtype)
    plan = plan_shares(experts * pairs, m // depth, multiprocessors, tile.split)
    steps = plan.steps

    def body(x_g, d_g, p_g, o_g, share_g, x_s, d_s, o_s, full, free):
        group, worker = lax.axis_index("group"), lax.axis_index("worker")
        rounds = lax.div(INT(plan.items) - worker + (multiprocessors - 1), INT(multiprocessors))
        begin, end = plan.bounds(worker)
        share_item = lax.div(begin, INT(steps))

        def share(which):
            """Item and step range of a worker's first or second share; the range may be empty."""
            low = jnp.maximum(begin, (share_item + which) * steps)
            high = jnp.maximum(low, jnp.minimum(end, (share_item + which + 1) * steps))
            item = jnp.minimum(plan.items + share_item + which, experts * pairs - 1)
            return item, low - (share_item + which) * steps, high - low

        def locate(item):
            e, p = lax.div(item, INT(pairs)), lax.rem(item, INT(pairs))
            return e, [p_g[e, field, p] for field in range(6)]

        def ring_slot(step):
            return lax.rem(step, INT(stages))

        @pl.when(group == 2)
        def _produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def fetch(item, first, count, step):
                e, (row0, column0, _, row1, column1, _) = locate(item)

                def one(i, step):
                    s = ring_slot(step)

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(free.at[s])

                    tokens = pl.ds((first + i) * depth, depth)
                    x0 = x_g.at[e, tokens, pl.ds(row0 * block_in, block_in)]
                    x1 = x_g.at[e, tokens, pl.ds(row1 * block_in, block_in)]
                    plgpu.copy_gmem_to_smem(x0, x_s.at[s, 0], full.at[s])
                    plgpu.copy_gmem_to_smem(
                        d_g.at[e, tokens, pl.ds(column0 * block_out, block_out)], d_s.at[s, 0], full.at[s]
                    )
                    plgpu.copy_gmem_to_smem(
                        d_g.at[e, tokens, pl.ds(column1 * block_out, block_out)], d_s.at[s, 1], full.at[s]
                    )

                    if tile.shared_only:
                        return step + 1

                    @pl.when(row0 != row1)
                    def _():
                        plgpu.copy_gmem_to_smem(x1, x_s.at[s, 1], full.at[s])

                    @pl.when(row0 == row1)  # both consumers read the first slab of x: only keep the count of arrivals
                    def _():
                        plgpu.barrier_arrive(full.at[s])

                    return step + 1

                return lax.fori_loop(0, count, one, step)

            step = lax.fori_loop(
                0, rounds, lambda t, step: fetch(t * multiprocessors + worker, INT(0), INT(steps), step), INT(0)
            )
            if plan.rest:
                step = lax.fori_loop(0, 2, lambda which, step: fetch(*share(which), step), step)
            lax.fori_loop(
                jnp.maximum(step - stages, 0), step, lambda i, _: plgpu.barrier_wait(free.at[ring_slot(i)]), None
            )

        @pl.when(group < 2)
        def _consume():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")

            def multiply(item, count, step):
                e, (row0, _, slot0, row1, _, slot1) = locate(item)
                mine = INT(0) if tile.shared_only else jnp.where((group == 1) & (row0 != row1), 1, 0)

                def scope(acc):
                    def one(i, _):
                        s = ring_slot(step + i)
                        plgpu.barrier_wait(full.at[s])
                        plgpu.wgmma(acc, x_s.at[s, mine].transpose((1, 0)), d_s.at[s, group])
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(free.at[s])

                    lax.fori_loop(0, count, one, None)
                    return acc[...]

                product = pl.run_scoped(scope, plgpu.ACC((block_in, block_out), jnp.float32))
                return e, jnp.where(group == 0, slot0, slot1), product

            def whole(t, step):
                e, slot, product = multiply(t * multiprocessors + worker, INT(steps), step)
                product = product.astype(out_dtype)
                for r in range(0, block_in, EPILOGUE):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    o_s[group] = product[r : r + EPILOGUE]
                    plgpu.commit_smem()

                    @pl.when(slot < blocks)
                    def _():
                        plgpu.copy_smem_to_gmem(o_s.at[group], o_g.at[e, slot, pl.ds(r, EPILOGUE)])

                return step + steps

            step = lax.fori_loop(0, rounds, whole, INT(0))
            if plan.rest:

                def part(which, step):
                    item, _, count = share(which)
                    _, _, product = multiply(item, count, step)

                    @pl.when(count > 0)
                    def _():
                        share_g[2 * worker + which, group] = product

                    return step + count

                lax.fori_loop(0, 2, part, step)
            plgpu.wait_smem_to_gmem(0)

    body.__name__ = "block_sampled_product"
    share_rows = 2 * multiprocessors if plan.rest else 1
    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((experts, blocks, block_in, block_out), out_dtype),
            jax.ShapeDtypeStruct((share_rows, 2, block_in, block_out), jnp.float32),
        ),
        grid=(multiprocessors,),
        grid_names=("worker",),
        num_threads=3,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((stages, 1 if tile.shared_only else 2, depth, block_in), dtype, transforms=SWIZZLED),
            plgpu.SMEM((stages, 2, depth, block_out), dtype, transforms=SWIZZLED),
            plgpu.SMEM((2, EPILOGUE, block_out), out_dtype, transforms=SWIZZLED),
            plgpu.Barrier(num_arrivals=3 if tile.shared_only else 4, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    out_EJkn, shares = kernel(x_EMK, dy_EMN, pairs_E6P)
    if not plan.rest:
        return out_EJkn
    table = plan.table()
    gathered = jnp.where((table >= 0)[:, :, None, None, None], shares[np.maximum(table, 0)], 0.0)
    sums = gathered.sum(axis=1).reshape(2 * plan.rest, block_in, block_out).astype(out_dtype)
    items = np.arange(plan.items, plan.items + plan.rest)
    slots = pairs_E6P[items // pairs][np.arange(plan.rest), :, items % pairs][:, np.array([2, 5])]
    flat = jnp.where(slots < blocks, slots + (items // pairs * blocks)[:, None], experts * blocks).reshape(-1)
    out = out_EJkn.reshape(experts * blocks, block_in, block_out)
    return out.at[flat].set(sums, mode="drop", unique_indices=True).reshape(out_EJkn.shape)
