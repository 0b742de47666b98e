"""AbsTopK activations: what stays of a vector, where in a block, and what gets a gradient."""

import dataclasses
import shutil
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scripted import pretrain

from sparse_lm.config import ConfigError
from sparse_lm.layers.feed_forward import DenseFeedForward
from sparse_lm.layers.projection import DenseMatrix
from sparse_lm.model.attention import Attention
from sparse_lm.model.definition import define
from sparse_lm.model.transformer import Model
from sparse_lm.train.checkpoint_reader import read_checkpoint
from sparse_lm.train.loop import train
from sparse_lm.train.metrics import read_rows
from sparse_lm.weight_sparsity.behind import AbsTopK
from sparse_lm.weight_sparsity.masked import Masked
from sparse_lm.weight_sparsity.schedules import LinearSparsity
from sparse_lm.weight_sparsity.sparse_activations import (
    SparseActivationsMatrix,
    SparseActivationsProjection,
    abs_top_k,
    activations_row,
    split_metrics,
)


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


def sparse_model(**changes: Any) -> Model:
    """A model of two blocks with a squared ReLU, all of whose matrices stand between sparse vectors."""
    projection = SparseActivationsProjection(keep=0.5)
    forward = DenseFeedForward(hidden=32, activation="relu_squared", projection=projection)
    return tiny.model(forward, attention=Attention(heads=2, kv_heads=1, head_dim=8, projection=projection), **changes)


@pytest.mark.parametrize("execution", ["scanned", pytest.param("unrolled", marks=pytest.mark.slow)])
def test_the_density_achieved_is_counted(execution: Literal["scanned", "unrolled"]) -> None:
    """8 of 16 stay everywhere but in the hidden activation, where a squared ReLU leaves about half of 32 and never more than 16."""
    definition, params, state = tiny.materialized(sparse_model(execution=execution))

    @tiny.jit
    def metrics(params):
        batch = tiny.full_batch(2)
        return definition.objective(params, state, batch, definition.units(batch), None)[1]["metrics"]["blocks"]

    others, blocks = split_metrics(jax.device_get(metrics(params)))
    row = activations_row(blocks)
    assert not others and all(len(value) == 2 for name, value in row.items() if name != "activations/density")
    hidden = row.pop("activations/feed_forward.down/reads")
    assert all(0.2 < share < 0.5 for share in hidden)
    rest = {name: value for name, value in row.items() if name != "activations/density"}
    assert set(map(tuple, rest.values())) == {(0.5, 0.5)} and sorted(rest) == [
        "activations/attention.key/gives",
        "activations/attention.key/reads",
        "activations/attention.out/gives",
        "activations/attention.query/gives",
        "activations/attention.query/reads",
        "activations/attention.value/gives",
        "activations/attention.value/reads",
        "activations/feed_forward.down/gives",
        "activations/feed_forward.gate/reads",
    ]
    # By entries of a token: 4 vectors of 16 that are read, 3 given (query, and keys and values of 8), 2 of 16 given to the residual
    # stream: in all 64 + 32 + 32 = 128 at one half, and the hidden 32.
    assert row["activations/density"] == pytest.approx((128 * 0.5 + 32 * sum(hidden) / 2) / 160, rel=1e-6)


@pytest.mark.slow
def test_a_run_with_sparse_activations_stops_and_goes_on_to_the_same_bits(tmp_path, monkeypatch) -> None:
    """Weight-sparse and activation-sparse at once, through scripts/pretrain.py; a dense twin reports no activations."""
    tiny.corpus(tmp_path / "text")
    sparsity = Masked(density=0.25, algorithm=AbsTopK(least_fan_in=1), schedule=LinearSparsity(every=1, end=0.5))
    recipe = tiny.recipe(
        tmp_path, model=sparse_model(vocab_size=264), weight_sparsity=sparsity, validation__every=0, train__steps=20
    )
    recipe = dataclasses.replace(recipe, checkpoint=dataclasses.replace(recipe.checkpoint, every=10))
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    pretrain(recipe, straight, monkeypatch)
    shutil.copytree(straight, stopped)
    shutil.rmtree(stopped / "checkpoints" / "20")
    assert train(recipe, stopped) == 0
    tiny.assert_same(*(read_checkpoint(run / "checkpoints", 20).state for run in (straight, stopped)))
    rows, again = (read_rows(run / "metrics.jsonl", "train") for run in (straight, stopped))
    named = [{name: value for name, value in row.items() if name.startswith("activations/")} for row in rows]
    assert named == [{name: row[name] for name in named[0]} for row in again]
    assert all(len(row) == 11 and 0.4 < row["activations/density"] <= 0.5 for row in named)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["sparsity/density"] == rows[-1]["sparsity/requested"]
