"""Tables in host memory: what a step touches travels to it and back, while other steps run.

A batch names its rows before it is trained on, so they are fetched ahead. The step gets them as a small table of their own
("working set": the batch's distinct rows in ascending order, their slots, and for every address its place among them), on which
lookup and update are those of tables on a device, to the bit. One thread writes back and fetches, in this order:

    step t is handed to the device      its working set comes back when it is done
    write back the rows of step t       this waits for the device
    fetch the rows of step t + 2        while step t + 1 runs

So the rows of step t + 2 are those after step t; what step t + 1 changes of them is taken from its working set on the device
(`forwarded`), before step t + 2 begins. Nothing is read that a step before has yet to write.

On several devices the working set is split over them by rows, so a row travels to one device and comes back from it, however many
devices have tokens that read it. Of several processes each moves the rows that it keeps (`owners.py`), on the part of the mesh that its
own devices are; what it makes there are its pieces of the working set. Places and program need the whole batch: a small program brings
its ids to every process, run by the thread that runs the steps, because programs in which devices wait for each other must be begun in
the same order everywhere. All find the same from the same ids.

Legend: B batch, L length, H heads, U distinct rows of a batch that this process keeps, S rows of its part of the working set (U and
padding), R rows, D row width.
"""

import collections
import concurrent.futures
import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sparse_lm.memory.device_tables import Batch, DeviceTables, Tables
from sparse_lm.memory.hashing import Hash
from sparse_lm.memory.host_array import HostArray, as_records
from sparse_lm.memory.memory import Memory
from sparse_lm.memory.owners import mesh_of_process, owners_of
from sparse_lm.memory.placement import OnHost
from sparse_lm.memory.working_set import Wanted, forwarded, places_in, wanted_rows, working_shardings
from sparse_lm.parallel import rules

Tree = dict[str, Any]
Coming = concurrent.futures.Future[Wanted]

READ = ("tokens_BL", "segments_BL", "positions_BL")
"""Arrays of a batch that its addresses follow from."""

THREADS = 8
"""Most threads that copy rows."""
PIECE = 1 << 12
"""Rows that a thread copies at a time."""
PARTS = ("gather", "to_device", "step", "to_host", "scatter")
"""What the moving thread does for a step: rows into staging memory, their transfer begun; a step waited for, its rows back, into the table."""


class HostTables:
    """Moves rows between host memory and the steps of one run. See `Tables`.

    Args:
      memory: the component.
      hashes: of its tables.
      tables: the state's tables, whose rows and slots are `HostArray`s; they are changed in place.
      mesh: where working sets go.
    """

    def __init__(self, memory: Memory, hashes: dict[str, Hash], tables: Tree, mesh: Mesh):
        placement = memory.placement
        assert isinstance(placement, OnHost)
        self._memory, self._hashes, self._tables, self._ahead = memory, hashes, tables, placement.ahead
        self._mesh, self._here, self._owners = mesh, mesh_of_process(mesh), owners_of(mesh)
        self._everywhere, self._by_rows = working_shardings(mesh), working_shardings(self._here)["rows"]
        # One array, so one exchange.
        self._gathered = jax.jit(
            lambda batch: jnp.stack([batch[name] for name in READ]), out_shardings=rules.replicated(mesh)
        )
        threads = min(THREADS, len(os.sched_getaffinity(0)))
        self._mover = concurrent.futures.ThreadPoolExecutor(1, "host tables")
        self._finder = concurrent.futures.ThreadPoolExecutor(1, "addresses")
        self._hands = concurrent.futures.ThreadPoolExecutor(threads, "rows")
        self._waiting: collections.deque[Coming] = collections.deque()
        self._fetches: collections.deque[tuple[Coming, concurrent.futures.Future]] = collections.deque()
        self._asked, self._given = 0, 0
        self._last_asked: Coming | None = None
        self._running: Wanted | None = None
        self._programs: list[Any] = []  # that have run
        self._alone = False
        self._written: Tree | None = None
        self._last_write: concurrent.futures.Future = concurrent.futures.Future()
        self._last_write.set_result(None)
        self._staging: dict[tuple[int, int, int], np.ndarray] = {}
        self._fetched = 0
        self._on_cpu = mesh.devices.flat[0].platform == "cpu"
        # Seconds and counts since the start: each is added to by one thread only, and `read` takes differences.
        self._spent = dict.fromkeys(("wait", *PARTS), 0.0)
        self._moved = {"steps": 0, "rows": 0, "bytes": 0}
        self._said: dict[str, float] = {**self._spent, **self._moved}

    def find(self, batch: dict[str, np.ndarray]) -> Wanted | None:
        """See Tables.find."""
        return None if self._mesh.is_multi_process else self._found(batch)

    def _found(self, batch: dict[str, np.ndarray]) -> Wanted:
        return wanted_rows(self._memory, self._hashes, batch, self._hands, self._owners)

    def prefetch(self, wanted: Wanted | None, batch: Batch) -> None:
        """See Tables.prefetch."""
        coming: Coming = concurrent.futures.Future()
        if wanted is not None:
            coming.set_result(wanted)
        else:
            ids = self._gathered({name: batch[name] for name in READ})
            ids.copy_to_host_async()
            coming = self._finder.submit(lambda: self._found(dict(zip(READ, np.asarray(ids)))))
        self._waiting.append(coming)
        self._ask()

    def full(self) -> bool:
        """See Tables.full."""
        with self._timed("wait"):
            return self._fetches[0][0].result().full

    def _ask(self) -> None:
        """Hands fetches to the thread, each as soon as the writes that it must see are handed over before it."""
        while self._waiting and self._asked <= self._given + self._ahead:
            coming = self._waiting.popleft()
            future = self._mover.submit(self._fetch, coming, self._last_asked, self._last_write)
            self._fetches.append((coming, future))
            self._last_asked = coming
            self._asked += 1

    def lend(self, tables: Tree, program: Any) -> Tree:
        """See Tables.lend."""
        coming, future = self._fetches.popleft()
        with self._timed("wait"):
            places, fetched, source = future.result()
        self._running = coming.result()
        self._alone = program not in self._programs
        if self._alone:
            # On a GPU the first run of a program loads cuDNN's kernels, which fails if rows travel meanwhile ("capturing stream has
            # unjoined work"). Only this thread hands out work, so nothing moves from here on until `give_back`.
            self._programs.append(program)
            self.settle()
            jax.block_until_ready((places, fetched, source))
        if self._written is not None:
            fetched = forwarded(fetched, self._written, source, mesh=self._here)
        self._moved["steps"] += 1
        self._moved["rows"] += sum(map(len, self._running.unique.values()))
        self._moved["bytes"] += sum(leaf.nbytes for leaf in jax.tree.leaves(fetched))
        return {"places": places, **jax.tree.map(self._whole, fetched)}

    def give_back(self, tables: Tree) -> Tree:
        """See Tables.give_back."""
        assert self._running is not None
        self._written = {part: jax.tree.map(self._part, tables[part]) for part in ("rows", "slots")}
        if self._alone:
            jax.block_until_ready(self._written)
        pieces = jax.tree.map(_pieces, self._written)
        for piece in jax.tree.leaves(pieces):
            piece.copy_to_host_async()
        self._last_write = self._mover.submit(self._write, self._running, pieces, self._last_write)
        self._given += 1
        self._ask()
        return self._tables

    def settle(self) -> None:
        """See Tables.settle."""
        self._last_write.result()
        jax.block_until_ready([future.result() for _, future in self._fetches])
        concurrent.futures.wait(self._waiting)

    def reading(self, model_state: Tree, batch: dict[str, np.ndarray]) -> Tree:
        """See Tables.reading: a batch reads its working set."""
        wanted, rows = self._found(batch), {}
        for name, held in self._tables["rows"].items():
            out = np.zeros((wanted.sizes[name], *held.shape[1:]), held.dtype)
            rows[name] = self._whole(jax.device_put(self._take(wanted.unique[name], held, out), self._by_rows))
        return {**model_state, "tables": {"places": wanted.places, "rows": rows}}

    def read(self) -> dict[str, float]:
        """See Tables.read: means over the steps handed over since the last call; bytes go to the device and as many come back."""
        now = {**self._spent, **self._moved}
        new = {name: value - self._said[name] for name, value in now.items()}
        if not new["steps"]:
            return {}
        self._said = now
        return {
            "memory/fetch_wait_ms": 1e3 * new["wait"] / new["steps"],
            "memory/fetched_rows": new["rows"] / new["steps"],
            "memory/fetched_mb": new["bytes"] / 1e6 / new["steps"],
            **{f"memory/{part}_ms": 1e3 * new[part] / new["steps"] for part in PARTS},
        }

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._spent[name] += time.perf_counter() - start

    def close(self) -> None:
        """See Tables.close."""
        self._finder.shutdown()
        self._mover.shutdown()
        self._hands.shutdown()

    def _whole(self, part_SD: jax.Array) -> jax.Array:
        """Returns the working set of which this process's devices have a part [S, ...]."""
        return self._over(part_SD, self._everywhere["rows"], len(part_SD) * self._owners.count)

    def _part(self, whole_CD: jax.Array) -> jax.Array:
        """Returns what this process's devices have of a working set, [S, ...]."""
        return self._over(whole_CD, self._by_rows, len(whole_CD) // self._owners.count)

    def _over(self, leaf: jax.Array, sharding: NamedSharding, rows: int) -> jax.Array:
        """Returns the array of so many rows whose pieces here are those of another; nothing is copied."""
        if not self._mesh.is_multi_process:
            return leaf
        pieces = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays((rows, *leaf.shape[1:]), sharding, pieces)

    def _fetch(self, coming: Coming, asked: Coming | None, last_write: concurrent.futures.Future) -> tuple[Any, ...]:
        """Returns (places, rows and slots, where the step before holds them), on the devices; rows and slots of this process."""
        last_write.result()  # raises here what failed there
        wanted, before = coming.result(), None if asked is None else asked.result()
        self._fetched += 1
        with self._timed("gather"):
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
        with self._timed("to_device"):
            # Not waited for: a transfer may begin only when the device has done what was enqueued before, and the step that reads these
            # rows can be enqueued meanwhile.
            return self._places(wanted.places), *jax.device_put((fetched, source), self._by_rows)

    def _places(self, places: dict[str, np.ndarray]) -> Batch:
        """Returns places on the devices, split as the tokens."""
        if not self._mesh.is_multi_process:
            return jax.device_put(places, self._everywhere["places"])
        put = jax.make_array_from_callback
        return {n: put(p.shape, self._everywhere["places"], lambda index, p=p: p[index]) for n, p in places.items()}

    def _write(self, wanted: Wanted, pieces: Tree, last_write: concurrent.futures.Future) -> None:
        """Puts the rows and slots of a step, in pieces as `_pieces` returns them, into host memory."""
        last_write.result()
        with self._timed("step"):
            jax.block_until_ready(pieces)
        with self._timed("to_host"):
            arrived = jax.tree.map(np.asarray, pieces)
        with self._timed("scatter"):
            for part, of in self._parts():
                for name, tree in of.items():
                    put = functools.partial(self._scatter, wanted.unique[name])
                    jax.tree.map(put, tree, arrived[part][name], is_leaf=_is_host)

    def _parts(self) -> list[tuple[str, Tree]]:
        return [(part, self._tables[part]) for part in ("rows", "slots")]

    def _gather(self, wanted: Wanted, name: str, held: HostArray) -> np.ndarray:
        unique_U, size = wanted.unique[name], wanted.sizes[name]
        # Memory that was used before has its pages; new memory of this size would fault for each of them in every step. It was last used
        # by the fetch `ahead` + 1 steps ago, whose step has been written back by now. What is put on a CPU may stay where it is and
        # must not change.
        place = id(held), size, self._fetched % (self._ahead + 1)
        out = self._staging.get(place)
        if out is None or self._on_cpu:
            out = self._staging[place] = np.zeros((size, *held.shape[1:]), held.dtype)
        return self._take(unique_U, held, out)

    def _take(self, unique_U: np.ndarray, held: HostArray, out_SD: np.ndarray) -> np.ndarray:
        """Copies rows into an array, zeros after them, and returns it."""
        records_R, records_U = held.records(), as_records(out_SD)[: len(unique_U)]
        out_SD[len(unique_U) :] = 0

        def copy(part: slice) -> None:
            np.take(records_R, unique_U[part], out=records_U[part], mode="clip")

        self._share(copy, len(unique_U))
        return out_SD

    def _scatter(self, unique_U: np.ndarray, held: HostArray, pieces: list[np.ndarray]) -> None:
        records_R, start = held.records(), 0
        for piece in pieces:
            own_U, records_U = unique_U[start : start + len(piece)], as_records(piece)

            def copy(part: slice, own_U: np.ndarray = own_U, records_U: np.ndarray = records_U) -> None:
                records_R[own_U[part]] = records_U[: len(own_U)][part]

            self._share(copy, len(own_U))
            start += len(piece)

    def _share(self, work: Callable[[slice], None], size: int) -> None:
        """Runs work(slice) over a range in several threads; numpy copies without holding the interpreter."""
        parts = [slice(start, start + PIECE) for start in range(0, size, PIECE)]
        list(map(work, parts) if len(parts) == 1 else self._hands.map(work, parts))


def _is_host(leaf: Any) -> bool:
    return isinstance(leaf, HostArray)


def _pieces(leaf_SD: jax.Array) -> list[jax.Array]:
    """Returns the rows of a working set as this process's devices hold them, in order; of copies the first."""
    shards = [shard for shard in leaf_SD.addressable_shards if shard.replica_id == 0]
    return [shard.data for shard in sorted(shards, key=lambda shard: shard.index[0].start or 0)]


def tables_of(memory: Memory, hashes: dict[str, Hash], tables: Tree, mesh: Mesh) -> Tables:
    """Returns what moves the rows of a state's tables; arguments as for `HostTables`."""
    return HostTables(memory, hashes, tables, mesh) if memory.placement.on_host else DeviceTables()
