"""Norm, projection and the dense feed-forward against plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm.layers.feed_forward import DenseFeedForward, TokenInfo, activate
from sparse_lm.layers.norm import rms_norm
from sparse_lm.layers.parameter import map_leaves
from sparse_lm.layers.projection import DenseProjection

NORMAL = np.random.default_rng(0).normal


def filled(build):
    """Builds a module and fills its parameters with normal values."""
    graph, state = nnx.split(nnx.eval_shape(build))
    values = map_leaves(lambda _, leaf: jnp.asarray(NORMAL(size=leaf.shape), jnp.float32), nnx.to_pure_dict(state))
    return nnx.merge(graph, values), values


def test_rms_norm_by_hand() -> None:
    # mean square of (3, 4) is 12.5; 3 / sqrt(12.5) = 0.848528, 4 / sqrt(12.5) = 1.131371; scales 1 and 2
    out = rms_norm(jnp.array([3.0, 4.0]), jnp.array([1.0, 2.0]), 0.0)
    np.testing.assert_allclose(out, [0.848528, 2.262742], rtol=1e-6)


def test_rms_norm_computes_in_float32_and_keeps_the_dtype() -> None:
    x = jnp.full((256,), 300.0, jnp.bfloat16)  # the sum of squares would lose half its terms in bfloat16
    out = rms_norm(x, jnp.ones(256), 1e-6)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32), 1.0)


def test_activations_by_hand() -> None:
    gate, up = jnp.array([-1.0, 2.0]), jnp.array([3.0, 0.5])
    # silu(-1) = -1 / (1 + e) = -0.268941, silu(2) = 2 / (1 + e^-2) = 1.761594
    np.testing.assert_allclose(activate(gate, up, "swiglu"), [-0.806824, 0.880797], rtol=1e-5)
    np.testing.assert_allclose(activate(gate, None, "relu_squared"), [0.0, 4.0])
    np.testing.assert_allclose(activate(gate, None, "gelu"), [-0.158808, 1.954598], rtol=1e-5)


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu_squared"])
def test_dense_feed_forward_is_its_matrices(activation) -> None:
    config = DenseFeedForward(hidden=12, activation=activation)
    layer, values = filled(lambda: config.build(8))
    x_BLD = jnp.asarray(NORMAL(size=(2, 3, 8)), jnp.float32)
    y_BLD, aux = layer(x_BLD, TokenInfo(*[jnp.ones((2, 3), jnp.int32)] * 3, None))
    gate = x_BLD @ values["gate"]["weight"]
    up = x_BLD @ values["up"]["weight"] if activation == "swiglu" else None
    np.testing.assert_allclose(y_BLD, activate(gate, up, activation) @ values["down"]["weight"], rtol=1e-5, atol=1e-5)
    assert not aux.metrics and not aux.statistics and float(aux.objective["tokens"]) == 0
    size = sum(leaf.size for leaf in jax.tree.leaves(values))
    # a row costs two operations for every weight
    assert config.cost(8) == {"feed_forward": (size, size, 2.0 * size)}


def test_a_projection_computes_in_the_dtype_of_its_input() -> None:
    layer, _ = filled(lambda: DenseProjection().build(4, 6, ("embed", "ffn")))
    assert layer(jnp.ones((2, 4), jnp.bfloat16)).dtype == jnp.bfloat16
    assert layer.weight[...].dtype == jnp.float32


def test_grouped_projection_equals_a_loop_over_experts() -> None:
    layer, values = filled(lambda: DenseProjection().build(4, 6, ("embed", "ffn"), experts=3))
    x_AI = jnp.asarray(NORMAL(size=(9, 4)), jnp.float32)
    sizes = np.array([2, 0, 5], np.int32)  # two rows belong to no expert
    pieces, start = [], 0
    for expert, size in enumerate(sizes):
        pieces.append(x_AI[start : start + size] @ values["weight"][expert])
        start += size
    expected = np.concatenate([*pieces, np.zeros((2, 6))])
    np.testing.assert_allclose(layer.grouped(x_AI, jnp.asarray(sizes)), expected, rtol=1e-5, atol=1e-5)


def test_dims_name_every_parameter() -> None:
    graph, state = nnx.split(nnx.eval_shape(lambda: DenseProjection().build(4, 6, ("embed", "ffn"), experts=3)))
    ((path, variable),) = nnx.to_flat_state(state)
    assert path == ("weight",) and variable.get_metadata("dims") == ("experts", "embed", "ffn")
