"""Tables in host memory move as tables on a device do, to the bit, whatever travels while steps run."""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from pallas_kernels.embedding_lookup import pack
from sparse_lm.memory.engram import Engram
from sparse_lm.memory.host_array import HostArray
from sparse_lm.memory.host_tables import PARTS, HostTables
from sparse_lm.memory.memory import fetch, host_rows, initial_tables, update_tables
from sparse_lm.memory.ngram import NgramMemory
from sparse_lm.memory.placement import OnHost, StaleHost
from sparse_lm.memory.row_optimizer import LazyAdam, RowAdagrad, RowOptimizer, RowSGD, TouchAdam
from sparse_lm.memory.table import look_up
from sparse_lm.memory.working_set import places_in, wanted_rows, working_set
from sparse_lm.parallel.mesh import MeshShape

STEPS = 10
BATCHES = [tiny.batch((10, 4), (9,), (16,), (3, 3, 3), vocabulary=8, seed=seed) for seed in range(STEPS)]
BROKEN = 6
"""The step that is skipped."""
ONE = MeshShape(data=1).build(jax.devices()[:1])


def memory(optimizer: RowOptimizer, **changes: Any) -> NgramMemory:
    # A table of 4 x 60 rows and more; a batch has 48 tokens with 4 addresses each, so batches share most of their rows.
    start = {"at": (0,), "heads": 2, "width": 8, "rows": 60, "deviation": 0.5, "optimizer": optimizer}
    return Engram(**{**start, **changes})


def take_step(memory: NgramMemory, tables: Any, batch: Any, number: jax.Array, skipped: jax.Array) -> Any:
    """A step of training without a model: a loss of the rows that differs by position, and the update."""
    rows, address = fetch(memory, tables, batch["tokens_BL"], batch["segments_BL"], batch["positions_BL"])

    def loss(rows):
        weights = 1.0 + jnp.arange(batch["tokens_BL"].size, dtype=jnp.float32).reshape(*batch["tokens_BL"].shape, 1)
        return sum(jnp.sum(jnp.sin(weights * r)) for r in rows.values())

    return update_tables(memory, tables, address, jax.grad(loss)(rows), jnp.float32(0.01), number, skipped)


@functools.cache
def on_device(optimizer: RowOptimizer, dtype: str) -> Any:
    chosen = memory(optimizer, dtype=dtype)
    step = tiny.jit(functools.partial(take_step, chosen))
    tables = initial_tables(chosen, chosen.hashes(tiny.VOCABULARY, None), jax.random.key(3))
    for i, batch in enumerate(BATCHES):
        tables = step(tables, batch, i + 1, i == BROKEN)
    return tables


def on_host(chosen: NgramMemory, batches: list[Any] = BATCHES, delay: float = 0.0) -> tuple[Any, dict[str, float], int]:
    """Returns (tables after the batches, what is logged, steps of the full program); `delay` seconds before every write."""
    step = tiny.jit(functools.partial(take_step, chosen), donate_argnums=0)
    hashes = chosen.hashes(tiny.VOCABULARY, None)
    tables = host_rows(chosen, jax.random.key(3))
    mover = HostTables(chosen, hashes, tables, ONE)
    write = mover._write

    def late(*arguments: Any) -> None:
        time.sleep(delay)
        write(*arguments)

    mover._write = late
    wanted = [mover.find(batch) for batch in batches]
    for i in range(2)[: len(batches)]:
        mover.prefetch(wanted[i], batches[i])
    for i, batch in enumerate(batches):
        if i + 2 < len(batches):
            mover.prefetch(wanted[i + 2], batches[i + 2])
        assert mover.full() == wanted[i].full
        assert mover.give_back(step(mover.lend(tables, step), batch, i + 1, i == BROKEN)) is tables
    mover.settle()
    row = mover.read()
    mover.close()
    return tables, row, sum(found.full for found in wanted)


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [
        (TouchAdam(), "float32"),
        (RowAdagrad(), "float8"),
        *(pytest.param(o, "float32", marks=pytest.mark.slow) for o in (LazyAdam(), RowAdagrad(), RowSGD())),
    ],
    ids=lambda o: o if isinstance(o, str) else type(o).__name__,
)
def test_host_and_device_are_bitwise_equal(optimizer: RowOptimizer, dtype: str) -> None:
    expected = on_device(optimizer, dtype)
    found, row, full = on_host(memory(optimizer, dtype=dtype, placement=OnHost()), delay=0.01)
    tiny.assert_same(found, {part: expected[part] for part in ("rows", "slots")})
    assert full == 0 and row["memory/fetch_wait_ms"] > 0
    # A row is 4 floats of 4 bytes; of float8 4 bytes, 4 with its scale, and a sum of squares.
    assert (
        50 < row["memory/fetched_rows"] < 4 * 48
        and row["memory/fetched_mb"] >= (12 if dtype == "float8" else 16) * 192 / 1e6
    )
    assert all(row[f"memory/{part}_ms"] > 0 for part in PARTS)


def test_a_batch_that_outgrows_its_room_takes_the_full_program() -> None:
    """Two tables, 64 x 4 addresses with a room of 0.3: 77 rows, which most batches exceed, but not all."""
    narrow = [tiny.batch((16,), (16,), (16,), (16,), vocabulary=2, seed=1), *BATCHES[1:]]
    batches = [narrow[0], *BATCHES[:4], narrow[0], BATCHES[4]]
    found, _, full = on_host(memory(RowAdagrad(), at=(0, 1), placement=OnHost(room=0.3)), batches)
    expected, _, none = on_host(memory(RowAdagrad(), at=(0, 1), placement=OnHost(room=1.0)), batches)
    assert (full, none) == (5, 0)
    tiny.assert_same(found, expected)


def test_the_places_of_a_batch_by_hand() -> None:
    chosen = memory(RowSGD(), at=(0, 1), placement=OnHost())
    hashes, batch = chosen.hashes(tiny.VOCABULARY, None), BATCHES[0]
    wanted = wanted_rows(chosen, hashes, batch)
    abstract = jax.eval_shape(lambda: initial_tables(chosen, hashes, jax.random.key(0)))
    address = chosen.addresses_on_host(hashes, batch["tokens_BL"], batch["segments_BL"], batch["positions_BL"])
    for name, spec in chosen.tables().items():
        unique, places = wanted.unique[name], wanted.places[name]
        size = wanted.sizes[name]
        assert size == 192  # of 4 x 16 x 4 = 256 addresses three quarters; the table has more rows than that
        assert (np.diff(unique) > 0).all() and unique[-1] < spec.rows
        valid = batch["segments_BL"] > 0
        assert (unique[places[valid]] == address[name][valid]).all() and (places[~valid] == size).all()
        shapes = working_set(chosen, abstract, 4, 16, False)
        assert shapes["rows"][name].shape == (size, 4) and shapes["places"][name].shape == places.shape


def test_where_rows_are_in_the_set_before() -> None:
    """Rows 2, 5, 9 padded to 5; before them 3, 5, 9, 11 were there, of 6 places: 5 is at 1, 9 at 2, the rest nowhere."""
    assert places_in(np.array([2, 5, 9]), 5, np.array([3, 5, 9, 11]), 6).tolist() == [6, 1, 2, 6, 6]
    assert places_in(np.array([12]), 2, np.array([3]), 4).tolist() == [4, 4]
    assert places_in(np.array([1]), 1, np.array([], int), 4).tolist() == [4]


def test_stale_rows_lose_the_update_before_the_last() -> None:
    """SGD; batches A, B, A with no row in common: the exact table has both updates of A, the stale one only the last."""
    a, b = tiny.batch((16,), vocabulary=4, seed=1), tiny.batch((16,), vocabulary=4, seed=1)
    b["tokens_BL"] = a["tokens_BL"] + 8

    def rows(placement: OnHost, batches: list[Any]) -> np.ndarray:
        chosen = Engram(
            at=(0,), heads=1, orders=(1,), width=8, rows=60, deviation=0.5, optimizer=RowSGD(), placement=placement
        )
        return np.asarray(on_host(chosen, batches)[0]["rows"]["0"])

    start, once, twice = rows(OnHost(), []), rows(OnHost(), [a]), rows(OnHost(), [a, b, a])
    stale = rows(StaleHost(), [a, b, a])
    only_b = rows(OnHost(), [b])
    read_by_a, read_by_b = (once != start).any(1), (only_b != start).any(1)
    assert read_by_a.sum() == 4 and not (read_by_a & read_by_b).any()
    np.testing.assert_array_equal(stale[read_by_a], once[read_by_a])
    np.testing.assert_array_equal(stale[read_by_b], twice[read_by_b])
    assert (twice[read_by_a] != once[read_by_a]).any()
    # A row that every step touches is never stale: it is forwarded.
    np.testing.assert_array_equal(rows(StaleHost(), [a, a, a]), rows(OnHost(), [a, a, a]))


def test_a_lookup_in_host_memory() -> None:
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    address = jnp.array([[[0, 4], [3, 1]]], jnp.int32)  # 4 is no row
    held = HostArray(rows).readable()
    assert held.sharding.memory_kind == "pinned_host"
    found = tiny.jit(look_up)(held, address)
    assert found.sharding.memory_kind != "pinned_host"
    tiny.assert_same({"": found}, {"": look_up(jnp.asarray(rows), address)})
    assert np.asarray(found).tolist() == [[[0, 1, 2, 0, 0, 0], [9, 10, 11, 3, 4, 5]]]
    packed = tiny.jit(pack)(jnp.arange(16, dtype=jnp.float32).reshape(4, 4))
    found = tiny.jit(look_up)(HostArray(np.asarray(packed)).readable(), address)
    assert np.asarray(found, np.float32).tolist() == [[[0, 1, 2, 3, 0, 0, 0, 0], [12, 13, 14, 15, 4, 5, 6, 7]]]


def test_a_failed_write_is_raised() -> None:
    chosen = memory(RowSGD(), placement=OnHost())
    tables = host_rows(chosen, jax.random.key(3))
    mover = HostTables(chosen, chosen.hashes(tiny.VOCABULARY, None), tables, ONE)
    mover.prefetch(mover.find(BATCHES[0]), BATCHES[0])
    tables["rows"]["0"].values.flags.writeable = False
    held = mover.lend(tables, None)
    mover.give_back({part: held[part] for part in ("rows", "slots")})
    mover.prefetch(mover.find(BATCHES[1]), BATCHES[1])
    with pytest.raises(ValueError, match="read-only"):
        mover.lend(tables, None)
    mover.close()


def test_nothing_travels_while_a_program_runs_for_the_first_time() -> None:
    chosen = memory(RowSGD(), placement=OnHost())
    tables = host_rows(chosen, jax.random.key(3))
    mover = HostTables(chosen, chosen.hashes(tiny.VOCABULARY, None), tables, ONE)
    started, ended, fetch = [], [], mover._fetch

    def slow(*arguments: Any) -> Any:
        started.append(1)
        time.sleep(0.03)
        found = fetch(*arguments)
        ended.append(1)
        return found

    mover._fetch = slow
    wanted = [mover.find(batch) for batch in BATCHES]
    for i in range(2):
        mover.prefetch(wanted[i], BATCHES[i])
    travels = []
    for i, program in enumerate(("plain", "plain", "plain", "full", "plain", "full")):
        mover.prefetch(wanted[i + 2], BATCHES[i + 2])
        held = mover.lend(tables, program)
        travels.append(len(started) > len(ended))
        time.sleep(0.01)
        travels[-1] |= len(started) > len(ended)
        mover.give_back({part: held[part] for part in ("rows", "slots")})
    mover.close()
    assert not travels[0] and not travels[3]
    assert any(travels)


def test_the_address_arithmetic_is_that_of_the_variants() -> None:
    """Shuffled addresses depend on positions on the host too."""
    shuffled = dataclasses.replace(memory(RowSGD(), placement=OnHost()), addressing="shuffled")
    hashes, batch = shuffled.hashes(tiny.VOCABULARY, None), BATCHES[0]
    arrays = batch["tokens_BL"], batch["segments_BL"], batch["positions_BL"]
    on_device = tiny.jit(lambda hashes, *arrays: shuffled.addresses(hashes, *arrays, None))
    tiny.assert_same(shuffled.addresses_on_host(hashes, *arrays), on_device(hashes, *arrays))
