"""Updates of table rows: each sees only the rows that a step touched, with the sum of their gradients.

A row of a hash table is touched a few times in a whole run, unlike a weight. Two consequences are built in here:

- The gradient of a row comes from single tokens divided by all tokens of the step (1e-6 and less), so epsilons are 1e-15: a usual
  1e-8 would make the step of a row shrink with the batch size.
- What averages over steps averages over nothing. `LazyAdam` keeps the moments that dense Adam would have and divides by dense Adam's
  bias correction; a row touched for the first time late in a run then moves by (1 - beta1) / sqrt(1 - beta2) of the learning rate
  (0.45 at 0.9 and 0.95), and not by the tail of steps that dense Adam takes on momentum afterwards (another 5.4). `TouchAdam` and
  `RowAdagrad` count touches: the first touch moves every entry, or the row on average, by the whole learning rate, whenever it comes.

None of them decays weights: decay would shrink rows that nothing touches.

Legend: R rows of the table, U touched rows, D row width.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_lm.config import Config

Slots = dict[str, jax.Array]


class SlotSpec(NamedTuple):
    """One slot: shape and dims of a row's entry, and dtype; it starts from zeros."""

    shape: tuple[int, ...]
    dims: tuple[str, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOptimizer(Config):
    """Base of the row optimizers."""

    learning_rate: float = 5.0
    """Multiple of the optimizer's learning rate, schedule included (5: Cheng et al. 2026, arXiv 2601.07372)."""

    def check(self) -> None:
        """See Config.check."""
        self.require(self.learning_rate >= 0, "learning_rate", "0 or above")

    def slots(self, width: int) -> dict[str, SlotSpec]:
        """Returns what is kept of every row besides its values."""
        return {}

    def direction(self, grads_UD: jax.Array, slots: Slots, step: jax.Array) -> tuple[jax.Array, Slots]:
        """Returns (direction of each touched row, its new slots).

        Args:
          grads_UD: float32 gradients, summed over the step.
          slots: {name: [U, ...]} before the step.
          step: int32 number of this step, counted from 1.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSGD(RowOptimizer):
    """Plain gradient steps; the learning rate must fit the size of the gradients."""

    def direction(self, grads_UD: jax.Array, slots: Slots, step: jax.Array) -> tuple[jax.Array, Slots]:
        """See RowOptimizer.direction."""
        return grads_UD, {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowAdagrad(RowOptimizer):
    """Adagrad with one number a row: the sum of mean squared gradients (Duchi et al. 2011; row-wise as in DLRM, arXiv 1906.00091).

    Its n-th step falls as 1 / sqrt(n) by itself, which suits rows between one touch and thousands, and it keeps 4 bytes a row.
    """

    epsilon: float = 1e-15
    """Added to the root."""

    def check(self) -> None:
        """See Config.check."""
        super().check()
        self.require(self.epsilon > 0, "epsilon", "above 0")

    def slots(self, width: int) -> dict[str, SlotSpec]:
        """See RowOptimizer.slots."""
        return {"sum_squares": SlotSpec((), (), jnp.float32)}

    def direction(self, grads_UD: jax.Array, slots: Slots, step: jax.Array) -> tuple[jax.Array, Slots]:
        """See RowOptimizer.direction."""
        total_U = slots["sum_squares"] + jnp.mean(jnp.square(grads_UD), axis=-1)
        return grads_UD / (jnp.sqrt(total_U)[:, None] + self.epsilon), {"sum_squares": total_U}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LazyAdam(RowOptimizer):
    """Adam whose moments fall by the steps since a row's last touch, as if its gradient had been zero (Kingma and Ba 2014).

    At a touch the moments are those of dense Adam. The row itself did not move in between, which dense Adam makes it do.
    """

    beta1: float = 0.9
    """Decay of the mean gradient, a step."""
    beta2: float = 0.95
    """Decay of the mean squared gradient, a step."""
    epsilon: float = 1e-15
    """Added to the root."""

    def check(self) -> None:
        """See Config.check."""
        super().check()
        for name in ("beta1", "beta2"):
            self.require(0 <= getattr(self, name) < 1, name, "0 to below 1")
        self.require(self.epsilon > 0, "epsilon", "above 0")

    def slots(self, width: int) -> dict[str, SlotSpec]:
        """See RowOptimizer.slots."""
        moment = SlotSpec((width,), ("row",), jnp.float32)
        return {"mu": moment, "nu": moment, "clock": SlotSpec((), (), jnp.int32)}

    def clock(self, before_U: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (the clock after the step, by how much the moments fall): the step of the last touch."""
        return jnp.full_like(before_U, step), step - before_U

    def direction(self, grads_UD: jax.Array, slots: Slots, step: jax.Array) -> tuple[jax.Array, Slots]:
        """See RowOptimizer.direction."""
        clock_U, elapsed_U = self.clock(slots["clock"], step)
        ages_U1, falls_U1 = (a.astype(jnp.float32)[:, None] for a in (clock_U, elapsed_U))
        mu_UD = self.beta1**falls_U1 * slots["mu"] + (1 - self.beta1) * grads_UD
        nu_UD = self.beta2**falls_U1 * slots["nu"] + (1 - self.beta2) * jnp.square(grads_UD)
        root_UD = jnp.sqrt(nu_UD / (1 - self.beta2**ages_U1)) + self.epsilon
        return mu_UD / (1 - self.beta1**ages_U1) / root_UD, {"mu": mu_UD, "nu": nu_UD, "clock": clock_U}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TouchAdam(LazyAdam):
    """Adam in each row's own time: the n-th touch is its step n, however many steps lie between."""

    def clock(self, before_U: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See LazyAdam.clock; the number of touches."""
        return before_U + 1, jnp.ones_like(before_U)
