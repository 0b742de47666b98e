"""The batches of a run, made by several processes at once: the same, in the same order, as one process makes.

A batch is a function of its step, so every process makes stretches of steps of its own. The processes are spawned and never use an
accelerator; they begin when `Making` is created, while the caller does something else.
"""

import concurrent.futures
import itertools
import multiprocessing
import os

from experiments.memory_data import training_batches
from sparse_lm.data.dataset import Dataset
from sparse_lm.data.pipeline import Batch, DataConfig, prepare

STRETCH = 32
"""Steps that a process makes at a time."""
MOST_PROCESSES = 8

_opened: list[tuple[Dataset, DataConfig]] = []
"""What a process makes batches of, once it is open."""


def processes() -> int:
    """Returns how many processes make batches here: half of the processors, as programs are compiled meanwhile."""
    return max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2))


def _open(data: DataConfig) -> None:
    _opened.append((prepare(data, report=lambda line: None), data))


def _make(steps: range) -> list[Batch]:
    return list(training_batches(*_opened[0], steps))


class Making:
    """Batches that are being made."""

    def __init__(self, data: DataConfig, steps: int, workers: int):
        """Begins.

        Args:
          data: of which the caller has prepared the dataset already: processes only open it.
          steps: batches to make.
          workers: processes that make them.

        Raises:
          ValueError: for a number below 1.
        """
        for name, value in (("steps", steps), ("workers", workers)):
            if value < 1:
                raise ValueError(f"{name} = {value}; allowed: at least 1")
        stretches = [range(first, min(first + STRETCH, steps)) for first in range(0, steps, STRETCH)]
        self._pool = concurrent.futures.ProcessPoolExecutor(
            min(workers, len(stretches)), multiprocessing.get_context("spawn"), _open, (data,)
        )
        self._made = self._pool.map(_make, stretches)

    def batches(self) -> list[Batch]:
        """Waits for all batches and returns them, the first step's first; may be called once."""
        with self._pool:
            return list(itertools.chain.from_iterable(self._made))
