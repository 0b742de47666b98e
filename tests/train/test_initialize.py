"""Starting from another run: what is taken, what stays fresh, and what is refused by path."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparse_lm.model.definition import define
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.train.checkpoint_reader import CheckpointError
from sparse_lm.train.initialize import StartFrom, flatten, initialize, is_partial, transforms_of, unflatten, upcycle
from sparse_lm.train.state import TrainState, unrolled


def state(fill: float, *, ema: bool = False, layers: str = "stacked") -> TrainState:
    """A state of an embedding, two blocks and a head; every number is `fill` plus something of its own."""
    blocks = {"0_to_1": {"w": jnp.array([[1.0, 2], [3, 4]]) + fill}}
    if layers == "unrolled":
        blocks = {"0": {"w": jnp.array([1.0, 2]) + fill}, "1": {"w": jnp.array([3.0, 4]) + fill}}
    params = {"embedding": jnp.zeros((3, 2)) + fill, "blocks": blocks, "head": jnp.ones((2, 3)) + fill}
    return TrainState(
        step=jnp.int32(fill),
        params=params,
        opt_state={"count": jnp.int32(fill), "mu": {name: part for name, part in params.items() if name != "head"}},
        model_state={"bias": jnp.full(2, fill)},
        tables={},
        ema=params if ema else {},
        key=jnp.array([7, int(fill)], jnp.uint32),
        skipped=jnp.int32(0),
    )


FRESH, OLD = state(0), state(100)


def start(fresh: TrainState, source: TrainState | dict, **fields) -> TrainState:
    config = StartFrom(run="there", **fields)
    tree = unrolled(source) if isinstance(source, TrainState) else source
    return initialize(fresh, tree, transforms_of(config), partial=is_partial(config))


def test_parameters_alone_begin_at_step_zero() -> None:
    found = start(FRESH, OLD)
    tiny.assert_same(found.params, OLD.params)
    fresh = {**dataclasses.asdict(FRESH), "params": OLD.params}
    tiny.assert_same(dataclasses.asdict(found), fresh)


def test_everything_continues_where_the_source_stopped() -> None:
    tiny.assert_same(dataclasses.asdict(start(FRESH, OLD, keep="everything")), dataclasses.asdict(OLD))


def test_everything_of_step_zero_is_taken_too() -> None:
    source = dataclasses.replace(OLD, step=jnp.int32(0))
    tiny.assert_same(dataclasses.asdict(start(state(5), source, keep="everything")), dataclasses.asdict(source))


@pytest.mark.parametrize(("here", "there"), [("stacked", "unrolled"), ("unrolled", "stacked")])
def test_scanned_and_unrolled_runs_start_from_each_other(here: str, there: str) -> None:
    found = start(state(0, layers=here), state(100, layers=there), keep="everything")
    tiny.assert_same(dataclasses.asdict(found), dataclasses.asdict(state(100, layers=here)))


def test_excluded_parameters_stay_fresh() -> None:
    found = start(FRESH, OLD, exclude=("head", "blocks.1.*"))
    np.testing.assert_array_equal(found.params["head"], FRESH.params["head"])
    np.testing.assert_array_equal(found.params["blocks"]["0_to_1"]["w"], [[101, 102], [3, 4]])
    np.testing.assert_array_equal(found.params["embedding"], OLD.params["embedding"])


def test_included_parameters_alone_are_loaded() -> None:
    found = start(FRESH, OLD, include=("embedding",))
    tiny.assert_same(found.params, {**FRESH.params, "embedding": OLD.params["embedding"]})


def test_renaming_happens_in_order_before_selection() -> None:
    tree = unrolled(OLD)
    tree["params"] = unflatten(
        {path.replace("blocks.", "layers.block"): leaf for path, leaf in flatten(tree["params"]).items()}
    )
    found = start(FRESH, tree, rename=(r"^layers\.=blocks.", r"\.block(\d)=.\1"), exclude=("head",))
    tiny.assert_same(found.params, {**OLD.params, "head": FRESH.params["head"]})


def test_an_average_that_the_source_lacks_starts_from_the_parameters() -> None:
    found = start(state(0, ema=True), OLD)
    tiny.assert_same(found.ema, OLD.params)
    found = start(state(0, ema=True), OLD, keep="everything")
    tiny.assert_same(found.ema, OLD.params)


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (lambda t: t["params"].pop("head"), ["missing:    params.head (2, 3)"]),
        (lambda t: t["params"].update(extra=np.zeros(4)), ["unexpected: params.extra (4,)"]),
        (lambda t: t["params"].update(embedding=np.zeros((5, 2))), ["reshaped:   params.embedding (5, 2) -> (3, 2)"]),
        (
            lambda t: t["params"]["blocks"].update({"2": {"w": np.zeros(2)}, "1": {"w": np.zeros(3)}}),
            ["unexpected: params.blocks.2.w (2,)", "reshaped:   params.blocks.1.w (3,) -> (2,)"],
        ),
    ],
)
def test_parameters_that_do_not_fit_are_listed(change, lines) -> None:
    tree = unrolled(OLD)
    tree["params"] = {**tree["params"], "blocks": dict(tree["params"]["blocks"])}
    change(tree)
    with pytest.raises(CheckpointError) as error:
        start(FRESH, tree)
    assert all(line in str(error.value) for line in lines), error.value


def test_what_is_left_out_on_purpose_is_no_mistake_but_what_is_unexpected_is() -> None:
    tree = unrolled(OLD)
    tree["params"] = {"embedding": tree["params"]["embedding"], "other": np.zeros(1)}
    with pytest.raises(CheckpointError, match=r"unexpected: params\.other") as error:
        start(FRESH, tree, exclude=("head",))
    assert "missing" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "fresh", "line"),
    [
        (state(100, ema=True), FRESH, "unexpected: ema.embedding (3, 2)"),
        (dataclasses.replace(OLD, model_state={}), FRESH, "missing:    model_state.bias (2,)"),
        (OLD, dataclasses.replace(FRESH, model_state={}), "unexpected: model_state.bias (2,)"),
        (
            dataclasses.replace(OLD, opt_state={"count": jnp.int32(0)}),
            FRESH,
            "missing:    opt_state.mu.blocks.0.w (2,)",
        ),
    ],
)
def test_a_whole_state_must_fit_part_by_part(source: TrainState, fresh: TrainState, line: str) -> None:
    with pytest.raises(CheckpointError) as error:
        start(fresh, source, keep="everything")
    assert line in str(error.value), error.value


def test_values_take_the_dtype_of_the_run() -> None:
    tree = unrolled(OLD)
    tree["params"] = {**tree["params"], "head": np.ones((2, 3), np.float64)}
    assert start(FRESH, tree).params["head"].dtype == jnp.float32


@pytest.mark.slow
def test_upcycled_experts_compute_what_the_dense_model_did() -> None:
    dense = tiny.model(dataclasses.replace(tiny.DENSE, activation="relu_squared"), layers=1)
    definition, params, _ = tiny.materialized(dense)
    hidden = tiny.DENSE.hidden
    sparse = define(tiny.model(MoEFeedForward(experts=4, hidden=hidden, activation="relu_squared"), layers=1))
    fresh = sparse.initial_params(jax.random.key(1))
    zero = jnp.zeros((), jnp.int32)
    fresh_state = TrainState(zero, fresh, {}, {}, {}, {}, jnp.zeros(2, jnp.uint32), zero)
    found = initialize(fresh_state, {"params": params}, [upcycle({0: 4}, 0.0, 0)], partial=True).params
    batch = tiny.full_batch(2)
    expected = tiny.jit(lambda p: definition.token_losses(p, {}, batch)[0])(params)
    losses = tiny.jit(lambda p: sparse.token_losses(p, {}, batch)[0])(found)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
    router = found["blocks"]["0"]["feed_forward"]["router"]
    tiny.assert_same(router, fresh["blocks"]["0"]["feed_forward"]["router"])


def test_upcycling_with_noise_and_without_anything_to_copy() -> None:
    weight = np.random.default_rng(0).normal(size=(30, 40)).astype(np.float32)
    tree = {
        "params": unflatten({"blocks.1.feed_forward.gate.weight": weight, "blocks.1.attention.query.weight": weight})
    }
    found = flatten(upcycle({1: 3}, 0.1, 7)(tree)["params"])
    copies = found["blocks.1.feed_forward.gate.weight"]
    assert copies.shape == (3, 30, 40) and found["blocks.1.attention.query.weight"] is weight
    difference = copies - weight
    assert difference.std() == pytest.approx(0.1 * weight.std(), rel=0.05)  # 3600 draws: deviation of the estimate 1.2%
    assert np.abs(difference[0] - difference[1]).max() > 0
    again = flatten(upcycle({1: 3}, 0.1, 7)(tree)["params"])["blocks.1.feed_forward.gate.weight"]
    np.testing.assert_array_equal(again, copies)
    with pytest.raises(CheckpointError, match="no block is dense"):
        upcycle({0: 3}, 0.0, 0)(tree)
