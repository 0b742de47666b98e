"""Sparse weights, routed experts and n-gram tables in one model: a step on every mesh axis is the step on one device.

masked       every matrix under a mask, those of the experts too
packed       blocks in attention and in the experts
packed_attention   the same with dense experts, which `tensor` can split
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny

from sparse_lm.memory.engram import Engram
from sparse_lm.memory.row_optimizer import LazyAdam
from sparse_lm.model.attention import Attention
from sparse_lm.parallel.mesh import MeshShape
from sparse_lm.recipe import Recipe
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.routing.top_k import TopKRouter
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.schedule import Constant
from sparse_lm.train.session import open_session
from sparse_lm.train.step import PULSE, Train
from sparse_lm.weight_sparsity.growth import RigL
from sparse_lm.weight_sparsity.masked import Masked
from sparse_lm.weight_sparsity.packed import Packed
from sparse_lm.weight_sparsity.projection import BlockSparseProjection
from sparse_lm.weight_sparsity.schedules import Periodic
from sparse_lm.weight_sparsity.topology_update import SETBlocks

LENGTH = 8
BATCH = tiny.batch(*[(8,), (3, 2), (), (5,), (1, 1, 1), (8,), (4, 4), (7,)], length=LENGTH)
DENSE = Attention().projection
BLOCKS = BlockSparseProjection(density=0.5, block=16, row_shards=2)
PROJECTIONS = {"masked": (DENSE, DENSE), "packed": (BLOCKS, BLOCKS), "packed_attention": (BLOCKS, DENSE)}
MASKED = Masked(density=0.25, algorithm=RigL(), schedule=Periodic(every=2, end=1.0))
PACKED = Packed(algorithm=SETBlocks(), schedule=Periodic(every=2, end=1.0))


def recipe(name: str, **mesh: int) -> Recipe:
    attention, experts = PROJECTIONS[name]
    router = TopKRouter(k=2, balance_coefficient=0.1, z_coefficient=0.01, bias_rate=0.1)
    base = Recipe(
        model=tiny.model(
            MoEFeedForward(experts=4, hidden=32, activation="relu_squared", router=router, projection=experts),
            layers=1,
            d_model=32,
            attention=Attention(heads=2, head_dim=16, projection=attention),
            memory=Engram(at=(0,), heads=2, width=8, rows=250, deviation=0.5, optimizer=LazyAdam(epsilon=1e-3)),
        ),
        # An epsilon far above the gradients: steps follow them in proportion, so the rounding of a small one is not blown up.
        optimizer=AdamW(learning_rate=0.1, schedule=Constant(warmup_fraction=0.0), epsilon=0.1),
        train=Train(steps=20, clip_norm=0.5),
        weight_sparsity=MASKED if name == "masked" else PACKED,
        mesh=MeshShape(**{"data": 1, **mesh}),
    )
    return dataclasses.replace(base, data=dataclasses.replace(base.data, sequence_length=LENGTH, batch_size=8))


@functools.cache
def result(name: str, **mesh: int):
    """(state after a step, pulse) on the host."""
    session = open_session(recipe(name, **mesh), jax.devices()[: int(np.prod(list(mesh.values()) or [1]))])
    compiled, _ = session.compile_step()
    after, metrics = compiled(session.create(), session.put(BATCH))
    return jax.device_get(after), dict(zip(PULSE, np.asarray(metrics["pulse"]).tolist()))


@functools.cache
def start(name: str):
    """The state before the step, on the host."""
    return jax.device_get(open_session(recipe(name), jax.devices()[:1]).create())


AXES = ("data", "fsdp", "expert", "tensor", "context")
CASES: list[tuple[str, dict[str, int]]] = [("masked", {"data": 2, "expert": 2, "tensor": 2})]
SLOW: list[tuple[str, dict[str, int]]] = [
    *(("masked", {axis: 2}) for axis in AXES),
    *(("packed", {axis: 2}) for axis in AXES if axis != "tensor"),
    ("packed_attention", {"tensor": 2}),
    ("packed", {"data": 2, "fsdp": 2, "expert": 2}),
    ("packed_attention", {"fsdp": 2, "expert": 2, "tensor": 2}),
]


@pytest.mark.parametrize(
    ("name", "mesh"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in [*CASES, *SLOW]],
    ids=lambda value: value if isinstance(value, str) else "x".join(f"{axis}{size}" for axis, size in value.items()),
)
def test_a_step_with_all_of_it_is_the_step_on_one_device(name: str, mesh: dict[str, int]) -> None:
    expected, expected_pulse = result(name)
    after, pulse = result(name, **mesh)
    for key in ("loss", "grad_norm", "tokens"):
        assert pulse[key] == pytest.approx(expected_pulse[key], rel=1e-5), key
    tiny.assert_close(after.params, expected.params, rtol=1e-5, atol=1e-5)
    tiny.assert_close(after.opt_state, expected.opt_state, rtol=1e-4, atol=1e-4)
    tiny.assert_close(after.tables, expected.tables, rtol=1e-4, atol=1e-4)
    # Masks, patterns and the biases of the router, which moved by the loads of the whole batch, are equal to the bit.
    tiny.assert_same(after.sparsity, expected.sparsity)
    tiny.assert_same(after.model_state, expected.model_state)
    if name == "masked":
        masks = tiny.flatten(after.sparsity["masks"]["mask"])
        assert any("feed_forward" in path and mask.shape[0] == 4 for path, mask in masks.items())
        weights = tiny.flatten(after.params)
        assert all(
            (weights[path][~mask] == 0).all() and (weights[path][mask] != 0).any() for path, mask in masks.items()
        )
    begun = start(name)
    before = tiny.flatten(begun.params)
    for path, leaf in tiny.flatten(after.params).items():  # nothing is left out of the step
        assert (leaf != before[path]).any() or path.startswith("memory."), path
    # Behind a convolution that starts at zero the norm of a memory's taps has no gradient yet; they themselves have.
    assert (after.params["memory"]["0"]["taps"] != begun.params["memory"]["0"]["taps"]).any()
    assert (begun.tables["rows"]["0"] != after.tables["rows"]["0"]).any()
