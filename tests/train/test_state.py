"""The state tree: layouts in memory and on disk, dims of every leaf, stacked steps equal to unrolled ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparse_lm.model.definition import define
from sparse_lm.routing.top_k import TopKRouter
from sparse_lm.train.adafactor import Adafactor
from sparse_lm.train.muon import Muon
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.schedule import Constant
from sparse_lm.train.state import TrainState, dims_of, initial_state, is_empty, rolled, stack, unrolled, unstack
from sparse_lm.train.step import Train, build_step

OPTIMIZERS = {
    "adamw": AdamW(learning_rate=0.01, schedule=Constant()),
    "muon": Muon(learning_rate=0.01, schedule=Constant(), precision="float32"),
    "adafactor": Adafactor(learning_rate=0.1, schedule=Constant(), smallest_factored_dim=8, momentum=0.9),
}
DENSE = tiny.model(layers=2)
MIXED = tiny.model(layers=3, leading=(dataclasses.replace(tiny.DENSE, hidden=24),))
"""Scanned, it has a single block and a stacked run."""


def abstract_state(model, optimizer) -> TrainState:
    definition = define(model)
    return jax.eval_shape(lambda: initial_state(definition, optimizer.build(definition.dims), 0, with_ema=True))


def after_three_steps(execution: str, optimizer) -> dict:
    definition = define(dataclasses.replace(DENSE, execution=execution))
    transformation = optimizer.build(definition.dims)
    state = tiny.jit(lambda: initial_state(definition, transformation, 0, with_ema=False))()
    step = tiny.jit(build_step(definition, optimizer, Train(steps=3)))
    for i in range(3):
        state, _ = step(state, tiny.batch((10, 6), (9,), seed=i), jnp.float32(1))
    return unrolled(state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_three_scanned_steps_are_three_unrolled_steps(name: str) -> None:
    states = [after_three_steps(execution, OPTIMIZERS[name]) for execution in ("unrolled", "scanned")]
    # rtol 1e-4: Adam divides by the root of second moments near zero, which magnifies the rounding of sums
    tiny.assert_close(states[1]["params"], states[0]["params"], rtol=1e-4, atol=1e-5)
    assert tiny.flatten(states[0]["opt_state"]).keys() == tiny.flatten(states[1]["opt_state"]).keys()


@pytest.mark.parametrize("execution", ["unrolled", "scanned"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_leaf_of_the_state_has_its_dims(name: str, execution: str) -> None:
    model = dataclasses.replace(MIXED, pattern=(tiny.MOE,), execution=execution)
    state = abstract_state(model, OPTIMIZERS[name])
    dims = dims_of(define(model), state)
    for field in dataclasses.fields(state):
        part, names = tiny_flat(getattr(state, field.name)), tiny_flat(getattr(dims, field.name))
        assert part.keys() == names.keys()
        for path, leaf in part.items():
            assert len(names[path]) == leaf.ndim, f"{field.name}.{path}: {names[path]} for {leaf.shape}"


def tiny_flat(tree) -> dict:
    from sparse_lm.layers.tree_paths import flatten

    return flatten(tree) if isinstance(tree, dict) else {"": tree}


def test_unstack_and_stack_are_inverse() -> None:
    draw = lambda size: np.random.default_rng(0).normal(size=size).astype(np.float32)  # noqa: E731
    like = {
        "blocks": {"0": {"w": draw(size=(2,))}, "1_to_3": {"w": draw(size=(3, 2)), "b": {"c": draw(size=(3,))}}},
        "head": draw(size=4),
    }
    flat = unstack(like, 0)
    assert sorted(flat["blocks"]) == ["0", "1", "2", "3"]
    np.testing.assert_array_equal(flat["blocks"]["2"]["w"], like["blocks"]["1_to_3"]["w"][1])
    tiny.assert_same(stack(flat, like, 0), like)


def test_in_a_population_the_members_dimension_leads() -> None:
    like = {"1_to_2": {"w": np.arange(12, dtype=np.int32).reshape(3, 2, 2)}}  # members, layers, size
    flat = unstack(like, 1)
    assert flat["2"]["w"].tolist() == [[2, 3], [6, 7], [10, 11]]
    tiny.assert_same(stack(flat, like, 1), like)


def test_the_layout_on_disk_does_not_depend_on_the_layout_in_memory() -> None:
    router = TopKRouter(bias_rate=0.1)
    base = dataclasses.replace(MIXED, pattern=(dataclasses.replace(tiny.MOE, router=router),))
    shapes = []
    for execution in ("unrolled", "scanned"):
        state = abstract_state(dataclasses.replace(base, execution=execution), OPTIMIZERS["adafactor"])
        tree = jax.eval_shape(unrolled, state)
        assert "tables" not in tree  # empty parts are left out
        shapes.append({path: leaf.shape for path, leaf in tiny_flat(tree).items()})
        back = jax.eval_shape(lambda tree, state=state: rolled(tree, state), tree)
        assert jax.tree.map(lambda leaf: leaf.shape, back) == jax.tree.map(lambda leaf: leaf.shape, state)
    assert shapes[0] == shapes[1]


def test_empty_parts() -> None:
    assert is_empty({}) and is_empty({"a": {"b": {}}})
    assert not is_empty({"a": {"b": 0}}) and not is_empty(np.zeros(()))


def test_the_initial_state_depends_on_the_seed_alone() -> None:
    definition = define(tiny.model(layers=1))
    optimizer = OPTIMIZERS["adamw"].build(definition.dims)
    make = tiny.jit(lambda seed: initial_state(definition, optimizer, seed, with_ema=True))
    a, b, c = make(0), make(0), make(1)
    tiny.assert_same(a, b)
    assert (np.asarray(a.params["head"]) != np.asarray(c.params["head"])).any()
    assert a.key.tolist() != c.key.tolist()
    tiny.assert_same(a.ema, a.params)
    assert int(a.step) == int(a.skipped) == 0
