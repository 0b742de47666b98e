"""What stands between the steps of a run and the tables of its state; for tables on devices that is nothing."""

from typing import Any, Protocol

import jax
import numpy as np

from sparse_lm.memory.working_set import Wanted

Tree = dict[str, Any]
Batch = dict[str, jax.Array]


class Tables(Protocol):
    """What stands between the loop and the tables of its state."""

    def find(self, batch: dict[str, np.ndarray]) -> Wanted | None:
        """Returns the rows that a batch reads, None if other processes have parts of it; may be called from any thread."""

    def prefetch(self, wanted: Wanted | None, batch: Batch) -> None:
        """Asks for the rows of the next batch; batches are asked for in the order in which they are trained on.

        Args:
          wanted: what `find` returned.
          batch: the batch on the devices.
        """

    def full(self) -> bool:
        """Says whether the next step needs the full program, the same on every process; waits until its rows are found."""

    def lend(self, tables: Tree, program: Any) -> Tree:
        """Returns the tables that the next step is given, which `program` is about to take, and waits for them."""

    def give_back(self, tables: Tree) -> Tree:
        """Takes the tables that a step returned, which need not have run yet; returns those of the state."""

    def settle(self) -> None:
        """Waits until the state's tables are those after the last step and nothing travels."""

    def reading(self, model_state: Tree, batch: dict[str, np.ndarray]) -> Tree:
        """Returns a model state in which a whole batch that every process has can be looked up; after `settle`."""

    def read(self) -> dict[str, float]:
        """Returns what is to be logged since the last call."""

    def close(self) -> None:
        """Ends threads; the state's tables are those after the last step."""


class DeviceTables:
    """Tables on devices: they go into the step whole and nothing travels. See `Tables`."""

    def find(self, batch: dict[str, np.ndarray]) -> Wanted:
        """See Tables.find."""
        return Wanted({}, {}, {}, False)

    def prefetch(self, wanted: Wanted | None, batch: Batch) -> None:
        """See Tables.prefetch."""

    def full(self) -> bool:
        """See Tables.full."""
        return False

    def lend(self, tables: Tree, program: Any) -> Tree:
        """See Tables.lend."""
        return tables

    def give_back(self, tables: Tree) -> Tree:
        """See Tables.give_back."""
        return tables

    def settle(self) -> None:
        """See Tables.settle."""

    def reading(self, model_state: Tree, batch: dict[str, np.ndarray]) -> Tree:
        """See Tables.reading."""
        return model_state

    def read(self) -> dict[str, float]:
        """See Tables.read."""
        return {}

    def close(self) -> None:
        """See Tables.close."""
