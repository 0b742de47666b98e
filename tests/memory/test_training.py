"""Tables in a step of training: only touched rows move, in pieces and populations alike; nothing table-shaped is computed."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparse_lm.memory.engram import Engram
from sparse_lm.memory.row_optimizer import LazyAdam
from sparse_lm.model.definition import define
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.population import Population, member_arrays, over_members
from sparse_lm.train.schedule import Constant
from sparse_lm.train.state import initial_state
from sparse_lm.train.step import Train, build_step

MEMORY = Engram(at=(0,), heads=2, width=8, rows=100, deviation=0.5, optimizer=LazyAdam())
MODEL = tiny.model(memory=MEMORY, layers=1)
OPTIMIZER = AdamW(learning_rate=0.01, schedule=Constant(warmup_fraction=0.0), epsilon=1e-3)
DEFINITION = define(MODEL)
TRANSFORMATION = OPTIMIZER.build(DEFINITION.dims)
BATCH = tiny.batch((10, 4), (9,), (16,), (3, 3, 3))


def create(seed):
    return initial_state(DEFINITION, TRANSFORMATION, seed, with_ema=False)


@functools.cache
def start():
    return tiny.jit(create)(3)


@functools.cache
def step(microbatches: int = 1):
    return tiny.jit(build_step(DEFINITION, OPTIMIZER, Train(steps=9, microbatches=microbatches)))


def test_a_step_moves_the_rows_that_it_read_and_no_other() -> None:
    state, _ = step()(start(), BATCH, jnp.float32(1))
    address = MEMORY.addresses_on_host(
        MEMORY.hashes(tiny.VOCABULARY, None), BATCH["tokens_BL"], BATCH["segments_BL"], BATCH["positions_BL"]
    )["0"]
    rows = MEMORY.tables()["0"].rows
    assert (address[np.asarray(BATCH["segments_BL"]) == 0] == rows).all()
    read = np.setdiff1d(np.unique(address), [rows])
    before, after = start().tables, state.tables
    assert np.flatnonzero((before["rows"]["0"] != after["rows"]["0"]).any(1)).tolist() == read.tolist()
    assert np.flatnonzero(after["slots"]["0"]["clock"]).tolist() == read.tolist()
    assert set(np.asarray(after["slots"]["0"]["clock"])[read].tolist()) == {1}
    tiny.assert_same(before["address"], after["address"])


def test_the_rows_take_the_gradient_of_the_loss() -> None:
    """Against the gradient of the same loss through the lookup itself, which is as large as the table."""

    def loss(rows):
        state = {"tables": {**start().tables, "rows": {"0": rows}}}
        units = DEFINITION.units(BATCH)
        return DEFINITION.objective(start().params, state, BATCH, units, None)[0]

    grads = np.asarray(tiny.jit(jax.grad(loss))(start().tables["rows"]["0"]))
    state, _ = step()(start(), BATCH, jnp.float32(1))
    found = np.asarray(state.tables["slots"]["0"]["mu"]) / (1 - 0.9)
    np.testing.assert_allclose(found, grads, rtol=1e-3, atol=1e-6 * np.abs(grads).max())


@pytest.mark.slow
def test_microbatches_add_up() -> None:
    whole, _ = step()(start(), BATCH, jnp.float32(1))
    pieces, _ = step(2)(start(), BATCH, jnp.float32(1))
    tiny.assert_close(pieces.tables["slots"], whole.tables["slots"], rtol=1e-4, atol=1e-5)
    tiny.assert_close(pieces.params, whole.params, rtol=1e-5, atol=1e-5)


def test_a_step_that_is_not_finite_leaves_the_tables() -> None:
    broken = dataclasses.replace(
        start(), params={**start().params, "final_norm": {"scale": jnp.full((16,), jnp.nan, jnp.float32)}}
    )
    state, metrics = step()(broken, BATCH, jnp.float32(1))
    assert int(state.skipped) == 1
    tiny.assert_same(state.tables, start().tables)
    assert np.isnan(metrics["group_norms"]["tables.0"])


def equations(jaxpr: Any):
    """Yields every equation of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
                if isinstance(inner, (jax.extend.core.ClosedJaxpr, jax.extend.core.Jaxpr)):
                    yield from equations(getattr(inner, "jaxpr", inner))


def test_nothing_as_large_as_a_table_is_computed() -> None:
    """The table and its slots are only ever the result of a scatter of the touched rows."""
    rows = MEMORY.tables()["0"].rows
    traced = jax.make_jaxpr(build_step(DEFINITION, OPTIMIZER, Train(steps=9)))(start(), BATCH, jnp.float32(1))
    made = [
        equation.primitive.name
        for equation in equations(traced.jaxpr)
        for out in equation.outvars
        if rows in getattr(out.aval, "shape", ()) and "jaxpr" not in equation.params
    ]
    assert made == ["scatter"] * 4  # rows, mu, nu, clock


@pytest.mark.slow
def test_a_member_of_a_population_is_a_run_of_its_own() -> None:
    population = Population(seeds=(3, 8), learning_rate_multipliers=(0.5, 2.0))
    seeds, multipliers = member_arrays(population, 0)
    make = tiny.jit(over_members(create, population, (0,)))
    together = tiny.jit(over_members(build_step(DEFINITION, OPTIMIZER, Train(steps=9)), population, (0, None, 0)))
    states, _ = together(make(seeds), BATCH, multipliers)
    for i, (seed, multiplier) in enumerate(population.members(0)):
        alone, _ = step()(tiny.jit(create)(seed), BATCH, jnp.float32(multiplier))
        own = jax.tree.map(lambda a, i=i: a[i], states)
        tiny.assert_close(own.tables, alone.tables, rtol=1e-4, atol=1e-5)
        tiny.assert_close(own.params, alone.params, rtol=1e-5, atol=1e-5)
