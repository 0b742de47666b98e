"""Squared norms of all blocks of x^T dy on Hopper, without writing x^T dy.

The dense weight-gradient product with a different ending: a program multiplies out 128 x 256 tiles (two blocks that
share x, one per consumer warpgroup) and stores one sum of squares per row of a block, 1/128 of the gradient's size.
Tiles are visited in bands of block rows so that those in flight reuse x and dy from the L2 cache.

Legend: E experts, M tokens, K/N features, R/C block rows and columns, k/n features inside a block.
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
    INT,
    PRODUCER_REGISTERS,
    SMEM_RESERVED,
    SWIZZLED,
)


@dataclasses.dataclass(frozen=True)
class NormsTile:
    """How the norms are cut: tokens per ring slot, ring slots, block rows per band."""

    depth: int = 64
    stages: int = 4
    band: int = 16

    def smem_bytes(self, block_in: int, block_out: int, itemsize: int = 2) -> int:
        """Shared memory of one program."""
        return self.stages * (block_in + 2 * block_out) * self.depth * itemsize + 2 * 4 * block_in + SMEM_RESERVED


def row_square_sums(
    x_EMK: jax.Array,
    dy_EMN: jax.Array,
    *,
    block_in: int,
    block_out: int,
    tile: NormsTile,
    multiprocessors: int,
    interpret=None,
) -> jax.Array:
    """Sums the squares along each row of each block of x^T dy.

    Args:
        x_EMK: [experts, tokens, features in], bfloat16 or float16; tokens divisible by ``tile.depth``.
        dy_EMN: [experts, tokens, features out], same dtype.
        block_in: Rows of a block, 64 or 128.
        block_out: Columns of a block, 64 or 128.
        tile: Tiling.
        multiprocessors: Programs to run.
        interpret: ``plgpu.InterpretGPUParams`` to run on a CPU.

    Returns:
        float32 [experts, R, C, block_in]; its sum over the last dimension is the squared Frobenius norm.
    """
    experts, m, features_in = x_EMK.shape
    dtype, depth, stages = x_EMK.dtype, tile.depth, tile.stages
    rows, columns = features_in // block_in, dy_EMN.shape[2] // block_out
    pairs = -(-columns // 2)
    band = max(d for d in range(1, min(rows, tile.band) + 1) if rows % d == 0)
    items, steps = experts * rows * pairs, m // depth
    assert m % depth == 0, (m, tile)

    def body(x_g, d_g, o_g, x_s, d_s, full, free):
        group, worker = lax.axis_index("group"), lax.axis_index("worker")
        rounds = lax.div(INT(items) - worker + (multiprocessors - 1), INT(multiprocessors))

        def locate(t):
            e, r = (
                lax.div(t * multiprocessors + worker, INT(rows * pairs)),
                lax.rem(t * multiprocessors + worker, INT(rows * pairs)),
            )
            band_index, r = lax.div(r, INT(band * pairs)), lax.rem(r, INT(band * pairs))
            first = 2 * lax.div(r, INT(band))
            return e, band_index * band + lax.rem(r, INT(band)), first, jnp.minimum(first + 1, columns - 1)

        def ring_slot(step):
            return lax.rem(step, INT(stages))

        @pl.when(group == 2)
        def _produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def fetch(t, step):
                e, row, column0, column1 = locate(t)

                def one(i, step):
                    s = ring_slot(step)

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(free.at[s])

                    tokens = pl.ds(i * depth, depth)
                    plgpu.copy_gmem_to_smem(x_g.at[e, tokens, pl.ds(row * block_in, block_in)], x_s.at[s], full.at[s])
                    for which, column in enumerate((column0, column1)):
                        plgpu.copy_gmem_to_smem(
                            d_g.at[e, tokens, pl.ds(column * block_out, block_out)], d_s.at[s, which], full.at[s]
                        )
                    return step + 1

                return lax.fori_loop(0, steps, one, step)

            step = lax.fori_loop(0, rounds, fetch, INT(0))
            lax.fori_loop(
                jnp.maximum(step - stages, 0), step, lambda i, _: plgpu.barrier_wait(free.at[ring_slot(i)]), None
            )

        @pl.when(group < 2)
        def _consume():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")

            def multiply(t, step):
                e, row, column0, column1 = locate(t)

                def scope(acc):
                    def one(i, _):
                        s = ring_slot(step + i)
                        plgpu.barrier_wait(full.at[s])
                        plgpu.wgmma(acc, x_s.at[s].transpose((1, 0)), d_s.at[s, group])
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(free.at[s])

                    lax.fori_loop(0, steps, one, None)
                    return acc[...]

                product = pl.run_scoped(scope, plgpu.ACC((block_in, block_out), jnp.float32))
                sums = jnp.sum(product * product, axis=1)

                @pl.when((group == 0) | (column1 != column0))
                def _():
                    o_g[e, row, column0 + group] = sums

                return step + steps

            lax.fori_loop(0, rounds, multiply, INT(0))

    body.__name__ = "block_gradient_norms"
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((experts, rows, columns, block_in), jnp.float32),
        grid=(multiprocessors,),
        grid_names=("worker",),
        num_threads=3,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((stages, depth, block_in), dtype, transforms=SWIZZLED),
            plgpu.SMEM((stages, 2, depth, block_out), dtype, transforms=SWIZZLED),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    return kernel(x_EMK, dy_EMN)
