"""The device mesh: five axes whose product is the number of devices."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from sparse_lm.config import Config, ConfigError

AXES = ("data", "fsdp", "expert", "tensor", "context")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape(Config):
    """Sizes of the mesh axes; -1 on at most one axis takes the devices that are left."""

    data: int = -1
    """Replicas that see different sequences."""
    fsdp: int = 1
    """Shards of parameters and optimizer state that also see different sequences."""
    expert: int = 1
    """Shards of the experts; also splits sequences outside the routed layers."""
    tensor: int = 1
    """Shards of heads, hidden units and vocabulary."""
    context: int = 1
    """Shards of each sequence."""
    allow_split_physical_axes: bool = False
    """Let a mesh axis span part of a TPU torus axis, where the topology needs it."""

    def check(self) -> None:
        """See Config.check."""
        for axis in AXES:
            size = getattr(self, axis)
            self.require(size >= 1 or size == -1, axis, "at least 1, or -1 to infer it")
        inferred = [axis for axis in AXES if getattr(self, axis) == -1]
        if len(inferred) > 1:
            raise ConfigError(inferred[1], -1, f"-1 on one axis only ({inferred[0]} has it)")

    def sizes(self, devices: int) -> dict[str, int]:
        """Returns the size of every axis for a number of devices.

        Raises:
          ConfigError: if the product cannot be the number of devices.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        fixed = math.prod(size for size in sizes.values() if size != -1)
        inferred = next((axis for axis, size in sizes.items() if size == -1), None)
        if devices % fixed or (inferred is None and fixed != devices):
            written = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
            raise ConfigError("mesh", written or "all 1", f"sizes whose product is the {devices} devices of this run")
        if inferred:
            sizes[inferred] = devices // fixed
        return sizes

    def build(self, devices: list[jax.Device] | None = None) -> Mesh:
        """Builds the mesh over the given devices, or over all of them."""
        devices = jax.devices() if devices is None else devices
        shape = tuple(self.sizes(len(devices)).values())
        if devices[0].platform == "tpu":
            from jax.experimental import mesh_utils

            try:
                grid = mesh_utils.create_device_mesh(
                    shape, devices, allow_split_physical_axes=self.allow_split_physical_axes
                )
            except NotImplementedError as error:
                written = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape) if size > 1)
                torus = " x ".join(str(max(d.coords[i] for d in devices) + 1) for i in range(3))
                allowed = f"True for the mesh {written} on a {torus} torus, whose axes it must split"
                if self.allow_split_physical_axes:
                    raise ConfigError("mesh", written, f"sizes that lie on a {torus} torus") from error
                raise ConfigError("mesh.allow_split_physical_axes", False, allowed) from error
        else:
            grid = np.asarray(devices).reshape(shape)
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def current() -> AbstractMesh | None:
    """Returns the mesh that the program being traced is spread over; None on one device.

    A `Definition` sets it around its functions (`jax.sharding.use_abstract_mesh`). The few places that split their work by hand
    (dispatch, attention, the loss) read it here; nothing else asks.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def inside_shard_map() -> bool:
    """Says whether what is being traced is one device's part of a program that is split by hand."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)
