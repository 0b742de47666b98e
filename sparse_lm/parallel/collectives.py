"""Inside shard_map: sums whose transpose costs nothing, and functions that gather again instead of keeping what they gathered."""

import functools
from collections.abc import Callable
from typing import Any

import jax


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def sum_of_copies(x: jax.Array, axis: str) -> jax.Array:
    """Sums over an axis a value that leaves shard_map as one copy of many (its out_spec leaves the axis out).

    shard_map (with check_vma off) hands each copy its share of the cotangent, 1 / size; psum's own transpose would sum the shares by
    a second exchange, this one multiplies.
    """
    return jax.lax.psum(x, axis)


def _forward(x: jax.Array, axis: str) -> tuple[jax.Array, None]:
    return sum_of_copies(x, axis), None


def _backward(axis: str, _: None, share: jax.Array) -> tuple[jax.Array]:
    return (share * jax.lax.axis_size(axis),)


sum_of_copies.defvjp(_forward, _backward)


MOVES = ("all_gather", "reshape", "transpose", "squeeze", "slice", "dynamic_slice", "convert_element_type")
"""Primitives by which gathered weights reach the product that reads them."""


def gathering_again(apply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns a function that gathers weights and multiplies, such that its backward pass gathers them again and keeps all else.

    (A name for the gathered array, excepted by a policy, would not do: what the name is given to, or made from it, is then kept.) XLA
    may join the two gathers where it sees both, in blocks that are neither scanned nor rematerialised; it is let, since a barrier
    between them would also make a rematerialised block gather three times.
    """

    def kept(primitive: Any, *_: Any, **__: Any) -> bool:
        return primitive.name not in MOVES

    return jax.checkpoint(apply, policy=kept, prevent_cse=False)
