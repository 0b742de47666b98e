"""Schedules against numbers worked by hand, on the host and traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.config import ConfigError, validate
from sparse_lm.train.schedule import Constant, Cosine, Linear, Schedule, WarmupStableDecay

TOTAL = 110


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Warmup of 10: step 0 gives (0 + 1) / (10 + 1), step 4 gives 5 / 11, step 10 is the first at the peak.
        (Constant(warmup_steps=10), {0: 1 / 11, 4: 5 / 11, 9: 10 / 11, 10: 1.0, 60: 1.0, 110: 1.0}),
        # After the warmup 100 steps remain. Quarter: 0.1 + 0.9 * (1 + cos(pi / 4)) / 2 = 0.1 + 0.45 * 1.70710678 = 0.86819805;
        # half: 0.1 + 0.9 / 2 = 0.55; end: 0.1, and it stays there.
        (Cosine(warmup_steps=10), {0: 1 / 11, 10: 1.0, 35: 0.86819805, 60: 0.55, 110: 0.1, 500: 0.1}),
        # Without warmup step 0 is the peak. 27.5 of 110 steps are a quarter.
        (Cosine(warmup_steps=0, final_fraction=0.0), {0: 1.0, 27.5: 0.85355339, 55: 0.5, 110: 0.0}),
        # A line from 1 at step 10 to 0.2 at step 110: 0.008 a step, so 1 - 25 * 0.008 = 0.8 at step 35.
        (Linear(warmup_steps=10, final_fraction=0.2), {10: 1.0, 35: 0.8, 60: 0.6, 110: 0.2}),
        # 20 steps of decay end with the run: they start at 90. A quarter is step 95: 1 - sqrt(0.25) = 0.5; half: 1 - 0.70710678.
        (
            WarmupStableDecay(warmup_steps=10, decay_steps=20),
            {0: 1 / 11, 10: 1.0, 90: 1.0, 95: 0.5, 100: 0.29289322, 110: 0.0},
        ),
        # Final fraction 0.1, linear: 1 - 0.9 * 0.5 = 0.55 halfway.
        (
            WarmupStableDecay(warmup_steps=10, decay_steps=20, decay_shape="linear", final_fraction=0.1),
            {89: 1.0, 100: 0.55, 110: 0.1},
        ),
        # A trunk never decays.
        (WarmupStableDecay(warmup_steps=10, decay_fraction=0.0), {10: 1.0, 109: 1.0}),
        # Fractions: 0.1 * 110 = 11 steps of warmup, 0.5 * 110 = 55 steps of decay; 55 + 13.75 is a quarter of it.
        (WarmupStableDecay(warmup_fraction=0.1, decay_fraction=0.5), {0: 1 / 12, 11: 1.0, 55: 1.0, 68.75: 0.5}),
    ],
)
def test_hand_worked_numbers(schedule: Schedule, expected: dict[float, float]) -> None:
    validate(schedule).check_run(TOTAL)
    traced = jax.jit(lambda step: schedule.at(step, TOTAL))
    for step, value in expected.items():
        on_host = schedule.at(step, TOTAL)
        assert isinstance(on_host, float)
        assert on_host == pytest.approx(value, abs=1e-7)
        assert float(traced(jnp.asarray(step))) == pytest.approx(value, abs=1e-6)


def test_array_of_steps_gives_the_curve() -> None:
    schedule = Cosine(warmup_steps=3)
    steps = np.arange(20)
    expected = [schedule.at(int(step), 20) for step in steps]
    np.testing.assert_allclose(schedule.at(steps, 20), expected, rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(lambda step: schedule.at(step, 20))(jnp.asarray(steps)), expected, atol=1e-6)


def test_branch_continues_the_trunk_and_decays_from_any_stable_step() -> None:
    trunk = WarmupStableDecay(warmup_steps=100, decay_fraction=0.0)
    branch = WarmupStableDecay(warmup_steps=100, decay_start=5000, decay_steps=1000)
    branch.check_run(6000)
    for step in (0, 50, 99, 100, 4999, 5000):
        assert branch.at(step, 6000) == trunk.at(step, 20000)
    assert branch.at(5250, 6000) == pytest.approx(0.5)  # 1 - sqrt(250 / 1000)
    assert branch.at(6000, 6000) == 0.0


@pytest.mark.parametrize(
    ("schedule", "total", "message"),
    [
        (Cosine(warmup_steps=200), 100, "warmup_steps = 200"),
        (WarmupStableDecay(warmup_steps=60, decay_steps=50), 100, "decay_steps = 50"),
        (WarmupStableDecay(warmup_steps=60, decay_start=50, decay_steps=50), 100, "decay_start = 50"),
        (
            WarmupStableDecay(warmup_steps=10, decay_start=50, decay_steps=20),
            100,
            r"decay_start = 50 .* 100.*\(now 70\)",
        ),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused(schedule: Schedule, total: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schedule.check_run(total)


@pytest.mark.parametrize(
    ("schedule", "field"),
    [
        (Cosine(warmup_fraction=1.5), "warmup_fraction"),
        (Cosine(warmup_steps=-1), "warmup_steps"),
        (Linear(final_fraction=-0.1), "final_fraction"),
        (WarmupStableDecay(decay_start=10), "decay_start"),
        (WarmupStableDecay(decay_steps=-5), "decay_steps"),
        (WarmupStableDecay(decay_fraction=2.0), "decay_fraction"),
    ],
)
def test_impossible_values_name_their_field(schedule: Schedule, field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field} = "):
        validate(schedule)
