"""What the figures of comparisons have in common: held-out losses over seeds, and training curves."""

from collections.abc import Callable
from typing import Any

import numpy as np

Rows = list[tuple[str, dict[str, Any]]]
"""(label, row of the report) of each arm, from the top; arms keep the colour of their place."""


def draw_losses(axes: Any, rows: Rows, marker: Callable[[dict[str, Any]], str] = lambda row: "o") -> None:
    """Draws each arm's mean with its 95% interval, and a tick for every seed."""
    for y, (_, row) in enumerate(rows):
        mean, half = row["loss"]
        axes.errorbar(mean, y, xerr=half, fmt=marker(row), color=f"C{y}", capsize=3)
        axes.plot(row["losses"], [y + 0.18] * len(row["losses"]), "|", color=f"C{y}", alpha=0.6)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("held-out loss, nats a token; bars: 95% over seeds, ticks: seeds")


def draw_curves(axes: Any, rows: Rows, line: Callable[[dict[str, Any]], str] = lambda row: "-") -> None:
    """Draws each arm's training loss, a mean over a fortieth of the run."""
    for y, (label, row) in enumerate(rows):
        step, loss = np.array(row["curve"]).T
        window = np.ones(max(1, len(loss) // 40))
        mean = [np.convolve(values, window / len(window), "valid") for values in (step, loss)]
        axes.plot(*mean, color=f"C{y}", label=label, linestyle=line(row))
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, mean of seeds")
    axes.set_ylim(top=float(np.percentile(np.concatenate([np.array(row["curve"])[:, 1] for _, row in rows]), 90)))
    axes.legend(fontsize=8)
