"""The flat ring: one producer warpgroup streams operand tiles of all work items of a CTA through a ring of shared-memory slots, two consumers multiply them.

The producer never waits for an item to be finished: while the consumers end one item it already loads the next, so no item pays for filling the pipeline. A finished
tile stays in registers, rounded to 16 bits, and is stored piece by piece while the next is multiplied. Items are dealt round robin to persistent CTAs; how many there
are is read at run time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
CHUNK = 64  # rows and columns that leave through shared memory at a time
PRODUCER = 2
# Registers a thread of the producer and of a consumer: where the copy engine brings everything, and where the producer's threads copy rows themselves.
# If the three warpgroups asked for more than the 3 * 168 they start with, they would wait forever.
ENGINE_COPIES, THREADS_COPY = (40, 232), (56, 224)


class Tile(NamedTuple):
    """A finished tile in the registers of one consumer: value [height, width] at (row, column) of the output; its own rows are own .. end."""

    value: jax.Array
    row: jax.Array
    column: jax.Array
    own: jax.Array
    end: jax.Array

    @property
    def whole(self):
        """Whether every row is its own."""
        return (self.own <= self.row) & (self.row + self.value.shape[0] <= self.end)

    def corners(self):
        """(row, column) of each piece of CHUNK x CHUNK."""
        height, width = self.value.shape
        return itertools.product(range(0, height, CHUNK), range(0, width, CHUNK))


def no_tile(height: int, width: int, dtype) -> Tile:
    """What a consumer holds before its first tile: nothing to store."""
    return Tile(jnp.zeros((height, width), dtype), *[jnp.int32(0)] * 4)


def run_ring(
    items,
    lanes: int,
    slots: int,
    free,
    locate,
    produce,
    consume,
    first_held,
    finish,
    life: int = 0,
    hand_over_last=None,
):
    """Run all items of this CTA.

    Lane l takes the items l, l + lanes, ..; with `life`, at most that many of a section of lanes * life items, and lanes further on take the next sections.

    Args:
        items: How many in all, at least one.
        lanes: CTAs that deal items among themselves.
        slots: Ring slots.
        free: Barrier array on which the consumers hand slots back; every completion is waited for, also those of the last slots.
        locate: locate(item) -> place, scalars. Called one item ahead: its loads take as long as a step.
        produce: produce(place, step, owed) -> step, owed, on the producer; `step` counts ring slots used so far, `owed` is the arrivals that the barrier of the last still expects of it.
        consume: consume(place, ahead, step, held) -> upcoming, (step, held), on both consumers; `held` is what the item leaves to the next one, `upcoming` the place
            of the next, which ahead() finds. To be called while a product runs.
        first_held: first_held() -> what the first item finds.
        finish: finish(held), after the last item.
        life: Most items of a CTA; 0: no limit.
        hand_over_last: hand_over_last(step, owed), on the producer after its last item, if its threads copy rows themselves.
    """
    registers = THREADS_COPY if hand_over_last else ENGINE_COPIES
    assert registers[0] + 2 * registers[1] <= 3 * 168
    warpgroup, cta = lax.axis_index("wg"), lax.axis_index("cta")
    if life:
        first = lax.div(cta, jnp.int32(lanes)) * (lanes * life) + lax.rem(cta, jnp.int32(lanes))
        mine = jnp.clip(lax.div(items - first + (lanes - 1), jnp.int32(lanes)), 0, life)
    else:
        first, mine = cta, lax.div(items - cta + (lanes - 1), jnp.int32(lanes))

    def run(role, state):
        def one(i, carry):
            place, state = carry
            return role(place, lambda: locate(jnp.minimum(first + (i + 1) * lanes, items - 1)), *state)

        return lax.fori_loop(0, mine, one, (locate(jnp.minimum(first, items - 1)), state))[1]

    @pl.when(warpgroup == PRODUCER)
    def _():
        plgpu.set_max_registers(registers[0], action="decrease")
        step, owed = run(lambda place, ahead, *state: (ahead(), produce(place, *state)), (jnp.int32(0), jnp.int32(0)))
        if hand_over_last:
            hand_over_last(step, owed)
        held = jnp.maximum(step - slots, 0)
        lax.fori_loop(held, step, lambda s, _: plgpu.barrier_wait(free.at[lax.rem(s, jnp.int32(slots))]), None)

    @pl.when(warpgroup < PRODUCER)
    def _():
        plgpu.set_max_registers(registers[1], action="increase")
        _, held = run(consume, (jnp.int32(0), first_held()))
        finish(held)
        plgpu.wait_smem_to_gmem(0)


def acquire(step, slots: int, free):
    """The slot of this step, once the consumers have handed it back."""
    slot = lax.rem(step, jnp.int32(slots))

    @pl.when(step >= slots)
    def _():
        plgpu.barrier_wait(free.at[slot])

    return slot


def hand_over(step, owed, slots: int, full, threads, later: int = 1) -> None:
    """Gives the consumers the slot of step - 1, once the rows that threads copied are there.

    Args:
        step: int32.
        owed: int32, arrivals that the barrier of that slot still expects of this warpgroup: 0, 1 or 2.
        slots: Ring slots.
        full: Barriers of the slots.
        threads: `mosaic_gpu_rows`, or its plain form.
        later: How often `end_step` was called since.
    """

    @pl.when(owed > 0)
    def _():
        threads.landed(later)
        plgpu.barrier_arrive(full.at[lax.rem(step - 1, jnp.int32(slots))])

    @pl.when(owed > 1)
    def _():
        plgpu.barrier_arrive(full.at[lax.rem(step - 1, jnp.int32(slots))])


def _staged(tile: Tile, r: int, c: int, tiled_s):
    """The piece at (r, c) of a tile in shared memory, once the copy of the piece before has read it; the row and column of the output where it belongs."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    buffer_s = tiled_s.at[lax.axis_index("wg")]
    buffer_s[...] = tile.value[r : r + CHUNK, c : c + CHUNK]
    plgpu.commit_smem()
    return buffer_s, tile.row + r, pl.multiple_of(tile.column + c, CHUNK)


def _copy(buffer_s, out_g, row, column):
    """Stores a piece by the copy engine, which goes on by itself."""
    plgpu.copy_smem_to_gmem(buffer_s, out_g.at[pl.ds(pl.multiple_of(row, 8), CHUNK), pl.ds(column, CHUNK)])


def stores(tile: Tile, out_g, tiled_s) -> list[Callable[[], None]]:
    """Calls that store a whole tile, one for each 64 x 64 piece; if the tile is not whole they store nothing.

    One buffer for each consumer is enough where every call stands in another step: by then the copy of the piece before has read it.
    """

    def store(r, c):
        buffer_s, row, column = _staged(tile, r, c, tiled_s)

        @pl.when(tile.whole)
        def _():
            _copy(buffer_s, out_g, row, column)

    return [functools.partial(store, *corner) for corner in tile.corners()]


def row_stores(tile: Tile, out_g, tiled_s, threads, index_g=None) -> list[Callable[[], None]]:
    """Calls that store the own rows of a tile, one for each 64 x 64 piece; rows outside stay untouched.

    A whole tile leaves by the copy engine. Threads store the rows of others, and those that go to out_g[index_g[row]]; places out of range are left out.

    Args:
        tile: A finished tile.
        out_g: [A, N] in global memory, [O, N] with an index.
        tiled_s: `tiled_buffers`.
        threads: `mosaic_gpu_rows`, or its plain form.
        index_g: int32 [A] or None.
    """

    def store(r, c):
        buffer_s, row, column = _staged(tile, r, c, tiled_s)
        by_rows = tile.own < tile.end
        if index_g is None:
            by_rows &= jnp.logical_not(tile.whole)

            @pl.when(tile.whole)
            def _():
                _copy(buffer_s, out_g, row, column)

        @pl.when(by_rows)
        def _():
            threads.store_rows(buffer_s, out_g, index_g, row, column, tile.own, tile.end)

    return [functools.partial(store, *corner) for corner in tile.corners()]


def tiled_buffers(dtype):
    """Scratch of `stores`: a swizzled piece for each consumer."""
    return plgpu.SMEM((2, CHUNK, CHUNK), dtype, transforms=TILED)
