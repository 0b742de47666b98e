"""Tables split over devices, or in host memory and read by several: the same loss and table after ten steps as on one device."""

import dataclasses
import functools
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from pallas_kernels.embedding_lookup import unpack
from sparse_lm.memory import sharded
from sparse_lm.memory.engram import Engram
from sparse_lm.memory.host_array import HostArray
from sparse_lm.memory.placement import OnDevice, OnHost, Placement, StaleHost
from sparse_lm.memory.row_optimizer import LazyAdam
from sparse_lm.memory.table import look_up, update
from sparse_lm.parallel.mesh import MeshShape
from sparse_lm.recipe import Recipe
from sparse_lm.train.checkpoint import Checkpointer, Checkpoints
from sparse_lm.train.checkpoint_reader import read_checkpoint
from sparse_lm.train.loop import train
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.schedule import Constant
from sparse_lm.train.session import Session, open_session
from sparse_lm.train.step import PULSE, Train

LENGTH = 8
MEMORY = Engram(at=(0,), heads=2, width=8, rows=250, deviation=0.5, optimizer=LazyAdam(epsilon=1e-4))
DEVICE = OnDevice()
MESH = {"data": 2, "fsdp": 2, "context": 2}


def session(placement: Placement = DEVICE, **mesh: int) -> Session:
    base = Recipe(
        model=tiny.model(layers=1, memory=dataclasses.replace(MEMORY, placement=placement)),
        optimizer=AdamW(learning_rate=0.01, schedule=Constant(warmup_fraction=0.0), epsilon=1e-3),
        train=Train(steps=20),
        mesh=MeshShape(**{"data": 1, **mesh}),
    )
    data = dataclasses.replace(base.data, sequence_length=LENGTH, batch_size=8)
    devices = jax.devices()[: int(np.prod(list(mesh.values()) or [1]))]
    return open_session(dataclasses.replace(base, data=data), devices)


DOCUMENTS = [(8,), (3, 2), (), (5,), (1, 1, 1), (8,), (4, 4), (7,)]
BATCHES = [tiny.batch(*DOCUMENTS, length=LENGTH, vocabulary=8, seed=seed) for seed in range(10)]


@functools.cache
def start() -> Any:
    """The state of step 0, created on one device."""
    return jax.device_get(session().create())


def placed(opened: Session) -> Any:
    """The state of step 0 where a session has it: creating it there compiles for seconds."""
    state = start()
    if opened.recipe.model.memory.placement.on_host:
        held = {part: jax.tree.map(lambda a: HostArray(a.copy()), state.tables[part]) for part in ("rows", "slots")}
        state = dataclasses.replace(state, tables={**state.tables, **held})
    return opened.place(state)


@functools.cache
def ten_steps(placement: Placement = DEVICE, **mesh: int) -> tuple[Session, Any, list[float]]:
    """(session, state after ten steps, losses)."""
    opened = session(placement, **mesh)
    state, losses = placed(opened), []
    step, _ = opened.compile_step()
    tables = opened.tables(state)
    wanted = [(tables.find(batch), batch) for batch in BATCHES]
    assert not any(found.full for found, _ in wanted)
    for found in wanted[:2]:
        tables.prefetch(*found)
    for i, batch in enumerate(BATCHES):
        for found in wanted[i + 2 : i + 3]:
            tables.prefetch(*found)
        state, metrics = step(dataclasses.replace(state, tables=tables.lend(state.tables, step)), opened.put(batch))
        state = dataclasses.replace(state, tables=tables.give_back(state.tables))
        losses.append(float(np.asarray(metrics["pulse"])[PULSE.index("loss")]))
    tables.settle()
    tables.close()
    return opened, state, losses


def test_ten_steps_are_those_of_one_device() -> None:
    _, alone, losses = ten_steps()
    opened, spread, spread_losses = ten_steps(**MESH)
    rows = spread.tables["rows"]["0"]
    assert rows.addressable_shards[0].data.shape == (rows.shape[0] // 8, rows.shape[1])
    np.testing.assert_allclose(spread_losses, losses, rtol=1e-5)
    tiny.assert_close(jax.device_get(spread.tables), jax.device_get(alone.tables), rtol=1e-4, atol=1e-4)
    clocks = np.asarray(spread.tables["slots"]["0"]["clock"])
    assert (clocks == np.asarray(alone.tables["slots"]["0"]["clock"])).all() and len(set(clocks.tolist())) > 3


def test_tables_in_host_memory_are_those_on_eight_devices() -> None:
    """To the bit: each row is summed and updated by one device, from the same shards of the tokens in the same order.

    A row is touched by tokens of several devices, so one that was written back more than once would differ.
    """
    _, spread, losses = ten_steps(**MESH)
    opened, held, host_losses = ten_steps(OnHost(room=0.6), **MESH)
    assert host_losses == losses
    parts = ("rows", "slots")
    tiny.assert_same({part: held.tables[part] for part in parts}, {part: spread.tables[part] for part in parts})
    wanted = opened.tables(held).find(BATCHES[0])
    assert wanted.sizes["0"] == 160  # 8 x 8 x 4 = 256 addresses, of which 0.6 are 154: eight shards of 20
    # The first place of a row lies on one device, another of its places elsewhere.
    per_device = [set(part.reshape(-1).tolist()) - {160} for part in np.split(wanted.places["0"], 4)]
    assert len(set.union(*per_device)) < sum(map(len, per_device))


@pytest.mark.slow
def test_tables_are_created_on_a_mesh_as_on_one_device() -> None:
    tiny.assert_same(jax.device_get(session(**MESH).create().tables), start().tables)


@pytest.mark.slow
@pytest.mark.parametrize("stale", [False, True])
def test_a_run_with_tables_in_host_memory_goes_on_bitwise_on_a_mesh(tmp_path: pathlib.Path, stale: bool) -> None:
    """Through the loop, validation and saves included; the exact run is also that with tables on the devices."""
    tiny.corpus(tmp_path / "text")

    def run(placement: Placement, name: str) -> dict[str, Any]:
        memory = dataclasses.replace(MEMORY, rows=500, placement=placement)
        kept = {"model__layers": 1, "model__memory": memory, "checkpoint__keep_last": 9, "mesh": MeshShape(**MESH)}
        assert train(tiny.recipe(tmp_path, **kept), tmp_path / name) == 0
        return read_checkpoint(tmp_path / name / "checkpoints", 8).state

    host = StaleHost(room=0.6) if stale else OnHost(room=0.6)
    whole = run(host, "host")
    if stale:
        tiny.assert_same(whole, run(host, "again"))
        return
    tiny.assert_same(whole, run(DEVICE, "device"))
    shutil.copytree(tmp_path / "host", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "8")
    tiny.assert_same(run(host, "resumed"), whole)


def test_a_saved_table_is_restored_on_another_mesh(tmp_path) -> None:
    opened, state, _ = ten_steps(**MESH)
    make = functools.partial(Checkpointer, tmp_path / "checkpoints", Checkpoints(), population=False)
    writer = make(opened.abstract, opened.dims, opened.mesh)
    writer.save(10, state, {"windows": 0}, {}, 0.0)
    writer.close()
    other = session(fsdp=4)
    reader = make(other.abstract, other.dims, other.mesh)
    restored, _ = reader.restore(10, other.shardings)
    reader.close()
    tiny.assert_same(jax.device_get(restored.tables), jax.device_get(state.tables))
    assert len(restored.tables["rows"]["0"].addressable_shards) == 4


@pytest.mark.slow
def test_rows_of_float8_come_and_take_their_steps() -> None:
    """Lookups are those of one device; sums of gradients differ in their last digits, which may round a number to the other neighbour."""
    spec = dataclasses.replace(MEMORY, dtype="float8").tables()["0"]
    rows, slots = spec.create(jax.random.key(0))
    draw = np.random.default_rng(0)
    address = jnp.asarray(draw.integers(0, spec.rows + 1, (8, 4, 4)), jnp.int32)
    grads = jnp.asarray(draw.normal(size=(8, 4, 16)), jnp.float32)
    mesh = session(**MESH).mesh
    axes = sharded.row_axes(spec.rows, mesh.abstract_mesh)
    arguments = spec, rows, slots, address, grads, jnp.float32(0.1), jnp.int32(1)
    expected = jax.jit(lambda: (look_up(rows, address), update(*arguments)))()
    with jax.sharding.set_mesh(mesh):
        own = mesh.abstract_mesh
        found = jax.jit(
            lambda: (sharded.look_up_sharded(own, axes, rows, address), sharded.update_sharded(own, axes, *arguments))
        )()
    assert found[0].dtype == jnp.bfloat16 and (found[0] == expected[0]).all()
    tiny.assert_close(found[1][1], expected[1][1], rtol=1e-5, atol=1e-6)
    numbers = [np.asarray(unpack(table)) for table in (found[1][0], expected[1][0])]
    assert (numbers[0] != numbers[1]).mean() < 0.01 and (numbers[0] != np.asarray(unpack(rows))).any()


@pytest.mark.parametrize("crowded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_row_comes_and_every_gradient_arrives(crowded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against one device; crowded: all addresses belong to one owner and there is room for one row in ten, so rounds follow rounds."""
    if crowded:
        monkeypatch.setattr(sharded, "ROOM", 0.1)
    spec = MEMORY.tables()["0"]
    rows, slots = spec.create(jax.random.key(0))
    draw = np.random.default_rng(0)
    most = spec.rows // 8 if crowded else spec.rows + 1
    address = jnp.asarray(draw.integers(0, most, (8, 4, 4)), jnp.int32)
    grads = jnp.asarray(draw.normal(size=(8, 4, 16)), jnp.float32)
    mesh = session(**MESH).mesh
    axes = sharded.row_axes(spec.rows, mesh.abstract_mesh)
    assert axes == ("data", "fsdp", "context")

    def run(mesh):
        if mesh is None:
            return look_up(rows, address), update(spec, rows, slots, address, grads, jnp.float32(0.1), jnp.int32(1))
        found = sharded.look_up_sharded(mesh, axes, rows, address)
        return found, sharded.update_sharded(
            mesh, axes, spec, rows, slots, address, grads, jnp.float32(0.1), jnp.int32(1)
        )

    expected = jax.jit(lambda: run(None))()
    with jax.sharding.set_mesh(mesh):
        found = jax.jit(lambda: run(mesh.abstract_mesh))()
    assert (np.asarray(found[0]) == np.asarray(expected[0])).all()
    tiny.assert_close(
        {"rows": found[1][0], **found[1][1]}, {"rows": expected[1][0], **expected[1][1]}, rtol=1e-5, atol=1e-6
    )
