"""Parameters as declarations: shape, logical dims and kind of initial value; values are drawn later, by path.

A module declares what it needs and never draws numbers. `materialize` draws every leaf from a key folded with the leaf's path,
so an initial value depends only on (seed, path, shape): adding a component changes no other component's initial values, which
keeps ablations paired, and a stacked run of blocks starts equal to the same blocks unrolled.
"""

import functools
import re
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

Dims = tuple[str, ...]
Init = Literal["normal", "zeros", "ones"]

RUN_KEY = re.compile(r"^(\d+)_to_(\d+)$")
"""The name of a stacked run of equal blocks: first and last block number."""


class ModelState(nnx.Variable):
    """A value that training changes without a gradient, such as a router's bias or the pattern of a sparse matrix."""


class StandsFor(NamedTuple):
    """The matrix of which a parameter is a storage: what initial scales and learning rates follow.

    Attributes:
      dims: logical dims of the matrix, batch dims included.
      shape: its shape.
      density: fraction of it that exists.
    """

    dims: Dims
    shape: tuple[int, ...]
    density: float


def declare(
    shape: tuple[int, ...],
    dims: Dims,
    init: Init = "normal",
    *,
    frozen: bool = False,
    stands_for: StandsFor | None = None,
) -> nnx.Param:
    """Declares a float32 parameter inside a module's constructor (run under `nnx.eval_shape`).

    Args:
      shape: its shape.
      dims: one logical name per dimension; sharding, decay groups, Muon and initial scales read only these.
      init: "normal" (the parametrization gives the deviation), "zeros" or "ones".
      frozen: whether training leaves it as it is, without decay either.
      stands_for: the matrix that it stores, where that is not the array itself.
    """
    assert len(shape) == len(dims), f"{dims} does not name the dimensions of {shape}"
    stands_for = stands_for or StandsFor(dims, shape, 1.0)
    return nnx.Param(jnp.zeros(shape, jnp.float32), dims=dims, init=init, frozen=frozen, stands_for=stands_for)


def map_leaves(function: Callable[..., Any], tree: Any, *rest: Any, path: tuple[str, ...] = ()) -> Any:
    """Maps function(path, leaf, *other_leaves) over nested dicts; tuples are leaves, so trees of dims work."""
    if isinstance(tree, dict):
        return {key: map_leaves(function, tree[key], *(r[key] for r in rest), path=(*path, key)) for key in tree}
    return function(".".join(path), tree, *rest)


def _draw(key: jax.Array, names: jax.Array, scale: jax.Array, shape: tuple[int, ...], init: Init) -> jax.Array:
    """Draws one leaf; with names of several blocks, their stack."""
    if init != "normal":
        return jnp.full(shape, 0.0 if init == "zeros" else 1.0, jnp.float32)

    def one(name: jax.Array) -> jax.Array:
        own = shape[1:] if names.ndim else shape
        return jax.random.truncated_normal(jax.random.fold_in(key, name), -3.0, 3.0, own, jnp.float32)

    # A normal cut at three deviations has no outlier weights, and a deviation of 0.98658 that the division restores.
    return (jax.vmap(one)(names) if names.ndim else one(names)) * (scale / 0.98658)


@functools.cache
def _compiled_draw(shape: tuple[int, ...], init: Init, sharding: Any, members: bool) -> Callable[..., jax.Array]:
    """One program for every leaf of a shape: a model's hundreds of leaves compile in seconds."""
    draw = functools.partial(_draw, shape=shape, init=init)
    return jax.jit(jax.vmap(draw, (0, None, None)) if members else draw, out_shardings=sharding)


def materialize(key: jax.Array, shapes: Any, inits: Any, scales: Any, shardings: Any = None) -> Any:
    """Draws the parameter tree, leaf by leaf.

    Args:
      key: the member's key, or [P] keys of a population: then every leaf has a leading members dimension.
      shapes: nested dict of shapes of one member; leaves below a stacked run carry the leading layers dimension.
      inits: the same nested dict with kinds of initial value.
      scales: the same nested dict with standard deviations.
      shardings: the same nested dict with where each leaf is made; None: the default device.

    Returns:
      The same nested dict of float32 arrays. A leaf below a run named "a_to_b" is the stack of what blocks a..b would draw.
    """

    def name_of(parts: list[str]) -> int:
        return zlib.crc32(".".join(parts).encode()) & 0x7FFFFFFF

    def leaf(path: str, shape: tuple[int, ...], init: Init, scale: float, sharding: Any = None) -> jax.Array:
        parts = path.split(".")
        names: Any = name_of(parts)
        for i, part in enumerate(parts):
            if match := RUN_KEY.match(part):
                blocks = range(int(match[1]), int(match[2]) + 1)
                names = [name_of([*parts[:i], str(n), *parts[i + 1 :]]) for n in blocks]
        draw = _compiled_draw(tuple(shape), init, sharding, bool(key.ndim))
        return draw(key, jnp.asarray(names, jnp.uint32), jnp.float32(scale))

    trees = (inits, scales) if shardings is None else (inits, scales, shardings)
    return map_leaves(leaf, shapes, *trees)
