"""What a run reports of its routers, from (sum, count) pairs of one step, and what it warns of.

Legend: E experts, P members of a population.
"""

import collections
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

RUN = re.compile(r"^(\d+)(?:_to_(\d+))?$")
KEY = re.compile(r"^router/blocks\.(\d+)/(\w+)$")
WINDOW = 20
"""Logged rows over which an expert without a token counts as dead, and a condition must last to raise an alarm."""


def router_row(blocks: dict[str, dict[str, tuple[Any, Any]]], *, population: bool) -> dict[str, Any]:
    """Renders one step's router metrics by block.

    Args:
      blocks: {run of blocks: {name: (sum, count)}}; stacked runs have a layers dimension after the members dimension.
      population: whether a members dimension leads.

    Returns:
      {"router/blocks.3/load": fraction of assignments by expert, "router/blocks.3/max_violation": (max - mean) / mean load
      (Wang et al. 2024, arXiv 2408.15664, equation 4), "router/blocks.3/coactivation": see `strongest_pair`, and the mean of every
      other metric}; lists by member in a population.
    """
    row: dict[str, Any] = {}
    layer_axis = 1 if population else 0
    for run, metrics in blocks.items():
        match = RUN.match(run)
        assert match is not None, f"{run!r} is no run of blocks"
        first, last = int(match[1]), int(match[2] or match[1])
        for layer in range(first, last + 1):
            for name, (total, count) in metrics.items():
                total, count = np.asarray(total, np.float64), np.asarray(count, np.float64)
                if match[2]:
                    total, count = (np.take(a, layer - first, axis=layer_axis) for a in (total, count))
                prefix = f"router/blocks.{layer}/"
                if name == "load":
                    load = total / np.maximum(count, 1.0)[..., None]
                    row[prefix + "load"] = load.tolist()
                    row[prefix + "max_violation"] = (load.max(-1) * load.shape[-1] - 1.0).tolist()
                elif name.endswith("coactivation"):
                    row[prefix + name] = strongest_pair(total).tolist()
                else:
                    row[prefix + name] = (total / np.maximum(count, 1.0)).tolist()
    return row


def strongest_pair(together: np.ndarray) -> np.ndarray:
    """Returns how much of one expert's tokens another one takes too, for the pair where that is most, [...].

    Args:
      together: tokens by pair of experts [..., E, E], their own on the diagonal. Experts with less than a tenth of the even share
        are left out: of three tokens anything may be true.
    """
    own = np.diagonal(together, axis1=-2, axis2=-1)
    enough = own >= 0.1 * own.mean(-1, keepdims=True)
    share = together / np.maximum(own, 1.0)[..., None] * enough[..., None]
    return np.where(np.eye(own.shape[-1], dtype=bool), 0.0, share).max((-2, -1))


def by_layer(row: Mapping[str, Any], name: str) -> dict[int, np.ndarray]:
    """Returns one measure of a row by block."""
    found = {}
    for key, value in row.items():
        match = KEY.match(key)
        if match and match[2] == name and value is not None:
            found[int(match[1])] = np.asarray(value, np.float64)
    return found


ADVICE = {
    "dead experts": (
        "their weights only decay. Balance the load: raise router.balance_coefficient (0.01 to 0.1), or use router bias_balanced "
        "with bias_rate 1e-3; with few tokens a step, balance_over = step"
    ),
    "collapse": (
        "the others learn nothing from it. A lower learning rate or a longer warmup, router.z_coefficient 1e-3, a larger "
        "balance_coefficient; go back to a checkpoint from before it, since a collapsed router seldom recovers"
    ),
    "drops": (
        "the tokens dropped skip the layer. Raise router.capacity_factor, rows_per_token or receive_factor, or leave them out; or "
        "balance the load, which makes room"
    ),
}
"""What to do about each alarm."""


class RouterWatch:
    """Follows the rows of a run: counts dead experts over a window, and raises each alarm once while its condition lasts."""

    def __init__(self) -> None:
        self._loads: dict[int, collections.deque[np.ndarray]] = {}
        self._lasting: collections.Counter[tuple[int, str]] = collections.Counter()

    def restore(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Lives through the rows of an earlier part of the run."""
        for row in rows:
            self.update(row)

    def update(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Takes a training row.

        Returns:
          ({"router/blocks.3/dead_experts": experts without a token in the last WINDOW rows}, alarms with advice).
        """
        entries: dict[str, Any] = {}
        alarms: list[str] = []
        per_token, dropped = by_layer(row, "experts_per_token"), by_layer(row, "dropped")
        overflow = by_layer(row, "overflow")
        for layer, load in by_layer(row, "load").items():
            loads = self._loads.setdefault(layer, collections.deque(maxlen=WINDOW))
            loads.append(load)
            dead = (np.stack(loads) == 0).all(0).sum(-1)
            entries[f"router/blocks.{layer}/dead_experts"] = dead.tolist()
            experts = load.shape[-1]
            # Of a population the worst member counts.
            busiest = float(np.max(load.max(-1) * per_token.get(layer, np.ones(()))))
            lost = max(float(np.max(found[layer])) for found in (dropped, overflow, {layer: 0.0}) if layer in found)
            conditions = {
                "dead experts": (
                    float(np.max(dead)) / experts >= 0.25,
                    f"{np.max(dead):.0f} of {experts} experts get no token",
                ),
                "collapse": (
                    busiest > 0.9 and float(np.max(per_token.get(layer, np.zeros(())))) < 0.5 * experts,
                    f"{busiest:.0%} of the tokens go to one expert",
                ),
                "drops": (lost > 0.2, f"{lost:.0%} of the assignments are dropped"),
            }
            for name, (holds, words) in conditions.items():
                self._lasting[layer, name] = self._lasting[layer, name] + 1 if holds else 0
                if self._lasting[layer, name] == WINDOW:
                    alarms.append(f"{name} in blocks.{layer}: {words}; {ADVICE[name]}")
        return entries, alarms
