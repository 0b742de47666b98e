"""A mesh changes where numbers live, not what they are: one step on several meshes against one device."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
import tiny

from sparse_lm.config import ConfigError
from sparse_lm.parallel.mesh import AXES, MeshShape
from sparse_lm.recipe import Recipe
from sparse_lm.routing.top_k import TopKRouter
from sparse_lm.train.muon import Muon
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.schedule import Constant
from sparse_lm.train.session import open_session
from sparse_lm.train.step import PULSE, Train, gradients

LENGTH = 8
MOE = dataclasses.replace(
    tiny.MOE,
    activation="relu_squared",
    router=TopKRouter(k=2, balance_coefficient=0.1, z_coefficient=0.01, bias_rate=0.1),
)
# Epsilon well above the rounding of a gradient: Adam's direction of a gradient near zero is otherwise its sign alone.
ADAMW = AdamW(learning_rate=0.01, schedule=Constant(warmup_fraction=0.0), epsilon=1e-3)
RECIPES = {
    "dense": (tiny.DENSE, ADAMW, 1),
    "moe": (MOE, ADAMW, 1),
    "muon": (
        tiny.DENSE,
        Muon(learning_rate=0.01, schedule=Constant(warmup_fraction=0.0), precision="float32", epsilon=1e-3),
        1,
    ),
    "accumulated": (MOE, ADAMW, 2),
}
# Ragged rows and padding: shards have different numbers of tokens.
BATCH = tiny.batch(*[(8,), (3, 2), (), (5,), (1, 1, 1), (8,), (4, 4), (7,)] * 2, length=LENGTH)


def recipe(name: str, **mesh: int) -> Recipe:
    feed_forward, optimizer, microbatches = RECIPES[name]
    base = Recipe(
        model=tiny.model(feed_forward, layers=1),
        optimizer=optimizer,
        train=Train(steps=4, microbatches=microbatches, clip_norm=0.5),
        mesh=MeshShape(**{"data": 1, **mesh}),
    )
    data = dataclasses.replace(base.data, sequence_length=LENGTH, batch_size=16)
    return dataclasses.replace(base, data=data)


@functools.cache
def result(name: str, **mesh: int):
    """(gradient, state after a step, pulse) with every array on the host."""
    whole = recipe(name, **mesh)
    devices = jax.devices()[: int(np.prod(list(mesh.values()) or [1]))]
    session = open_session(whole, devices)
    state, batch = session.create(), session.put(BATCH)

    @jax.jit
    def gradient(state, batch):
        key = jax.random.key(0)
        return gradients(session.definition, state.params, state.model_state, batch, whole.train.microbatches, key)[1]

    grads = jax.device_get(gradient(state, batch)) if name == "moe" or name == "dense" else {}
    compiled, _ = session.compile_step()
    after, metrics = compiled(state, batch)
    for leaf, sharding in zip(jax.tree.leaves(after), jax.tree.leaves(session.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    pulse = dict(zip(PULSE, np.asarray(metrics["pulse"]).tolist()))
    return grads, jax.device_get(after), pulse


CASES = [
    ("dense", {"fsdp": 2, "tensor": 2, "context": 2}),
    ("moe", {"data": 2, "expert": 2, "tensor": 2}),
]
ALONE = [{axis: 8} for axis in ("data", "fsdp")] + [{axis: 2} for axis in ("expert", "tensor", "context")]
MIXES = [dict.fromkeys(axes, 2) for axes in itertools.combinations(AXES, 3)]
SLOW = [
    *((name, mesh) for name in ("dense", "moe") for mesh in ALONE + MIXES if (name, mesh) not in CASES),
    ("moe", {"expert": 4}),
    ("muon", {"data": 2, "fsdp": 2, "tensor": 2}),
    ("accumulated", {"data": 2, "expert": 2, "tensor": 2}),
    ("accumulated", {"data": 2, "fsdp": 2, "context": 2}),
]


@pytest.mark.parametrize(
    ("name", "mesh"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
    ids=lambda value: value if isinstance(value, str) else "x".join(f"{axis}{size}" for axis, size in value.items()),
)
def test_a_step_on_a_mesh_is_the_step_on_one_device(name: str, mesh: dict[str, int]) -> None:
    expected_grads, expected, expected_pulse = result(name)
    grads, after, pulse = result(name, **mesh)
    for key in ("loss", "grad_norm", "learning_rate", "tokens"):
        assert pulse[key] == pytest.approx(expected_pulse[key], rel=1e-5), key
    tiny.assert_close(grads, expected_grads, rtol=1e-5, atol=1e-5)
    tiny.assert_close(after.params, expected.params, rtol=1e-5, atol=1e-5)
    tiny.assert_close(after.model_state, expected.model_state)
    assert int(after.skipped) == 0 and int(after.step) == 1


def test_parameters_are_split_as_the_table_says() -> None:
    session = open_session(recipe("moe", expert=2, tensor=2, data=2))
    state = session.create()
    gate = state.params["blocks"]["0"]["feed_forward"]["gate"]["weight"]
    # 4 experts over expert = 2, F = 16 over tensor = 2, D whole (fsdp = 1)
    assert gate.shape == (4, 16, 16) and gate.addressable_shards[0].data.shape == (2, 16, 8)
    moment = state.opt_state["mu"]["blocks"]["0"]["feed_forward"]["gate"]["weight"]
    assert moment.sharding.is_equivalent_to(gate.sharding, 3)


@pytest.mark.slow
def test_initial_values_do_not_depend_on_the_mesh() -> None:
    alone = open_session(recipe("dense"), jax.devices()[:1]).create()
    spread = open_session(recipe("dense", data=2, fsdp=2, tensor=2)).create()
    tiny.assert_same(jax.device_get(spread.params), jax.device_get(alone.params))


def test_a_batch_that_does_not_divide_over_the_mesh_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_size = 16 .* \(2\) .* group_sequences .* \(2\) .* \(8\)"):
        grouped = dataclasses.replace(MOE, group_sequences=2)
        bad = recipe("accumulated", data=8)
        open_session(dataclasses.replace(bad, model=dataclasses.replace(bad.model, pattern=(grouped,))))
    with pytest.raises(ConfigError, match=r"data\.sequence_length = 9 .* context \(2\)"):
        bad = recipe("dense", data=4, context=2)
        open_session(dataclasses.replace(bad, data=dataclasses.replace(bad.data, sequence_length=9)))
