"""The training step: accumulation, clipping, skipped steps, averages, and numbers that stay what they are."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from sparse_lm.layers.parameter import map_leaves
from sparse_lm.routing.top_k import TopKRouter
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.schedule import Linear
from sparse_lm.train.state import TrainState, initial_state
from sparse_lm.train.step import PULSE, Train, build_step, gradients, split_microbatches

ROUTER = TopKRouter(k=2, balance_coefficient=0.1, z_coefficient=0.01, bias_rate=0.25)
MOE = dataclasses.replace(tiny.MOE, activation="relu_squared", group_sequences=2, router=ROUTER)
MODEL = tiny.model(MOE, layers=1)
TRAIN = Train(steps=6, clip_norm=0.05, ema_decay=0.9)
OPTIMIZER = AdamW(learning_rate=0.01, schedule=Linear(warmup_steps=2, final_fraction=0.0))

# Documents and padding everywhere: the microbatches have different numbers of tokens, and one routing group is all padding.
RAGGED = tiny.batch((16,), (4, 4), (), (), (9, 2), (1,), (16,), (5, 5, 5))


@pytest.fixture(scope="module")
def step():
    """The compiled step of a routed model with a selection bias, an average and clipping."""
    return tiny.jit(build_step(tiny.materialized(MODEL)[0], OPTIMIZER, TRAIN))


@pytest.fixture(scope="module")
def start() -> TrainState:
    definition = tiny.materialized(MODEL)[0]
    return tiny.jit(lambda: initial_state(definition, OPTIMIZER.build(definition.dims), 0, with_ema=True))()


@pytest.fixture(scope="module")
def first(step, start):
    """The state after one step, and its metrics."""
    return step(start, RAGGED, jnp.float32(1))


def pulse(metrics) -> dict[str, float]:
    return dict(zip(PULSE, np.asarray(metrics["pulse"]).tolist()))


def norm(tree) -> float:
    return math.sqrt(sum(float(np.sum(np.square(np.asarray(leaf, np.float64)))) for leaf in jax.tree.leaves(tree)))


@pytest.mark.parametrize("microbatches", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_gradients_do_not_depend_on_the_number_of_microbatches(microbatches: int) -> None:
    definition, params, state = tiny.materialized(MODEL)

    def run(microbatches):
        whole = functools.partial(gradients, definition, microbatches=microbatches, key=jax.random.key(0))
        return tiny.jit(lambda params, batch: whole(params, state, batch))(params, RAGGED)

    objective, grads, aux, _ = run(1)
    assert norm(grads) > 0
    again, again_grads, again_aux, _ = run(microbatches)
    np.testing.assert_allclose(again, objective, rtol=1e-6)
    tiny.assert_close(again_grads, grads, rtol=1e-5, atol=1e-6)
    # loads, losses and counts are sums over microbatches; integers add exactly
    for left, right in zip(jax.tree.leaves(again_aux), jax.tree.leaves(aux), strict=True):
        np.testing.assert_allclose(left, right, rtol=2e-6)
    load = aux["metrics"]["blocks"]["0"]["load"]
    np.testing.assert_array_equal(again_aux["metrics"]["blocks"]["0"]["load"][0], load[0])
    assert float(load[1]) == 2 * (RAGGED["segments_BL"] > 0).sum()  # two experts a token, none dropped


def test_microbatches_keep_routing_groups_whole() -> None:
    rows = {"tokens_BL": jnp.arange(8)[:, None]}
    # groups (0, 1), (2, 3), (4, 5), (6, 7) are dealt out in turn, so a shard of four rows has its part of each microbatch
    assert split_microbatches(rows, 2, 2)["tokens_BL"][..., 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert split_microbatches(rows, 4, 1)["tokens_BL"][..., 0].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_the_gradient_is_clipped_to_the_norm(first) -> None:
    state, metrics = first
    assert pulse(metrics)["grad_norm"] > 0.05  # reported as it was
    # Adam's first moment after one step is (1 - beta1) times the clipped gradient.
    assert norm(state.opt_state["mu"]) / 0.1 == pytest.approx(0.05, rel=1e-5)
    groups = {name: float(value) for name, value in metrics["group_norms"].items()}
    assert math.sqrt(sum(value**2 for value in groups.values())) == pytest.approx(pulse(metrics)["grad_norm"], rel=1e-5)
    assert set(groups) == {"blocks.0", "embedding", "final_norm.scale", "head"}


def test_one_step_is_the_optimizers_update_at_the_scheduled_rate(start, first) -> None:
    state, metrics = first
    # linear warmup of 2 steps: (0 + 1) / (2 + 1) of 0.01
    assert pulse(metrics)["learning_rate"] == pytest.approx(0.01 / 3, rel=1e-6)
    definition = tiny.materialized(MODEL)[0]
    clipped = map_leaves(lambda _, mu: mu / 0.1, state.opt_state["mu"])
    updates, _ = OPTIMIZER.build(definition.dims).update(clipped, start.opt_state, start.params)
    expected = jax.tree.map(lambda weight, update: weight - 0.01 / 3 * update, start.params, updates)
    tiny.assert_close(state.params, expected)


def test_learning_rates_follow_the_schedule_and_the_multiplier(step, start) -> None:
    state, rates = start, []
    for _ in range(6):
        state, metrics = step(state, RAGGED, jnp.float32(0.5))
        rates.append(pulse(metrics)["learning_rate"])
    # warmup 1/3, 2/3, then a line from 1 at step 2 to 0 at step 6; half of 0.01
    np.testing.assert_allclose(rates, np.array([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]) * 0.005, rtol=1e-5)
    assert int(state.step) == 6


def test_the_average_of_parameters_by_hand(start, first) -> None:
    # decay = min(0.9, (1 + 0) / (10 + 0)) = 0.1 at step 0: the average moves nine tenths of the way
    expected = jax.tree.map(lambda old, new: 0.1 * old + 0.9 * new, start.ema, first[0].params)
    tiny.assert_close(first[0].ema, expected)


def test_the_router_bias_moves_by_its_rate_against_the_load(start, first) -> None:
    state, metrics = first
    load_E = np.asarray(metrics["blocks"]["0"]["load"][0])
    assert load_E.std() > 0
    bias_E = state.model_state["blocks"]["0"]["feed_forward"]["router"]["bias"]
    np.testing.assert_allclose(bias_E, 0.25 * np.sign(load_E.mean() - load_E))
    assert (np.asarray(start.model_state["blocks"]["0"]["feed_forward"]["router"]["bias"]) == 0).all()


def test_loss_is_the_mean_over_valid_tokens(start, first) -> None:
    definition = tiny.materialized(MODEL)[0]
    losses_BL = tiny.jit(lambda p, s: definition.token_losses(p, s, RAGGED)[0])(start.params, start.model_state)
    tokens = (RAGGED["segments_BL"] > 0).sum()
    assert pulse(first[1])["loss"] == pytest.approx(float(losses_BL.sum()) / tokens, rel=1e-5)
    assert pulse(first[1])["tokens"] == tokens


# A target outside the vocabulary makes the loss NaN.
POISONED = {**RAGGED, "targets_BL": np.full_like(RAGGED["targets_BL"], 10**6)}


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(step, first) -> None:
    before = first[0]
    after, metrics = step(before, POISONED, jnp.float32(1))
    assert math.isnan(pulse(metrics)["loss"])
    for part in ("params", "opt_state", "model_state", "ema"):
        tiny.assert_same(getattr(after, part), getattr(before, part))
    assert (int(before.step), int(after.step)) == (1, 2)
    assert (int(before.skipped), int(after.skipped)) == (0, 1)
    again, _ = step(after, POISONED, jnp.float32(1))
    assert int(again.skipped) == 2
    well, metrics = step(again, RAGGED, jnp.float32(1))
    assert int(well.skipped) == 0 and pulse(metrics)["skipped"] == 0
    assert norm(jax.tree.map(jnp.subtract, well.params, before.params)) > 0


def test_gradients_that_are_not_finite_name_their_groups_and_are_skipped(step, start) -> None:
    params = {**start.params, "head": start.params["head"].at[0].set(3e38)}
    before = dataclasses.replace(start, params=params)
    after, metrics = step(before, RAGGED, jnp.float32(1))
    assert int(after.skipped) == 1
    assert not all(math.isfinite(float(value)) for value in metrics["group_norms"].values())
    tiny.assert_same(after.opt_state, before.opt_state)
    tiny.assert_same(after.params, before.params)


def test_a_batch_of_padding_is_harmless(step, first) -> None:
    empty = tiny.batch(*[()] * 8)
    state, metrics = step(first[0], empty, jnp.float32(1))
    assert pulse(metrics)["tokens"] == 0 and pulse(metrics)["loss"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_steps_of_other_values_do_not_recompile(step, start) -> None:
    state = start
    for i in range(3):
        state, _ = step(state, tiny.batch(*[(16 - i, i)] * 8, seed=i), jnp.float32(0.1 * (i + 1)))
    assert step._cache_size() == 1


@pytest.mark.slow
@pytest.mark.slow
def test_no_clipping_when_told_so() -> None:
    """With plain gradients, Adam's first moment is the gradient itself."""
    model = tiny.model(layers=1)
    definition, params, model_state = tiny.materialized(model)
    batch = tiny.full_batch(2)
    build = build_step(definition, OPTIMIZER, Train(steps=4, clip_norm=None))
    start = initial_state_of(params, model_state, OPTIMIZER.build(definition.dims))
    state, metrics = tiny.jit(build)(start, batch, jnp.float32(1))
    assert norm(state.opt_state["mu"]) / 0.1 == pytest.approx(pulse(metrics)["grad_norm"], rel=1e-5)
    assert state.ema == {}


def initial_state_of(params, model_state, optimizer: optax.GradientTransformation) -> TrainState:
    key = jax.random.key_data(jax.random.key(0))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), model_state, {}, {}, key, zero)
