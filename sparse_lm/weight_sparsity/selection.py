"""Exact selection of the k largest by bisection over the bits of their keys: no sort, no gather, equal bits under every sharding.

Scores become uint32 keys in the same order. The k-th largest key is found bit by bit from counts, and counts are integers, so
their sums over shards are exact in any order. Among equal keys the lowest indices are taken: the index behind which ties are left
out is found by a second bisection. `jax.lax.top_k` would sort, and on a sharded matrix gather.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FRACTION_BITS = 15
"""Fractions of counts are multiples of 2^-15, so that shares of counts up to 2^31 are exact in 32 bits."""

Axes = tuple[int, ...]

NEVER = np.uint32(0)
"""Key of what may not be chosen: below the key of every number."""


def keys_of(scores: jax.Array) -> jax.Array:
    """Returns uint32 keys in the order of float32 scores; -0 equals 0; every key is above `NEVER`.

    Positive floats are ordered as their bits, negative ones against them. Not-a-number counts as the largest.
    """
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32) + 0.0, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def kth_largest(at_least: Callable[[Any], Any], size: Any, count: Any) -> tuple[Any, Any]:
    """Returns (t, how many keys are >= t) with t a bound of the `count` largest keys of each group.

    If that many keys are >= t as asked for, t separates them; else t is the count-th largest key and several equal it.

    Args:
      at_least: tree of uint32 bounds, one a group -> tree of int32, how many keys of the group are >= its bound.
      size: the same tree of int32 sizes of the groups, in the shape of the bounds.
      count: the same tree of int32, broadcasting against the sizes; from 0 to the size.
    """

    def refine(i: jax.Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        bound, found = state
        bit = jnp.uint32(1) << (31 - i).astype(jnp.uint32)
        trial = jax.tree.map(lambda b: b | bit, bound)
        there = at_least(trial)
        enough = jax.tree.map(jnp.greater_equal, there, count)
        # Once the count is met exactly, later bits change neither the choice nor the count.
        return jax.tree.map(jnp.where, enough, trial, bound), jax.tree.map(jnp.where, enough, there, found)

    start = jax.tree.map(lambda n: jnp.zeros(n.shape, jnp.uint32), size), size
    return jax.lax.fori_loop(0, 32, refine, start)


def positions(shape: Sequence[int], axes: tuple[int, ...]) -> jax.Array:
    """Returns the row-major index of every element within its group, int32."""
    index = jnp.zeros(tuple(shape), jnp.int32)
    for axis in axes:
        index = index * shape[axis] + jax.lax.broadcasted_iota(jnp.int32, tuple(shape), axis)
    return index


def keep_top(keys: dict[str, jax.Array], count: dict[str, jax.Array], axes: Mapping[str, Axes]) -> dict[str, jax.Array]:
    """Chooses the `count` largest keys of each group, exactly; among equal ones those with the lowest index.

    One loop serves all arrays: few and small programs, and few synchronisations of a device with its host.

    Args:
      keys: {name: uint32}, from `keys_of` or any other; `NEVER` where nothing may be chosen.
      count: {name: int32}, as in `kth_largest`; at most the number of keys above `NEVER`.
      axes: {name: ascending dims that a group spans, from the front or the back}.

    Returns:
      {name: bool of the shape of the keys}, with exactly `count` true in each group.
    """

    axes = {name: tuple(axis % array.ndim for axis in axes[name]) for name, array in keys.items()}

    def total(name: str, mask: jax.Array) -> jax.Array:
        return jnp.sum(mask, axis=axes[name], keepdims=True, dtype=jnp.int32)

    def at_least(bound: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: total(name, array >= bound[name]) for name, array in keys.items()}

    size = {name: math.prod(array.shape[axis] for axis in axes[name]) for name, array in keys.items()}
    groups = {
        name: jnp.full([1 if axis in axes[name] else n for axis, n in enumerate(array.shape)], size[name], jnp.int32)
        for name, array in keys.items()
    }
    count = {name: jnp.broadcast_to(count[name], groups[name].shape) for name in keys}
    bound, found = kth_largest(at_least, groups, count)
    excess = {name: found[name] - count[name] for name in keys}
    index = {name: positions(array.shape, axes[name]) for name, array in keys.items()}

    # The last `excess` ties are left out: those at or behind the largest index with so many ties at or behind it.
    def left_out(first: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            name: (array == bound[name]) & (excess[name] > 0) & (index[name] >= first[name])
            for name, array in keys.items()
        }

    def unfinished(state: tuple[jax.Array, dict[str, jax.Array]]) -> jax.Array:
        tied = jnp.stack([jnp.any(array > 0) for array in excess.values()])
        return (state[0] >= 0) & jnp.any(tied)

    def refine(state: tuple[jax.Array, dict[str, jax.Array]]) -> tuple[jax.Array, dict[str, jax.Array]]:
        bit, first = state
        trial = {name: array | (jnp.int32(1) << bit) for name, array in first.items()}
        behind = {name: total(name, mask) for name, mask in left_out(trial).items()}
        return bit - 1, {n: jnp.where(behind[n] >= excess[n], trial[n], array) for n, array in first.items()}

    bits = max(size.values()).bit_length()
    start = (jnp.int32(bits - 1), {name: jnp.zeros_like(array) for name, array in excess.items()})
    _, first = jax.lax.while_loop(unfinished, refine, start)
    out = left_out(first)
    return {name: (array >= bound[name]) & ~out[name] for name, array in keys.items()}


def share_of(count: jax.Array, fraction: jax.Array) -> jax.Array:
    """Returns count * q / 2^15 to the nearest, halves up, q = round(fraction * 2^15): exact integers, where float32 rounds above 2^24.

    Args:
      count: int32 from 0 to 2^31 - 1.
      fraction: float32 from 0 to 1; at 1 all of count.
    """
    q, low = quantized(fraction), count & ((1 << FRACTION_BITS) - 1)
    return (count >> FRACTION_BITS) * q + ((low * q + (1 << (FRACTION_BITS - 1))) >> FRACTION_BITS)


def quantized(fraction: jax.Array) -> jax.Array:
    """Returns a fraction in units of 2^-15, int32."""
    scaled = jnp.clip(jnp.asarray(fraction, jnp.float32), 0.0, 1.0) * (1 << FRACTION_BITS)
    return jnp.round(scaled).astype(jnp.int32)
