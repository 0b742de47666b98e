"""Runs of the comparison of memories: its sizes, and the tuning, training and evaluation of one arm.

Every arm trains as one population. A program has a fixed number of members, so tuning tries as many pairs of rate and seed as there
are final seeds. Tuning runs are shorter than the final ones and finish a schedule of their own; the shape of the schedule is the same.
"""

import dataclasses
import time
from typing import Any

import numpy as np

from experiments.comparison import Arm, outcome, thinned
from experiments.memory_arms import Sizes, models
from experiments.memory_data import HeldOut
from sparse_lm.model.definition import define, with_classes
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.schedule import WarmupStableDecay
from sparse_lm.train.step import Train


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the comparison; the defaults are 100 M tokens a member, as 2% of the positions of generated documents are padding."""

    sizes: Sizes = Sizes()
    batch: int = 128
    steps: int = 6240
    tuning_share: float = 0.125
    """Steps of a tuning run, as a share of those of a final run."""
    learning_rate: float = 2e-3
    multipliers: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """Of the learning rate, tried in tuning."""
    tuning_seeds: tuple[int, ...] = (100,)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    validation_tokens: int = 65536
    """Of each domain."""
    documents: int | None = None
    """Of each domain of the packaged text; None: all."""

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
          ValueError: for impossible ones.
        """
        tried = len(self.multipliers) * len(self.tuning_seeds)
        for name, value, sound, allowed in (
            ("batch", self.batch, self.batch >= 1, "at least 1"),
            ("steps", self.steps, self.steps >= 2, "at least 2"),
            ("tuning_share", self.tuning_share, 0 < self.tuning_share <= 1, "above 0, at most 1"),
            ("multipliers", self.multipliers, tried == len(self.seeds), f"with each tuning seed {len(self.seeds)}, seeds"),
            ("tuning_seeds", self.tuning_seeds, not {*self.tuning_seeds} & {*self.seeds}, "none of seeds"),
        ):  # fmt: skip
            if not sound:
                raise ValueError(f"{name} = {value}; allowed: {allowed}")

    @property
    def tuning_steps(self) -> int:
        """Steps of a tuning run."""
        return max(1, round(self.steps * self.tuning_share))


SMOKE = Setup(
    Sizes(512, 64, 32, 3, 2, 8, 4, 64, 2, 256, 8, 2, "float32"), 4, 6, 0.25, validation_tokens=512, documents=40
)  # fmt: skip


def made(name: str, setup: Setup, dataset: Any) -> Arm:
    """Returns an arm, not yet compiled."""
    schedule = WarmupStableDecay(warmup_fraction=0.04, decay_fraction=0.4)
    return Arm(
        with_classes(define(models(setup.sizes)[name]), dataset.tokenizer),
        AdamW(learning_rate=setup.learning_rate, schedule=schedule),
        Train(steps=setup.steps),
        members=len(setup.seeds),
        shape=(setup.batch, setup.sizes.length),
    )


def tune(arm: Arm, setup: Setup, batches: list[Any]) -> dict[str, Any]:
    """Chooses an arm's learning rate; see `Arm.tune`."""
    return arm.tune(setup.multipliers, setup.tuning_seeds, batches[: setup.tuning_steps])


def final_seconds(tuned: dict[str, Any], setup: Setup) -> float:
    """Returns how long the final run of a tuned arm will take, evaluation included, with a twentieth to spare."""
    return 5.0 + 1.05 * tuned["seconds"] * setup.steps / setup.tuning_steps


def result(
    arm: Arm, setup: Setup, tuned: dict[str, Any], batches: list[Any], held_out: HeldOut, tokens: int
) -> dict[str, Any]:
    """Trains and evaluates a tuned arm; returns its row."""
    start = time.perf_counter()
    final = arm.run(setup.seeds, [tuned["factor"]] * len(setup.seeds), batches)
    inference = arm.inference(final.state)
    nats_PDK = held_out.sums([arm.token_losses(inference, batch) for batch, _ in held_out.batches])
    tokens_DK = held_out.tokens_DK
    by_domain, by_kind = nats_PDK.sum(2) / tokens_DK.sum(1), nats_PDK.sum(1) / np.maximum(tokens_DK.sum(0), 1)
    losses = nats_PDK.sum((1, 2)) / tokens_DK.sum()
    return {
        **outcome(tuned, losses),
        "domains": {name: by_domain[:, i].tolist() for i, name in enumerate(held_out.domains)},
        "kinds": {name: by_kind[:, i].tolist() for i, name in enumerate(held_out.kinds)},
        "curve": thinned(final.losses_SP.mean(1)),
        "tokens_per_s": len(setup.seeds) * tokens / final.seconds,
        "wall_s": time.perf_counter() - start,
    }
