"""Which process keeps which rows of tables in host memory, and where its part of a working set is.

A working set is split over the devices in equal pieces. The process whose devices hold a piece keeps the rows that may travel there, so a
row crosses from host memory to a device and back inside one process, and host memory needed falls with the number of processes. Rows
of a table are split evenly among the owners, in the order of the mesh. Processes that an axis of copies (`tensor`) sets apart hold the
same pieces: they are one owner, and each keeps the same rows.

Legend: O owners, K processes of an owner, M pieces of an owner, U distinct rows of a batch, S rows that one owner has in a working set.
"""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from sparse_lm.config import ConfigError
from sparse_lm.memory.host_array import HostArray
from sparse_lm.parallel import rules


@dataclasses.dataclass(frozen=True, eq=False)
class Owners:
    """Owners of rows, seen from one process.

    Attributes:
      processes_OK: their processes.
      pieces_OM: which pieces of a working set their devices hold, ascending.
      own: number of this process's owner.
    """

    processes_OK: np.ndarray
    pieces_OM: np.ndarray
    own: int

    @property
    def count(self) -> int:
        """O."""
        return len(self.pieces_OM)

    def rows(self, rows: int) -> slice:
        """Returns which rows of a table with so many this process keeps."""
        share = rows // self.count
        return slice(self.own * share, (self.own + 1) * share)

    def keep(self, values: np.ndarray, rows: int) -> HostArray:
        """Returns the part of a table of so many rows that this process keeps, from those rows."""
        return HostArray(values, rows, self.rows(rows).start)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> HostArray:
        """Returns this process's part of a table of zeros."""
        return self.keep(np.zeros((shape[0] // self.count, *shape[1:]), dtype), shape[0])

    def starts(self, unique_U: np.ndarray, rows: int) -> np.ndarray:
        """Returns where the rows of each owner begin among distinct rows in ascending order, and U: int [O + 1]."""
        return np.searchsorted(unique_U, np.arange(self.count + 1) * (rows // self.count))

    def places(self, starts_O1: np.ndarray, size: int) -> np.ndarray:
        """Returns where each distinct row is in a working set of O * S rows, and O * S: int32 [U + 1].

        Args:
          starts_O1: from `starts`.
          size: S.
        """
        owner_U = np.repeat(np.arange(self.count), np.diff(starts_O1))
        piece_U, within_U = np.divmod(np.arange(len(owner_U)) - starts_O1[owner_U], size // self.pieces_OM.shape[1])
        place_U = self.pieces_OM[owner_U, piece_U] * (size // self.pieces_OM.shape[1]) + within_U
        return np.append(place_U, self.count * size).astype(np.int32)


def alone(pieces: int = 1) -> Owners:
    """Returns the one owner of all pieces."""
    return Owners(np.zeros((1, 1), int), np.arange(pieces)[None], 0)


def axes_of_rows(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Returns the mesh axes that the rows of a working set are split over."""
    return tuple(axis for axis in rules.axes_of("rows") if mesh.shape[axis] > 1)


def owners_of(mesh: Mesh | AbstractMesh) -> Owners:
    """Returns the owners of rows on a mesh; on an abstract one, whose processes nobody knows, there is one.

    Raises:
      ConfigError: where no process would have a fair part of its own, see `split`.
    """
    axes = axes_of_rows(mesh)
    if not isinstance(mesh, Mesh):
        return alone(math.prod(mesh.shape[axis] for axis in axes))
    process = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    return split(process, tuple(mesh.axis_names.index(axis) for axis in axes), jax.process_index())


def split(process: np.ndarray, axes: tuple[int, ...], here: int) -> Owners:
    """Finds the owners of rows that are split over some axes of a mesh, the first of them outermost.

    Args:
      process: the process of each device, in the shape of the mesh.
      axes: numbers of the axes.
      here: this process.

    Raises:
      ConfigError: unless each process's devices are a box of the mesh, and two processes hold the same pieces or none in common.
    """
    piece = np.zeros(process.shape, int)
    for axis in axes:
        index = np.arange(process.shape[axis])
        piece = piece * process.shape[axis] + np.expand_dims(index, [i for i in range(process.ndim) if i != axis])
    held: dict[tuple[int, ...], list[int]] = {}
    for number in np.unique(process):
        if not (process[_box(process == number)] == number).all():
            raise _refused(f"process {number} has devices that are no box of it")
        held.setdefault(tuple(np.unique(piece[process == number]).tolist()), []).append(int(number))
    parts = sorted(held)
    sizes = {(len(part), len(held[part])) for part in parts}
    if len(sizes) > 1 or sum(map(len, parts)) != piece.max() + 1:
        raise _refused(f"processes hold pieces {', '.join(f'{held[part]}: {list(part)}' for part in parts)}")
    own = next((i for i, part in enumerate(parts) if here in held[part]), 0)
    return Owners(np.array([held[part] for part in parts]), np.array(parts), own)


def _refused(found: str) -> ConfigError:
    allowed = f"OnDevice on a mesh whose axes lie so across the processes: {found}, where each must have whole pieces of rows for itself"
    return ConfigError("model.memory.placement", "OnHost", allowed)


def _box(where: np.ndarray) -> tuple[slice, ...]:
    """Returns the smallest box around what is true."""
    return tuple(slice(int(index.min()), int(index.max()) + 1) for index in np.nonzero(where))


def mesh_of_process(mesh: Mesh) -> Mesh:
    """Returns the part of a mesh that this process's devices are."""
    if not mesh.is_multi_process:
        return mesh
    here = np.vectorize(lambda device: device.process_index == jax.process_index(), otypes=[bool])(mesh.devices)
    return Mesh(mesh.devices[_box(here)], mesh.axis_names, axis_types=mesh.axis_types)


def mesh_of_memories(owners: Owners) -> Mesh | None:
    """Returns a CPU device of every process, [owner, copy]: where rows are that the processes save together; None for one owner.

    The devices of accelerators have other memory; these stand for that of their hosts.
    """
    if owners.count == 1:
        return None
    first = {device.process_index: device for device in reversed(jax.devices("cpu"))}
    return Mesh(np.vectorize(first.__getitem__, otypes=[object])(owners.processes_OK), ("owner", "copy"))
