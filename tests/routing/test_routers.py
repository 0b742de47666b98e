"""Plans of every router by hand: a few tokens and experts, the arithmetic beside them. Top-k itself is in test_top_k.py."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparse_lm.config import ConfigError
from sparse_lm.routing.hash_router import HashRouter, mix
from sparse_lm.routing.plan import compacted, counts, dense_mask, plan_of_choices
from sparse_lm.routing.router import RouterInputs, Routing
from sparse_lm.routing.token_choice import (
    BatchPriorityRouter,
    BiasBalancedRouter,
    GroupLimitedRouter,
    GShardRouter,
    NoisyTopKRouter,
    RandomRouter,
    SinkhornRouter,
    SwitchRouter,
    UniformRouter,
)
from sparse_lm.routing.top_k import TopKRouter
from sparse_lm.routing.variable import (
    EDGES,
    ExpertChoiceRouter,
    ExpertThresholdRouter,
    ReMoERouter,
    quantile_of_counts,
)
from sparse_lm.routing.zero_computation import without_zero_computation

KEY = jax.random.key(1)


@functools.partial(tiny.jit, static_argnums=(0, 5))
def _route(router, logits_GSE, valid_GS, tokens_GS, state, train, key) -> Routing:
    inputs = RouterInputs(tokens_GS, valid_GS, valid_GS.astype(jnp.int32), key if train else None)
    return router.plan(logits_GSE, inputs, state)


def route(router, logits_SE, *, valid_S=None, tokens_S=None, state=None, train=False, key=KEY) -> Routing:
    """Routes one group."""
    logits_GSE = jnp.asarray(logits_SE, jnp.float32)[None]
    valid_S = np.ones(logits_GSE.shape[1], bool) if valid_S is None else np.asarray(valid_S)
    tokens_S = np.zeros(logits_GSE.shape[1], np.int32) if tokens_S is None else np.asarray(tokens_S, np.int32)
    state = {name: jnp.asarray(value, jnp.float32) for name, value in (state or {}).items()}
    return _route(router, logits_GSE, valid_S[None], tokens_S[None], state, train, key)


def mask(routing: Routing) -> np.ndarray:
    return np.asarray(dense_mask(routing.plan))[0]


def logit(probability) -> np.ndarray:
    probability = np.asarray(probability, np.float64)
    return np.log(probability) - np.log1p(-probability)


P = np.array([[0.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0.3, 0.1, 0.6]])
"""First and second choices: 0 then 1, 1 then 0, 2 then 0."""


def test_switch_weighs_its_one_expert_by_the_probability() -> None:
    np.testing.assert_allclose(mask(route(SwitchRouter(), np.log(P))), np.diag([0.5, 0.7, 0.6]), rtol=1e-6)
    x_GSD = jnp.ones((1, 3, 50))
    seen = np.asarray(SwitchRouter(jitter=0.1).observe(x_GSD, KEY))
    assert 0.9 <= seen.min() < 0.93 and 1.07 < seen.max() <= 1.1
    assert SwitchRouter().observe(x_GSD, None) is x_GSD is SwitchRouter(jitter=0.0).observe(x_GSD, KEY)


def test_noise_is_normal_with_the_softplus_of_the_second_half_as_its_deviation() -> None:
    clean, raw = np.log(P), np.array([[0.0, 1.0, -1.0]] * 3)
    logits = np.concatenate([clean, raw], axis=-1)
    np.testing.assert_allclose(
        mask(route(NoisyTopKRouter(k=1), logits)), [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    )  # no noise without a key
    noise = np.asarray(jax.random.normal(KEY, (1, 3, 3)))[0]
    noisy = clean + noise * np.log1p(np.exp(raw))
    best = np.argsort(-noisy, axis=-1)[:, :2]
    found = route(NoisyTopKRouter(k=2), logits, train=True)
    assert np.asarray(found.plan.expert_GA).reshape(3, 2).tolist() == best.tolist()
    exponentials = np.exp(np.take_along_axis(noisy, best, -1))  # a softmax over the best two
    weights = exponentials / exponentials.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(found.plan.weight_GA).reshape(3, 2), weights, rtol=1e-5)


def test_gshard_samples_the_second_choice() -> None:
    # shares of the best two: (0.6, 0.3) -> 2/3, 1/3: second taken with probability 2 * 1/3; (0.4, 0.4) -> 1/2, 1/2: always
    logits = np.log([[0.6, 0.3, 0.1], [0.4, 0.4, 0.2]])
    np.testing.assert_allclose(mask(route(GShardRouter(), logits)), [[2 / 3, 1 / 3, 0], [0.5, 0.5, 0]], rtol=1e-6)
    valid = jnp.ones((1, 2), bool)

    def one(key):
        inputs = RouterInputs(valid.astype(jnp.int32), valid, valid.astype(jnp.int32), key)
        return dense_mask(GShardRouter().plan(jnp.asarray(logits, jnp.float32)[None], inputs, {}).plan)[0]

    masks = np.asarray(tiny.jit(jax.vmap(one))(jax.random.split(KEY, 2000)))
    np.testing.assert_allclose(masks[:, 0, 0], 2 / 3, rtol=1e-6)  # weights do not depend on what was sampled
    np.testing.assert_allclose(np.unique(masks[:, 0, 1]), [0, 1 / 3], rtol=1e-6)
    # deviation of a mean of 2000: sqrt(2/9 / 2000) = 0.0105
    assert (masks[:, 0, 1] > 0).mean() == pytest.approx(2 / 3, abs=0.04)
    assert (masks[:, 1] > 0).tolist() == [[True, True, False]] * 2000


@pytest.mark.parametrize(
    ("order", "kept"),
    [
        # room for ceil(0.5 * 3 * 2 / 3) = 1. Token 0 takes 0 and 1; token 1 finds both full; token 2 gets 2
        ("position", [[0.625, 0.375, 0], [0, 0, 0], [0, 0, 2 / 3]]),
        # first choices all differ; every second choice finds its expert full
        ("choice", [[0.625, 0, 0], [0, 7 / 9, 0], [0, 0, 2 / 3]]),
    ],
)
def test_who_finds_room_under_a_capacity(order, kept) -> None:
    routing = route(TopKRouter(k=2, capacity_factor=0.5, capacity_order=order), np.log(P))
    np.testing.assert_allclose(mask(routing), kept, rtol=1e-6)
    assert float(routing.plan.dropped) == 3
    assert [float(value) for value in routing.metrics["dropped"]] == [3, 6]
    # Losses and the bias see what was wanted: 3, 2, 1
    assert routing.statistics["wanted"].tolist() == [3, 2, 1]


def test_batch_priority_serves_the_surest_token_first() -> None:
    logits = np.log([[0.5, 0.3, 0.2], [0.9, 0.05, 0.05], [0.6, 0.3, 0.1]])  # all want expert 0
    router = BatchPriorityRouter(k=1)  # room for 1.0 * 3 * 1 / 3 = 1
    assert mask(route(router, logits)).tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
    by_position = TopKRouter(k=1, capacity_factor=1.0)
    assert mask(route(by_position, logits)).tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_bias_balanced_is_sigmoid_top_k_with_a_bias() -> None:
    router = BiasBalancedRouter(k=1, renormalize=False)
    found = mask(route(router, logit([[0.6, 0.5]]), state={"bias": [0.0, 0.2]}))
    np.testing.assert_allclose(found, [[0, 0.5]], rtol=1e-6)  # 0.6 against 0.5 + 0.2, weighted 0.5
    assert router.initial_state(2)["bias"].tolist() == [0, 0]


@pytest.mark.parametrize(("by", "expected"), [("best_two", [0, 0, 0.6, 0.5]), ("best", [0.9, 0.1, 0, 0])])
def test_group_limited_routing_chooses_groups_first(by, expected) -> None:
    # groups (0.9, 0.1) and (0.6, 0.5): the best is 0.9, the best sum 0.6 + 0.5
    router = GroupLimitedRouter(k=2, group_score=by, bias_rate=0.0)
    found = mask(route(router, logit([[0.9, 0.1, 0.6, 0.5]])))
    np.testing.assert_allclose(found, [2.5 * np.array(expected) / sum(expected)], rtol=1e-6)


def test_sinkhorn_balances_in_training_and_is_greedy_in_evaluation() -> None:
    # A balanced plan [[a, 1 - a], [1 - a, a]] keeps the odds ratio exp(2 - 0 - 1 + 0) = e: a = 0.62, so token 1 moves to expert 1
    logits = np.array([[2.0, 0.0], [1.0, 0.0]])
    greedy = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    np.testing.assert_allclose(mask(route(SinkhornRouter(), logits)), [[greedy[0], 0], [greedy[1], 0]], rtol=1e-6)
    balanced = mask(route(SinkhornRouter(), logits, train=True))
    np.testing.assert_allclose(balanced, [[greedy[0], 0], [0, 0.5]], rtol=1e-6)  # sigmoid(0) = 1/2
    # Padding takes no part: alone, token 1 keeps its first choice.
    alone = mask(route(SinkhornRouter(), logits[::-1], valid_S=[True, False], train=True))
    assert (alone[1] == 0).all()


def test_forced_uniform_takes_experts_in_turn() -> None:
    found = route(UniformRouter(k=2), np.random.default_rng(0).normal(size=(6, 4)))
    assert found.plan.expert_GA.tolist() == [[0, 1, 2, 3] * 3]
    assert counts(found.plan).tolist() == [3, 3, 3, 3]


def test_random_experts_are_even_on_average_and_the_same_in_every_evaluation() -> None:
    logits = np.zeros((800, 4))
    found = route(RandomRouter(k=2), logits, train=True)
    np.testing.assert_allclose(counts(found.plan), 400, atol=60)  # deviation sqrt(800 / 4) = 14
    other = route(RandomRouter(k=2), logits, train=True, key=jax.random.key(2))
    assert (np.asarray(found.plan.expert_GA) != np.asarray(other.plan.expert_GA)).any()
    again = [np.asarray(route(RandomRouter(k=2), logits).plan.expert_GA) for _ in range(2)]
    np.testing.assert_array_equal(*again)


def test_hash_knows_the_token_id_alone() -> None:
    tokens = np.array([7, 3, 7, 4095])
    found = route(HashRouter(k=2), np.zeros((4, 8)), tokens_S=tokens)
    experts = np.asarray(found.plan.expert_GA).reshape(4, 2)
    assert experts[0].tolist() == experts[2].tolist() and len({tuple(row) for row in experts.tolist()}) > 1
    np.testing.assert_array_equal(np.asarray(found.plan.weight_GA), 0.5)

    def mixed(x: int) -> int:  # the same in plain integers
        x = (x + 0x9E3779B9) % 2**32
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) % 2**32
        x = ((x ^ (x >> 15)) * 0x735A2D97) % 2**32
        return x ^ (x >> 15)

    assert int(mix(jnp.uint32(12345))) == mixed(12345)
    ranked = sorted(range(8), key=lambda e: -(mixed((7 * 8 + e + mixed(0)) % 2**32) >> 1))
    assert experts[0].tolist() == ranked[:2]
    many = route(HashRouter(k=1), np.zeros((4096, 8)), tokens_S=np.arange(4096))
    np.testing.assert_allclose(counts(many.plan), 512, atol=100)  # deviation sqrt(4096 * 7 / 64) = 21
    assert [float(v) for v in many.objective.values()] == [0, 0]


SCORE = np.array([[0.9, 0.95], [0.8, 0.1], [0.3, 0.2], [0.4, 0.7]])


def test_expert_choice_takes_the_best_tokens_of_each_expert() -> None:
    # one expert a token on average: each takes 1 * 4 / 2 = 2. Expert 0: tokens 0 and 1; expert 1: tokens 0 and 3; token 2 has none
    router = ExpertChoiceRouter(k=1, scores="sigmoid")
    found = route(router, logit(SCORE))
    np.testing.assert_allclose(mask(found), [[0.9, 0.95], [0.8, 0], [0, 0], [0, 0.7]], rtol=1e-6)
    assert [float(v) for v in found.metrics["experts_per_token"]] == [4, 4]
    limited = route(ExpertChoiceRouter(k=1, scores="sigmoid", most_experts=1), logit(SCORE))
    np.testing.assert_allclose(mask(limited), [[0, 0.95], [0.8, 0], [0, 0], [0, 0.7]], rtol=1e-6)
    # three valid tokens: each takes ceil(1 * 3 / 2) = 2 of them
    padded = route(router, logit(SCORE), valid_S=[False, True, True, True])
    np.testing.assert_allclose(mask(padded), [[0, 0], [0.8, 0], [0, 0.2], [0.4, 0.7]], rtol=1e-6)
    softmax = route(ExpertChoiceRouter(k=1), np.log([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]]))
    np.testing.assert_allclose(mask(softmax), [[0.9, 0], [0.8, 0], [0, 0.7], [0, 0.6]], rtol=1e-6)


def test_expert_threshold_compares_each_token_with_a_number() -> None:
    logits = np.array([[0.5, 2.0], [-1.0, 0.5], [1.0, -1.0]])
    state = {"threshold": [0.0, 1.0], "updates": 3.0}
    s = 1 / (1 + np.exp(-logits))
    found = route(ExpertThresholdRouter(k=1), logits, state=state)
    np.testing.assert_allclose(mask(found), [[s[0, 0], s[0, 1]], [0, 0], [s[2, 0], 0]], rtol=1e-6)
    # room for ceil(0.6 * 3) = 2 rows: the third choice, of the last token, is dropped
    short = route(ExpertThresholdRouter(k=1, rows_per_token=0.6), logits, state=state)
    np.testing.assert_allclose(mask(short), [[s[0, 0], s[0, 1]], [0, 0], [0, 0]], rtol=1e-6)
    assert short.plan.expert_GA.tolist() == [[0, 1]] and float(short.plan.dropped) == 1
    assert short.expert_GSR.tolist() == [[[0, 1], [2, 2], [2, 2]]]


def test_a_threshold_follows_the_quantile_of_whole_steps() -> None:
    # 8 tokens at -3.5, -2.5, ..., 3.5; half of them is wanted of each of two experts (K = 1): any number from -0.5 to 0.5 does.
    # Expert 1's logits are one higher.
    logits = np.arange(8)[:, None] - 3.5 + np.array([0.0, 1.0])
    router = ExpertThresholdRouter(k=1, decay=0.75)
    start = {"threshold": [0.0, 0.0], "updates": 0.0}
    found = route(router, logits, state=start)
    one = router.advance({name: jnp.asarray(v, jnp.float32) for name, v in start.items()}, found.statistics)
    low, high = float(one["threshold"][0]), float(one["threshold"][1])
    assert -0.5 <= low <= 0.5 and 0.5 <= high <= 1.5 and float(one["updates"]) == 1
    again = route(router, logits, state=one)
    assert counts(again.plan).tolist() == [4, 4]
    # The same tokens two higher: the second update counts half, later ones a quarter (1 - decay).
    shifted = route(router, logits + 2, state=one)
    two = router.advance(one, shifted.statistics)
    quantile = quantile_of_counts(shifted.statistics["above"], 4.0)
    np.testing.assert_allclose(two["threshold"], one["threshold"] + 0.5 * (quantile - one["threshold"]), rtol=1e-6)
    late = {**one, "updates": jnp.float32(50)}
    np.testing.assert_allclose(
        router.advance(late, shifted.statistics)["threshold"],
        one["threshold"] + 0.25 * (quantile - one["threshold"]),
        rtol=1e-6,
    )
    # Statistics add over pieces of a step; a step of padding changes nothing.
    pieces = [route(router, part, state=start).statistics for part in (logits[:3], logits[3:])]
    np.testing.assert_array_equal(pieces[0]["above"] + pieces[1]["above"], found.statistics["above"])
    empty = route(router, logits, valid_S=[False] * 8, state=start).statistics
    assert {name: value.tolist() for name, value in router.advance(one, empty).items()} == {
        name: value.tolist() for name, value in one.items()
    }


def test_a_quantile_is_linear_between_edges() -> None:
    # 10 tokens above edge 60, 6 above edge 61: for 7 go 3/4 of the way
    above = np.where(np.arange(len(EDGES)) <= 60, 10.0, 6.0)
    expected = EDGES[60] + 0.75 * (EDGES[61] - EDGES[60])
    assert float(quantile_of_counts(jnp.asarray(above), 7.0)) == pytest.approx(expected, rel=1e-5)


def test_remoe_takes_every_positive_logit() -> None:
    router = ReMoERouter(k=2)
    state = {"l1": 0.5}
    found = route(router, [[1.0, -1.0, 2.0]], state=state)
    assert mask(found).tolist() == [[1, 0, 2]]
    # fractions E / k * (1, 0, 1) = (1.5, 0, 1.5); norm 1.5 * 1 + 1.5 * 2 = 4.5; times the coefficient
    assert float(found.objective["groups"]) == pytest.approx(0.5 * 4.5)
    for wanted, factor in ((3.0, 1.2), (1.0, 1 / 1.2), (2.0, 1.0)):
        statistics = {"wanted": jnp.array([wanted, 0.0, 0.0]), "tokens": jnp.array(1.0)}
        assert float(router.advance({"l1": jnp.float32(0.5)}, statistics)["l1"]) == pytest.approx(
            0.5 * factor, rel=1e-6
        )
    assert float(router.initial_state(3)["l1"]) == pytest.approx(1e-8)
    nothing = route(router, [[-1.0, -1.0, -2.0]], state=state)
    assert (mask(nothing) == 0).all() and math.isfinite(float(nothing.metrics["entropy"][0]))


def test_compacting_keeps_the_first_live_rows() -> None:
    # E = 2 marks unused slots. Live in order: token 0 -> 1, token 1 -> 0, token 1 -> 1, token 3 -> 0
    expert_GSR = jnp.array([[[2, 1], [0, 1], [2, 2], [0, 2]]])
    weight_GSR = jnp.arange(8.0).reshape(1, 4, 2)
    plan = compacted(plan_of_choices(expert_GSR, weight_GSR, 2), 3)
    assert plan.token_GA.tolist() == [[0, 1, 1]] and plan.expert_GA.tolist() == [[1, 0, 1]]
    assert plan.weight_GA.tolist() == [[1, 2, 3]] and float(plan.dropped) == 1
    assert plan.slot_GSR.tolist() == [[[3, 0], [1, 2], [3, 3], [3, 3]]]
    roomy = compacted(plan_of_choices(expert_GSR, weight_GSR, 2), 5)
    assert roomy.expert_GA.tolist() == [[1, 0, 1, 0, 2]] and float(roomy.dropped) == 0


def test_zero_computation_experts_leave_the_plan() -> None:
    # Experts 0 and 1 compute; 2 and 3 do not. Token 0: 1 and 2; token 1: 3 and 2; token 2: none
    plan = plan_of_choices(jnp.array([[[1, 2], [3, 2], [4, 4]]]), jnp.array([[[0.1, 0.2], [0.3, 0.4], [9.0, 9.0]]]), 4)
    kept, weight_GSZ = without_zero_computation(plan, 2)
    assert kept.expert_GA.tolist() == [[1, 2, 2, 2, 2, 2]] and kept.experts == 2
    np.testing.assert_allclose(dense_mask(kept)[0], [[0, 0.1], [0, 0], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(weight_GSZ[0], [[0.2, 0], [0.4, 0.3], [0, 0]], rtol=1e-6)


def test_a_frozen_router_has_no_losses_and_does_not_advance() -> None:
    router = TopKRouter(k=1, bias_rate=0.1, frozen=True)
    found = route(router, np.log(P), state={"bias": [0.0, 0.0, 0.0]})
    assert [float(v) for v in found.objective.values()] == [0, 0]
    state = {"bias": jnp.zeros(3)}
    assert router.advance(state, found.statistics) is state


@pytest.mark.parametrize(
    ("router", "experts", "field"),
    [
        (TopKRouter(k=5), 4, "router.k"),
        (HashRouter(k=5), 4, "router.k"),
        (ReMoERouter(k=5), 4, "router.k"),
        (ReMoERouter(k=2, most_experts=1), 4, "router.most_experts"),
        (ExpertChoiceRouter(k=0.5), 1, "router.scores"),
        (GroupLimitedRouter(expert_groups=3), 4, "router.expert_groups"),
        (GroupLimitedRouter(expert_groups=4, groups_kept=2), 4, "router.group_score"),
        (GroupLimitedRouter(expert_groups=2, k=3), 4, "router.k"),
    ],
)
def test_experts_that_a_router_cannot_serve_are_refused(router, experts: int, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        router.check_experts(experts)
