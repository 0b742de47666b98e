"""A population of four is four runs; what happens to one member does not reach the others."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparse_lm.model.definition import define
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.population import Population, member_arrays, over_members
from sparse_lm.train.schedule import Constant
from sparse_lm.train.state import initial_state
from sparse_lm.train.step import Train, build_step
from sparse_lm.train.validation import build_eval_step

POPULATION = Population(seeds=(3, 8), learning_rate_multipliers=(0.5, 2.0))
OPTIMIZER = AdamW(learning_rate=0.01, schedule=Constant())
MEMBERS = [(3, 0.5), (3, 2.0), (8, 0.5), (8, 2.0)]
DEFINITION = define(tiny.model(layers=1))
TRANSFORMATION = OPTIMIZER.build(DEFINITION.dims)


def create(seed):
    return initial_state(DEFINITION, TRANSFORMATION, seed, with_ema=False)


@functools.cache
def programs(population: Population):
    step = over_members(build_step(DEFINITION, OPTIMIZER, Train(steps=5)), population, (0, None, 0))
    return tiny.jit(over_members(create, population, (0,))), tiny.jit(step)


def run(population: Population, seeds, multipliers, poison: int | None = None):
    """Five steps on the same data; returns (state, pulses)."""
    make, step = programs(population)
    state, pulses = make(seeds), []
    if poison is not None:
        scale = state.params["final_norm"]["scale"].at[poison, 0].set(jnp.nan)
        state = dataclasses.replace(state, params={**state.params, "final_norm": {"scale": scale}})
    for i in range(5):
        state, metrics = step(state, tiny.batch((10, 6), (9,), seed=i), multipliers)
        pulses.append(np.asarray(metrics["pulse"]))
    return state, np.stack(pulses)


def distances(left, right) -> dict[str, float]:
    """Relative Frobenius distance of every leaf. Adam divides by the root of the second moment, so single elements whose gradients
    nearly cancel carry their rounding at full size; a leaf as a whole does not."""
    left, right = tiny.flatten(left), tiny.flatten(right)
    return {path: float(np.linalg.norm(left[path] - right[path]) / np.linalg.norm(right[path])) for path in right}


def member(tree, i: int):
    return jax.tree.map(lambda leaf: leaf[i], tree)


@pytest.fixture(scope="module")
def population():
    return run(POPULATION, *member_arrays(POPULATION, 0))


def test_members_are_seeds_times_multipliers() -> None:
    assert POPULATION.members(0) == MEMBERS
    assert Population().members(7) == [(7, 1.0)] and not Population().active
    assert Population(learning_rate_multipliers=(1.0, 3.0)).members(7) == [(7, 1.0), (7, 3.0)]
    seeds, multipliers = member_arrays(POPULATION, 0)
    assert seeds.tolist() == [3, 3, 8, 8] and multipliers.tolist() == [0.5, 2.0, 0.5, 2.0]
    assert [a.shape for a in member_arrays(Population(), 7)] == [(), ()]


@pytest.mark.parametrize("i", range(4))
def test_a_member_is_a_run_of_its_own(i: int, population) -> None:
    seed, multiplier = MEMBERS[i]
    alone, pulses = run(Population(), jnp.uint32(seed), jnp.float32(multiplier))
    apart = distances(member(population[0].params, i), alone.params)
    assert max(apart.values()) < 1e-5, apart
    np.testing.assert_allclose(population[1][:, i], pulses, rtol=1e-5)


def test_members_differ(population) -> None:
    heads = np.asarray(population[0].params["head"])
    assert all((heads[i] != heads[j]).any() for i in range(4) for j in range(i))


def test_a_nan_in_one_member_leaves_the_others_as_they_were(population) -> None:
    poisoned, pulses = run(POPULATION, *member_arrays(POPULATION, 0), poison=1)
    for i in (0, 2, 3):
        tiny.assert_same(member(poisoned, i), member(population[0], i))
        assert pulses[:, i].tobytes() == population[1][:, i].tobytes()
    assert poisoned.skipped.tolist() == [0, 5, 0, 0] and poisoned.step.tolist() == [5] * 4
    assert np.isnan(pulses[:, 1, 0]).all()
    # The poisoned member keeps its finite parameters as they were.
    make, _ = programs(POPULATION)
    fresh = member(make(member_arrays(POPULATION, 0)[0]), 1)
    tiny.assert_same(member(poisoned.params["blocks"], 1), fresh.params["blocks"])


def test_evaluation_gives_losses_by_member_and_changes_no_state(population) -> None:
    state = population[0]
    batch = tiny.batch((10, 6), (9,))
    losses_PBL = build_eval_step(DEFINITION, POPULATION)(state.params, state.model_state, batch)
    alone = build_eval_step(DEFINITION, Population())
    assert losses_PBL.shape == (4, 2, tiny.LENGTH)
    np.testing.assert_allclose(losses_PBL[2], alone(member(state.params, 2), {}, batch), rtol=1e-5, atol=1e-5)
