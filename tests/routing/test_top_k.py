"""The top-k router by hand: plans, losses and the selection bias of a few tokens and three experts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparse_lm.routing import losses
from sparse_lm.routing.losses import balance_loss, z_loss
from sparse_lm.routing.measure import chosen_mask
from sparse_lm.routing.plan import cost, counts, dense_mask, density, picture
from sparse_lm.routing.router import RouterInputs, Routing
from sparse_lm.routing.top_k import TopKRouter

# Probabilities of two tokens over three experts, one routing group.
PROBABILITY_GSE = np.array([[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]], np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _route(router: TopKRouter, logits_GSE, valid_GS, state) -> Routing:
    inputs = RouterInputs(valid_GS.astype(jnp.int32), valid_GS, valid_GS.astype(jnp.int32), None)
    return router.plan(logits_GSE, inputs, state)


def route(router: TopKRouter, logits_GSE, valid_GS=None, bias=None) -> Routing:
    logits_GSE = jnp.asarray(logits_GSE, jnp.float32)
    valid_GS = np.ones(logits_GSE.shape[:2], bool) if valid_GS is None else np.asarray(valid_GS)
    return _route(router, logits_GSE, valid_GS, {} if bias is None else {"bias": jnp.asarray(bias, jnp.float32)})


def mean(metric) -> float:
    total, count = metric
    return float(total) / float(count)


def test_softmax_plan_by_hand() -> None:
    routing = route(TopKRouter(k=2), np.log(PROBABILITY_GSE))
    # token 0: experts 0 and 1, weights 0.5 / (0.5 + 0.3) and 0.3 / 0.8; token 1: experts 1 and 2, weights 0.6 / 0.9, 0.3 / 0.9
    assert routing.plan.token_GA.tolist() == [[0, 0, 1, 1]]
    assert routing.plan.expert_GA.tolist() == [[0, 1, 1, 2]]
    np.testing.assert_allclose(routing.plan.weight_GA, [[0.625, 0.375, 2 / 3, 1 / 3]], rtol=1e-6)
    assert routing.plan.slot_GSR.tolist() == [[[0, 1], [2, 3]]]
    np.testing.assert_allclose(dense_mask(routing.plan), [[[0.625, 0.375, 0], [0, 2 / 3, 1 / 3]]], rtol=1e-6)
    assert counts(routing.plan).tolist() == [1, 2, 1]
    assert float(density(routing.plan)) == pytest.approx(4 / 6)  # 4 of 2 x 3 pairs
    assert float(cost(routing.plan, 10.0)) == 40.0
    np.testing.assert_array_equal(picture(routing.plan), np.asarray(dense_mask(routing.plan)[0]).T)


def test_losses_and_metrics_by_hand() -> None:
    router = TopKRouter(k=2, balance_coefficient=0.5, z_coefficient=0.25)
    logits = np.log(PROBABILITY_GSE) + np.array([[[0.0], [2.0]]])  # the second token's log partition is 2
    routing = route(router, logits)
    # f = (1, 2, 1) / 4; P = mean over tokens = (0.3, 0.45, 0.25); 3 * (0.075 + 0.225 + 0.0625) = 1.0875
    assert mean(routing.metrics["balance_loss"]) == pytest.approx(1.0875, rel=1e-6)
    # squared log partitions: 0 and 4
    assert [float(v) for v in routing.metrics["z_loss"]] == pytest.approx([4.0, 2.0], rel=1e-5)
    assert float(routing.objective["groups"]) == pytest.approx(0.5 * 1.0875, rel=1e-6)
    assert float(routing.objective["tokens"]) == pytest.approx(0.25 * 4.0, rel=1e-5)
    assert mean(routing.metrics["top_probability"]) == pytest.approx((0.5 + 0.6) / 2)
    entropy = -sum(p * math.log(p) for p in PROBABILITY_GSE.ravel().tolist()) / 2
    assert mean(routing.metrics["entropy"]) == pytest.approx(entropy, rel=1e-5)
    assert routing.metrics["load"][0].tolist() == [1, 2, 1] and float(routing.metrics["load"][1]) == 4


def test_sigmoid_scores_renormalised_and_scaled() -> None:
    # sigmoid(0) = 1/2, sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4
    logits = [[[0.0, math.log(3), -math.log(3)]]]
    plan = route(TopKRouter(k=2, scores="sigmoid"), logits).plan
    assert plan.expert_GA.tolist() == [[1, 0]]
    np.testing.assert_allclose(plan.weight_GA, [[0.75 / 1.25, 0.5 / 1.25]], rtol=1e-6)
    plan = route(TopKRouter(k=2, scores="sigmoid", scale=2.5), logits).plan
    np.testing.assert_allclose(plan.weight_GA, [[1.5, 1.0]], rtol=1e-6)
    plan = route(TopKRouter(k=2, scores="sigmoid", renormalize=False), logits).plan
    np.testing.assert_allclose(plan.weight_GA, [[0.75, 0.5]], rtol=1e-6)
    # The balance loss uses scores that sum to one: P = (1/3, 1/2, 1/6), f = (1/2, 1/2, 0): 3 * (1/6 + 1/4) = 1.25
    assert mean(route(TopKRouter(k=2, scores="sigmoid"), logits).metrics["balance_loss"]) == pytest.approx(
        1.25, rel=1e-6
    )


def test_softmax_without_renormalisation_keeps_the_probabilities() -> None:
    plan = route(TopKRouter(k=2, renormalize=False), np.log(PROBABILITY_GSE)).plan
    np.testing.assert_allclose(plan.weight_GA, [[0.5, 0.3, 0.6, 0.3]], rtol=1e-6)


def test_ties_go_to_the_lower_expert() -> None:
    assert route(TopKRouter(k=2), np.zeros((1, 3, 4))).plan.expert_GA.tolist() == [[0, 1, 0, 1, 0, 1]]


def test_the_bias_chooses_and_does_not_weigh() -> None:
    plan = route(TopKRouter(k=1, renormalize=False, bias_rate=0.1), np.log(PROBABILITY_GSE), bias=[0.0, 0.0, 0.35]).plan
    # choice: token 0: (0.5, 0.3, 0.55) -> expert 2 with its own probability 0.2; token 1: (0.1, 0.6, 0.65) -> expert 2
    assert plan.expert_GA.tolist() == [[2, 2]]
    np.testing.assert_allclose(plan.weight_GA, [[0.2, 0.3]], rtol=1e-6)


def test_no_gradient_reaches_the_bias() -> None:
    router = TopKRouter(k=1, bias_rate=0.1)

    def objective(bias):
        routing = route(router, np.log(PROBABILITY_GSE), bias=bias)
        return jnp.sum(routing.plan.weight_GA) + routing.objective["groups"]

    assert jax.grad(objective)(jnp.array([0.1, 0.2, 0.3])).tolist() == [0, 0, 0]


def test_bias_update_by_hand() -> None:
    router = TopKRouter(bias_rate=0.1)
    assert router.initial_state(3)["bias"].tolist() == [0, 0, 0]
    # loads 4, 2, 0: mean 2; too much -> -0.1, equal -> 0, too little -> +0.1; the second layer is balanced
    counts_LE = jnp.array([[4.0, 2.0, 0.0], [2.0, 2.0, 2.0]])
    statistics = {"wanted": counts_LE, "tokens": jnp.array([3.0, 3.0])}
    state = router.advance({"bias": jnp.array([[0.5, 0.5, 0.5], [0.0, 0.0, 0.0]])}, statistics)
    np.testing.assert_allclose(state["bias"], [[0.4, 0.5, 0.6], [0, 0, 0]], rtol=1e-6)
    assert TopKRouter().initial_state(3) == {} == TopKRouter().advance({}, statistics)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_padding_appears_nowhere(scores) -> None:
    router = TopKRouter(k=2, scores=scores)
    logits = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    valid = np.array([[True, True, True, False, False], [True, False, True, True, False]])
    routing = route(router, logits, valid)
    dead = ~np.repeat(valid, 2, axis=1)
    assert (np.asarray(routing.plan.expert_GA)[dead] == 4).all()
    assert (np.asarray(routing.plan.weight_GA)[dead] == 0).all()
    assert (np.asarray(dense_mask(routing.plan))[~valid] == 0).all()
    assert float(counts(routing.plan).sum()) == 2 * valid.sum()
    assert float(routing.metrics["z_loss"][1]) == float(routing.metrics["entropy"][1]) == valid.sum()
    # Other logits at padding change no number, and no gradient reaches them.
    changed = route(router, np.where(valid[..., None], logits, 7.0 * logits + 1), valid)
    for before, after in zip(jax.tree.leaves(routing), jax.tree.leaves(changed)):
        np.testing.assert_array_equal(before, after)
    grad = jax.grad(lambda x: sum(jax.tree.leaves(route(router, x, valid).objective)))(jnp.asarray(logits))
    assert (np.asarray(grad)[~valid] == 0).all() and (np.asarray(grad)[valid] != 0).any()


def test_a_group_of_padding_counts_as_no_group() -> None:
    logits = np.random.default_rng(1).normal(size=(2, 3, 4))
    both = route(TopKRouter(k=1), logits, [[True] * 3, [False] * 3]).metrics["balance_loss"]
    alone = route(TopKRouter(k=1), logits[:1]).metrics["balance_loss"]
    assert float(both[1]) == 1.0
    assert float(both[0]) == pytest.approx(float(alone[0]), rel=1e-6)


@pytest.mark.parametrize(("experts", "k"), [(4, 1), (4, 2), (8, 3)])
def test_balance_loss_is_one_when_uniform(experts: int, k: int) -> None:
    # Token s takes experts s .. s + k - 1 (mod E): every load is equal; probabilities are uniform.
    expert_GSK = (jnp.arange(experts)[:, None] + jnp.arange(k))[None] % experts
    valid_GS = jnp.ones((1, experts), bool)
    probability_GSE = jnp.full((1, experts, experts), 1 / experts)
    chosen_GSE = chosen_mask(expert_GSK, experts)
    assert float(balance_loss(probability_GSE, chosen_GSE, valid_GS)) == pytest.approx(1.0, rel=1e-6)


def test_balance_loss_is_the_number_of_experts_when_all_goes_to_one() -> None:
    routing = route(TopKRouter(k=1), np.array([[[50.0, 0, 0, 0, 0]] * 6]))
    assert mean(routing.metrics["balance_loss"]) == pytest.approx(5.0, rel=1e-6)


def test_balance_loss_is_a_mean_over_groups() -> None:
    logits = np.random.default_rng(2).normal(size=(3, 4, 4))
    together = float(route(TopKRouter(k=2), logits).metrics["balance_loss"][0])
    apart = sum(float(route(TopKRouter(k=2), group[None]).metrics["balance_loss"][0]) for group in logits)
    assert together == pytest.approx(apart, rel=1e-6)


def test_z_loss_by_hand() -> None:
    # ln(1 + 3) = ln 4 squared; the second token is padding
    logits = jnp.log(jnp.array([[[1.0, 3.0], [5.0, 5.0]]]))
    assert float(z_loss(logits, jnp.array([[True, False]]))) == pytest.approx(math.log(4) ** 2, rel=1e-6)


VALID_GS = jnp.ones((1, 2), bool)


def test_importance_by_hand() -> None:
    # mean probabilities (0.3, 0.45, 0.25), their mean 1/3: variance (0.0333^2 + 0.1167^2 + 0.0833^2) / 3 = 0.0072222; times 9
    assert float(losses.importance_loss(PROBABILITY_GSE, VALID_GS)) == pytest.approx(0.065, rel=1e-5)
    one = jnp.array([[[1.0, 0, 0, 0]]])  # all on one of four: variance 3/16, squared mean 1/16
    assert float(losses.importance_loss(one, VALID_GS[:, :1])) == pytest.approx(3.0, rel=1e-5)


def test_a_group_of_padding_has_no_importance_and_no_gradient() -> None:
    value, gradient = jax.value_and_grad(losses.importance_loss)(PROBABILITY_GSE, jnp.zeros_like(VALID_GS))
    assert float(value) == 0 and (np.asarray(gradient) == 0).all()


def test_entropies_by_hand() -> None:
    local = -sum(p * math.log(p) for p in PROBABILITY_GSE.ravel().tolist())
    assert float(losses.local_entropy_loss(PROBABILITY_GSE, VALID_GS)) == pytest.approx(local, rel=1e-5)
    mean = sum(p * math.log(p) for p in (0.3, 0.45, 0.25))
    assert float(losses.global_entropy_loss(PROBABILITY_GSE, VALID_GS)) == pytest.approx(mean, rel=1e-5)


def test_balance_over_sequences_is_the_mean_of_theirs() -> None:
    # Two tokens, each its own sequence, one expert each: E * f * P = 3 * 0.5 and 3 * 0.6
    chosen_GSE = jnp.array([[[1.0, 0, 0], [0, 1, 0]]])
    found = float(losses.sequence_balance_loss(PROBABILITY_GSE, chosen_GSE, VALID_GS, 2))
    assert found == pytest.approx((1.5 + 1.8) / 2, rel=1e-6)
    one = float(losses.sequence_balance_loss(PROBABILITY_GSE, chosen_GSE, VALID_GS, 1))
    assert one == pytest.approx(float(losses.balance_loss(PROBABILITY_GSE, chosen_GSE, VALID_GS)), rel=1e-6)
    half = float(losses.sequence_balance_loss(PROBABILITY_GSE, chosen_GSE, jnp.array([[True, False]]), 2))
    assert half == pytest.approx(1.5, rel=1e-6)  # a sequence of padding counts as none


def test_balance_over_the_step_uses_the_fractions_of_the_step_before() -> None:
    # f = (1/2, 1/4, 1/4): 3 * ((0.25 + 0.075 + 0.05) + (0.05 + 0.15 + 0.075)) = 3 * 0.65
    router = TopKRouter(k=1, balance_over="step", balance_coefficient=0.5)
    state = {"fraction": jnp.array([0.5, 0.25, 0.25])}
    inputs = RouterInputs(VALID_GS.astype(jnp.int32), VALID_GS, VALID_GS.astype(jnp.int32), None)
    routing = tiny.jit(router.plan)(jnp.log(PROBABILITY_GSE), inputs, state)
    assert [float(v) for v in routing.metrics["balance_loss"]] == pytest.approx([1.95, 2.0], rel=1e-6)
    assert float(routing.objective["tokens"] - 1e-3 * routing.metrics["z_loss"][0]) == pytest.approx(0.975, rel=1e-5)
    # The next step's fractions: experts 0 and 1 once each.
    assert router.advance(state, routing.statistics)["fraction"].tolist() == [0.5, 0.5, 0]
    assert router.initial_state(4)["fraction"].tolist() == [0.25] * 4


@pytest.mark.parametrize("order", ["position", "choice", "score"])
def test_a_capacity_that_takes_every_token_changes_nothing(order) -> None:
    """Capacity factor E / k: every expert takes all S tokens, even if all choose it."""
    logits_GSE = np.random.default_rng(4).normal(size=(2, 5, 3)).astype(np.float32)
    logits_GSE[0, :, 1] = 9.0
    limited = route(TopKRouter(k=2, capacity_factor=1.5, capacity_order=order), logits_GSE)
    free = route(TopKRouter(k=2), logits_GSE)
    assert float(limited.plan.dropped) == 0
    tiny.assert_same(limited.plan, free.plan)
