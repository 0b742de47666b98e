"""Learning-rate schedules: a multiplier of the peak learning rate as a function of the step.

`at(step, total_steps)` takes the index of the update about to be applied (0 first). Given a Python number it returns a float,
given a jax array (a tracer included) it returns an fp32 array, by the same formula. Nothing is kept between steps, so a
restored run and a branch of it see the multiplier of their step and nothing else. The warmup rises as
(step + 1) / (warmup + 1): the first update is not wasted on a zero, and step = warmup is the first one at the peak.
"""

import dataclasses
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.config import Config, ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(Config):
    """Base of the schedules: warmup, then `after_warmup`."""

    warmup_fraction: float = 0.01
    """Length of the linear warmup as a fraction of the run; unused when warmup_steps is given."""
    warmup_steps: int | None = None
    """Length of the linear warmup in steps."""

    def check(self) -> None:
        self.require(0.0 <= self.warmup_fraction <= 1.0, "warmup_fraction", "a number from 0 to 1")
        self.require(self.warmup_steps is None or self.warmup_steps >= 0, "warmup_steps", "none, or a number >= 0")

    def check_run(self, total_steps: int) -> None:
        """Raises ConfigError when the schedule does not fit a run of `total_steps`."""
        warmup = self.warmup(total_steps)
        if warmup > total_steps:
            raise ConfigError("warmup_steps", warmup, f"at most the {total_steps} steps of the run")

    def warmup(self, total_steps: int) -> int:
        """Returns the length of the warmup in steps."""
        return round(self.warmup_fraction * total_steps) if self.warmup_steps is None else self.warmup_steps

    def at(self, step: Any, total_steps: int) -> Any:
        """Returns the multiplier of the peak learning rate.

        Args:
          step: index of the update about to be applied; int, float, numpy or jax array (traced or not).
          total_steps: length of the run, a Python int.

        Returns:
          A float for a Python number, an array of the shape of `step` otherwise.
        """
        warmup = self.warmup(total_steps)
        if isinstance(step, jax.Array):
            step = step.astype(jnp.float32)
            rise = jnp.minimum(1.0, (step + 1.0) / (warmup + 1.0))
            return jnp.where(step < warmup, rise, self.after_warmup(step, warmup, total_steps, jnp))
        rise = np.minimum(1.0, (np.asarray(step) + 1.0) / (warmup + 1.0))
        out = np.where(np.asarray(step) < warmup, rise, self.after_warmup(step, warmup, total_steps, np))
        return float(out) if out.ndim == 0 else out

    def after_warmup(self, step: Any, warmup: int, total_steps: int, xp: ModuleType) -> Any:
        """Returns the multiplier at steps >= warmup, computed with numpy or jax.numpy (`xp`)."""
        raise NotImplementedError


def progress(step: Any, start: int, steps: int, xp: ModuleType) -> Any:
    """Returns how far `step` is from `start` to `start + steps`, clipped to [0, 1]."""
    return xp.clip((step - start) / max(steps, 1), 0.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """Warmup, then the peak for ever."""

    def after_warmup(self, step: Any, warmup: int, total_steps: int, xp: ModuleType) -> Any:
        return xp.ones_like(step, dtype=xp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decaying(Schedule):
    """Base of the schedules that end below their peak."""

    final_fraction: float = 0.1
    """Multiplier at the end of the run."""

    def check(self) -> None:
        super().check()
        self.require(0.0 <= self.final_fraction <= 1.0, "final_fraction", "a number from 0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Decaying):
    """Warmup, then half a cosine from 1 to the final fraction (Loshchilov and Hutter 2017, arXiv 1608.03983, eq. 5)."""

    def after_warmup(self, step: Any, warmup: int, total_steps: int, xp: ModuleType) -> Any:
        done = progress(step, warmup, total_steps - warmup, xp)
        return self.final_fraction + (1.0 - self.final_fraction) * 0.5 * (1.0 + xp.cos(np.pi * done))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Decaying):
    """Warmup, then a straight line from 1 to the final fraction."""

    def after_warmup(self, step: Any, warmup: int, total_steps: int, xp: ModuleType) -> Any:
        return 1.0 - (1.0 - self.final_fraction) * progress(step, warmup, total_steps - warmup, xp)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Decaying):
    """Warmup, a long stable stretch at the peak, a short decay (Hu et al. 2024, arXiv 2404.06395).

    The decay shape 1 - sqrt(progress) is from Haegele et al. 2024 (arXiv 2405.18392, eq. 2). Branches: a trunk run decays
    never (`decay_fraction=0`); a branch restores any checkpoint of its stable stretch, say step 5000, sets
    `decay_start=5000, decay_steps=1000` and runs to 6000. Its multipliers before 5000 are the trunk's.
    """

    final_fraction: float = 0.0
    """Multiplier at the end of the decay."""
    decay_fraction: float = 0.2
    """Length of the decay as a fraction of the run; unused when decay_steps is given. 0: never decay (a trunk)."""
    decay_steps: int | None = None
    """Length of the decay in steps."""
    decay_start: int | None = None
    """First step of the decay; none: so that the decay ends with the run. A branch states it and decay_steps."""
    decay_shape: Literal["linear", "one_minus_sqrt"] = "one_minus_sqrt"
    """Form of the decay over its progress p: 1 - p, or 1 - sqrt(p)."""

    def check(self) -> None:
        super().check()
        self.require(0.0 <= self.decay_fraction <= 1.0, "decay_fraction", "a number from 0 to 1")
        self.require(self.decay_steps is None or self.decay_steps >= 0, "decay_steps", "none, or a number >= 0")
        self.require(self.decay_start is None or self.decay_start >= 0, "decay_start", "none, or a number >= 0")
        self.require(
            self.decay_start is None or bool(self.decay_steps),
            "decay_start",
            "none, or a step together with decay_steps >= 1",
        )

    def decay(self, total_steps: int) -> tuple[int, int]:
        """Returns (first step, number of steps) of the decay; 0 steps: none."""
        steps = round(self.decay_fraction * total_steps) if self.decay_steps is None else self.decay_steps
        return (total_steps - steps if self.decay_start is None else self.decay_start), steps

    def check_run(self, total_steps: int) -> None:
        super().check_run(total_steps)
        warmup = self.warmup(total_steps)
        start, steps = self.decay(total_steps)
        if start < warmup:
            field = "decay_steps" if self.decay_start is None else "decay_start"
            value = steps if self.decay_start is None else start
            allowed = f"a decay that starts after the warmup ({warmup} steps) in a run of {total_steps} steps"
            raise ConfigError(field, value, allowed)
        if steps and start + steps != total_steps:
            allowed = f"decay_start + decay_steps = {total_steps}, the steps of the run (now {start + steps})"
            raise ConfigError("decay_start", start, allowed)

    def after_warmup(self, step: Any, warmup: int, total_steps: int, xp: ModuleType) -> Any:
        start, steps = self.decay(total_steps)
        if not steps:
            return xp.ones_like(step, dtype=xp.float32)
        done = progress(step, start, steps, xp)
        fall = done if self.decay_shape == "linear" else xp.sqrt(done)
        return 1.0 - (1.0 - self.final_fraction) * fall
