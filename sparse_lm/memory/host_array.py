"""Arrays in host memory as part of a state: JAX's transformations carry them along whole and never copy them to a device.

Legend: B batch, L length, H heads, R rows, D row width, X = H * D.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from jax.typing import DTypeLike

from pallas_kernels.embedding_lookup import unpack
from sparse_lm.parallel.rules import split_tokens


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

    def zeros(self) -> "HostArray":
        """Returns zeros of the same shape and dtype; they take no memory until they are written to."""
        return HostArray(np.zeros(self.values.shape, self.dtype), self._total, self._first)

    def with_rows(self, values_RD: np.ndarray) -> "HostArray":
        """Returns the same rows of another table of this shape."""
        own = values_RD if self.whole else values_RD[self._first : self._first + len(self.values)].copy()
        return HostArray(own, self._total, self._first)

    def look_up(self, address_BLH: jax.Array, mesh: AbstractMesh | None = None) -> jax.Array:
        """Returns what `table.look_up` does, fetched while the program runs; for evaluation and generation, it has no gradient.

        On a mesh every device asks for the rows of its own tokens. All rows must be here.
        """
        assert self.whole, "a table of several processes is read through a working set"
        if mesh is not None:
            tokens = split_tokens(address_BLH.shape[0], address_BLH.shape[1], mesh).spec(None)
            return jax.shard_map(self.look_up, mesh=mesh, in_specs=tokens, out_specs=tokens, check_vma=False)(
                address_BLH
            )
        batch, length, heads = address_BLH.shape
        shape = jax.ShapeDtypeStruct((batch, length, heads, self.shape[1]), self.dtype)
        found = jax.pure_callback(self._rows, shape, address_BLH)
        return (unpack(found) if self.dtype == jnp.uint32 else found).reshape(batch, length, -1)

    def _rows(self, address_BLH: Any) -> np.ndarray:
        address_A = np.asarray(address_BLH).reshape(-1)
        records_A = np.take(self.records(), address_A, mode="clip")
        found_AD = records_A.view(self.dtype).reshape(len(address_A), -1)
        found_AD[address_A >= self.shape[0]] = 0
        return found_AD.reshape(*address_BLH.shape, -1)
