"""Tables split over devices: the same loss and table after ten steps as on one device, also when requests need several rounds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from pallas_kernels.embedding_lookup import unpack
from sparse_lm.memory import sharded
from sparse_lm.memory.engram import Engram
from sparse_lm.memory.row_optimizer import LazyAdam
from sparse_lm.memory.table import look_up, update
from sparse_lm.parallel.mesh import MeshShape
from sparse_lm.recipe import Recipe
from sparse_lm.train.checkpoint import Checkpointer, Checkpoints
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.schedule import Constant
from sparse_lm.train.session import Session, open_session
from sparse_lm.train.step import PULSE, Train

LENGTH = 8
MEMORY = Engram(at=(0,), heads=2, width=8, rows=250, deviation=0.5, optimizer=LazyAdam(epsilon=1e-4))
MESH = {"data": 2, "fsdp": 2, "context": 2}


def session(**mesh: int) -> Session:
    base = Recipe(
        model=tiny.model(layers=1, memory=MEMORY),
        optimizer=AdamW(learning_rate=0.01, schedule=Constant(warmup_fraction=0.0), epsilon=1e-3),
        train=Train(steps=20),
        mesh=MeshShape(**{"data": 1, **mesh}),
    )
    data = dataclasses.replace(base.data, sequence_length=LENGTH, batch_size=8)
    devices = jax.devices()[: int(np.prod(list(mesh.values()) or [1]))]
    return open_session(dataclasses.replace(base, data=data), devices)


@functools.cache
def ten_steps(**mesh: int):
    """(state after ten steps, losses)."""
    opened = session(**mesh)
    state, losses = opened.create(), []
    step, _ = opened.compile_step()
    for i in range(10):
        batch = tiny.batch(*[(8,), (3, 2), (), (5,), (1, 1, 1), (8,), (4, 4), (7,)], length=LENGTH, seed=i)
        state, metrics = step(state, opened.put(batch))
        losses.append(float(np.asarray(metrics["pulse"])[PULSE.index("loss")]))
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
    axes = sharded.row_axes(spec, mesh.abstract_mesh)
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


@pytest.mark.parametrize("crowded", [False, True])
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
    axes = sharded.row_axes(spec, mesh.abstract_mesh)
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
