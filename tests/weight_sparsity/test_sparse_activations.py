"""AbsTopK activations: what stays of a vector, where in a block, and what gets a gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparse_lm.config import ConfigError
from sparse_lm.layers.projection import DenseMatrix
from sparse_lm.model.definition import define
from sparse_lm.weight_sparsity.sparse_activations import SparseActivationsMatrix, SparseActivationsProjection, abs_top_k


def test_abs_top_k_by_hand() -> None:
    x = jnp.array([[0.5, -3.0, 2.0, -1.0], [1.0, -1.0, 1.0, 0.0]])
    # half of 4 entries; in the second vector three are equal and the first two stay
    expected = [[0.0, -3.0, 2.0, 0.0], [1.0, -1.0, 0.0, 0.0]]
    np.testing.assert_array_equal(np.asarray(abs_top_k(x, 0.5)), expected)
    np.testing.assert_array_equal(np.asarray(abs_top_k(x, 0.01))[0], [0.0, -3.0, 0.0, 0.0])  # at least one
    np.testing.assert_array_equal(np.asarray(abs_top_k(x, 1.0)), np.asarray(x))
    grad = jax.grad(lambda x: jnp.sum(abs_top_k(x, 0.5) * jnp.arange(1.0, 5.0)))(x)
    np.testing.assert_array_equal(np.asarray(grad), [[0, 2, 3, 0], [1, 2, 0, 0]])


@pytest.mark.parametrize(
    ("dims", "reads", "gives"),
    [
        (("embed", "heads"), True, True),
        (("embed", "kv_heads"), True, True),
        (("heads", "embed"), False, True),
        (("embed", "ffn"), True, False),
        (("ffn", "embed"), True, True),
    ],
)
def test_which_vectors_of_a_block_are_sparse(dims: tuple[str, str], reads: bool, gives: bool) -> None:
    matrix = SparseActivationsProjection(keep=0.5).build(4, 4, dims)
    assert isinstance(matrix, SparseActivationsMatrix)
    matrix.weight[...] = jnp.eye(4) + 0.1
    x = jnp.array([[4.0, 3.0, 2.0, 1.0]])
    read = jnp.array([[4.0, 3.0, 0.0, 0.0]]) if reads else x
    y = read @ matrix.weight[...]
    expected = abs_top_k(y, 0.5) if gives else y
    np.testing.assert_allclose(np.asarray(matrix(x)), np.asarray(expected), rtol=1e-6)


def test_parameters_are_those_of_a_dense_model() -> None:
    """So that a dense checkpoint can go on with sparse activations; `keep = 1` is the dense matrix."""
    model = tiny.model()
    sparse = SparseActivationsProjection()
    attention = dataclasses.replace(model.attention, projection=sparse)
    pattern = tuple(dataclasses.replace(forward, projection=sparse) for forward in model.pattern)
    changed = dataclasses.replace(model, attention=attention, pattern=pattern)
    assert jax.tree.structure(define(changed).shapes) == jax.tree.structure(define(model).shapes)
    assert define(changed).dims == define(model).dims
    dense, whole = DenseMatrix(6, 4, ("embed", "heads"), 0), SparseActivationsMatrix(1.0, 6, 4, ("embed", "heads"), 0)
    x, w = jax.random.normal(jax.random.key(0), (3, 6)), jax.random.normal(jax.random.key(1), (6, 4))
    dense.weight[...], whole.weight[...] = w, w
    np.testing.assert_array_equal(np.asarray(dense(x)), np.asarray(whole(x)))


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="keep"):
        SparseActivationsProjection(keep=0.0).check()
