"""The contract of plans: executing a plan equals dense computation under its mask, gradients included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import grouped_matmul
from sparse_lm.layers.feed_forward import TokenInfo
from sparse_lm.layers.parameter import map_leaves
from sparse_lm.routing.benchmark_layer import OtherProjection, Shape, abstract, stored_bytes
from sparse_lm.routing.dispatch import dispatch_local, dispatch_reference
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.routing.plan import RoutingPlan, counts, dense_mask
from sparse_lm.routing.router import RouterInputs
from sparse_lm.routing.top_k import TopKRouter

D = 6
SHAPES = [(1, 5, 3, 2), (2, 4, 4, 1)]
MORE_SHAPES = [(1, 1, 1, 1), (3, 7, 5, 5), (2, 8, 16, 3)]
"""(groups, tokens of a group, experts, experts of a token)"""


def experts_of(w_EDD: jax.Array):
    """One matrix and a nonlinearity for each expert; zero rows stay zero."""
    return lambda x_AD, sizes_E: jnp.tanh(grouped_matmul(x_AD, w_EDD, sizes_E))


@functools.cache
def compiled(shape: tuple[int, int, int, int], reference: bool, scores: str):
    """(x, router weights, expert weights, valid, cotangent) -> ((sum, (output, plan)), gradients of the three)."""
    groups, tokens, _, k = shape
    router = TopKRouter(k=k, scores=scores)

    def total(x_TD, router_DE, w_EDD, valid_GS, cotangent_TD):
        logits_GSE = (x_TD @ router_DE).reshape(groups, tokens, -1)
        inputs = RouterInputs(valid_GS.astype(jnp.int32), valid_GS, valid_GS.astype(jnp.int32), None)
        routing = router.plan(logits_GSE, inputs, {})
        if reference:
            out_TD = dispatch_reference(x_TD, dense_mask(routing.plan), experts_of(w_EDD))
        else:
            out_TD = dispatch_local(x_TD, routing.plan, experts_of(w_EDD))
        return jnp.sum(out_TD * cotangent_TD), (out_TD, routing.plan)

    return tiny.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))


def draw(shape: tuple[int, int, int, int], seed: int, kind: str):
    groups, tokens, experts, _ = shape
    normal = np.random.default_rng(seed).normal
    x_TD = normal(size=(groups * tokens, D)).astype(np.float32)
    router_DE = normal(size=(D, experts)).astype(np.float32)
    valid_GS = np.ones((groups, tokens), bool)
    if kind == "all to one":
        x_TD[:, 0] = 1.0
        router_DE[0, :] = [9.0] + [0.0] * (experts - 1)
    if kind == "experts without tokens":
        x_TD[:, 0] = 1.0
        router_DE[0, :] = -9.0 * (np.arange(experts) % 2)
    if kind == "padding":
        valid_GS = np.random.default_rng(seed + 1).random((groups, tokens)) < 0.6
    if kind == "a padded group":
        valid_GS[-1] = False
    w_EDD = normal(size=(experts, D, D)).astype(np.float32)
    return x_TD, router_DE, w_EDD, valid_GS, normal(size=x_TD.shape).astype(np.float32)


KINDS = ["random", "all to one", "experts without tokens", "padding", "a padded group"]


@pytest.mark.parametrize(
    "shape", [SHAPES[0], *(pytest.param(shape, marks=pytest.mark.slow) for shape in (*SHAPES[1:], *MORE_SHAPES))]
)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 1000))
def test_dispatch_equals_dense_computation_under_the_mask(shape, kind: str, seed: int) -> None:
    scores = "sigmoid" if shape[3] == 2 else "softmax"
    arguments = draw(shape, seed, kind)
    (_, (out, plan)), grads = compiled(shape, False, scores)(*arguments)
    (_, (expected, _)), expected_grads = compiled(shape, True, scores)(*arguments)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    for name, grad, expected_grad in zip(("x", "router", "experts"), grads, expected_grads):
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=2e-5, err_msg=name)
    valid_GS = arguments[3]
    assert float(counts(plan).sum()) == valid_GS.sum() * shape[3] - float(plan.dropped)
    assert (np.asarray(out).reshape(*valid_GS.shape, D)[~valid_GS] == 0).all()


def test_an_expert_without_tokens_has_no_gradient() -> None:
    shape = SHAPES[1]
    (_, (_, plan)), (_, _, dw_EDD) = compiled(shape, False, "softmax")(*draw(shape, 3, "all to one"))
    assert counts(plan).tolist() == [8, 0, 0, 0]
    assert (np.asarray(dw_EDD[1:]) == 0).all() and (np.asarray(dw_EDD[0]) != 0).any()


def test_dispatch_is_deterministic_to_the_bit() -> None:
    shape = SHAPES[0]
    arguments = draw(shape, 5, "random")
    runs = [jax.tree.leaves(compiled(shape, False, "softmax")(*arguments)) for _ in range(3)]
    for run in runs[1:]:
        assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(runs[0], run))


def irregular_plan(weight_GA: jax.Array) -> RoutingPlan:
    """A plan that no token choice makes: tokens with 3, 0, 1 and 2 experts, a dropped one, slots out of order."""
    # assignments: 0: token 3 -> expert 1, 1: token 0 -> 2, 2: dead, 3: token 0 -> 0, 4: token 2 -> 1, 5: token 0 -> 1, 6: token 3 -> 2
    return RoutingPlan(
        token_GA=jnp.array([[3, 0, 1, 0, 2, 0, 3]], jnp.int32),
        expert_GA=jnp.array([[1, 2, 3, 0, 1, 1, 2]], jnp.int32),
        weight_GA=weight_GA * jnp.array([[1, 1, 0, 1, 1, 1, 1]], jnp.float32),
        slot_GSR=jnp.array([[[1, 3, 5], [7, 7, 7], [7, 4, 7], [6, 0, 7]]], jnp.int32),
        dropped=jnp.ones(()),
        experts=3,
    )


def test_plans_with_any_number_of_experts_per_token_execute_too() -> None:
    normal = np.random.default_rng(0).normal
    x_TD, w_EDD = normal(size=(4, D)).astype(np.float32), normal(size=(3, D, D)).astype(np.float32)
    weight_GA, cotangent_TD = normal(size=(1, 7)).astype(np.float32), normal(size=(4, D)).astype(np.float32)

    def total(dispatch, x_TD, w_EDD, weight_GA):
        plan = irregular_plan(weight_GA)
        mask = plan if dispatch is dispatch_local else dense_mask(plan)
        return jnp.sum(dispatch(x_TD, mask, experts_of(w_EDD)) * cotangent_TD)

    results = [
        tiny.jit(jax.value_and_grad(functools.partial(total, dispatch), argnums=(0, 1, 2)))(x_TD, w_EDD, weight_GA)
        for dispatch in (dispatch_local, dispatch_reference)
    ]
    for a, b in zip(*map(jax.tree.leaves, results)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    plan = irregular_plan(jnp.ones((1, 7)))
    assert dense_mask(plan)[0].tolist() == [[1, 1, 1], [0, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert counts(plan).tolist() == [1, 3, 2]


def test_experts_in_one_operation_equal_gather_products_and_combine() -> None:
    """Values and gradients of tokens, matrices and weights, on a plan with absent, dropped and unordered assignments."""
    graph, state = nnx.split(nnx.eval_shape(lambda: MoEFeedForward(experts=3, hidden=5).build(D)))
    normal = np.random.default_rng(2).normal
    values = map_leaves(lambda _, leaf: normal(size=leaf.shape).astype(np.float32), nnx.to_pure_dict(state))
    x_TD, cotangent_TD = (normal(size=(4, D)).astype(np.float32) for _ in range(2))
    weight_GA = normal(size=(1, 7)).astype(np.float32)

    def total(fused, values, x_TD, weight_GA):
        experts = nnx.merge(graph, values).experts
        out_TD = dispatch_local(x_TD, irregular_plan(weight_GA), experts, experts.on_tokens if fused else None)
        return jnp.sum(out_TD * cotangent_TD), out_TD

    def both(*arguments):
        return [
            jax.value_and_grad(functools.partial(total, fused), argnums=(0, 1, 2), has_aux=True)(*arguments)
            for fused in (True, False)
        ]

    fused, plain = tiny.jit(both)(values, x_TD, weight_GA)
    for found, expected in zip(*map(jax.tree.leaves, (fused, plain)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert (np.asarray(fused[0][1])[1] == 0).all()  # token 1 has no assignment


def test_which_experts_offer_one_operation() -> None:
    def offers(**changes) -> bool:
        return (
            nnx.eval_shape(lambda: MoEFeedForward(experts=2, hidden=4, **changes).build(4)).experts.on_tokens
            is not None
        )

    assert offers() and not offers(activation="relu_squared")
    assert not offers(projection=OtherProjection(by=jax.lax.ragged_dot))


@pytest.mark.parametrize(("experts", "k"), [(16, 2), (256, 32)])
def test_a_layer_stores_what_a_dense_one_of_equal_active_size_does(experts: int, k: int) -> None:
    """At most 1.1 times: input, gate and up products; logits, choices and plan are what is added.

    256 experts, 32 of a token, D = 2048, F = 8192 in all, bfloat16: a token's input and products are 2 (2048 + 2 * 8192) = 36864 bytes,
    its logits 4 * 256 = 1024, and 32 choices of some 24 bytes 768: 1.05 times.
    """
    shape = Shape(tokens=4096, experts=experts, k=k)
    graph, values = abstract(shape.moe(), shape, jnp.bfloat16)
    x_BLD = jax.ShapeDtypeStruct((2, 2048, shape.d_model), jnp.bfloat16)
    least = 2 * shape.tokens * (shape.d_model + 2 * shape.active)
    assert 1.0 <= stored_bytes(graph, values, x_BLD) / least <= 1.06


@pytest.mark.parametrize("activation", ["swiglu", pytest.param("relu_squared", marks=pytest.mark.slow)])
def test_the_layer_is_router_plus_masked_experts_plus_shared_expert(activation) -> None:
    config = MoEFeedForward(experts=4, hidden=8, shared_hidden=8, activation=activation, group_sequences=2)
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(16)))
    normal = np.random.default_rng(0).normal
    values = map_leaves(lambda _, leaf: normal(size=leaf.shape).astype(np.float32), nnx.to_pure_dict(state))
    x_BLD = normal(size=(4, 6, 16)).astype(np.float32)
    arrays = tiny.batch((3, 2), (6,), (1, 1, 1), (5,), length=6)
    info = TokenInfo(arrays["tokens_BL"], arrays["positions_BL"], arrays["segments_BL"], None)

    def fast(values, x_BLD, info):
        return nnx.merge(graph, values)(x_BLD, info)

    def slow(values, x_BLD, info):
        layer, segments_GS = nnx.merge(graph, values), info.segments_BL.reshape(2, 12)
        inputs = RouterInputs(info.tokens_BL.reshape(2, 12), segments_GS > 0, segments_GS, None)
        plan = layer.router(x_BLD.reshape(2, 12, 16), inputs).plan
        routed_TD = dispatch_reference(x_BLD.reshape(-1, 16), dense_mask(plan), layer.experts)
        return routed_TD.reshape(x_BLD.shape) + layer.shared(x_BLD, info)[0], counts(plan)

    y_BLD, aux = tiny.jit(fast)(values, x_BLD, info)
    expected_BLD, load_E = tiny.jit(slow)(values, x_BLD, info)
    np.testing.assert_allclose(y_BLD, expected_BLD, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(aux.metrics["load"][0], load_E)
    assert float(aux.metrics["balance_loss"][1]) == 2  # two groups of two sequences
