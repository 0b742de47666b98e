"""Schedules: when masks are chosen anew, how much of the sparsity is reached by then, and how much of a mask is exchanged.

`step` counts finished steps: a change "at step 100" happens in the step that follows 100 finished ones. All functions take traced
numbers. Shares are of the steps of the whole run.
"""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp

from sparse_lm.config import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsitySchedule(Config):
    """Base of the schedules."""

    every: int = 1
    """Steps between two choices of the mask, while masks change. Algorithms that train the weights behind the mask choose all
    through the run."""
    dense_tail: float = 0.0
    """Share of the run at its end that is dense again: weights that were masked start from zero or from behind the mask."""

    def check(self) -> None:
        """See Config.check."""
        self.require(self.every >= 1, "every", "at least 1")
        self.require(0.0 <= self.dense_tail < 1.0, "dense_tail", "a share from 0 to below 1")

    def tail(self, steps: int) -> int:
        """Returns the step from which the run is dense again; `steps` if it is not."""
        return steps - math.floor(self.dense_tail * steps)

    def progress(self, step: Any, steps: int) -> Any:
        """Returns the share of the final sparsity that a mask chosen at this step has, float32 from 0 to 1."""
        return jnp.where(step >= self.tail(steps), 0.0, self.rise(step, steps)).astype(jnp.float32)

    def start(self, steps: int) -> Any:
        """Returns the share of the sparsity that the first masks have, chosen before the first step."""
        return self.progress(0, steps)

    def due(self, step: Any, steps: int) -> Any:
        """Says whether masks are chosen at this step."""
        inside = self.changes(step, steps) & (step < self.tail(steps))
        return inside | (step == self.tail(steps)) if self.dense_tail else inside

    def rise(self, step: Any, steps: int) -> Any:
        """`progress` without the dense tail."""
        return jnp.float32(1.0)

    def changes(self, step: Any, steps: int) -> Any:
        """`due` without the dense tail."""
        return False

    def turns(self, step: Any, steps: int) -> Any:
        """Says whether algorithms that train the weights behind the mask choose at this step."""
        often = (step > 0) & (step % self.every == 0) & (step < self.tail(steps))
        return often | self.due(step, steps)

    def drop_fraction(self, step: Any, steps: int) -> Any:
        """Returns the share of the active weights that algorithms that grow exchange at this step."""
        return jnp.float32(0.0)

    def passed(self, step: Any, steps: int) -> Any:
        """Returns how much of the time in which masks change has passed, from 0 to 1."""
        return jnp.minimum(step / steps, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantSparsity(SparsitySchedule):
    """Sparse from the first step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneShot(SparsitySchedule):
    """Dense, then sparse at once."""

    at: float = 0.0
    """Share of the run after which the mask is chosen; 0: in the first step, with its gradient."""

    def check(self) -> None:
        """See Config.check."""
        super().check()
        self.require(0.0 <= self.at < 1.0 - self.dense_tail, "at", "a share below 1 - dense_tail")

    def start(self, steps: int) -> Any:
        """See SparsitySchedule.start."""
        return jnp.float32(0.0)

    def first(self, steps: int) -> int:
        """Returns the step of the choice."""
        return math.floor(self.at * steps)

    def rise(self, step: Any, steps: int) -> Any:
        """See SparsitySchedule.rise."""
        return jnp.where(step >= self.first(steps), 1.0, 0.0)

    def changes(self, step: Any, steps: int) -> Any:
        """See SparsitySchedule.changes."""
        return step == self.first(steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window(SparsitySchedule):
    """Base of the schedules that choose masks at regular steps of a window."""

    every: int = 100
    """Steps between two choices of the mask."""
    begin: float = 0.0
    """Share of the run before the window."""
    end: float = 0.75
    """Share of the run at the end of the window; the last choice is then."""
    drop: float = 0.0
    """Share of the active weights that algorithms that grow exchange at the first choice."""
    drop_decay: Literal["cosine", "constant"] = "cosine"
    """How that share falls to the end of the window: drop / 2 (1 + cos(pi step / last)) (arXiv 1911.11134, eq. 1), or not."""

    def check(self) -> None:
        """See Config.check."""
        super().check()
        self.require(0.0 <= self.begin < self.end, "begin", f"a share below end ({self.end})")
        self.require(self.end <= 1.0 - self.dense_tail, "end", "a share of at most 1 - dense_tail")
        self.require(0.0 <= self.drop <= 1.0, "drop", "a share from 0 to 1")

    def bounds(self, steps: int) -> tuple[int, int]:
        """Returns the first and the last step of the window; the last one is a step of the run."""
        last = min(math.ceil(self.end * steps), steps - 1)
        return min(math.floor(self.begin * steps), last), last

    def fraction(self, step: Any, steps: int) -> Any:
        """Returns how far the window has passed, from 0 to 1."""
        first, last = self.bounds(steps)
        return jnp.clip((step - first) / max(1, last - first), 0.0, 1.0)

    def passed(self, step: Any, steps: int) -> Any:
        """See SparsitySchedule.passed."""
        return self.fraction(step, steps)

    def changes(self, step: Any, steps: int) -> Any:
        """See SparsitySchedule.changes."""
        first, last = self.bounds(steps)
        inside = (step > 0) & (step >= first) & (step < last) & (step % self.every == 0)
        return inside | (step == last)

    def drop_fraction(self, step: Any, steps: int) -> Any:
        """See SparsitySchedule.drop_fraction."""
        if self.drop_decay == "constant":
            return jnp.float32(self.drop)
        _, last = self.bounds(steps)
        return self.drop / 2 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / max(1, last), 1.0)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CubicSparsity(Window):
    """Sparsity rises as 1 - (1 - fraction of the window)^3 (Zhu and Gupta 2017, arXiv 1710.01878, eq. 1)."""

    def rise(self, step: Any, steps: int) -> Any:
        """See SparsitySchedule.rise."""
        return 1.0 - (1.0 - self.fraction(step, steps)) ** 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSparsity(Window):
    """Sparsity rises linearly over the window."""

    def rise(self, step: Any, steps: int) -> Any:
        """See SparsitySchedule.rise."""
        return self.fraction(step, steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Periodic(Window):
    """Sparse from the first step; a share of the weights is exchanged at regular steps."""

    drop: float = 0.3
    """Share of the active weights that is exchanged at the first choice."""

    def changes(self, step: Any, steps: int) -> Any:
        """See SparsitySchedule.changes; nothing is left to reach at the last step of the window, so it is as any other."""
        first, last = self.bounds(steps)
        return (step > 0) & (step >= first) & (step < last) & (step % self.every == 0)
