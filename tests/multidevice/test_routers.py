"""Routers on a 2 x 2 x 2 mesh: a step is the step on one device, losses, metrics and router state included."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from sparse_lm.parallel.mesh import MeshShape
from sparse_lm.recipe import Recipe
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.routing.hash_router import HashRouter
from sparse_lm.routing.router import Router
from sparse_lm.routing.token_choice import (
    BatchPriorityRouter,
    BiasBalancedRouter,
    GroupLimitedRouter,
    NoisyTopKRouter,
    SinkhornRouter,
    SwitchRouter,
)
from sparse_lm.routing.top_k import TopKRouter
from sparse_lm.routing.variable import ExpertChoiceRouter, ExpertThresholdRouter, ReMoERouter
from sparse_lm.routing.zero_computation import ZeroComputation
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.schedule import Constant
from sparse_lm.train.session import open_session
from sparse_lm.train.step import PULSE, Train

LENGTH = 8
ROUTERS: dict[str, Router] = {
    "expert_threshold": ExpertThresholdRouter(k=2, rows_per_token=2.5, most_experts=3),
    "balance over the step, zero computation": TopKRouter(k=2, balance_over="step", balance_coefficient=0.1),
    "switch": SwitchRouter(balance_coefficient=0.1),
    "noisy_top_k": NoisyTopKRouter(k=2),
    "batch_priority": BatchPriorityRouter(k=2),
    "bias_balanced": BiasBalancedRouter(k=2, bias_rate=0.1),
    "group_limited": GroupLimitedRouter(k=2),
    "hash": HashRouter(k=2),
    "remoe": ReMoERouter(k=2, first_coefficient=1e-2),
    "expert_choice": ExpertChoiceRouter(k=2),
    "sinkhorn": SinkhornRouter(k=1),
}
BATCH = tiny.batch(*[(8,), (3, 2), (), (5,), (1, 1, 1), (8,), (4, 4), (7,)], length=LENGTH)


def step_of(name: str, devices: int, **mesh: int):
    """(state after a step, pulse, router metrics), on the host."""
    extra = ZeroComputation(identity=2) if "zero" in name else ZeroComputation()
    moe = MoEFeedForward(
        experts=4, hidden=16, activation="relu_squared", router=ROUTERS[name], zero_computation=extra, shared_hidden=8
    )
    # Epsilon well above the rounding of a gradient: Adam's direction of a gradient near zero is otherwise its sign alone.
    optimizer = AdamW(learning_rate=0.01, schedule=Constant(warmup_fraction=0.0), epsilon=1e-3)
    base = Recipe(
        model=tiny.model(moe, layers=1),
        optimizer=optimizer,
        train=Train(steps=4),
        mesh=MeshShape(**{"data": 1, **mesh}),
    )
    data = dataclasses.replace(base.data, sequence_length=LENGTH, batch_size=8)
    session = open_session(dataclasses.replace(base, data=data), jax.devices()[:devices])
    compiled, _ = session.compile_step()
    after, metrics = compiled(session.create(), session.put(BATCH))
    pulse = dict(zip(PULSE, np.asarray(metrics["pulse"]).tolist()))
    return jax.device_get(after), pulse, jax.device_get(metrics["blocks"]["0"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTERS)
def test_a_routed_step_on_a_mesh_is_the_step_on_one_device(name: str) -> None:
    expected, expected_pulse, expected_metrics = step_of(name, 1)
    after, pulse, metrics = step_of(name, 8, data=2, expert=2, tensor=2)
    for key in ("loss", "grad_norm", "tokens"):
        assert pulse[key] == pytest.approx(expected_pulse[key], rel=1e-5), key
    tiny.assert_close(after.params, expected.params, rtol=1e-5, atol=1e-5)
    tiny.assert_close(after.model_state, expected.model_state)
    assert float(metrics.pop("overflow")[0]) == 0
    np.testing.assert_array_equal(metrics["load"][0], expected_metrics["load"][0])
    for left, right in zip(jax.tree.leaves(metrics), jax.tree.leaves(expected_metrics), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)
