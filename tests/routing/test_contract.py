"""What every router of the component table promises: its plan is its dense mask, what it counts adds up, causal ones do not look ahead."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparse_lm.components import TABLE, lookup
from sparse_lm.routing.dispatch import dispatch_local, dispatch_reference
from sparse_lm.routing.plan import counts, dense_mask
from sparse_lm.routing.router import Router, RouterInputs

G, S, D, E = 2, 12, 6, 4
OPTIONS: dict[str, list[dict]] = {
    "top_k": [{"k": 2, "bias_rate": 0.1, "balance_over": "step"}, {"k": 2, "capacity_factor": 0.7}],
    "switch": [{"capacity_factor": 1.0, "importance_coefficient": 0.1}],
    "noisy_top_k": [{"balance_over": "sequence"}],
    "gshard": [{"capacity_factor": 0.8, "capacity_order": "choice"}],
    "group_limited": [{"local_entropy_coefficient": 0.1, "global_entropy_coefficient": 0.1}],
    "hash": [{"k": 2}],
    "expert_choice": [{"most_experts": 2}],
    "expert_threshold": [{"most_experts": 3, "rows_per_token": 1.5}],
    "remoe": [{"rows_per_token": 1.2}],
}
SLOW = ("uniform", "random", "bias_balanced", "switch", "noisy_top_k", "batch_priority", "group_limited", "sinkhorn")
NAMES = [(name, options) for name in TABLE["router"] for options in OPTIONS.get(name, [{}])]
CASES = [pytest.param(*case, marks=pytest.mark.slow if case[0] in SLOW else ()) for case in NAMES]
REPLAYED = [case for case in NAMES if case[0] == "expert_choice"]
REPLAYED += [pytest.param(*case, marks=pytest.mark.slow) for case in NAMES if case[0] in ("gshard", "remoe")]
NOT_CAUSAL = {"batch_priority", "gshard", "sinkhorn", "expert_choice"}
KEY = jax.random.key(5)


def label(value) -> str:
    return value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items())


def scaled_experts(scale_E: jax.Array):
    """Expert e computes tanh(scale_e * x): cheap to compile, different for every expert; rows past the sizes give zero."""

    def apply(x_AD: jax.Array, sizes_E: jax.Array) -> jax.Array:
        ends_E = jnp.cumsum(sizes_E)
        row_A = jnp.arange(x_AD.shape[0])
        expert_A = jnp.sum(row_A[:, None] >= ends_E, axis=1)
        factor_A = jnp.where(row_A < ends_E[-1], scale_E[jnp.minimum(expert_A, scale_E.size - 1)], 0.0)
        return jnp.tanh(x_AD * factor_A[:, None])

    return apply


@functools.cache
def compiled(name: str, options: tuple):
    """Everything that the tests ask of one router, in one program."""
    router: Router = lookup("router", name)(**dict(options))
    state = {name: jnp.asarray(value) for name, value in router.initial_state(E).items()}

    def parts(dispatch, x_TD, weight, scale_E, inputs, cotangent_TD):
        def total(x_TD, weight, scale_E):
            logits = (x_TD @ weight).reshape(G, S, -1) if router.columns else jnp.zeros((G, S, E))
            routing = router.plan(logits, inputs, state)
            plan = routing.plan if dispatch is dispatch_local else dense_mask(routing.plan)
            out_TD = dispatch(x_TD, plan, scaled_experts(scale_E))
            objective = routing.objective["tokens"] + routing.objective["groups"]
            return jnp.sum(out_TD * cotangent_TD), (out_TD, objective, routing)

        (_, aux), grads = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(x_TD, weight, scale_E)
        return aux, grads

    def run(x_TD, weight, scale_E, tokens_GS, valid_GS, cotangent_TD, replay_GSR=None):
        inputs = RouterInputs(tokens_GS, valid_GS, valid_GS.astype(jnp.int32), KEY, 2, replay_GSR)
        arguments = (x_TD, weight, scale_E, inputs, cotangent_TD)
        (out, objective, routing), grads = parts(dispatch_local, *arguments)
        (expected, _, _), expected_grads = parts(dispatch_reference, *arguments)
        logits = (x_TD @ weight).reshape(G, S, -1) if router.columns else jnp.zeros((G, S, E))

        def one_group(logits, tokens_GS, valid_GS):
            alone = RouterInputs(tokens_GS[None], valid_GS[None], valid_GS[None].astype(jnp.int32), KEY, 2)
            r = router.plan(logits[None], alone, state)
            return r.objective, r.metrics, r.statistics

        by_group = jax.vmap(one_group)(logits, tokens_GS, valid_GS)
        return {
            "summed": jax.tree.map(lambda a: jnp.sum(a, axis=0), by_group),
            "whole": (routing.objective, routing.metrics, routing.statistics),
            "out": out,
            "expected": expected,
            "grads": grads,
            "expected_grads": expected_grads,
            "objective": objective,
            "plan": routing.plan,
            "mask": dense_mask(routing.plan),
            "expert_GSR": routing.expert_GSR,
            "metrics": routing.metrics,
            "statistics": routing.statistics,
        }

    return router, tiny.jit(run)


def arrays(router: Router, seed: int = 0, padding: bool = False):
    draw = np.random.default_rng(seed)
    x_TD = draw.normal(size=(G * S, D)).astype(np.float32)
    weight = draw.normal(size=(D, E * max(1, router.columns))).astype(np.float32)
    scale_E = draw.normal(size=E).astype(np.float32)
    tokens_GS = draw.integers(0, 50, (G, S)).astype(np.int32)
    valid_GS = draw.random((G, S)) < (0.7 if padding else 1.1)
    return x_TD, weight, scale_E, tokens_GS, valid_GS, draw.normal(size=x_TD.shape).astype(np.float32)


def run(name, options, seed: int = 0, padding: bool = False):
    router, program = compiled(name, tuple(options.items()))
    return router, program(*arrays(router, seed, padding))


def test_every_router_of_the_table_is_here() -> None:
    assert {name for name, _ in NAMES} == set(TABLE["router"]) and set(OPTIONS) <= set(TABLE["router"])


@pytest.mark.parametrize(("name", "options"), CASES, ids=label)
def test_executing_the_plan_is_dense_computation_under_its_mask(name, options) -> None:
    for seed, padding in ((0, False), (1, True)):
        _, found = run(name, options, seed, padding)
        np.testing.assert_allclose(found["out"], found["expected"], rtol=1e-5, atol=1e-5)
        for grad, expected in zip(found["grads"], found["expected_grads"]):
            np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-5)
            assert np.isfinite(grad).all()


@pytest.mark.parametrize(("name", "options"), CASES, ids=label)
def test_what_is_counted_adds_up(name, options) -> None:
    router, program = compiled(name, tuple(options.items()))
    given = arrays(router, 1, padding=True)
    found = program(*given)
    valid_GS, plan = given[4], found["plan"]
    executed, wanted = float(counts(plan).sum()), float(found["statistics"]["wanted"].sum())
    assert executed == wanted - float(plan.dropped)
    assert float(found["statistics"]["tokens"]) == valid_GS.sum()
    np.testing.assert_array_equal(counts(plan), found["metrics"]["load"][0])
    if name in ("top_k", "switch", "noisy_top_k", "hash", "group_limited", "uniform", "random", "sinkhorn"):
        assert wanted == valid_GS.sum() * router.experts_per_token(E)
    # Padding goes nowhere, and a token has an expert once at most.
    expert_GSR, mask = np.asarray(found["expert_GSR"]), np.asarray(found["mask"])
    assert (expert_GSR[~valid_GS] == E).all() and (mask[~valid_GS] == 0).all()
    for row in expert_GSR.reshape(-1, expert_GSR.shape[-1]):
        chosen = row[row < E].tolist()
        assert len(set(chosen)) == len(chosen)
    if "coactivation" in found["metrics"]:
        np.testing.assert_array_equal(np.diag(found["metrics"]["coactivation"][0]), found["metrics"]["load"][0])


DRAWN = ("switch", "noisy_top_k", "gshard", "random")
ADDITIVE = [case for case in CASES if case.values[0] not in DRAWN]


@pytest.mark.parametrize(("name", "options"), ADDITIVE, ids=label)
def test_losses_metrics_and_statistics_are_sums_over_groups(name, options) -> None:
    """So they are the same for every number of microbatches and every mesh, neither of which cuts a group."""
    _, found = run(name, options, seed=3, padding=True)
    for left, right in zip(jax.tree.leaves(found["whole"]), jax.tree.leaves(found["summed"]), strict=True):
        np.testing.assert_allclose(left, right, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "options"), CASES, ids=label)
def test_a_causal_router_does_not_look_ahead_and_others_say_that_they_do(name, options) -> None:
    """Routes are discrete, which no gradient sees: later tokens are replaced, and the mask of earlier ones must stay."""
    router, program = compiled(name, tuple(options.items()))
    looked_ahead = False
    for seed in range(4):
        before = arrays(router, seed)
        other = arrays(router, seed + 100)
        cut = S // 2
        later_GS = np.broadcast_to(np.arange(S) >= cut, (G, S))
        x_TD = np.where(later_GS.reshape(-1, 1), other[0], before[0])
        tokens_GS = np.where(later_GS, other[3], before[3])
        masks = [
            np.asarray(program(x, *before[1:3], tokens, *before[4:])["mask"])[:, :cut]
            for x, tokens in ((before[0], before[3]), (x_TD, tokens_GS))
        ]
        looked_ahead |= not np.allclose(*masks, atol=1e-6)
    assert router.causal is not looked_ahead
    assert (name in NOT_CAUSAL) is looked_ahead
    if looked_ahead:
        said = " ".join((type(router).__doc__ or "").split()) + str(options)
        assert "Not causal" in said or "choice" in options.get("capacity_order", "")


@pytest.mark.parametrize(("name", "options"), REPLAYED, ids=label)
def test_a_recorded_choice_replays(name, options) -> None:
    router, program = compiled(name, tuple(options.items()))
    given = arrays(router, 2)
    found = program(*given)
    again = program(*given, found["expert_GSR"])
    np.testing.assert_array_equal(again["expert_GSR"], found["expert_GSR"])
    assert float(again["plan"].dropped) == 0
    if float(found["plan"].dropped) == 0:
        np.testing.assert_allclose(again["out"], found["out"], rtol=1e-6, atol=1e-6)
