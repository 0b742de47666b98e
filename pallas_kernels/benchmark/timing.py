"""Device time of jitted functions: CUPTI on NVIDIA GPUs, the wall clock elsewhere.

Python loops cannot time what takes less than about 0.2 ms, so on a GPU the duration of every kernel a call launches
is read from CUPTI and added up. Candidates are timed in turn, round after round, because the clock of a GPU depends
on what ran before; medians and spreads over the rounds are reported.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
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


def has_device_timer() -> bool:
    """True where kernels can be timed by CUPTI."""
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


def compile_all(
    functions: Mapping[str, tuple[Callable[..., Any], Sequence[Any]]], threads: int = 8
) -> tuple[dict[str, Any], dict[str, str]]:
    """Compiles functions concurrently (the assembler of GPU kernels runs outside the interpreter lock).

    Args:
        functions: name -> (function, arguments).
        threads: Compilations at a time.

    Returns:
        name -> compiled function, and name -> message for those that failed.
    """
    compiled, failed = {}, {}

    def build(name):
        function, arguments = functions[name]
        return jax.jit(function).lower(*arguments).compile()

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        futures = {name: pool.submit(build, name) for name in functions}
        for name, future in futures.items():
            try:
                compiled[name] = future.result()
            except Exception as error:  # a configuration that does not compile is a result, not a crash
                failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
    return compiled, failed


def _once(function: Callable[..., Any], arguments: Sequence[Any], iterations: int) -> float:
    if not has_device_timer():
        begin = time.perf_counter()
        for _ in range(iterations):
            result = function(*arguments)
        jax.block_until_ready(result)
        return (time.perf_counter() - begin) / iterations
    from jax.experimental.mosaic.gpu import profiler

    _, milliseconds = profiler.Cupti(finalize=False).measure(function, iterations=iterations)(*arguments)
    if milliseconds is None:
        raise RuntimeError("CUPTI recorded no kernel")
    values = milliseconds if isinstance(milliseconds, list) else [milliseconds]
    return statistics.median(values) * 1e-3


def time_all(
    compiled: Mapping[str, tuple[Callable[..., Any], Sequence[Any]]], *, iterations: int = 5, rounds: int = 3
) -> dict[str, Timing]:
    """Times functions in turn.

    Args:
        compiled: name -> (jitted or compiled function, arguments).
        iterations: Calls per round; the median counts on a GPU, the mean elsewhere.
        rounds: Times every function gets its turn.

    Returns:
        name -> Timing.
    """
    samples: dict[str, list[float]] = {name: [] for name in compiled}
    for name, (function, arguments) in compiled.items():
        jax.block_until_ready(function(*arguments))
    for _ in range(rounds):
        for name, (function, arguments) in compiled.items():
            samples[name].append(_once(function, arguments, iterations))
    return {
        name: Timing(statistics.median(values), min(values), max(values), rounds) for name, values in samples.items()
    }
