"""Machines that need not be there: chips, their rates, and TPU slices described by name.

Rates are the vendors' published peaks: Cloud TPU system architecture pages (v5e, v5p, v6e; interconnect counted one way, all links of a
chip together) and NVIDIA's data sheets (NVLink one way inside a machine, one 400 Gb/s network port for each GPU between machines).
"""

import dataclasses
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

    def attach(self) -> list[jax.Device]:
        """Returns device objects of a TPU slice to compile for; none of them can run anything.

        Raises:
          ValueError: where libtpu is missing or knows no such slice.
        """
        assert self.chip.platform == "tpu"
        # libtpu must not ask a metadata server that only TPU machines have, and compiling needs no lock on chips.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        from jax.experimental import topologies

        try:
            return list(topologies.get_topology_desc(self.name, platform="tpu").devices)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            reason = str(error).splitlines()[0]
            hint = "" if "libtpu" not in reason.lower() else " (pip install libtpu)"
            raise ValueError(f"topology = {self.name!r}: libtpu cannot describe it{hint}: {reason}") from error


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
