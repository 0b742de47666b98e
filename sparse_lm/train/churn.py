"""Churn: how much of the routing of the same text changes from checkpoint to checkpoint.

Legend: B batch, L length, R most experts of a token, P members of a population.
"""

import pathlib
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sparse_lm.data.dataset import Dataset
from sparse_lm.data.pipeline import DataConfig, validation_batches
from sparse_lm.layers.tree_paths import flatten
from sparse_lm.model.definition import Batch, Definition
from sparse_lm.parallel import rules
from sparse_lm.train.population import Population, over_members
from sparse_lm.train.state import unstack
from sparse_lm.train.validation import MODEL_ARRAYS

KEPT = 3
"""Records that stay on disk: the one of the last checkpoint, and earlier ones for a run that goes back to them."""


class RoutingProbe:
    """Routes one validation batch at every scheduled checkpoint and compares it with the one before.

    The choices are kept as RUN/routing/STEP.npz, so that a run that was stopped compares with the same step as one that was not.
    """

    def __init__(self, definition: Definition, population: Population, mesh: Mesh, run_dir: pathlib.Path, batch: Batch):
        self.directory, self.batch = run_dir / "routing", batch
        self.model, self.members = definition.config, population.active

        def choices(params: Any, model_state: Any, batch: Batch) -> Any:
            return definition.token_losses(params, model_state, batch)[1].choices

        whole = rules.replicated(mesh)
        self._choices = jax.jit(over_members(choices, population, (0, 0, None)), out_shardings=whole)

    def choices(self, params: Any, model_state: Any) -> dict[str, np.ndarray]:
        """Returns {"3.feed_forward": experts [B, L, R], -1 where there is none}; a members dimension leads in a population."""
        found = unstack(jax.device_get(self._choices(params, model_state, self.batch)), 1 if self.members else 0)
        choices = {}
        for path, expert in flatten(found).items():
            layer, router = path.split(".")
            experts = 1 if router == "depth" else self.model.feed_forward_of(int(layer)).routes
            choices[path] = np.where(expert < experts, expert, -1).astype(np.int16)
        return choices

    def __call__(self, step: int, params: Any, model_state: Any) -> dict[str, Any]:
        """Records the choices after `step` steps.

        Returns:
          {"router/blocks.3/churn": fraction of the assignments that the record before did not have}; {} for the first record.
        """
        now = self.choices(params, model_state)
        if not now or jax.process_index():  # of several processes the first one keeps the record
            return {}
        self.directory.mkdir(exist_ok=True)
        steps = sorted(int(path.stem) for path in self.directory.glob("*.npz") if re.fullmatch(r"\d+", path.stem))
        earlier = [s for s in steps if s < step]
        row: dict[str, Any] = {}
        if earlier:
            with np.load(self.directory / f"{earlier[-1]}.npz") as before:
                for path, expert in now.items():
                    layer, router = path.split(".")
                    name = "churn" if router == "feed_forward" else f"{router}_churn"
                    row[f"router/blocks.{layer}/{name}"] = churn(before[path], expert, self.members)
        part = self.directory / f"{step}.part.npz"
        np.savez_compressed(part, **now)
        part.replace(self.directory / f"{step}.npz")
        for old in earlier[: -(KEPT - 1)]:
            (self.directory / f"{old}.npz").unlink()
        return row


def churn(before: np.ndarray, after: np.ndarray, members: bool = False) -> Any:
    """Returns the fraction of assignments after that were not there before; the order of a token's experts does not matter.

    Args:
      before: experts [..., R], -1 where there is none.
      after: the same later.
      members: whether the first dimension is the members of a population; then a list.
    """
    live = after >= 0
    new = live & ~(after[..., :, None] == before[..., None, :]).any(-1)
    axes = tuple(range(1 if members else 0, after.ndim))
    return (new.sum(axes) / np.maximum(live.sum(axes), 1)).tolist()


def probe_batch(dataset: Dataset, data: DataConfig, batch_size: int) -> Batch:
    """Returns the first validation batch of the first domain."""
    batch = next(iter(validation_batches(dataset, data, dataset.domains[0], batch_size=batch_size, max_tokens=None)))
    return {name: batch[name] for name in MODEL_ARRAYS}
