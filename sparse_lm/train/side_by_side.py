"""Times recipes side by side: their bare steps take turns in one process, so that their ratios hold on this machine."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels.benchmark.timing import has_device_timer, launched
from sparse_lm.accounting import account
from sparse_lm.recipe import Recipe
from sparse_lm.train import machine
from sparse_lm.train.benchmark import RepeatedStep, packed_batch, time_calls
from sparse_lm.train.session import open_session

WARM_UP = 4
"""Steps of each recipe before the first turn."""


class Contender:
    """A recipe's compiled step and its times.

    Args:
      recipe: what is timed.
      mean_document: tokens of a document of its batch, on average.
    """

    def __init__(self, recipe: Recipe, mean_document: int):
        session = open_session(recipe)
        data, self._recipe = recipe.data, recipe
        shape = data.batch_size, data.sequence_length
        batch = packed_batch(*shape, recipe.model.vocab_size, mean_document=mean_document, seed=0)
        self._step = RepeatedStep(session, batch)
        self._tokens = math.prod(shape) * (session.members or 1)
        self._rounds: list[float] = []
        self.turn(WARM_UP)
        self._rounds.clear()

    def turn(self, steps: int) -> None:
        """Takes steps one after another."""
        self._rounds.append(1e3 * time_calls(lambda: self._step()["pulse"], warmup=1, repeats=steps))

    def row(self) -> dict[str, Any]:
        """Returns what was measured; see `side_by_side`."""
        state, recipe = self._step.state, self._recipe
        step_ms, model = float(np.median(self._rounds)), account(recipe.model, recipe.data.sequence_length)
        peak = machine.peak_flops(jax.devices()[0].device_kind, recipe.model.compute_dtype)
        memory = self._step.programs[False].memory_analysis()
        return {
            "name": recipe.name,
            "parameters": model.parameters,
            "step_ms": step_ms,
            "rounds_ms": self._rounds,
            "tokens_per_s": 1e3 * self._tokens / step_ms,
            "mfu": 1e3 * model.train_flops * self._tokens / step_ms / (peak * jax.device_count()) if peak else None,
            "state_gb": sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state))) / 1e9,
            "temporary_gb": memory.temp_size_in_bytes / 1e9 if memory else None,
            "compile_s": self._step.compile_s,
            "kernels_ms": self._kernels(),
        }

    def _kernels(self) -> dict[str, float]:
        if not has_device_timer():
            return {}
        found: dict[str, float] = {}
        for name, seconds in launched(self._step):
            found[name] = found.get(name, 0.0) + 1e3 * seconds
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def side_by_side(
    recipes: Sequence[Recipe], *, rounds: int = 4, repeats: int = 6, mean_document: int = 700
) -> list[dict[str, Any]]:
    """Times the bare steps of recipes, whose states are on the devices all at once, in rounds of `repeats` steps each.

    A step whose topology changes is not among them.

    Returns:
      For each {"name", "parameters", "step_ms" (median of the rounds), "rounds_ms", "tokens_per_s", "mfu", "state_gb" (parameters and
      optimizer), "temporary_gb" (XLA's count for one device), "compile_s", "kernels_ms" (device time of a step by kernel; empty where no
      device timer is), "times_faster" (than the first), "state_ratio" (to the first)}.

    Raises:
      ValueError: without recipes, or for a number of rounds or of steps below 1.
    """
    for name, value in (("recipes", len(recipes)), ("rounds", rounds), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} = {value}; allowed: at least 1")
    contenders = [Contender(recipe, mean_document) for recipe in recipes]
    for _, contender in itertools.product(range(rounds), contenders):
        contender.turn(repeats)
    rows = [contender.row() for contender in contenders]
    for row in rows:
        row["times_faster"] = rows[0]["step_ms"] / row["step_ms"]
        row["state_ratio"] = row["state_gb"] / rows[0]["state_gb"]
    return rows
