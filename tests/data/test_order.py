"""The keyed order: permutations and draws that depend on their key alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.data import order


@given(count=st.integers(0, 300), key=st.lists(st.integers(0, 2**63), max_size=3))
def test_permutation_is_one(count, key):
    assert sorted(order.permutation(count, *key).tolist()) == list(range(count))


def test_bits_are_fixed():
    # From the definition of SplitMix64: the first outputs of the generator seeded with 0 and 1234567.
    assert int(order.scramble(np.uint64(0))) == 0xE220A8397B1DCDAF
    assert int(order.scramble(np.uint64(1234567))) == 6457827717110365317
    assert order.permutation(10, 3).tolist() == [7, 3, 8, 6, 5, 9, 4, 1, 2, 0]


@given(a=st.tuples(st.integers(0, 50), st.integers(0, 50)), b=st.tuples(st.integers(0, 50), st.integers(0, 50)))
def test_keys_differ(a, b):
    assert (order.fold(*a) == order.fold(*b)) == (a == b)


def test_negative_and_large_keys_are_keys():
    assert order.fold(-1) != order.fold(1)
    assert order.fold(2**64 - 1) == order.fold(-1)


@pytest.mark.parametrize("bound", [2, 7, 1000])
def test_integers_are_uniform(bound):
    drawn = order.integers(bound, 50_000, 5)
    assert drawn.min() >= 0 and drawn.max() < bound
    expected = 50_000 / bound
    chi = ((np.bincount(drawn, minlength=bound) - expected) ** 2 / expected).sum()
    assert abs(chi - (bound - 1)) < 6 * np.sqrt(2 * (bound - 1))


def test_places_of_a_permutation_are_uniform():
    first = np.array([order.permutation(5, seed)[0] for seed in range(5000)])
    assert (np.abs(np.bincount(first, minlength=5) - 1000) < 150).all()
