"""Tables in host memory: what a step touches travels to it and back, while other steps run.

A batch names its rows before it is trained on, so they are fetched ahead. The step gets them as a small table of their own
("working set": the batch's distinct rows in ascending order, their slots, and for every address its place among them), on which
lookup and update are those of tables on a device, to the bit. One thread writes back and fetches, in this order:

    step t is handed to the device      its working set comes back when it is done
    write back the rows of step t       this waits for the device
    fetch the rows of step t + 2        while step t + 1 runs

So the rows of step t + 2 are those after step t; what step t + 1 changes of them is taken from its working set on the device
(`forwarded`), before step t + 2 begins. Nothing is read that a step before has yet to write.

Legend: B batch, L length, H heads, U distinct rows of a batch, C rows of its working set (U and padding), R rows, D row width.
"""

import collections
import concurrent.futures
import functools
import os
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Sharding

from sparse_lm.memory.hashing import Hash
from sparse_lm.memory.host_array import HostArray
from sparse_lm.memory.memory import Memory
from sparse_lm.memory.placement import OnHost
from sparse_lm.memory.working_set import Wanted, forwarded, places_in, wanted_rows

Tree = dict[str, Any]

THREADS = 8
"""Most threads that copy rows."""
PIECE = 1 << 12
"""Rows that a thread copies at a time."""


class Tables(Protocol):
    """What stands between the loop and the tables of its state."""

    def find(self, batch: dict[str, np.ndarray]) -> Wanted:
        """Returns the rows that a batch reads; may be called from any thread."""

    def prefetch(self, wanted: Wanted) -> None:
        """Asks for the rows of the next batch; batches are asked for in the order in which they are trained on."""

    def lend(self, tables: Tree) -> Tree:
        """Returns the tables that the next step is given, and waits for them."""

    def give_back(self, tables: Tree) -> Tree:
        """Takes the tables that a step returned, which need not have run yet; returns those of the state."""

    def settle(self) -> None:
        """Waits until the state's tables are those after the last step."""

    def read(self) -> dict[str, float]:
        """Returns what is to be logged since the last call."""

    def close(self) -> None:
        """Ends threads; the state's tables are those after the last step."""


class DeviceTables:
    """Tables on devices: they go into the step whole and nothing travels. See `Tables`."""

    def find(self, batch: dict[str, np.ndarray]) -> Wanted:
        """See Tables.find."""
        return Wanted({}, {}, {}, False)

    def prefetch(self, wanted: Wanted) -> None:
        """See Tables.prefetch."""

    def lend(self, tables: Tree) -> Tree:
        """See Tables.lend."""
        return tables

    def give_back(self, tables: Tree) -> Tree:
        """See Tables.give_back."""
        return tables

    def settle(self) -> None:
        """See Tables.settle."""

    def read(self) -> dict[str, float]:
        """See Tables.read."""
        return {}

    def close(self) -> None:
        """See Tables.close."""


class HostTables:
    """Moves rows between host memory and the steps of one run. See `Tables`.

    Args:
      memory: the component.
      hashes: of its tables.
      tables: the state's tables, whose rows and slots are `HostArray`s; they are changed in place.
      sharding: where working sets go.
    """

    def __init__(self, memory: Memory, hashes: dict[str, Hash], tables: Tree, sharding: Sharding):
        placement = memory.placement
        assert isinstance(placement, OnHost)
        self._memory, self._hashes, self._sharding, self._ahead = memory, hashes, sharding, placement.ahead
        self._tables = tables
        threads = min(THREADS, len(os.sched_getaffinity(0)))
        self._mover = concurrent.futures.ThreadPoolExecutor(1, "host tables")
        self._hands = concurrent.futures.ThreadPoolExecutor(threads, "rows")
        self._waiting: collections.deque[Wanted] = collections.deque()
        self._fetches: collections.deque[tuple[Wanted, concurrent.futures.Future]] = collections.deque()
        self._asked, self._given = 0, 0
        self._last_asked: Wanted | None = None
        self._running: Wanted | None = None
        self._written: Tree | None = None
        self._last_write: concurrent.futures.Future = concurrent.futures.Future()
        self._last_write.set_result(None)
        self._clear()

    def _clear(self) -> None:
        self._steps, self._wait_s, self._rows, self._bytes = 0, 0.0, 0, 0

    def find(self, batch: dict[str, np.ndarray]) -> Wanted:
        """See Tables.find."""
        return wanted_rows(self._memory, self._hashes, batch, self._hands)

    def prefetch(self, wanted: Wanted) -> None:
        """See Tables.prefetch."""
        self._waiting.append(wanted)
        self._ask()

    def _ask(self) -> None:
        """Hands fetches to the thread, each as soon as the writes that it must see are handed over before it."""
        while self._waiting and self._asked <= self._given + self._ahead:
            wanted = self._waiting.popleft()
            future = self._mover.submit(self._fetch, wanted, self._last_asked, self._last_write)
            self._fetches.append((wanted, future))
            self._last_asked = wanted
            self._asked += 1

    def lend(self, tables: Tree) -> Tree:
        """See Tables.lend."""
        start = time.perf_counter()
        self._running, future = self._fetches.popleft()
        places, fetched, source = future.result()
        self._wait_s += time.perf_counter() - start
        if self._written is not None:
            fetched = forwarded(fetched, self._written, source)
        self._steps += 1
        self._rows += sum(map(len, self._running.unique.values()))
        self._bytes += sum(leaf.nbytes for leaf in jax.tree.leaves(fetched))
        return {"places": places, **fetched}

    def give_back(self, tables: Tree) -> Tree:
        """See Tables.give_back."""
        assert self._running is not None
        self._written = {part: tables[part] for part in ("rows", "slots")}
        for leaf in jax.tree.leaves(self._written):
            leaf.copy_to_host_async()
        self._last_write = self._mover.submit(self._write, self._running, self._written, self._last_write)
        self._given += 1
        self._ask()
        return self._tables

    def settle(self) -> None:
        """See Tables.settle."""
        self._last_write.result()

    def read(self) -> dict[str, float]:
        """See Tables.read: means over the steps handed over since the last call; bytes go to the device and as many come back."""
        if not self._steps:
            return {}
        found = {
            "memory/fetch_wait_ms": 1e3 * self._wait_s / self._steps,
            "memory/fetched_rows": self._rows / self._steps,
            "memory/fetched_mb": self._bytes / 1e6 / self._steps,
        }
        self._clear()
        return found

    def close(self) -> None:
        """See Tables.close."""
        self._mover.shutdown()
        self._hands.shutdown()

    def _fetch(self, wanted: Wanted, before: Wanted | None, last_write: concurrent.futures.Future) -> tuple[Any, ...]:
        """Returns (places, rows and slots, where the step before holds them), on the device."""
        last_write.result()  # raises here what failed there
        fetched = {
            part: {
                n: jax.tree.map(functools.partial(self._gather, wanted, n), tree, is_leaf=_is_host)
                for n, tree in of.items()
            }
            for part, of in self._parts()
        }
        source = {
            n: places_in(unique, wanted.sizes[n], before.unique[n], before.sizes[n])
            for n, unique in wanted.unique.items()
            if before is not None
        }
        return jax.block_until_ready(jax.device_put((wanted.places, fetched, source), self._sharding))

    def _write(self, wanted: Wanted, written: Tree, last_write: concurrent.futures.Future) -> None:
        """Puts the rows and slots of a step into host memory."""
        last_write.result()
        for part, of in self._parts():
            for name, tree in of.items():
                put = functools.partial(self._scatter, wanted.unique[name])
                jax.tree.map(put, tree, written[part][name], is_leaf=_is_host)

    def _parts(self) -> list[tuple[str, Tree]]:
        return [(part, self._tables[part]) for part in ("rows", "slots")]

    def _gather(self, wanted: Wanted, name: str, held: HostArray) -> np.ndarray:
        unique_U, table = wanted.unique[name], held.values
        out = np.zeros((wanted.sizes[name], *table.shape[1:]), table.dtype)

        def copy(part: slice) -> None:
            np.take(table, unique_U[part], axis=0, out=out[: len(unique_U)][part], mode="clip")

        self._share(copy, len(unique_U))
        return out

    def _scatter(self, unique_U: np.ndarray, held: HostArray, new: jax.Array) -> None:
        new_CD = np.asarray(new)

        def copy(part: slice) -> None:
            held.values[unique_U[part]] = new_CD[: len(unique_U)][part]

        self._share(copy, len(unique_U))

    def _share(self, work: Callable[[slice], None], size: int) -> None:
        """Runs work(slice) over a range in several threads; numpy copies without holding the interpreter."""
        parts = [slice(start, start + PIECE) for start in range(0, size, PIECE)]
        list(map(work, parts) if len(parts) == 1 else self._hands.map(work, parts))


def _is_host(leaf: Any) -> bool:
    return isinstance(leaf, HostArray)


def tables_of(memory: Memory, hashes: dict[str, Hash], tables: Tree, sharding: Sharding) -> Tables:
    """Returns what moves the rows of a state's tables; arguments as for `HostTables`."""
    return HostTables(memory, hashes, tables, sharding) if memory.placement.on_host else DeviceTables()
