"""Device time of jitted functions: CUPTI on NVIDIA GPUs, the wall clock elsewhere.

Python loops cannot time what takes less than about 0.2 ms, so on a GPU the duration of every kernel a call launches
is read from CUPTI and added up. Candidates are timed in turn, round after round, because the clock of a GPU depends
on what ran before; medians and spreads over the rounds are reported.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call over rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @property
    def spread(self) -> float:
        """(high - low) / median."""
        return (self.high - self.low) / self.median


class NoneChosenError(ValueError):
    """There is nothing of what was asked for."""


def chosen(named: Mapping[str, Any], only: str) -> dict[str, Any]:
    """The entries in whose name the regular expression `only` is found.

    Raises:
        NoneChosenError: there is none; the message lists the names.
    """
    found = {name: value for name, value in named.items() if re.search(only, name)}
    if not found:
        raise NoneChosenError(
            f"only = {only!r}; allowed: a regular expression that is found in one of {', '.join(named)}"
        )
    return found


def has_device_timer() -> bool:
    """True where kernels can be timed by CUPTI."""
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


def compile_all(
    functions: Mapping[str, tuple[Callable[..., Any], Sequence[Any]]], threads: int = 8
) -> tuple[dict[str, Any], dict[str, str]]:
    """Lowers functions in turn and compiles them concurrently (the assembler of GPU kernels runs outside the interpreter lock).

    Args:
        functions: name -> (function, arguments).
        threads: Compilations at a time.

    Returns:
        name -> compiled function, and name -> message for those that failed.
    """
    compiled, failed, futures = {}, {}, {}
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for name, (function, arguments) in functions.items():
            try:  # one after another: the lowering of Mosaic kernels shares state between threads
                futures[name] = pool.submit(jax.jit(function).lower(*arguments).compile)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
        for name, future in futures.items():
            try:
                compiled[name] = future.result()
            except Exception as error:  # a configuration that does not compile is a result, not a crash
                failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
    return compiled, failed


def _host_seconds(function: Callable[..., Any], arguments: Sequence[Any], iterations: int) -> float:
    # Devices of a CPU share its threads: programs that wait for each other must not be enqueued by the hundred.
    alone = jax.default_backend() == "cpu"
    begin = time.perf_counter()
    for _ in range(iterations):
        result = function(*arguments)
        if alone:
            jax.block_until_ready(result)
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) / iterations


def _device_seconds(function: Callable[..., Any], arguments: Sequence[Any], iterations: int) -> float:
    from jax.experimental.mosaic.gpu import profiler

    _, milliseconds = profiler.Cupti(finalize=False).measure(function, iterations=iterations)(*arguments)
    if milliseconds is None:
        raise RuntimeError("CUPTI recorded no kernel")
    return statistics.median(milliseconds if isinstance(milliseconds, list) else [milliseconds]) * 1e-3


def launched(call: Callable[[], Any]) -> list[tuple[str, float]]:
    """(name, seconds) of every kernel that a call launches on the GPU."""
    from jax.experimental.mosaic.gpu import profiler

    recorder = profiler.mosaic_gpu_lib._mosaic_gpu_ext
    recorder._cupti_init()
    try:
        jax.block_until_ready(call())
    finally:
        timings = recorder._cupti_get_timings(False)
    return [(name, milliseconds * 1e-3) for name, milliseconds in timings or []]


def kernels_of(function: Callable[..., Any], arguments: Sequence[Any]) -> list[tuple[str, float]]:
    """(name, seconds) of every kernel that a second call of a compiled function launches on the GPU."""
    jax.block_until_ready(function(*arguments))
    return launched(lambda: function(*arguments))


def time_all(
    compiled: Mapping[str, tuple[Callable[..., Any], Sequence[Any]]],
    *,
    rounds: int = 3,
    warm_seconds: float = 0.1,
    timed_seconds: float = 0.03,
) -> dict[str, Timing]:
    """Times functions in turn, each in its own steady state.

    A GPU lowers its clock within a tenth of a second of heavy matrix work (a dense bf16 product on an H100 runs at
    about 830 TFLOP/s in a short burst and 690 under load), so every function first runs back to back for a while.

    Args:
        compiled: name -> (jitted or compiled function, arguments).
        rounds: Times every function gets its turn.
        warm_seconds: How long a function runs before it is timed; 0 times bursts.
        timed_seconds: How long it is timed; the median call counts on a GPU, the mean elsewhere.

    Returns:
        name -> Timing.
    """
    device = has_device_timer()
    samples: dict[str, list[float]] = {name: [] for name in compiled}
    single = {}
    for name, (function, arguments) in compiled.items():
        jax.block_until_ready(function(*arguments))
        single[name] = max(_host_seconds(function, arguments, 3), 2e-5)
    for _ in range(rounds):
        for name, (function, arguments) in compiled.items():
            if warm_seconds:
                _host_seconds(function, arguments, max(1, int(warm_seconds / single[name])))
            iterations = min(200, max(3, int(timed_seconds / single[name])))
            measure = _device_seconds if device else _host_seconds
            samples[name].append(measure(function, arguments, iterations))
    return {
        name: Timing(statistics.median(values), min(values), max(values), rounds) for name, values in samples.items()
    }
