"""Keyed pseudo-random order: permutations and draws that are pure functions of integers.

NumPy documents that `Generator` streams may change between versions. Everything the order of training data depends on is
therefore computed here from SplitMix64 (Steele, Lea, Flood 2014), whose bits are fixed by its definition.
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def scramble(values: np.ndarray) -> np.ndarray:
    """Maps uint64 values one-to-one onto well-mixed uint64 values (the SplitMix64 finalizer)."""
    with np.errstate(over="ignore"):
        z = np.asarray(values, np.uint64) + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        return z ^ (z >> np.uint64(31))


def fold(*key: int) -> np.uint64:
    """Folds a sequence of integers into one uint64 key; the order of the integers matters."""
    state = np.uint64(len(key))
    for part in key:
        state = scramble(state ^ scramble(np.uint64(part & 0xFFFFFFFFFFFFFFFF)))[()]
    return state


def draws(shape: int | tuple[int, ...], *key: int) -> np.ndarray:
    """Returns independent uint64 draws of a shape, a pure function of the key."""
    count = int(np.prod(shape))
    with np.errstate(over="ignore"):
        counter = np.arange(count, dtype=np.uint64) + fold(*key) * _GOLDEN
    return scramble(scramble(counter) ^ fold(*key, 1)).reshape(shape)


def integers(bound: int, shape: int | tuple[int, ...], *key: int) -> np.ndarray:
    """Returns int64 draws below `bound`, uniform to one part in 2^32 (bound must be below 2^32)."""
    high = draws(shape, *key) >> np.uint64(32)
    return ((high * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def permutation(count: int, *key: int) -> np.ndarray:
    """Returns a permutation of range(count) as int64, a pure function of (count, key)."""
    return np.argsort(draws(count, *key, count), kind="stable")
