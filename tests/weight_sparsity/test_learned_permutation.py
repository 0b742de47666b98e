"""Orders of inputs that are learned: the soft matrix, its penalty, hardening, and a model that trains with it."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from packed_toy import random_lists, random_state
from scripted import pretrain

from sparse_lm.accounting import account
from sparse_lm.config import ConfigError, validate
from sparse_lm.layers.feed_forward import DenseFeedForward
from sparse_lm.layers.parameter import ModelState
from sparse_lm.layers.tree_paths import flatten
from sparse_lm.model.definition import define
from sparse_lm.recipe import Recipe
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.train.checkpoint_reader import read_checkpoint
from sparse_lm.train.initialize import StartFrom
from sparse_lm.train.loop import train
from sparse_lm.train.metrics import read_rows
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.session import open_session, starting_point
from sparse_lm.train.state import TrainState, initial_state
from sparse_lm.weight_sparsity.door import Moment
from sparse_lm.weight_sparsity.learned_permutation import (
    Shuffle,
    assignment,
    doubly_stochastic,
    penalty,
    penalty_gradient,
    permutation_matrix,
)
from sparse_lm.weight_sparsity.packed import Packed
from sparse_lm.weight_sparsity.packed_matrix import at, replaced
from sparse_lm.weight_sparsity.packing import unpack
from sparse_lm.weight_sparsity.projection import BlockSparseLowRankProjection, BlockSparseProjection
from sparse_lm.weight_sparsity.schedules import Periodic
from sparse_lm.weight_sparsity.topology_update import MagnitudeBlocks, RigLBlocks, SETBlocks

LEARNED = BlockSparseProjection(density=0.5, block=16, permutation="learned")
FORWARD = DenseFeedForward(hidden=32, activation="relu_squared", projection=LEARNED)
MODEL = tiny.model(FORWARD, d_model=32, layers=1)
PATHS = ("blocks.0.feed_forward.down", "blocks.0.feed_forward.gate")


def test_the_penalty_by_hand() -> None:
    # Rows of 1/4: ||m||_1 - ||m||_2 = 1 - sqrt(4 / 16) = 1/2, columns alike. A permutation: 1 - 1 = 0.
    assert float(penalty(jnp.full((4, 4), 0.25))) == 0.5
    assert float(penalty(jnp.eye(5)[::-1])) == 0.0
    # rows (3/5, 2/5), (2/5, 3/5): 1 - sqrt(13) / 5 each
    assert float(penalty(jnp.array([[0.6, 0.4], [0.4, 0.6]]))) == pytest.approx(1 - 13**0.5 / 5, rel=1e-6)
    soft = jnp.asarray(np.random.default_rng(0).random((4, 4)).astype(np.float32)) + 0.1
    np.testing.assert_allclose(penalty_gradient(soft), jax.grad(penalty)(soft), rtol=1e-5, atol=1e-6)


def test_a_doubly_stochastic_matrix_has_lines_that_sum_to_one() -> None:
    soft = np.random.default_rng(1).normal(0.2, 0.5, (3, 8, 8)).astype(np.float32)
    soft[1, 2] = -1.0  # a row with nothing in it
    found = np.asarray(doubly_stochastic(jnp.asarray(soft)))
    assert (found >= 0).all() and (found[0][soft[0] < 0] == 0).all()
    np.testing.assert_allclose(found.sum(-2), 1.0, rtol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1.0, atol=0.2)
    order = jnp.array([2, 0, 1])
    np.testing.assert_array_equal(doubly_stochastic(permutation_matrix(order)), permutation_matrix(order))


def test_an_assignment_by_hand() -> None:
    # The largest entry is 0.7 at (2, 0). Of rows 0, 1 and columns 1, 2: 0.5 at (0, 1). What is left is (1, 2).
    soft = jnp.array([[0.6, 0.5, 0.1], [0.1, 0.45, 0.2], [0.7, 0.2, 0.3]])
    assert assignment(soft).tolist() == [2, 0, 1]
    # Of equal entries the first in row order: (0, 0), then (1, 1).
    assert assignment(jnp.full((2, 2), 0.5)).tolist() == [0, 1]
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(x @ permutation_matrix(jnp.array([2, 0, 1])), [2.0, 0.0, 1.0])


def test_soft_and_hard_orders_are_their_dense_matrices() -> None:
    """One program for both: x M W and its gradients while the order is soft, x[..., p] W when it is hard."""
    draw, size = np.random.default_rng(0), (64, 32)
    module = nnx.eval_shape(lambda: LEARNED.build(*size, ("embed", "ffn")))
    graph, params, _, probes = nnx.split(module, nnx.Param, ModelState, ...)
    params = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), nnx.to_pure_dict(params))
    params["soft"] = np.asarray(doubly_stochastic(jnp.asarray(np.abs(params["soft"]))))
    order = draw.permutation(64).astype(np.int32)
    state = {"topology": random_lists(module.pattern, 0, draw), "permutation": jnp.asarray(order)}
    probes = jax.tree.map(lambda leaf: jnp.zeros(()), nnx.to_pure_dict(probes))
    x, dy = draw.normal(size=(5, 64)).astype(np.float32), draw.normal(size=(5, 32)).astype(np.float32)

    @tiny.jit
    def run(params, x, hard):
        y, pull = jax.vjp(lambda p, x: nnx.merge(graph, p, {**state, "hard": hard}, probes)(x), params, x)
        return y, *pull(dy)

    blocks = unpack({"values": params["values"]}, state["topology"], size)
    y, grads, dx = run(params, x, jnp.float32(0))
    np.testing.assert_allclose(y, x @ params["soft"] @ blocks, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grads["soft"], x.T @ (dy @ blocks.T), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx, dy @ blocks.T @ params["soft"].T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(y, x @ unpack(params, state["topology"], size), rtol=1e-4, atol=1e-4)
    y, grads, dx = run(params, x, jnp.float32(1))
    np.testing.assert_allclose(y, x[:, order] @ blocks, rtol=1e-4, atol=1e-4)
    assert not np.asarray(grads["soft"]).any()
    as_matrix = {**params, "soft": np.asarray(permutation_matrix(jnp.asarray(order)))}
    np.testing.assert_allclose(y, x @ unpack(as_matrix, state["topology"], size), rtol=1e-4, atol=1e-4)


@functools.cache
def begun() -> tuple:
    """(sparsifier, state of step 0)."""
    definition, optimizer = define(MODEL), AdamW()
    packed = Packed(shuffle=Shuffle(threshold=0.2, every=5, end=0.5))
    sparsifier = packed.build(definition, optimizer, 40, 1)
    transformation = optimizer.build(definition.dims)
    make = functools.partial(initial_state, definition, transformation, with_ema=False, sparsifier=sparsifier)
    state = random_state(jax.eval_shape(make, 0), definition.packed)
    soft = {f"{path}.soft": jnp.zeros((32, 32)) for path in PATHS}
    order = {f"{path}.permutation": jnp.arange(32, dtype=jnp.int32) for path in PATHS}
    state = dataclasses.replace(
        state, params=replaced(state.params, soft), model_state=replaced(state.model_state, order)
    )
    params, model_state, sparsity = tiny.jit(sparsifier.init)(state.params, state.model_state, jax.random.key(0))
    return sparsifier, dataclasses.replace(state, params=params, model_state=model_state, sparsity=sparsity)


@pytest.mark.slow
def test_orders_are_hardened_by_their_threshold_and_all_in_the_end() -> None:
    """Of 40 steps the 5th, 10th, ... look at the threshold, and the one numbered 20 hardens what is left."""
    sparsifier, state = begun()
    down, gate = PATHS
    assert [step for step in range(40) if sparsifier.apart(step)] == [5, 10, 15, 20, 25]
    first = at(state.params, f"{gate}.soft")
    assert float(jnp.mean(jnp.diagonal(first))) == pytest.approx(0.5, abs=0.1)  # half of an input stays in its place
    np.testing.assert_allclose(first.sum(0), 1.0, rtol=1e-5)
    shift = np.roll(np.arange(32), 3)
    near = (
        0.9 * permutation_matrix(jnp.asarray(shift)) + 0.1 / 32
    )  # its penalty is below 0.2, that of a first one is not
    assert float(penalty(near)) < 0.2 < float(penalty(first))
    params = replaced(state.params, {f"{down}.soft": near, f"{gate}.soft": first})
    moved = replaced(params, {f"{gate}.soft": first - 0.001})

    @tiny.jit
    def update(step, finite, params, moved, state: TrainState):
        rest = {"grads": params, "gradient": None, "ema": {}, "opt_state": {}, "model_state": state.model_state}
        moment = Moment(step, finite, jax.random.key(0), before=params, params=moved, sparsity=state.sparsity, **rest)
        change = sparsifier.update(moment)
        return change, sparsifier.optimizer_grads(params, params, change.sparsity, step)

    def hard(change) -> list[float]:
        return [float(at(change.model_state, f"{path}.hard")) for path in PATHS]

    run = functools.partial(update, params=params, moved=moved, state=state)
    between, _ = run(jnp.int32(6), jnp.bool_(True))
    assert hard(between) == [0, 0]
    np.testing.assert_array_equal(at(between.params, f"{gate}.soft"), doubly_stochastic(first - 0.001))
    looked, grads = run(jnp.int32(5), jnp.bool_(True))
    assert hard(looked) == [1, 0]
    assert at(looked.model_state, f"{down}.permutation").tolist() == shift.tolist()
    np.testing.assert_array_equal(at(looked.params, f"{down}.soft"), permutation_matrix(jnp.asarray(shift)))
    assert [float(leaf) for leaf in jax.tree.leaves(looked.sparsity["shuffle"])][:2] == [1.0, 0.0]  # hard, penalty
    # The penalty reaches the gradient of soft orders alone.
    np.testing.assert_array_equal(at(grads, f"{down}.soft"), near)
    expected = first + 0.1 * penalty_gradient(first)
    np.testing.assert_allclose(at(grads, f"{gate}.soft"), expected, rtol=1e-5, atol=1e-7)
    broken, _ = run(jnp.int32(20), jnp.bool_(False))
    assert hard(broken) == [0, 0]
    tiny.assert_same(broken.params["blocks"]["0"]["feed_forward"], params["blocks"]["0"]["feed_forward"])
    end, _ = run(jnp.int32(20), jnp.bool_(True))
    assert hard(end) == [1, 1]
    order = at(end.model_state, f"{gate}.permutation")
    assert sorted(order.tolist()) == list(range(32))
    np.testing.assert_array_equal(at(end.params, f"{gate}.soft"), permutation_matrix(order))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight_sparsity": Recipe().weight_sparsity}, r"permutation = 'learned' .* unless weight_sparsity is packed"),
        (
            {
                "model": tiny.model(
                    dataclasses.replace(
                        FORWARD, projection=BlockSparseLowRankProjection(block=16, rank=2, permutation="learned")
                    ),
                    d_model=32,
                    layers=1,
                ),
                "weight_sparsity": Packed(algorithm=MagnitudeBlocks()),
            },
            r"algorithm = 'MagnitudeBlocks' .* where the order of inputs is learned",
        ),
        (
            {"model": tiny.model(MoEFeedForward(experts=4, hidden=32, projection=LEARNED), d_model=32, layers=1)},
            r"permutation = 'learned' .* experts",
        ),
    ],
    ids=["nobody learns it", "companion", "experts"],
)
def test_what_cannot_learn_an_order_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recipe = Recipe(model=MODEL, weight_sparsity=Packed())
        open_session(validate(dataclasses.replace(recipe, **changes)), jax.devices()[:1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "execution"), [(SETBlocks(), "unrolled"), (RigLBlocks(), "scanned")], ids=["set", "rigl, stacked"]
)
def test_a_model_learns_its_orders_and_resumes_to_the_bit(algorithm, execution, tmp_path, monkeypatch) -> None:
    """16 steps: topology at 3, 6, 9, looks at 4 and 8, all hard after 12; stopped after 8; then the run goes on without soft matrices."""
    tiny.corpus(tmp_path / "text")
    packed = Packed(
        algorithm=algorithm, schedule=Periodic(every=3, drop=0.5), shuffle=Shuffle(every=4, end=0.75, threshold=0.02)
    )
    model = dataclasses.replace(MODEL, vocab_size=264, layers=2, execution=execution)
    recipe = tiny.recipe(tmp_path, model=model, weight_sparsity=packed, validation__every=0, train__steps=16)
    recipe = validate(dataclasses.replace(recipe, checkpoint=dataclasses.replace(recipe.checkpoint, every=8)))
    assert account(recipe.model, 32).parameters == define(recipe.model).parameters()
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    pretrain(recipe, straight, monkeypatch)
    shutil.copytree(straight, stopped)
    shutil.rmtree(stopped / "checkpoints" / "16")
    assert train(recipe, stopped) == 0
    end, again = (read_checkpoint(run / "checkpoints", 16).state for run in (straight, stopped))
    tiny.assert_same(end, again)
    rows = read_rows(straight / "metrics.jsonl", "train")
    hardened = [row["sparsity/feed_forward.gate/hardened"] for row in rows]
    assert hardened[11] == [0.0, 0.0] and hardened[12] == [1.0, 1.0]
    soft = [row["sparsity/feed_forward.gate/soft_order"][0] for row in rows]
    assert soft[0] > 0.1 and soft[-1] == 0.0
    assert rows[-1]["loss"] < rows[0]["loss"]
    params, state = flatten(end["params"]), flatten(end["model_state"])
    path = "blocks.1.feed_forward.gate"
    order = np.asarray(state[f"{path}.permutation"])
    np.testing.assert_array_equal(params[f"{path}.soft"], permutation_matrix(jnp.asarray(order)))

    kept = dataclasses.replace(FORWARD, projection=dataclasses.replace(LEARNED, permutation="random"))
    onward = dataclasses.replace(
        recipe,
        model=dataclasses.replace(model, pattern=(kept,)),
        weight_sparsity=Recipe().weight_sparsity,
        start_from=StartFrom(run=str(straight), convert=True),
    )
    begun = starting_point(open_session(validate(onward), jax.devices()[:1]))[0]
    found = flatten(begun.params)
    assert not any(name.endswith(".soft") for name in found)
    if execution == "unrolled":
        np.testing.assert_array_equal(found[f"{path}.values"], params[f"{path}.values"])
        np.testing.assert_array_equal(flatten(begun.model_state)[f"{path}.permutation"], order)
