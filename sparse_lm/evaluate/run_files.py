"""What a run left in its directory, read for the report."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sparse_lm.train.metrics import Row, read_rows
from sparse_lm.train.progress import count, duration, mean


class Run:
    """What a run directory holds, read once. Values of files that are missing are None; rows are lists that may be empty."""

    FILES = (
        "config.json",
        "environment.json",
        "accounting.json",
        "data.json",
        "evaluation.json",
        "samples.json",
        "sparsity.json",
        "memory.json",
    )

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        (
            self.config,
            self.environment,
            self.accounting,
            self.data,
            self.evaluation,
            self.samples,
            self.sparsity,
            self.memory,
        ) = map(self._read, self.FILES)
        metrics = directory / "metrics.jsonl"
        rows = read_rows(metrics) if metrics.exists() else []
        self.train, self.validation, self.events = (
            [row for row in rows if row["kind"] == kind] for kind in ("train", "validation", "event")
        )

    def _read(self, name: str) -> Any:
        path = self.directory / name
        return json.loads(path.read_text()) if path.exists() else None

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe's fields, empty when the run left no config."""
        return (self.config or {}).get("recipe", {})

    @property
    def title(self) -> str:
        """The recipe's name, or the directory's."""
        name = self.recipe.get("name")
        return name if isinstance(name, str) and name else self.directory.resolve().name

    @property
    def subtitle(self) -> str:
        """Where and how long."""
        parts = []
        if self.train:
            last = self.train[-1]
            parts.append(
                f"{last['step']:,} steps, {count(last['tokens'])} tokens, {duration(last['seconds'])} of training"
            )
        if self.members > 1:
            parts.append(f"a population of {self.members}")
        if self.environment:
            devices, kind = self.environment.get("devices", 1), self.environment.get("device_kind", "")
            kind = self.environment.get("processor") or "CPU" if kind == "cpu" else kind
            parts.append(kind if devices == 1 else f"{devices} x {kind}")
        return " · ".join(parts)

    @property
    def members(self) -> int:
        """Size of the population, 1 outside populations."""
        return next((len(row["loss"]) for row in self.train if isinstance(row.get("loss"), list)), 1)

    @property
    def domains(self) -> list[str]:
        """Domains that were validated or evaluated, in one order for the whole page."""
        names = {name for row in self.validation for name in row.get("domains", {})}
        return sorted(names | set((self.evaluation or {}).get("domains", {})))

    def series(self, key: str) -> np.ndarray:
        """One value of each training row, averaged over members; not a number where there is none."""
        return np.array([number(mean(row.get(key))) for row in self.train])

    def per_layer(self, measure: str, part: str = "router") -> dict[str, np.ndarray]:
        """Values of "PART/LAYER/measure" of all training rows, averaged over members: layer -> [rows] or [rows, experts]."""
        rows = [flat(row) for row in self.train]
        names = {key for row in rows for key in row if key.startswith(f"{part}/") and key.endswith(f"/{measure}")}
        found = {}
        for key in sorted(names, key=natural):
            width = next(np.shape(row[key]) for row in rows if row.get(key) is not None)
            empty = np.full(width, np.nan)
            values = np.array([empty if row.get(key) is None else np.array(row[key], np.float64) for row in rows])
            if self.members > 1:
                values = average(values, 1)
            found[key.removeprefix(f"{part}/").removesuffix(f"/{measure}")] = values
        return found


def average(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean over what is a number; not a number where nothing is."""
    good = np.isfinite(values)
    counts = good.sum(axis)
    return np.where(counts > 0, np.where(good, values, 0.0).sum(axis) / np.maximum(counts, 1), np.nan)


def number(value: float | None) -> float:
    """Turns None into not-a-number."""
    return float("nan") if value is None else float(value)


def natural(name: str) -> list[Any]:
    """Sorts blocks.10 after blocks.9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def flat(row: Row) -> Row:
    """Gives nested keys their paths: {"router": {"blocks.0": ...}} reads as "router/blocks.0"."""
    out: Row = {}
    for key, value in row.items():
        out |= (
            {f"{key}/{inner}": item for inner, item in flat(value).items()} if isinstance(value, dict) else {key: value}
        )
    return out
