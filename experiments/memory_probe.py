"""How long the comparison of memories will take: a few timed steps of every arm."""

from collections.abc import Callable
from typing import Any

from experiments.comparison import Arm
from experiments.memory_runs import Setup

WARM = 3
"""Steps before those that are timed: the first ones load kernels."""


def probe(arms: dict[str, Arm], setup: Setup, batches: list[Any], say: Callable[[str], Any]) -> None:
    """Times compiled arms on all batches but the first `WARM`; says milliseconds, tokens a second and the seconds of all runs."""
    rates = [1.0] * len(setup.seeds)
    runs, slots = setup.steps + setup.tuning_steps, len(setup.seeds) * setup.batch * setup.sizes.length
    total = 0.0
    for name, arm in arms.items():
        arm.run(setup.seeds, rates, batches[:WARM])
        step = arm.run(setup.seeds, rates, batches[WARM:]).seconds / len(batches[WARM:])
        total += step * runs
        say(f"{name}: {1e3 * step:.2f} ms a step, {slots / step:,.0f} tokens/s, {step * runs:.0f} s of training")
    say(
        f"training of {len(arms)} arms, {setup.tuning_steps} + {setup.steps} steps each: {total:.0f} s, "
        "beside compiling and about 2 s an arm of evaluation"
    )
