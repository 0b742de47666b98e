"""Which implementation of an operation runs where, and why the others were passed over.

An operation owns a list of :class:`Backend` in order of preference. Each one is asked, before anything is traced,
whether it supports the shapes, the dtypes and the kind of device; :func:`dispatch` then hands the survivors to
``lax.platform_dependent``, so the decision between platforms is made when the program is *lowered* (correct while
compiling on a CPU machine for a TPU, where ``jax.default_backend()`` would answer "cpu").

Every decision is remembered: :func:`backend_report` renders them as the table that a run prints at its start.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from jax import lax

BACKEND_NAMES = ("mosaic_gpu", "triton", "mosaic_tpu", "xla", "reference")
ACCELERATOR_PLATFORMS = ("cuda", "rocm", "tpu")

Shapes = Mapping[str, tuple[int, ...]]
Dtypes = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    Attributes:
        name: One of ``BACKEND_NAMES``.
        platforms: JAX platform names it can be lowered for; ``None`` means every platform.
        supports: ``supports(shapes, dtypes, device_kind) -> None | reason``; keys are argument names. ``device_kind``
            is None when no such device is attached and none was declared (compiling ahead of time).
        run: The function itself, called with the operation's arrays as positional arguments.
        by_default: False keeps it out of the automatic choice (a reference, a second opinion): only by name.
    """

    name: str
    platforms: tuple[str, ...] | None
    supports: Callable[[Shapes, Dtypes, str | None], str | None]
    run: Callable[..., Any]
    by_default: bool = True

    def __post_init__(self):
        if self.name not in BACKEND_NAMES:
            raise ValueError(f"Backend name={self.name!r}: expected one of {BACKEND_NAMES}.")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one platform runs for one operation at one set of shapes.

    Attributes:
        operation: Name of the operation.
        platform: JAX platform name, or "other" for every platform not listed on its own.
        shapes: Human-readable argument shapes and dtypes.
        backend: Name of the backend that runs.
        passed_over: (name, reason) for each backend of higher preference.
    """

    operation: str
    platform: str
    shapes: str
    backend: str
    passed_over: tuple[tuple[str, str], ...]


_declared_kinds: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar(
    "declared_kinds", default=MappingProxyType({})
)
_required: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("required_platforms", default=frozenset())
_choices: dict[Choice, None] = {}  # insertion-ordered set


@contextlib.contextmanager
def assume_device_kind(platform: str, kind: str):
    """Declares the kind of device that programs traced inside this context are compiled for.

    Needed only for ahead-of-time compilation, where the device is not attached; without it a kernel assumes the
    newest device it knows. It is read while tracing, so it must surround the first call of a jitted function.

    Args:
        platform: "cuda", "rocm" or "tpu".
        kind: The string that ``device.device_kind`` would give, e.g. "NVIDIA H100 80GB HBM3" or "TPU v5e".
    """
    if platform not in ACCELERATOR_PLATFORMS:
        raise ValueError(f"assume_device_kind: platform={platform!r} is not one of {ACCELERATOR_PLATFORMS}.")
    token = _declared_kinds.set({**_declared_kinds.get(), platform: kind})
    try:
        yield
    finally:
        _declared_kinds.reset(token)


@contextlib.contextmanager
def require_kernels(*platforms: str):
    """Makes it an error, while tracing, that one of `platforms` ("cuda", "tpu") falls back to a plain XLA path."""
    for platform in platforms:
        if platform not in ACCELERATOR_PLATFORMS:
            raise ValueError(f"require_kernels: platform={platform!r} is not one of {ACCELERATOR_PLATFORMS}.")
    token = _required.set(_required.get() | frozenset(platforms))
    try:
        yield
    finally:
        _required.reset(token)


@functools.cache
def _attached_kind(platform: str) -> str | None:
    try:
        return jax.devices(platform)[0].device_kind
    except RuntimeError:  # this process has no such platform
        return None


def device_kind(platform: str) -> str | None:
    """The declared kind of `platform`, else the kind of the attached device, else None."""
    return _declared_kinds.get().get(platform) or _attached_kind(platform)


@functools.cache
def attached_multiprocessors() -> int | None:
    """Streaming multiprocessors of the attached CUDA device; None without one."""
    try:
        return int(jax.devices("cuda")[0].core_count)
    except (RuntimeError, AttributeError):
        return None


@functools.cache
def jax_version() -> tuple[int, int, int]:
    """The installed JAX version as three integers, for `supports` functions that need a minimum."""
    major, minor, patch = (int(re.findall(r"\d+", part)[0]) for part in jax.__version__.split(".")[:3])
    return major, minor, patch


def varying_axes(*arrays: Any) -> frozenset[str]:
    """Mesh axes over which `arrays` vary: inside ``jax.shard_map(..., check_vma=True)``; empty elsewhere."""
    axes: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(arrays):
        kind = jax.typeof(leaf)
        manual = getattr(kind, "manual_axis_type", None)  # the name of it in JAX 0.11
        axes |= manual.varying if manual is not None else getattr(kind, "vma", frozenset())
    return axes


def vary_together(*arrays: Any) -> Any:
    """Casts pytrees so that they vary over the same mesh axes; the transpose of the cast adds gradients over them."""
    axes = varying_axes(*arrays)

    def vary(leaf):
        missing = tuple(sorted(axes - varying_axes(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, arrays) if axes else arrays


def choose(
    operation: str,
    backends: Sequence[Backend],
    platform: str,
    shapes: Shapes,
    dtypes: Dtypes,
    varying: bool = False,
) -> tuple[Backend, Choice]:
    """Picks the first backend that supports the arguments on `platform` ("other" admits only universal backends).

    Kernels are passed over for arguments that are `varying`: Pallas does not type-check them inside shard_map.
    """
    passed_over: list[tuple[str, str]] = []
    reason: str | None
    for backend in backends:
        if backend.platforms is not None and platform not in backend.platforms:
            reason = f"runs on {', '.join(backend.platforms)} only"
        elif not backend.by_default:
            reason = "only by name"
        elif varying and backend.platforms is not None:
            reason = "shard_map checks varying axes here; kernels need check_vma=False"
        else:
            reason = backend.supports(shapes, dtypes, None if platform == "other" else device_kind(platform))
        if reason is None:
            described = ", ".join(f"{name} {dtypes.get(name, '')}{list(shape)}" for name, shape in shapes.items())
            return backend, Choice(operation, platform, described, backend.name, tuple(passed_over))
        passed_over.append((backend.name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over)
    raise ValueError(f"{operation}: no backend supports these arguments on platform {platform!r} ({reasons}).")


def dispatch(
    operation: str,
    backends: Sequence[Backend],
    arguments: Sequence[Any],
    *,
    shapes: Shapes,
    dtypes: Dtypes,
    backend: str | None = None,
) -> Any:
    """Runs an operation through the backend asked for, or through the best one for whatever platform is lowered.

    Args:
        operation: Name used in messages and in the report.
        backends: The operation's backends, most wanted first.
        arguments: Positional pytrees of arrays, handed to ``Backend.run``; close over everything static.
        shapes: Argument name -> shape, what ``supports`` is asked with.
        dtypes: Argument name -> dtype, likewise.
        backend: Name of a backend to use whatever the platform, or None for the automatic choice.

    Returns:
        What ``Backend.run`` returns; all backends of an operation return the same structure of shapes and dtypes.

    Raises:
        ValueError: `backend` is unknown or does not support the arguments, or a kernel is required and none fits.
    """
    if backend is not None:
        by_name = {candidate.name: candidate for candidate in backends}
        if backend not in by_name:
            raise ValueError(f"{operation}: backend={backend!r} is unknown; allowed: {sorted(by_name)} or None.")
        chosen = by_name[backend]
        platform = chosen.platforms[0] if chosen.platforms else None
        reason = chosen.supports(shapes, dtypes, device_kind(platform) if platform else None)
        if reason is not None:
            raise ValueError(f"{operation}: backend={backend!r} cannot run here: {reason}.")
        return chosen.run(*arguments)

    varying = bool(varying_axes(*arguments))
    default, choice = choose(operation, backends, "other", shapes, dtypes, varying)
    _choices[choice] = None
    branches: dict[str, Callable[..., Any]] = {}
    for platform in ACCELERATOR_PLATFORMS:
        chosen, choice = choose(operation, backends, platform, shapes, dtypes, varying)
        _choices[choice] = None
        if platform in _required.get() and chosen.name in ("xla", "reference"):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.passed_over)
            raise ValueError(f"{operation}: a kernel is required on {platform!r} but none fits ({reasons}).")
        if chosen is not default:
            branches[platform] = chosen.run
    if not branches:
        return default.run(*arguments)
    return lax.platform_dependent(*arguments, default=default.run, **branches)


def recorded_choices() -> tuple[Choice, ...]:
    """Every choice made while tracing in this process, in order, without repetitions."""
    return tuple(_choices)


def clear_choices() -> None:
    """Forgets the recorded choices (a new run in the same process)."""
    _choices.clear()


def backend_report(platform: str | None = None) -> str:
    """Renders the recorded choices as text: operation, arguments -> backend, and why better ones were passed over.

    Args:
        platform: Only this platform ("cuda", "rocm", "tpu", "other"); None shows the platforms attached to this
            process, and "other" when there is no accelerator.

    Returns:
        A table, one line per operation and set of shapes; a line per backend passed over for a reason other than
        belonging to another platform.
    """
    if platform is None:
        shown = tuple(name for name in ACCELERATOR_PLATFORMS if device_kind(name)) or ("other",)
    else:
        shown = (platform,)
    lines = []
    for choice in _choices:
        if choice.platform not in shown:
            continue
        lines.append(f"{choice.operation:28s} {choice.platform:6s} -> {choice.backend:11s} {choice.shapes}")
        lines += [
            f"{'':28s}   not {name}: {reason}"
            for name, reason in choice.passed_over
            if not reason.startswith("runs on") and reason != "only by name"
        ]
    return "\n".join(lines) if lines else "no kernel operation has been traced yet"
