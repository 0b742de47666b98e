"""Arrays of a checkpoint, read straight to where they belong.

Orbax writes every array as a zarr array of TensorStore, named by its dotted path, in one OCDBT key-value store a checkpoint. Here each
device's part of a leaf is read from there into one buffer, stacked layers side by side in it, and handed to the device: no array is made
twice, nothing that another process holds is read, no program is compiled. On a CPU the buffer becomes the array.
"""

import collections
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore
from etils import epath

ALIGNMENT = 64
"""Bytes: a CPU device takes a buffer that begins at a multiple of this as it is."""
LEAST_IN_FLIGHT = 1 << 24
"""Bytes that may be under way however small the state is."""


class Leaf(NamedTuple):
    """One array in memory.

    Attributes:
      names: its arrays on disk by dotted path: one, or those that are stacked.
      stacked: the axis along which they are; None: there is one.
      shape: shape in memory, the stacked axis included.
      dtype: dtype in memory; another one on disk is converted.
      sharding: where it goes; None: a numpy array in host memory.
      rows: which rows that numpy array has; None: all.
    """

    names: tuple[str, ...]
    stacked: int | None
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: jax.sharding.Sharding | None
    rows: slice | None = None

    def parts(self) -> dict[tuple[tuple[int, int], ...], list[jax.Device | None]]:
        """Returns {(start, stop) of each dimension: the devices of this process that hold this part}."""
        if self.sharding is None:
            whole = tuple((0, size) for size in self.shape)
            return {whole if self.rows is None else ((self.rows.start, self.rows.stop), *whole[1:]): [None]}
        found: dict[tuple[tuple[int, int], ...], list[jax.Device | None]] = {}
        for device, index in self.sharding.addressable_devices_indices_map(self.shape).items():
            bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), self.shape, strict=True))
            found.setdefault(bounds, []).append(device)
        return found


class _Reading(NamedTuple):
    leaf: Leaf
    buffers: list[tuple[np.ndarray, list[jax.Device | None]]]
    writes: list[Any]
    bytes: int

    def finish(self) -> jax.Array | np.ndarray:
        for write in self.writes:
            write.result()
        if self.leaf.sharding is None:
            return self.buffers[0][0]
        arrays = [jax.device_put(buffer, device) for buffer, devices in self.buffers for device in devices]
        whole = jax.make_array_from_single_device_arrays(self.leaf.shape, self.leaf.sharding, arrays)
        return jax.block_until_ready(whole)


def read_leaves(directory: epath.Path, leaves: Sequence[Leaf]) -> list[jax.Array | np.ndarray]:
    """Reads leaves from the state of a checkpoint; at most a tenth of their bytes, or the largest leaf, is under way at a time.

    Args:
      directory: STEP/state.
      leaves: what to read; order and number as wanted.

    Returns:
      An array on its devices for each leaf, or a numpy array, which may be written to, where the leaf has no sharding.

    Raises:
      ValueError: when an array is missing or its file cannot be read; TensorStore's message names it.
    """
    sizes = [sum(math.prod(b - a for a, b in part) for part in leaf.parts()) * leaf.dtype.itemsize for leaf in leaves]
    limit = max([sum(sizes) // 10, *sizes, LEAST_IN_FLIGHT])
    names = [name for leaf in leaves for name in leaf.names]
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": LEAST_IN_FLIGHT}})
    opening = {name: tensorstore.open(_spec(directory, name), context=context, read=True, open=True) for name in names}
    found: list[jax.Array | np.ndarray] = []
    under_way: collections.deque[_Reading] = collections.deque()
    for leaf, size in zip(leaves, sizes, strict=True):
        while under_way and sum(reading.bytes for reading in under_way) + size > limit:
            found.append(under_way.popleft().finish())
        under_way.append(_begin(leaf, [opening[name].result() for name in leaf.names], size))
    return found + [reading.finish() for reading in under_way]


def _begin(leaf: Leaf, stores: list[Any], size: int) -> _Reading:
    buffers: list[tuple[np.ndarray, list[jax.Device | None]]] = []
    writes: list[Any] = []
    for bounds, devices in leaf.parts().items():
        buffer = aligned(tuple(stop - start for start, stop in bounds), leaf.dtype)
        buffers.append((buffer, devices))
        for number, store in enumerate(stores):
            inside: tuple[Any, ...] = (...,)
            region = bounds
            if leaf.stacked is not None:
                start, stop = bounds[leaf.stacked]
                if not start <= number < stop:
                    continue
                inside = (*(slice(None),) * leaf.stacked, number - start, ...)
                region = (*bounds[: leaf.stacked], *bounds[leaf.stacked + 1 :])
            source = store[tuple(slice(*bound) for bound in region)] if region else store
            if source.dtype.numpy_dtype != leaf.dtype:
                source = tensorstore.cast(source, leaf.dtype)
            target = tensorstore.array(buffer[inside], copy=False)
            writes.append(target.write(source.translate_to[(0,) * source.rank] if source.rank else source))
    return _Reading(leaf, buffers, writes, size)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an array that a CPU device need not copy; its values are whatever memory holds."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _spec(directory: epath.Path, name: str) -> dict[str, Any]:
    path = os.fspath(directory).rstrip("/") + "/"
    base = path if "://" in path else {"driver": "file", "path": path}
    store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    # What is being read does not change: nothing need be looked up twice.
    return {"driver": "zarr", "kvstore": store, "recheck_cached_metadata": "open", "recheck_cached_data": "open"}
