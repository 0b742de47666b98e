"""Where the rows of tables live: in the memory of the devices that read them, or in that of their host."""

import dataclasses
import math

import numpy as np

from sparse_lm.config import Config
from sparse_lm.memory.table import TableSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement(Config):
    """Base of the placements."""

    @property
    def on_host(self) -> bool:
        """Whether rows and their slots are in host memory."""
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnDevice(Placement):
    """Rows and slots are arrays of the devices, split over a mesh."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnHost(Placement):
    """Rows and slots are in host memory; those that a step touches travel, and the numbers are those of `OnDevice` to the bit.

    A step holds a table of the distinct rows of its batch. Programs have fixed sizes, so there are two: one for `room`, and one for as
    many rows as addresses, compiled when a batch first has more distinct rows than room.
    """

    room: float = 0.75
    """Distinct rows of a batch that there is room for, as a share of its addresses; more costs transfer, never a wrong row.

    Of several processes each has its part of the room, for the rows that it keeps.
    """

    def check(self) -> None:
        """See Config.check."""
        self.require(0 < self.room <= 1, "room", "above 0, at most 1")

    @property
    def on_host(self) -> bool:
        """See Placement.on_host."""
        return True

    @property
    def ahead(self) -> int:
        """Steps whose updates may be on their way when rows are fetched: the one before the reading step, whose rows are forwarded."""
        return 1

    def size(self, spec: TableSpec, addresses: int, full: bool, pieces: int, owners: int = 1) -> int:
        """Returns the rows that a step on so many addresses holds of a table at each owner, in the program with `room` or the full one.

        Args:
          spec: the table.
          addresses: of the batch, of all processes together.
          full: whether it is the full program, which no batch outgrows.
          pieces: devices that an owner's rows are split over, which must divide them.
          owners: processes that keep rows of their own (`owners.py`).
        """
        rows = most = most_rows(spec, addresses, owners)
        if not full:
            rows = min(most, math.ceil(self.room * addresses / owners))
        return -(-rows // pieces) * pieces


def most_rows(spec: TableSpec, addresses: int, owners: int) -> int:
    """Returns the most distinct rows that so many addresses can want of one owner: each head reads its own rows, one a token."""
    ends_H = np.cumsum(spec.primes)
    first_O1 = np.arange(owners)[:, None] * (spec.rows // owners)
    below_OH = np.minimum(ends_H, first_O1 + spec.rows // owners)
    kept_OH = below_OH - np.maximum(ends_H - np.array(spec.primes), first_O1)
    return int(np.clip(kept_OH, 0, addresses // len(spec.primes)).sum(axis=1).max())


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaleHost(OnHost):
    """As `OnHost` with rows fetched one step earlier, which is NOT exact.

    A row that steps t - 2 and t touch, but not t - 1, is read as before step t - 2, and what that step did to it is lost. Which rows
    is decided by the order of steps alone, but a run that was interrupted goes on with other ones. For hosts that are slower
    than a step.
    """

    @property
    def ahead(self) -> int:
        """See OnHost.ahead."""
        return 2
