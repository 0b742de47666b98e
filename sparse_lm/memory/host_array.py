"""Arrays in host memory as part of a state: JAX's transformations carry them along whole and never copy them to a device.

Legend: R rows, D row width.
"""

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike


def as_records(rows_RD: np.ndarray) -> np.ndarray:
    """Returns rows [R, ...] as R records of bytes that share their memory: numpy copies a record in one piece, a row as a subarray.

    Raises:
      ValueError: when the rows are not contiguous.
    """
    if rows_RD.ndim == 1:
        return rows_RD
    row = rows_RD.dtype.itemsize * int(np.prod(rows_RD.shape[1:]))
    return rows_RD.reshape(len(rows_RD), -1).view(np.dtype((np.void, row)))[:, 0]


@jax.tree_util.register_static
class HostArray:
    """A numpy array that is a node without leaves of a tree: `jax.tree.map` passes it over, a compiled program is compiled for it.

    Equal only to itself: its numbers may change between two calls of a program, which then reads the new ones.

    Args:
      values: [n, ...], all rows or those that this process keeps; copied if it cannot be written to.
      rows: R of the whole table; None: n.
      first: number of the first row that is here.
    """

    def __init__(self, values: np.ndarray, rows: int | None = None, first: int = 0):
        self.values = values if values.flags.writeable else values.copy()
        self._total, self._first = len(values) if rows is None else rows, first

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole table."""
        return (self._total, *self.values.shape[1:])

    @property
    def whole(self) -> bool:
        """Whether all rows are here."""
        return len(self.values) == self._total

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the array."""
        return self.values.dtype

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        assert self.whole, "other processes have the other rows"
        return np.array(self.values, dtype, copy=copy)

    def records(self) -> np.ndarray:
        """Returns the rows as one-dimensional records, which share the memory."""
        return as_records(self.values)

    def with_rows(self, values_RD: np.ndarray) -> "HostArray":
        """Returns the same rows of another table of this shape."""
        own = values_RD if self.whole else values_RD[self._first : self._first + len(self.values)].copy()
        return HostArray(own, self._total, self._first)

    def readable(self) -> jax.Array:
        """Returns a copy, still in host memory, that programs of the first device read rows of, for evaluation and generation.

        All rows must be here.
        """
        assert self.whole, "other processes have the other rows"
        return jax.device_put(self.values, SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"))
