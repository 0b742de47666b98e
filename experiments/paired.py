"""Statistics over paired seeds: intervals, differences and their t tests."""

import math
from typing import Any

import numpy as np
from jax.scipy.special import betainc

STUDENT = {4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}
"""97.5% quantiles of Student's t by degrees of freedom."""


def interval(values: np.ndarray) -> tuple[float, float]:
    """Returns (mean, half width of the 95% interval) of independent values.

    Raises:
      ValueError: for a number of values whose quantile is not here.
    """
    if len(values) - 1 not in STUDENT:
        raise ValueError(f"{len(values)} values; allowed: {', '.join(str(free + 1) for free in STUDENT)}")
    return float(values.mean()), float(STUDENT[len(values) - 1] * values.std(ddof=1) / math.sqrt(len(values)))


def paired(first: list[float], second: list[float]) -> dict[str, Any]:
    """Compares two arms by seed.

    Returns:
      {"difference": (mean of second - first, half width of its 95% interval), "p": of the two-sided paired t test, "lower": seeds in
      which the first is lower}. Where all differences are equal p is 0, or 1 if they are zero.
    """
    difference = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    mean, half = interval(difference)
    free, error = len(difference) - 1, difference.std(ddof=1) / math.sqrt(len(difference))
    if error == 0:
        p = float(mean == 0)
    else:
        # P(|T| > t) for Student's t is the regularised incomplete beta function at free / (free + t^2).
        p = float(betainc(free / 2, 0.5, free / (free + (mean / error) ** 2)))
    return {"difference": (mean, half), "p": p, "lower": int((difference > 0).sum())}
