"""In which order output tiles are dealt to multiprocessors, so that unequal block columns cost no balance.

Tiles are walked slab by slab (a few row tiles, all block columns in the order of their load) and dealt round by
round. Walking every other slab backwards, or dealing every other round backwards, makes heavy and light tiles meet
at every worker; which of the two works depends on how slab and round lengths beat against each other, so the choice
is made here, at trace time, by dealing a made-up linear load. No atomics, no table on the device: deterministic.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

TOLERATED = 1.06  # a width whose worst worker does at most this times the mean is not changed


@dataclasses.dataclass(frozen=True)
class WorkOrder:
    """`width` row tiles a slab; `reverse` walks every other slab backwards, `mirror` deals every other round so."""

    width: int
    reverse: bool
    mirror: bool


def imbalance(order: WorkOrder, row_tiles: int, columns: int, workers: int, load: np.ndarray) -> float:
    """Load of the busiest worker over the mean, for the given load of each column, heaviest first."""
    per_slab, items = order.width * columns, row_tiles * columns
    linear = np.arange(items)
    slab, position = linear // per_slab, linear % per_slab // order.width
    slabs = row_tiles // order.width
    if order.reverse:
        position = np.where((slabs - 1 - slab) % 2 == 0, position, columns - 1 - position)
    worker = linear % workers
    if order.mirror:
        worker = np.where(linear // workers % 2 == 0, worker, workers - 1 - worker)
    done = np.bincount(worker, load[position], workers)
    return float(done.max() / done.mean())


@functools.cache
def plan_order(row_tiles: int, columns: int, workers: int, width: int) -> WorkOrder:
    """Chooses the order for a geometry.

    Args:
        row_tiles: Row tiles.
        columns: Output block columns.
        workers: Programs.
        width: Wanted row tiles per slab (what fits the L2 cache); changed only where it ruins the balance.

    Returns:
        The order with the best balance at the wanted width, or at the nearest width that is balanced.
    """
    load = np.linspace(1.6, 0.4, columns)
    divisors = [d for d in range(1, row_tiles + 1) if row_tiles % d == 0]
    wanted = max(d for d in divisors if d <= max(1, width))
    nearest = sorted((d for d in divisors if d <= 4 * wanted), key=lambda d: abs(np.log2(d / wanted)))
    best: tuple[float, WorkOrder] = (float("inf"), WorkOrder(wanted, True, False))
    for candidate in nearest:
        for reverse in (True, False):
            for mirror in (False, True):
                order = WorkOrder(candidate, reverse, mirror)
                score = imbalance(order, row_tiles, columns, workers, load)
                if score < best[0] - 1e-9:
                    best = (score, order)
        # Half a tile per worker is the least that rounding costs; do not chase less than that.
        rounding = -(-row_tiles * columns // workers) * workers / (row_tiles * columns)
        if best[0] <= TOLERATED * rounding:
            break
    return best[1]
