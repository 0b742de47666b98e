"""What a run runs on: versions and devices, peak arithmetic rates, device memory, energy."""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

from sparse_lm.config import Config, to_dict
from sparse_lm.data.storage import content_key

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers", "tensorflow-datasets")

PEAK_FLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    # Dense matrix products, no structured sparsity, full-power parts, from the vendors' data sheets. NVIDIA's float32 is TF32, the
    # rate of JAX's default precision. The first entry whose name occurs in the device kind counts: longer names come first.
    ("GB200", {"bfloat16": 2500e12, "float32": 1250e12}),
    ("B200", {"bfloat16": 2250e12, "float32": 1125e12}),
    ("H200", {"bfloat16": 989e12, "float32": 494e12}),
    ("H100 PCIe", {"bfloat16": 756e12, "float32": 378e12}),
    ("H100 NVL", {"bfloat16": 835e12, "float32": 418e12}),
    ("H100", {"bfloat16": 989e12, "float32": 494e12}),
    ("A100", {"bfloat16": 312e12, "float32": 156e12}),
    ("L40S", {"bfloat16": 362e12, "float32": 183e12}),
    ("TPU v4", {"bfloat16": 275e12}),
    ("TPU v5 lite", {"bfloat16": 197e12}),
    ("TPU v5e", {"bfloat16": 197e12}),
    ("TPU v5p", {"bfloat16": 459e12}),
    ("TPU v5", {"bfloat16": 459e12}),
    ("TPU v6 lite", {"bfloat16": 918e12}),
    ("TPU v6e", {"bfloat16": 918e12}),
)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns the peak FLOP/s of one device for matrix products in `dtype` ("bfloat16", "float32"), or None when not in the table."""
    for name, rates in PEAK_FLOPS:
        if name.lower() in device_kind.lower():
            return rates.get(dtype)
    return None


def peak_statement(device_kind: str, dtype: str, devices: int = 1) -> str:
    """Returns one sentence on the peak that MFU is measured against, or on why there is none."""
    peak = peak_flops(device_kind, dtype)
    if peak is None:
        return f"MFU is not given: no peak FLOP/s known for {device_kind!r} in {dtype}"
    each = f"{peak / 1e12:.0f} TFLOP/s ({device_kind}, {dtype})"
    return f"MFU is measured against {each}" if devices == 1 else f"MFU is measured against {devices} x {each}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of git about the source tree this package lies in, or None (no git, not a checkout)."""
    here = pathlib.Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    """The CPU's model name where the system tells it."""
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Describes the machine, the versions and the commit: what a reader needs to judge or repeat the numbers of a run."""
    status = _git("status", "--porcelain")
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "backend": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if status is None else bool(status),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def memory_statistics() -> dict[str, int] | None:
    """Returns {"bytes_in_use", "peak_bytes", "limit_bytes"} of the fullest local device; None where the backend does not count (CPU)."""
    found = [statistics for device in jax.local_devices() if (statistics := device.memory_stats())]
    if not found:
        return None
    fullest = max(found, key=lambda statistics: statistics.get("peak_bytes_in_use", 0))
    return {
        "bytes_in_use": fullest.get("bytes_in_use", 0),
        "peak_bytes": fullest.get("peak_bytes_in_use", 0),
        "limit_bytes": fullest.get("bytes_limit", 0),
    }


class Energy:
    """Joules drawn by this process's NVIDIA GPUs since construction, read from NVML's counters.

    The counters belong to whole boards: work of others on the same GPU is counted too.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self.reason: str | None = None
        """Why there is no measurement, or None."""
        if jax.default_backend() != "gpu":
            self.reason = f"no NVIDIA GPU (backend {jax.default_backend()})"
            return
        try:
            import pynvml
        except ImportError:
            self.reason = "the package nvidia-ml-py is not installed (extra `gpu`)"
            return
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in self._board_numbers()]
            self._start = self._counters()
        except pynvml.NVMLError as error:
            self._handles, self.reason = [], f"NVML: {error}"

    @staticmethod
    def _board_numbers() -> list[int]:
        """NVML numbers of JAX's GPUs: it counts all boards, JAX only those that CUDA_VISIBLE_DEVICES lists."""
        visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
        numbers = [device.local_hardware_id or 0 for device in jax.local_devices()]
        if all(entry.isdigit() for entry in visible) and len(visible) > max(numbers):
            return [int(visible[number]) for number in numbers]
        return numbers

    def _counters(self) -> list[int]:
        return [self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles]

    def joules(self) -> float | None:
        """Returns joules since construction, or None when they cannot be measured (`reason` says why)."""
        if not self._handles:
            return None
        return sum(now - then for now, then in zip(self._counters(), self._start)) / 1000.0


def facts(recipe: Config) -> dict[str, Any]:
    """Returns what all processes of a run must have in common: the recipe's fields, versions of packages, the code, the devices."""
    found: dict[str, Any] = {}
    own = ("distributed.process", "log.display")

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}.{key}" if path else key)
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                walk(item, f"{path}.{index}")
        elif path not in own:
            found[path] = value

    walk(to_dict(recipe), "")
    found["recipe hash"] = content_key(found)
    found.update({f"version of {package}": _version(package) for package in PACKAGES})
    found["version of python"] = platform.python_version()
    found["hash of the code"] = code_hash()
    devices = jax.local_devices()
    found["local devices"] = f"{len(devices)} x {devices[0].device_kind}"
    return found


def code_hash() -> str:
    """Returns a hash over the source files of the library and its kernels."""
    root = pathlib.Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for package in ("sparse_lm", "pallas_kernels"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
