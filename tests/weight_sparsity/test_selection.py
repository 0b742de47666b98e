"""Exact selection: counts to the unit, ties by index, against a sort."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm.weight_sparsity.masks import (
    CELLS,
    cost,
    dense_mask,
    density,
    packed,
    picture,
    plan_of,
    unpacked,
)
from sparse_lm.weight_sparsity.selection import keep_top, keys_of, share_of
from sparse_lm.weight_sparsity.shared_threshold import counts_by_one_threshold, mean_magnitude

ROWS, COLUMNS = 6, 5


def by_sorting(scores: np.ndarray, count: int) -> np.ndarray:
    """The `count` largest of a flat array, the lowest index first among equals."""
    order = np.lexsort((np.arange(scores.size), -scores))
    mask = np.zeros(scores.size, bool)
    mask[order[:count]] = True
    return mask


@tiny.jit
def choose(scores, count, column_counts):
    """The whole matrix and each column, in one loop."""
    keys = {"matrix": keys_of(scores), "columns": keys_of(scores)}
    return keep_top(keys, {"matrix": count, "columns": column_counts}, {"matrix": (0, 1), "columns": (0,)})


FEW_VALUES = st.sampled_from([-np.inf, -2.5, -1e-40, -0.0, 0.0, 1e-40, 0.5, 1.0, 3.0, np.inf])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(FEW_VALUES | st.floats(width=32, allow_nan=False), min_size=30, max_size=30),
    st.integers(0, 30),
    st.lists(st.integers(0, 6), min_size=5, max_size=5),
)
def test_the_choice_is_that_of_a_stable_sort(values, count, column_counts) -> None:
    scores = np.array(values, np.float32).reshape(ROWS, COLUMNS)
    scores[np.abs(scores) < 1e-37] = 0.0  # XLA's CPU backend takes denormal numbers for zero
    found = choose(scores, jnp.int32(count), jnp.array([column_counts], jnp.int32))
    matrix, columns = (np.asarray(found[name]) for name in ("matrix", "columns"))
    assert matrix.sum() == count
    np.testing.assert_array_equal(matrix.reshape(-1), by_sorting(scores.reshape(-1), count))
    for column, wanted in enumerate(column_counts):
        np.testing.assert_array_equal(columns[:, column], by_sorting(scores[:, column], wanted))


SHARE = tiny.jit(share_of)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(0, 1, width=32))
def test_shares_of_counts_are_exact(count: int, fraction: float) -> None:
    q = int(np.round(np.float32(fraction) * 2**15))
    assert int(SHARE(jnp.int32(count), jnp.float32(fraction))) == (count * q * 2 + 2**15) // 2**16


def test_shares_by_hand() -> None:
    # 0.3 * 2^15 = 9830.4 -> 9830; 10 * 9830 / 32768 = 2.9999 -> 3; a half goes up: 3 * 0.5 = 1.5 -> 2
    assert [int(share_of(jnp.int32(n), f)) for n, f in ((10, 0.3), (3, 0.5), (2**31 - 1, 1.0), (7, 0.0))] == [
        3,
        2,
        2**31 - 1,
        0,
    ]


def test_one_threshold_for_two_matrices() -> None:
    # density 0.5 of 8 weights: 4. Largest first: 9, 8 (b), 7 (a), then a tie of 5 in a and 5, 5 in b: the first matrix has it.
    scores = {"a": jnp.array([[7.0, 5.0], [1.0, 0.0]]), "b": jnp.array([[9.0, 5.0], [5.0, 8.0]])}

    def counts(scores, normalize: bool) -> list[int]:
        found = tiny.jit(lambda s: counts_by_one_threshold(s, 0.5, jnp.float32(1.0), normalize=normalize))(scores)
        return [int(found[name].squeeze()) for name in "ab"]

    assert counts(scores, False) == [2, 2]
    # Divided by the mean magnitude: a by 13/4, b by 27/4 -> a 2.15, 1.54, 0.31, 0; b 1.33, 0.74, 0.74, 1.19: two each
    assert tiny.jit(mean_magnitude)(scores["b"]).item() == 6.75
    assert counts({**scores, "a": scores["a"] / 100}, True) == [2, 2]
    assert counts({**scores, "a": scores["a"] / 100}, False) == [0, 4]  # without it the small matrix vanishes


def test_bits_hold_every_mask() -> None:
    mask = np.random.default_rng(0).random((3, 5, 11)) < 0.5
    bits = packed(jnp.asarray(mask))
    assert bits.shape == (3, 5, 2) and bits.dtype == jnp.uint8
    assert int(bits[0, 0, 0]) == sum(int(on) << i for i, on in enumerate(mask[0, 0, :8]))
    np.testing.assert_array_equal(unpacked(bits, 11), mask)


def test_a_mask_is_a_plan() -> None:
    """The fast executor of a mask is a product with weights that are zero where it says so: equal to dense computation under it."""
    draw = np.random.default_rng(1)
    mask = draw.random((6, 10)) < 0.3
    weight, x = draw.normal(size=(6, 10)).astype(np.float32), draw.normal(size=(4, 6)).astype(np.float32)
    for bits in (False, True):
        plan = plan_of(jnp.asarray(mask), bits=bits)
        np.testing.assert_array_equal(dense_mask(plan), mask)
        assert float(density(plan)) == np.float32(mask.sum() / 60)
        assert float(cost(plan)) == 2 * mask.sum()
        np.testing.assert_allclose(picture(plan), mask, atol=1e-6)  # as many cells as weights
    stored = jnp.where(mask, weight, 0.0)

    def executed(w, x):
        return jnp.sum(jnp.sin(x @ w))

    def dense(w, x):
        return jnp.sum(jnp.sin(x @ (w * dense_mask(plan))))

    value, (dw, dx) = jax.value_and_grad(executed, (0, 1))(stored, x)
    expected, (dense_dw, dense_dx) = jax.value_and_grad(dense, (0, 1))(jnp.asarray(weight), x)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(dx, dense_dx, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jnp.where(mask, dw, 0.0), dense_dw, rtol=1e-5, atol=1e-6)


def test_a_picture_is_the_density_of_cells() -> None:
    mask = np.zeros((64, 40), bool)
    mask[:4, 0] = True  # 4 rows of 64 are one cell of 16; 40 columns make cells of 3 and 2: the first has 3
    cells = np.asarray(picture(plan_of(jnp.asarray(mask))))
    assert cells.shape == (CELLS, CELLS)
    assert cells[0, 0] == np.float32(1 / 3) and cells.sum() == cells[0, 0]
