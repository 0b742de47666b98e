"""Storing a finished tile while the tensor cores multiply the next: the order of work that the Hopper kernels share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl


def during_first_step(steps, one: Callable, other: Callable, otherwise):
    """The result of `other()`, called while the product of step 0 runs, or by itself if there is no step.

    Args:
        steps: int32, how many.
        one: one(i, call) starts the product of step i, calls `call`, then waits for the product.
        other: other() -> tree of scalars, loads of which no later step has to wait.
        otherwise: Scalars of the same tree, of any value.
    """

    def step(i, _):
        found = []
        one(i, lambda: found.append(other()))
        return found[0]

    found = lax.fori_loop(0, jnp.minimum(steps, 1), step, otherwise)
    return lax.cond(steps <= 0, other, lambda: found)


def multiply_while_storing(steps, one: Callable, stores: Sequence[Callable[[], None]]) -> None:
    """Runs `one(i, store)` for i in 0 .. steps - 1.

    Args:
        steps: int32, how many.
        one: one(i, store) starts the product of step i, calls `store` unless it is None, then waits for the product.
        stores: what is left to store. The first steps take one each; those for which there is no step are called by themselves.
    """
    for number, store in enumerate(stores):
        lax.fori_loop(number, jnp.minimum(steps, number + 1), lambda i, _, store=store: one(i, store), None)

        @pl.when(steps <= number)
        def _(store=store):
            store()

    lax.fori_loop(len(stores), steps, lambda i, _: one(i, None), None)
