"""The flat ring: one producer warpgroup streams operand tiles of all work items of a CTA through a ring of shared-memory slots, two consumers multiply them.

The producer never waits for an item to be finished: while the consumers write the result of one item it already loads the next, so no item pays for filling the
pipeline. Items are dealt round robin to persistent CTAs; how many there are is read at run time.
"""

from __future__ import annotations

import itertools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
CHUNK = 64  # rows and columns that leave through shared memory at a time
PRODUCER = 2


def run_ring(items, lanes: int, slots: int, free, produce, consume, life: int = 0):
    """Run all items: `produce(item, step) -> step` on the producer, `consume(item, step) -> step` on both consumers; `step` counts ring slots used so far.

    Lane l takes the items l, l + lanes, ..; with `life`, at most that many of a section of lanes * life items, and lanes further on take the next sections.
    `free` is the barrier array on which the consumers hand slots back; every completion is waited for, also those of the last slots.
    """
    warpgroup, cta = lax.axis_index("wg"), lax.axis_index("cta")
    if life:
        first = lax.div(cta, jnp.int32(lanes)) * (lanes * life) + lax.rem(cta, jnp.int32(lanes))
        mine = jnp.clip(lax.div(items - first + (lanes - 1), jnp.int32(lanes)), 0, life)
    else:
        first, mine = cta, lax.div(items - cta + (lanes - 1), jnp.int32(lanes))

    @pl.when(warpgroup == PRODUCER)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        step = lax.fori_loop(0, mine, lambda i, s: produce(first + i * lanes, s), jnp.int32(0))
        held = jnp.maximum(step - slots, 0)
        lax.fori_loop(held, step, lambda s, _: plgpu.barrier_wait(free.at[lax.rem(s, jnp.int32(slots))]), None)

    @pl.when(warpgroup < PRODUCER)
    def _():
        plgpu.set_max_registers(232, action="increase")
        lax.fori_loop(0, mine, lambda i, s: consume(first + i * lanes, s), jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def acquire(step, slots: int, free):
    """The slot of this step, once the consumers have handed it back."""
    slot = lax.rem(step, jnp.int32(slots))

    @pl.when(step >= slots)
    def _():
        plgpu.barrier_wait(free.at[slot])

    return slot


def store_rows(value, out_g, row, column, own, end, buffers, turn: int):
    """Write the rows own..end of a [rows, columns] value that lies at (row, column) of the output, 64 x 64 at a time; rows outside stay untouched.

    A whole chunk leaves in one copy from a swizzled buffer. Part of one leaves from a plain buffer, in copies of 32, 16, .. 1 rows, whichever its height needs.
    `turn` alternates the swizzled buffers; returns the next one.
    """
    for r, c in itertools.product(range(0, value.shape[0], CHUNK), range(0, value.shape[1], CHUNK)):
        piece = value[r : r + CHUNK, c : c + CHUNK]
        for who in range(2):

            @pl.when(lax.axis_index("wg") == who)
            def _(piece=piece, r=r, c=c, who=who, turn=turn):
                tiled_s, plain_s = buffers[who]
                _store_chunk(piece, out_g, row + r, column + c, own, end, tiled_s.at[turn % 2], plain_s)

        turn += 1
    return turn


def _store_chunk(value, out_g, row, column, own, end, tiled_s, plain_s):
    from_row = jnp.clip(own - row, 0, CHUNK)
    count = jnp.clip(end - row, 0, CHUNK) - from_row
    columns = pl.ds(column, CHUNK)

    @pl.when(count == CHUNK)
    def _():
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        tiled_s[...] = value
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tiled_s, out_g.at[pl.ds(pl.multiple_of(row, 8), CHUNK), columns])

    @pl.when((count > 0) & (count < CHUNK))
    def _():
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plain_s[...] = value
        plgpu.commit_smem()
        offset = from_row
        for height in (32, 16, 8, 4, 2, 1):
            part = count & height

            @pl.when(part != 0)
            def _(offset=offset, height=height):
                plgpu.copy_smem_to_gmem(
                    plain_s.at[pl.ds(offset, height)], out_g.at[pl.ds(row + offset, height), columns]
                )

            offset = offset + part
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def out_buffers(dtype):
    """Scratch of `store_rows`: for each consumer two swizzled chunks that share their memory with a plain one.

    One union per consumer, so that one never overlays the other's.
    """
    tiled, plain = plgpu.SMEM((2, CHUNK, CHUNK), dtype, transforms=TILED), plgpu.SMEM((CHUNK, CHUNK), dtype)
    return [plgpu.RefUnion(tiled, plain) for _ in range(2)]


def ring_grid(lanes: int, cluster: int):
    """Arguments of `plgpu.kernel` for CTAs (lanes), alone or in pairs."""
    grid = {"grid": (lanes,), "grid_names": ("cta",)}
    return grid if cluster == 1 else {**grid, "cluster": (cluster,), "cluster_names": ("pair",)}


def free_barriers(slots: int, cluster: int):
    """Barriers on which consumers hand slots back; in a cluster a slot is free when the consumers of all its CTAs have read it."""
    if cluster == 1:
        return plgpu.Barrier(num_arrivals=2, num_barriers=slots)
    return plgpu.ClusterBarrier(collective_axes=("pair",), num_arrivals=2, num_barriers=slots)


def shared_by_cluster(cluster: int):
    """Arguments of a load whose parts every CTA of the cluster sends to all."""
    return {} if cluster == 1 else {"collective_axes": "pair"}
