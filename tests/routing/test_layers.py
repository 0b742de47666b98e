"""Layers around routers: experts that compute nothing, Soft MoE, hash routers without weights, frozen routers in a step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from sparse_lm.accounting import account
from sparse_lm.layers.feed_forward import FeedForward, TokenInfo
from sparse_lm.layers.parameter import map_leaves
from sparse_lm.model.definition import define, token_info
from sparse_lm.routing.dispatch import dispatch_reference
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.routing.hash_router import HashRouter
from sparse_lm.routing.plan import dense_mask
from sparse_lm.routing.router import RouterInputs
from sparse_lm.routing.soft_moe import SoftMoEFeedForward
from sparse_lm.routing.top_k import TopKRouter
from sparse_lm.routing.zero_computation import ZeroComputation
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.state import initial_state
from sparse_lm.train.step import Train, build_step

B, L, D = 2, 6, 16
ARRAYS = tiny.batch((3, 2), (6,), length=L)
INFO = TokenInfo(ARRAYS["tokens_BL"], ARRAYS["positions_BL"], ARRAYS["segments_BL"], None)
X_BLD = np.random.default_rng(0).normal(size=(B, L, D)).astype(np.float32)


def values_of(config: FeedForward):
    """(graph, random values) of a layer."""
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(D)))
    normal = np.random.default_rng(1).normal
    return graph, map_leaves(lambda _, leaf: normal(size=leaf.shape).astype(np.float32), nnx.to_pure_dict(state))


@pytest.mark.slow
def test_experts_that_compute_nothing_are_columns_of_the_mask() -> None:
    extra = ZeroComputation(identity=1, zero=1, constant=2)
    config = MoEFeedForward(
        experts=2, hidden=8, activation="relu_squared", router=TopKRouter(k=2), zero_computation=extra
    )
    graph, values = values_of(config)

    def fast(values, x_BLD):
        y_BLD, aux = nnx.merge(graph, values)(x_BLD, INFO)
        return jnp.sum(y_BLD * np.arange(D)), (y_BLD, aux.metrics)

    def slow(values, x_BLD):
        layer = nnx.merge(graph, values)
        inputs = RouterInputs(INFO.tokens_BL, INFO.segments_BL > 0, INFO.segments_BL, None)
        mask_TE = dense_mask(layer.router(x_BLD, inputs).plan).reshape(B * L, 6)
        x_TD = x_BLD.reshape(-1, D)
        y_TD = dispatch_reference(x_TD, mask_TE[None, :, :2], layer.experts)
        # experts 2: the input, 3: zero, 4 and 5: a mixture of the input and a vector
        y_TD = y_TD + mask_TE[:, 2:3] * x_TD
        for i in range(2):
            logits_T2 = x_TD @ layer.zero_computation.mixture[...][:, 2 * i : 2 * i + 2]
            share_T2 = jax.nn.softmax(logits_T2, axis=-1)
            own_TD = share_T2[:, :1] * x_TD + share_T2[:, 1:] * layer.zero_computation.constant[...][i]
            y_TD = y_TD + mask_TE[:, 4 + i, None] * own_TD
        return jnp.sum(y_TD.reshape(X_BLD.shape) * np.arange(D)), (y_TD.reshape(X_BLD.shape), mask_TE)

    results = [tiny.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(values, X_BLD) for f in (fast, slow)]
    ((_, (y, metrics)), grads), ((_, (expected, mask_TE)), expected_grads) = results
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)
    tiny.assert_close(grads[0], expected_grads[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads[1], expected_grads[1], rtol=1e-4, atol=1e-3)
    # Only experts that compute count as computed.
    computed = (np.asarray(mask_TE)[:, :2] > 0).sum()
    assert [float(v) for v in metrics["experts_per_token"]] == [computed, 11]
    np.testing.assert_array_equal(metrics["load"][0], (np.asarray(mask_TE) > 0).sum(0))


def test_soft_moe_is_its_equations() -> None:
    config = SoftMoEFeedForward(experts=2, slots=3, hidden=8, activation="relu_squared")
    graph, values = values_of(config)
    y_BLD, aux = tiny.jit(lambda values, x_BLD: nnx.merge(graph, values)(x_BLD, INFO))(values, X_BLD)
    phi_DN, scale = values["router"]["weight"], values["router"]["scale"]
    for b in range(B):
        valid = ARRAYS["segments_BL"][b] > 0
        x = X_BLD[b][valid].astype(np.float64)
        unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
        logits = unit @ (scale * phi_DN / np.linalg.norm(phi_DN, axis=0))
        dispatch = np.exp(logits) / np.exp(logits).sum(0)
        combine = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        slots = dispatch.T @ x
        out = np.concatenate(
            [
                np.square(np.maximum(slots[3 * e : 3 * e + 3] @ values["gate"]["weight"][e], 0))
                @ values["down"]["weight"][e]
                for e in range(2)
            ]
        )
        np.testing.assert_allclose(np.asarray(y_BLD)[b][valid], combine @ out, rtol=1e-3, atol=1e-3)
        assert (np.asarray(y_BLD)[b][~valid] == 0).all()
    # 2 experts x 3 slots in each of two groups, for 11 tokens
    assert [float(v) for v in aux.metrics["experts_per_token"]] == [12, 11]
    assert float(aux.metrics["load"][0].sum()) == pytest.approx(11, rel=1e-5)


@pytest.mark.parametrize("name", ["soft_moe", "hash"])
def test_soft_moe_looks_ahead_by_gradient_and_says_so(name) -> None:
    soft = SoftMoEFeedForward(experts=2, slots=2, hidden=4, activation="relu_squared")
    config = {
        "soft_moe": soft,
        "hash": MoEFeedForward(experts=2, hidden=4, activation="relu_squared", router=HashRouter()),
    }[name]
    graph, values = values_of(config)
    info = TokenInfo(*(a[1:] for a in INFO[:3]), None)
    jacobian = tiny.jit(jax.jacrev(lambda x_BLD: nnx.merge(graph, values)(x_BLD, info)[0][0, :, 0]))(X_BLD[1:])
    depends_LL = np.abs(np.asarray(jacobian)[:, 0]).max(-1) > 0
    looks_ahead = bool(np.triu(depends_LL, 1).any())
    assert looks_ahead is (name == "soft_moe")
    if looks_ahead:
        assert config.causal is False and "NOT CAUSAL" in (type(config).__doc__ or "")


def test_a_layer_without_router_weights_has_none_in_tree_and_account() -> None:
    model = tiny.model(MoEFeedForward(experts=4, hidden=8, router=HashRouter(k=2)), layers=1)
    definition = define(model)
    assert "router" not in definition.shapes["blocks"]["0"]["feed_forward"]
    assert account(model, 16).parameters == definition.parameters()


@pytest.mark.parametrize(
    "feed_forward",
    [
        SoftMoEFeedForward(experts=2, slots=3, hidden=8),
        MoEFeedForward(experts=2, hidden=8, zero_computation=ZeroComputation(identity=1, zero=1, constant=2)),
    ],
    ids=["soft_moe", "zero_computation"],
)
def test_the_account_adds_up_to_the_tree(feed_forward) -> None:
    model = tiny.model(feed_forward, layers=1)
    assert account(model, 16).parameters == define(model).parameters()


def test_nominal_and_measured_experts_per_token() -> None:
    moe = MoEFeedForward(experts=6, hidden=8, router=TopKRouter(k=2), zero_computation=ZeroComputation(zero=2))
    one = 3 * 16 * 8 * 2  # three products of 16 x 8, two operations each
    assert moe.cost(16)["experts"][2] == 2 * 6 / 8 * one  # even loads: 6 of 8 choices compute
    assert moe.cost(16, 0.5)["experts"][2] == 0.5 * one


FROZEN = dataclasses.replace(
    tiny.MOE, activation="relu_squared", router=TopKRouter(k=2, bias_rate=0.5, balance_over="step", frozen=True)
)


@pytest.mark.slow
def test_a_step_leaves_a_frozen_router_as_it_is_and_starts_from_its_own_state() -> None:
    definition = define(tiny.model(FROZEN, layers=1))
    optimizer = AdamW(learning_rate=0.01, weight_decay=0.5)
    start = tiny.jit(lambda: initial_state(definition, optimizer.build(definition.dims), 0, with_ema=False))()
    state = start.model_state["blocks"]["0"]["feed_forward"]["router"]
    assert state["fraction"].tolist() == [0.25] * 4 and state["bias"].tolist() == [0] * 4
    after, _ = tiny.jit(build_step(definition, optimizer, Train(steps=4)))(start, tiny.full_batch(2), jnp.float32(1))
    before_router, router = (s.params["blocks"]["0"]["feed_forward"]["router"] for s in (start, after))
    tiny.assert_same(router, before_router)
    tiny.assert_same(after.model_state, start.model_state)
    assert (np.asarray(after.params["head"]) != np.asarray(start.params["head"])).any()


@functools.cache
def recorded():
    """A routed model of two blocks, its losses and its choices."""
    moe = dataclasses.replace(tiny.MOE, activation="relu_squared", router=TopKRouter(k=2, bias_rate=0.5))
    definition, params, state = tiny.materialized(tiny.model(moe, execution="scanned"))
    losses = tiny.jit(lambda params, replay: definition.token_losses(params, state, BATCH, replay))
    return state, params, losses


BATCH = tiny.batch((10, 6), (9,))


def test_a_model_records_its_routes_and_replays_them() -> None:
    _, params, losses = recorded()
    expected, aux = losses(params, None)
    (name,) = aux.choices
    expert_BLR = aux.choices[name]["feed_forward"]
    assert name == "0_to_1" and expert_BLR.shape == (2, 2, tiny.LENGTH, 2)  # layers, B, L, R
    assert (np.asarray(expert_BLR)[:, BATCH["segments_BL"] == 0] == 4).all()
    again, aux_again = losses(params, aux.choices)
    np.testing.assert_allclose(again, expected, rtol=1e-5, atol=1e-6)
    tiny.assert_same(aux_again.choices, aux.choices)
    # Another model under the same routes: the choices stay, the weights are its own.
    other = map_leaves(lambda path, leaf: leaf * 1.5 if path.endswith("router.weight") else leaf, params)
    moved, aux_moved = losses(other, jax.tree.map(lambda a: (a + 1) % 4, aux.choices))
    valid = BATCH["segments_BL"] > 0
    np.testing.assert_array_equal(
        np.asarray(aux_moved.choices[name]["feed_forward"])[:, valid], (np.asarray(expert_BLR)[:, valid] + 1) % 4
    )
    assert (np.asarray(moved) != np.asarray(expected)).any()


def test_evaluation_returns_no_state() -> None:
    """What evaluation computes has no room for a change of router state: losses and a report, nothing else."""
    state, params, program = recorded()
    before = {path: np.array(leaf) for path, leaf in tiny.flatten(state).items()}
    losses, aux = program(params, None)
    again, _ = program(params, None)
    np.testing.assert_array_equal(losses, again)
    assert set(aux._fields) == {"objective", "metrics", "statistics", "choices", "gates"}
    tiny.assert_same(state, before)
    assert token_info(BATCH).key is None  # and nothing is drawn
