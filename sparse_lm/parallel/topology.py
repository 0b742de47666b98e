"""Machines that need not be there: chips, their rates, and TPU slices described by name.

Rates are the vendors' published peaks: Cloud TPU system architecture pages (v5e, v5p, v6e; interconnect counted one way, all links of a
chip together) and NVIDIA's data sheets (NVLink one way inside a machine, one 400 Gb/s network port for each GPU between machines).
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax

from sparse_lm.components import did_you_mean


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      platform: what programs are lowered for, "tpu" or "cuda".
      kind: what `device_kind` says.
      flops: peak bfloat16 operations per second.
      memory_bytes: device memory.
      memory_rate: bytes per second to and from it.
      link_rate: bytes per second that a chip sends to others of its machine or slice.
      machine: chips that this rate reaches; None: the whole slice.
      network_rate: bytes per second and chip beyond a machine.
    """

    platform: str
    kind: str
    flops: float
    memory_bytes: float
    memory_rate: float
    link_rate: float
    machine: int | None = None
    network_rate: float = 0.0


GIB = 2.0**30
CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
CHIPS = {
    "v5e": Chip("tpu", "TPU v5 lite", 197e12, 16 * GIB, 819e9, 200e9),
    "v5p": Chip("tpu", "TPU v5", 459e12, 95 * GIB, 2765e9, 600e9),
    "v6e": Chip("tpu", "TPU v6 lite", 918e12, 32 * GIB, 1640e9, 400e9),
    "h100": Chip("cuda", "NVIDIA H100 80GB HBM3", 989e12, 80e9, 3350e9, 450e9, 8, 50e9),
    "h200": Chip("cuda", "NVIDIA H200", 989e12, 141e9, 4800e9, 450e9, 8, 50e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of equal chips.

    Attributes:
      name: as given, such as "v5p:8x8x8" or "h100:64".
      chip: the chip.
      devices: their number.
    """

    name: str
    chip: Chip
    devices: int

    @property
    def compilable(self) -> bool:
        """Whether the step is compiled for these machines, not only lowered: for GPUs where JAX's CUDA plugin is installed."""
        return self.chip.platform == "tpu" or any(importlib.util.find_spec(name) for name in CUDA_PLUGINS)

    def attach(self) -> list[jax.Device]:
        """Returns device objects to compile for; none of them can run anything. GPUs need JAX to run on the CPU here (JAX_PLATFORMS=cpu).

        Raises:
          ValueError: where the compiler (libtpu, JAX's CUDA plugin) is missing or knows no such machines.
        """
        # libtpu must not ask a metadata server that only TPU machines have, and compiling needs no lock on chips.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        from jax.experimental import topologies

        tpu = self.chip.platform == "tpu"
        compiler = "libtpu" if tpu else "JAX's CUDA plugin"
        options = {} if tpu else {"target_config": self.target_config(), "topology": self.hosts()}
        try:
            return list(topologies.get_topology_desc(self.name, platform=self.chip.platform, **options).devices)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            reason = str(error).splitlines()[0]
            if tpu:
                hint = "" if importlib.util.find_spec("libtpu") else " (pip install libtpu)"
            else:
                hint = " (set JAX_PLATFORMS=cpu)" if self.compilable else " (pip install jax[cuda13])"
            raise ValueError(f"topology = {self.name!r}: {compiler} cannot describe it{hint}: {reason}") from error

    def hosts(self) -> str:
        """GPUs as JAX's CUDA plugin counts them: slices x machines x GPUs of a machine."""
        machine = math.gcd(self.devices, self.chip.machine or self.devices)
        return f"1x{self.devices // machine}x{machine}"

    def target_config(self) -> str:
        """What XLA wants to know of a Hopper GPU, as the text of its GpuTargetConfigProto."""
        device = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 48 << 10,
            "shared_memory_per_core": 228 << 10,
            "shared_memory_per_block_optin": 227 << 10,
            "threads_per_core_limit": 2048,
            "core_count": 132,
            "fpus_per_core": 128,
            "registers_per_core_limit": 1 << 16,
            "registers_per_block_limit": 1 << 16,
            "block_dim_limit_x": (1 << 31) - 1,
            "block_dim_limit_y": (1 << 16) - 1,
            "block_dim_limit_z": (1 << 16) - 1,
            "memory_bandwidth": int(self.chip.memory_rate),
            "device_memory_size": int(self.chip.memory_bytes),
            "l2_cache_size": 50 << 20,
            "clock_rate_ghz": 1.98,
        }
        fields = " ".join(f"{name}: {value}" for name, value in device.items())
        return (
            f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: 9 }} }} "
            f'platform_name: "CUDA" dnn_version_info {{ major: 9 }} device_description_str: "{self.chip.kind}"'
        )


def topology(name: str) -> Topology:
    """Reads CHIP:SHAPE, such as "v5p:8x8x8", "v6e:16x16" or "h100:64".

    Raises:
      ValueError: for an unknown chip or a shape that cannot be.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        allowed = ", ".join(CHIPS)
        raise ValueError(f"topology = {name!r}: unknown chip {kind!r}; allowed: {allowed}.{did_you_mean(kind, CHIPS)}")
    chip = CHIPS[kind]
    if not re.fullmatch(r"\d+(x\d+){0,2}", shape) or 0 in (sizes := [int(size) for size in shape.split("x")]):
        example = "v5p:4x4x4" if kind == "v5p" else f"{kind}:4x4" if chip.platform == "tpu" else f"{kind}:64"
        raise ValueError(f"topology = {name!r}: allowed: CHIP:SHAPE, such as {example}")
    wanted = 3 if kind == "v5p" else 2
    if chip.platform == "tpu" and len(sizes) != wanted:
        raise ValueError(
            f"topology = {name!r}: a {kind} slice has {wanted} dimensions, such as {'x'.join(['4'] * wanted)}"
        )
    return Topology(name, chip, math.prod(sizes))
