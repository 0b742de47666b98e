"""Parameters as declarations: shape, logical dims and kind of initial value; values are drawn later, by path.

A module declares what it needs and never draws numbers. `materialize` draws every leaf from a key folded with the leaf's path,
so an initial value depends only on (seed, path, shape): adding a component changes no other component's initial values, which
keeps ablations paired, and a stacked run of blocks starts equal to the same blocks unrolled.
"""

import re
import zlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

Dims = tuple[str, ...]
Init = Literal["normal", "zeros", "ones"]

RUN_KEY = re.compile(r"^(\d+)_to_(\d+)$")
"""The name of a stacked run of equal blocks: first and last block number."""


def declare(shape: tuple[int, ...], dims: Dims, init: Init = "normal") -> nnx.Param:
    """Declares a float32 parameter inside a module's constructor (run under `nnx.eval_shape`).

    Args:
      shape: its shape.
      dims: one logical name per dimension; sharding, decay groups, Muon and initial scales read only these.
      init: "normal" (the parametrization gives the deviation), "zeros" or "ones".
    """
    assert len(shape) == len(dims), f"{dims} does not name the dimensions of {shape}"
    return nnx.Param(jnp.zeros(shape, jnp.float32), dims=dims, init=init)


def map_leaves(function: Callable[..., Any], tree: Any, *rest: Any, path: tuple[str, ...] = ()) -> Any:
    """Maps function(path, leaf, *other_leaves) over nested dicts; tuples are leaves, so trees of dims work."""
    if isinstance(tree, dict):
        return {key: map_leaves(function, tree[key], *(r[key] for r in rest), path=(*path, key)) for key in tree}
    return function(".".join(path), tree, *rest)


def _draw(key: jax.Array, path: str, shape: tuple[int, ...], init: Init, scale: float) -> jax.Array:
    if init == "zeros":
        return jnp.zeros(shape, jnp.float32)
    if init == "ones":
        return jnp.ones(shape, jnp.float32)
    leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)
    # A normal cut at three deviations: no outlier weights, and a deviation of 0.986 that the division restores.
    return jax.random.truncated_normal(leaf_key, -3.0, 3.0, shape, jnp.float32) * (scale / 0.98658)


def materialize(key: jax.Array, shapes: Any, inits: Any, scales: Any) -> Any:
    """Draws the parameter tree.

    Args:
      key: the member's key.
      shapes: nested dict of shapes; leaves below a stacked run carry the leading layers dimension.
      inits: the same nested dict with kinds of initial value.
      scales: the same nested dict with standard deviations.

    Returns:
      The same nested dict of float32 arrays. A leaf below a run named "a_to_b" is the stack of what blocks a..b would draw.
    """

    def leaf(path: str, shape: tuple[int, ...], init: Init, scale: float) -> jax.Array:
        parts = path.split(".")
        for i, part in enumerate(parts):
            if match := RUN_KEY.match(part):
                first, last = int(match[1]), int(match[2])
                names = (".".join([*parts[:i], str(n), *parts[i + 1 :]]) for n in range(first, last + 1))
                return jnp.stack([_draw(key, name, shape[1:], init, scale) for name in names])
        return _draw(key, path, shape, init, scale)

    return map_leaves(leaf, shapes, inits, scales)
