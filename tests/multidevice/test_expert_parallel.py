"""Dispatch on a mesh equals dense computation under the plan's mask; what it sends is what it says."""

import dataclasses
import functools
import re

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.grouped_matmul import grouped_matmul
from sparse_lm.layers.feed_forward import TokenInfo
from sparse_lm.layers.parameter import map_leaves
from sparse_lm.model.transformer import NEVER_REPEATED
from sparse_lm.parallel.mesh import AXES
from sparse_lm.routing.dispatch import dispatch_reference
from sparse_lm.routing.expert_parallel import Experts, buffer_rows, dispatch_on_mesh
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.routing.plan import RoutingPlan, counts, dense_mask

B, L, D, E, R = 8, 4, 6, 8, 3
DIMS = {"into": ("experts", "embed", "ffn"), "out": ("experts", "ffn", "embed")}


def mesh_of(**sizes: int) -> Mesh:
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = np.asarray(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def apply(weights, x_AD, sizes_E, weight_A=None):
    hidden = jnp.tanh(grouped_matmul(x_AD, weights["into"], sizes_E))
    hidden = hidden if weight_A is None else hidden * weight_A[:, None]
    return grouped_matmul(hidden.astype(x_AD.dtype), weights["out"], sizes_E)


def plan_of(kind: str, weight_GA: jax.Array, group_sequences: int = 1) -> RoutingPlan:
    """Tokens with 0 to R experts, slots in random order with dead ones between."""
    draw = np.random.default_rng(7)
    groups, tokens = B // group_sequences, group_sequences * L
    total = weight_GA.shape[1]
    token_GA, expert_GA = np.zeros((groups, total), np.int32), np.full((groups, total), E, np.int32)
    slot_GSR = np.full((groups, tokens, R), total, np.int32)
    for g in range(groups):
        free = draw.permutation(total).tolist()
        for t in range(tokens):
            chosen = draw.choice(E, draw.integers(0, R + 1), replace=False)
            if kind == "all to one":
                chosen = np.array([E - 1])
            if kind == "one shard empty":
                chosen = chosen[chosen < E // 2]
            for r, expert in enumerate(chosen):
                slot = free.pop()
                token_GA[g, slot], expert_GA[g, slot], slot_GSR[g, t, r] = t, expert, slot
    return RoutingPlan(
        token_GA=jnp.asarray(token_GA),
        expert_GA=jnp.asarray(expert_GA),
        weight_GA=weight_GA * (expert_GA < E),
        slot_GSR=jnp.asarray(slot_GSR),
        dropped=jnp.zeros(()),
        experts=E,
    )


KINDS = ("random", "all to one", "one shard empty")


@functools.cache
def arguments(group_sequences: int = 1):
    normal = np.random.default_rng(0).normal
    slots = group_sequences * L * R + 2
    return (
        normal(size=(B, L, D)).astype(np.float32),
        {name: normal(size=(E, D, D)).astype(np.float32) for name in DIMS},
        np.abs(normal(size=(B // group_sequences, slots))).astype(np.float32),
        normal(size=(B, L, D)).astype(np.float32),
    )


@functools.cache
def expected(kind: str, group_sequences: int = 1):
    def total(x_BLD, weights, weight_GA, cotangent):
        plan = plan_of(kind, weight_GA, group_sequences)
        rows = functools.partial(apply, weights)
        y = dispatch_reference(x_BLD.reshape(-1, D), dense_mask(plan), rows).reshape(x_BLD.shape)
        return jnp.sum(y * cotangent), y

    return tiny.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*arguments(group_sequences))


def on_mesh(mesh: Mesh, receive_factor: float = 0.0):
    """(plan without weights, x, weights, weight_GA, cotangent) -> ((sum, (output, overflow)), gradients)."""

    def total(plan, x_BLD, weights, weight_GA, cotangent):
        plan = dataclasses.replace(plan, weight_GA=weight_GA * (plan.expert_GA < E))
        y, lost = dispatch_on_mesh(mesh.abstract_mesh, x_BLD, plan, Experts(apply, weights, DIMS, D), receive_factor)
        return jnp.sum(y * cotangent), (y, lost)

    step = tiny.jit(jax.value_and_grad(total, argnums=(1, 2, 3), has_aux=True))

    def run(*args):
        with jax.set_mesh(mesh):
            return jax.device_get(step(*args))

    return run


@pytest.mark.parametrize(
    ("sizes", "group_sequences"),
    [
        ({"expert": 4, "tensor": 2}, 1),
        pytest.param({"fsdp": 2, "expert": 2, "context": 2}, 1, marks=pytest.mark.slow),
        pytest.param({"expert": 8}, 1, marks=pytest.mark.slow),
        pytest.param({"context": 4, "expert": 2}, 2, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_dispatch_on_a_mesh_equals_dense_computation_under_the_mask(sizes, group_sequences) -> None:
    run = on_mesh(mesh_of(**sizes))
    x_BLD, weights, weight_GA, cotangent = arguments(group_sequences)
    for kind in KINDS:
        (_, y), grads = expected(kind, group_sequences)
        plan = plan_of(kind, weight_GA, group_sequences)
        (_, (found, lost)), found_grads = run(plan, x_BLD, weights, weight_GA, cotangent)
        assert lost == 0
        np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-5, err_msg=kind)
        for a, b in zip(jax.tree.leaves(found_grads), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5, err_msg=kind)
        again = run(plan, x_BLD, weights, weight_GA, cotangent)
        assert again[0][1][0].tobytes() == found.tobytes()
        for a, b in zip(jax.tree.leaves(again[1]), jax.tree.leaves(found_grads), strict=True):
            assert a.tobytes() == b.tobytes()


def test_experts_in_one_operation_on_a_mesh_equal_dense_computation_under_the_mask() -> None:
    """Weights split over fsdp and gathered inside, hidden units over tensor: the one operation sees parts of both."""
    graph, state = nnx.split(nnx.eval_shape(lambda: MoEFeedForward(experts=E, hidden=4).build(D)))
    normal = np.random.default_rng(3).normal
    values = map_leaves(lambda _, leaf: normal(size=leaf.shape).astype(np.float32), nnx.to_pure_dict(state))
    x_BLD, _, weight_GA, cotangent = arguments()
    plan = plan_of("random", weight_GA)
    mesh = mesh_of(data=2, fsdp=2, tensor=2)

    def total(on_mesh, values, x_BLD, weight_GA):
        experts, routed = nnx.merge(graph, values).experts, dataclasses.replace(plan, weight_GA=weight_GA)
        if on_mesh:
            y, _ = dispatch_on_mesh(mesh.abstract_mesh, x_BLD, routed, experts.as_function(x_BLD.dtype), 0.0)
        else:
            y = dispatch_reference(x_BLD.reshape(-1, D), dense_mask(routed), experts).reshape(x_BLD.shape)
        return jnp.sum(y * cotangent), y

    def result(on_mesh):
        step = tiny.jit(jax.value_and_grad(functools.partial(total, on_mesh), argnums=(0, 1, 2), has_aux=True))
        return jax.device_get(step(values, x_BLD, weight_GA * (plan.expert_GA < E)))

    expected = result(False)
    with jax.set_mesh(mesh):
        found = result(True)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_what_a_full_buffer_does_not_take_is_dropped_and_counted() -> None:
    """Everything to the last shard, whose buffer takes one device's slots.

    Eight devices with one sequence of 4 tokens in 14 slots each: 8 x 4 = 32 rows ask for 14 places, which fill in the order of the
    devices: 4 + 4 + 4 + 2, so 18 are dropped.
    """
    x_BLD, weights, weight_GA, cotangent = arguments()
    plan = plan_of("all to one", weight_GA)
    (_, (y, lost)), grads = on_mesh(mesh_of(expert=8), 1.0)(plan, x_BLD, weights, weight_GA, cotangent)
    assert lost == 18 and counts(plan).sum() == 32
    (_, full), _ = expected("all to one")
    kept = np.any(y != 0, axis=-1)
    assert kept.sum(axis=1).tolist() == [4, 4, 4, 2, 0, 0, 0, 0]
    np.testing.assert_allclose(y[kept], full[kept], rtol=1e-5, atol=1e-5)
    assert (grads[0][~kept] == 0).all() and (grads[0][kept] != 0).any(axis=-1).all()


def test_size_of_the_buffer() -> None:
    assert buffer_rows(100, 8, 0.0) == 800  # everything to one shard
    assert buffer_rows(100, 8, 1.25) == 125
    assert buffer_rows(100, 2, 3.0) == 200  # never more than can come


TENSOR = re.compile(r"tensor<([0-9x]*)x?([a-z]+[0-9]+)>")
BYTES = {"f32": 4, "bf16": 2, "i32": 4}


def sent_bytes(text: str) -> list[int]:
    """Most bytes of rows that each ragged exchange of a lowered program can deliver: the smaller of its two sides."""
    found = []
    for line in text.splitlines():
        if "ragged_all_to_all" in line and "custom_call" in line:
            sides = TENSOR.findall(line[line.rindex(": (") :])[:2]
            sizes = [np.prod([int(n) for n in shape.strip("x").split("x")]) * BYTES[dtype] for shape, dtype in sides]
            found.append(int(min(sizes)))
    return found


@pytest.mark.parametrize("remat", ["none", "block"])
def test_rows_are_exchanged_once_each_way_and_no_more_than_there_are(remat) -> None:
    """Lowered for GPUs: forward and backward each send A rows to the experts and A back, whatever remat recomputes."""
    mesh = AbstractMesh((1, 2, 4, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, P()))
    x_BLD, weights, weight_GA, _ = arguments()
    plan = plan_of("random", weight_GA)

    def total(x_BLD, weights, weight_GA):
        def layer(x_BLD, weights, weight_GA):
            routed = dataclasses.replace(plan, weight_GA=weight_GA)
            return dispatch_on_mesh(mesh, x_BLD, routed, Experts(apply, weights, DIMS, D), 1.5)[0]

        if remat == "block":
            layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(*NEVER_REPEATED))
        return jnp.sum(jnp.sin(layer(x_BLD, weights, weight_GA).astype(jnp.float32)))

    half = functools.partial(jax.tree.map, lambda a: shape(a.shape, jnp.bfloat16))
    step = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    traced = step.trace(half(x_BLD), half(weights), shape(weight_GA.shape, jnp.float32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    rows = 1 * (L * R + 2)  # A: slots of the one sequence of a device
    sent = sent_bytes(text)
    # each way: A rows of D numbers in bfloat16 out, A back, and the A float32 weights with the rows
    assert sorted(sent) == sorted(2 * [rows * D * 2, rows * D * 2, rows * 4])
    assert sum(sent) - 2 * rows * 4 <= 2 * (2 * rows * D * 2)
    gathers = [line for line in text.splitlines() if "stablehlo.all_gather" in line]
    # by name, or (before JAX 0.11) by number: devices that differ in fsdp are four apart
    axes = [re.findall(r'axis_ref<name = "(\w+)">|replica_groups = dense<(.*?)> :', line) for line in gathers]
    # Two matrices, and in the backward pass again; a rematerialised block asks for one twice there, which XLA joins.
    assert len(gathers) == {"none": 4, "block": 5}[remat]
    assert all(axis in ([("fsdp", "")], [("", "[[0, 4], [1, 5], [2, 6], [3, 7]]")]) for axis in axes)


def test_the_shared_expert_and_the_exchange_need_nothing_of_each_other() -> None:
    """So XLA may compute one while rows of the other travel; forward and backward."""
    mesh = AbstractMesh((1, 1, 4, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    shared_hidden = 24  # no other size is 24
    config = MoEFeedForward(experts=E, hidden=4, shared_hidden=shared_hidden)
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(D)))
    values = nnx.to_pure_dict(state)
    ids_BL = jnp.ones((B, L), jnp.int32)

    def total(values, x_BLD):
        y_BLD, _ = nnx.merge(graph, values)(x_BLD, TokenInfo(ids_BL, ids_BL, ids_BL, None))
        return jnp.sum(y_BLD)  # linear, so that the backward pass needs nothing of the forward one's output

    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(values, jax.ShapeDtypeStruct((B, L, D), jnp.float32))
    equations = program.jaxpr.eqns
    exchanges = [e for e in equations if e.primitive.name == "shard_map" and "all_to_all" in str(e.params["jaxpr"])]
    shared = [e for e in equations if any(shared_hidden in v.aval.shape for v in e.outvars)]
    assert len(exchanges) >= 2 and len(shared) >= 6

    def reached(start) -> set:
        found = {variable for equation in start for variable in equation.outvars}
        for equation in equations:
            if any(isinstance(v, jax.extend.core.Var) and v in found for v in equation.invars):
                found.update(equation.outvars)
        return found

    def needs(equation, found: set) -> bool:
        return any(isinstance(v, jax.extend.core.Var) and v in found for v in equation.invars)

    assert not any(needs(equation, reached(exchanges)) for equation in shared)
    assert not any(needs(equation, reached(shared)) for equation in exchanges)
