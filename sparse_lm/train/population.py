"""Populations: P members (seeds x learning rates) trained as one vmapped program with one compile, on the same data in order.

Small models leave most of an accelerator idle; members of a population share it, which makes honest error bars cheap. A member
never reads another's numbers, so a NaN in one leaves the others untouched.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparse_lm.config import Config

MEMBERS = "members"
"""Name of the vmapped axis."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Population(Config):
    """Members of a population: every seed with every learning-rate multiplier."""

    seeds: tuple[int, ...] = ()
    """Seeds of initial values; empty: the run's own seed."""
    learning_rate_multipliers: tuple[float, ...] = ()
    """Factors on the optimizer's learning rate; empty: 1."""

    def check(self) -> None:
        """See Config.check."""
        self.require(len(set(self.seeds)) == len(self.seeds), "seeds", "different seeds")
        self.require(all(0 <= seed < 2**31 for seed in self.seeds), "seeds", "seeds from 0 to 2**31 - 1")
        factors = self.learning_rate_multipliers
        self.require(all(factor > 0 for factor in factors), "learning_rate_multipliers", "factors above 0")
        self.require(len(set(factors)) == len(factors), "learning_rate_multipliers", "different factors")

    @property
    def active(self) -> bool:
        """Whether the run is a population."""
        return bool(self.seeds or self.learning_rate_multipliers)

    def members(self, seed: int) -> list[tuple[int, float]]:
        """Returns (seed, learning-rate multiplier) of every member; one when the run is no population."""
        return list(itertools.product(self.seeds or (seed,), self.learning_rate_multipliers or (1.0,)))


def over_members(
    function: Callable[..., Any], population: Population, in_axes: tuple[int | None, ...]
) -> Callable[..., Any]:
    """Returns the function over all members at once: vmapped for a population, itself otherwise."""
    return jax.vmap(function, in_axes=in_axes, axis_name=MEMBERS) if population.active else function


def member_arrays(population: Population, seed: int) -> tuple[jax.Array, jax.Array]:
    """Returns (seeds, multipliers) for `over_members`: [P] arrays, or scalars when the run is no population."""
    seeds, factors = zip(*population.members(seed))
    arrays = jnp.asarray(seeds, jnp.uint32), jnp.asarray(factors, jnp.float32)
    return arrays if population.active else (arrays[0][0], arrays[1][0])
