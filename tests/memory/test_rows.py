"""Updates of rows: duplicates, untouched rows, and every row optimizer against a dense update of the whole table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparse_lm.memory.row_optimizer import LazyAdam, RowAdagrad, RowSGD, TouchAdam
from sparse_lm.memory.table import ROWS_MULTIPLE, TableSpec, look_up, sum_duplicates, update

WIDTH = 4
ROWS = ROWS_MULTIPLE


def spec(optimizer, **changes) -> TableSpec:
    return TableSpec(
        **{
            "primes": (101, 103),
            "width": WIDTH,
            "dtype": jnp.float32,
            "optimizer": optimizer,
            "deviation": 1.0,
            **changes,
        }
    )


def test_duplicates_are_summed() -> None:
    address = jnp.array([5, 2, 9, 5, 9, 5], jnp.int32)
    grads = jnp.array([[1.0], [2], [4], [8], [16], [32]])
    unique, sums = tiny.jit(lambda a, g: sum_duplicates(a, g, 9))(address, grads)
    assert unique.tolist() == [2, 5, 9, 9, 9, 9]
    assert sums[:3, 0].tolist() == [2, 1 + 8 + 32, 4 + 16]


def test_padding_reads_zeros_and_takes_no_update() -> None:
    own = spec(RowSGD(learning_rate=1.0))
    rows, slots = own.create(jax.random.key(0))
    address = jnp.array([[[3, ROWS]], [[ROWS, 7]]], jnp.int32)
    found = look_up(rows, address)
    assert found.shape == (2, 1, 2 * WIDTH)
    assert (found[0, 0, WIDTH:] == 0).all() and (found[0, 0, :WIDTH] == rows[3]).all()
    new, _ = update(own, rows, slots, address, jnp.ones_like(found), jnp.float32(0.5), jnp.int32(1))
    assert np.flatnonzero((new != rows).any(axis=1)).tolist() == [3, 7]
    np.testing.assert_allclose(new[3], rows[3] - 0.5, rtol=1e-6)


def stream(steps: int, rows: int, touched: int, seed: int = 0):
    """Zipf-like touches and gradients, as of n-grams: a few rows every step, most of them rarely."""
    draw = np.random.default_rng(seed)
    chance = 1.0 / np.arange(1, rows + 1)
    for _ in range(steps):
        address = draw.choice(rows, size=touched, p=chance / chance.sum()).astype(np.int32)
        yield address, draw.normal(size=(touched, WIDTH)).astype(np.float32) + 0.3


def run_sparse(optimizer, steps: int, touched: int = 12, rate: float = 0.01):
    own = spec(optimizer)
    rows, slots = own.create(jax.random.key(1))
    step = tiny.jit(lambda r, s, a, g, n: update(own, r, s, a, g, jnp.float32(rate), n))
    for n, (address, grads) in enumerate(stream(steps, own.addressed, touched), 1):
        rows, slots = step(rows, slots, address[None, :, None], grads[None].reshape(1, touched, WIDTH), n)
    return np.asarray(rows), jax.tree.map(np.asarray, slots)


def dense_gradient(address, grads) -> np.ndarray:
    out = np.zeros((ROWS, WIDTH))
    np.add.at(out, address, grads.astype(np.float64))
    return out


@pytest.mark.parametrize(
    "optimizer", [RowSGD(learning_rate=2.0), RowAdagrad(learning_rate=2.0), TouchAdam(learning_rate=2.0)]
)
def test_a_dense_update_is_the_oracle(optimizer) -> None:
    """1000 steps: float64 numpy over the whole table, in which a row without gradient keeps row and slots."""
    rows, _ = run_sparse(optimizer, 1000)
    expected = np.asarray(spec(optimizer).create(jax.random.key(1))[0], np.float64)
    total, mu, nu, count = np.zeros(ROWS), np.zeros_like(expected), np.zeros_like(expected), np.zeros((ROWS, 1))
    for address, grads in stream(1000, 204, 12):
        g = dense_gradient(address, grads)
        hit = np.isin(np.arange(ROWS), address)[:, None]
        if isinstance(optimizer, RowSGD):
            direction = g
        elif isinstance(optimizer, RowAdagrad):
            total += (g * g).mean(1)
            direction = g / np.sqrt(np.maximum(total, 1e-30))[:, None]
        else:
            count = count + hit
            mu = np.where(hit, 0.9 * mu + 0.1 * g, mu)
            nu = np.where(hit, 0.95 * nu + 0.05 * g * g, nu)
            ages = np.maximum(count, 1)
            direction = mu / (1 - 0.9**ages) / np.sqrt(np.maximum(nu / (1 - 0.95**ages), 1e-30))
        expected -= np.where(hit, 0.02 * direction, 0.0)
    np.testing.assert_allclose(rows, expected, rtol=2e-4, atol=2e-4)


def dense_adam(steps: int, rate: float = 0.01):
    """Adam over the whole table in float64: (rows, mu, nu, displacement of each row by its gradients' own steps)."""
    rows = np.asarray(spec(LazyAdam()).create(jax.random.key(1))[0], np.float64)
    mu, nu = np.zeros_like(rows), np.zeros_like(rows)
    for n, (address, grads) in enumerate(stream(steps, 204, 12), 1):
        g = dense_gradient(address, grads)
        mu, nu = 0.9 * mu + 0.1 * g, 0.95 * nu + 0.05 * g * g
        rows -= rate * mu / (1 - 0.9**n) / (np.sqrt(nu / (1 - 0.95**n)) + 1e-15)
    return rows, mu, nu


def test_lazy_adam_keeps_the_moments_of_dense_adam_and_drifts_from_its_rows() -> None:
    steps = 1000
    rows, slots = run_sparse(LazyAdam(learning_rate=1.0), steps)
    dense_rows, mu, nu = dense_adam(steps)
    start = np.asarray(spec(LazyAdam()).create(jax.random.key(1))[0])
    elapsed = (steps - slots["clock"])[:, None]
    touched = slots["clock"] > 0
    np.testing.assert_allclose((slots["mu"] * 0.9**elapsed)[touched], mu[touched], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose((slots["nu"] * 0.95**elapsed)[touched], nu[touched], rtol=1e-3, atol=1e-6)
    # What dense Adam moves a row by momentum between touches, lazy Adam leaves out: about five sixths of the way of a rare row
    # (0.45 of the rate at the touch, 5.8 in all), little of the row that nearly every step touches.
    moved, dense_moved = np.linalg.norm(rows - start, axis=1), np.linalg.norm(dense_rows - start, axis=1)
    print(
        "lazy / dense displacement, by frequency of the row:",
        (moved / np.maximum(dense_moved, 1e-12))[[0, 1, 3, 10, 30, 100, 200]],
    )
    share = moved[100:200].sum() / dense_moved[100:200].sum()
    assert 0.05 < share < 0.3
    assert 0.8 < moved[0] / dense_moved[0] < 1.2
    assert (rows[204:] == start[204:]).all()


def test_the_first_touch_moves_a_row_by_the_learning_rate_whenever_it_comes() -> None:
    for optimizer in (TouchAdam(learning_rate=1.0), RowAdagrad(learning_rate=1.0)):
        own = spec(optimizer, deviation=0.0)
        rows, slots = own.create(jax.random.key(0))
        grads = jnp.full((1, 1, WIDTH), -1e-9)  # of one token in a large batch
        rows, slots = update(
            own, rows, slots, jnp.full((1, 1, 1), 7, jnp.int32), grads, jnp.float32(0.02), jnp.int32(5000)
        )
        np.testing.assert_allclose(rows[7], 0.02, rtol=1e-4)
    # Lazy Adam's first touch at step 5000: (1 - 0.9) / sqrt(1 - 0.95) = 0.447 of the rate.
    own = spec(LazyAdam(learning_rate=1.0), deviation=0.0)
    rows, slots = own.create(jax.random.key(0))
    rows, _ = update(own, rows, slots, jnp.full((1, 1, 1), 7, jnp.int32), grads, jnp.float32(0.02), jnp.int32(5000))
    np.testing.assert_allclose(rows[7], 0.02 * 0.1 / 0.05**0.5, rtol=1e-4)


def test_untouched_rows_and_slots_keep_their_bits() -> None:
    for optimizer in (LazyAdam(), TouchAdam(), RowAdagrad(), RowSGD()):
        own = spec(optimizer)
        rows, slots = own.create(jax.random.key(3))
        address = jnp.array([[[4], [9]]], jnp.int32)
        new, new_slots = update(own, rows, slots, address, jnp.ones((1, 2, WIDTH)), jnp.float32(0.1), jnp.int32(1))
        others = np.setdiff1d(np.arange(ROWS), [4, 9])
        for before, after in zip(jax.tree.leaves((rows, slots)), jax.tree.leaves((new, new_slots)), strict=True):
            assert np.asarray(before)[others].tobytes() == np.asarray(after)[others].tobytes()
            assert (np.asarray(before)[[4, 9]] != np.asarray(after)[[4, 9]]).any()


def test_rows_of_float8_take_steps_smaller_than_their_digits() -> None:
    """400 steps of 0.001 beside a row's largest number 1: between 0.25 and 0.5 float8 numbers lie 1/32 apart, 31 steps."""
    own = TableSpec((200,), 32, jnp.dtype(jnp.float8_e4m3fn), RowSGD(learning_rate=1.0), 0.0)
    rows, slots = own.create(jax.random.key(0))
    assert own.stored == (9, jnp.uint32) and rows.shape == (256, 9)
    address = jnp.array([[[3], [7]]], jnp.int32)
    first = jnp.zeros((1, 2, 32)).at[..., 0].set(-1.0)
    each = jnp.full((1, 2, 32), -0.001).at[..., 0].set(0.0)
    step = tiny.jit(lambda r, g, n: update(own, r, slots, address, g, jnp.float32(1.0), n)[0])
    rows = step(rows, first, 1)
    one = step(rows, each, 2)
    assert (step(rows, each, 2) == one).all() and (step(rows, each, 3) != one).any()
    for n in range(400):
        rows = step(rows, each, n + 2)
    found = np.asarray(look_up(rows, address), np.float32).reshape(2, 32)
    assert (found[:, 0] == 1).all() and not np.asarray(rows)[[0, 4, 255]].any()
    # The variance of a step is at most 0.001 / 32; of the mean of 31 numbers after 400: 4e-4, a deviation of 0.02.
    assert abs(found[:, 1:].mean() - 0.4) < 0.08 and found[:, 1:].std() > 0.02
    assert (found[0] == found[1]).all()  # the bits are of step, column and number, not of where a row is
