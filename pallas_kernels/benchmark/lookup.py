"""Times lookups of random rows against a copy: how much of the memory's bandwidth narrow rows get.

    python scripts/benchmark.py kernels --op lookup

Bytes of a lookup = addresses x (row as held + row as written + 4); of the copy (x + 1 over 1 GiB of float32): read and written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.benchmark.timing import compile_all, has_device_timer, time_all
from pallas_kernels.embedding_lookup import embedding_lookup, row_words

BACKENDS = ("xla", "triton")
GPU_SIZES, CPU_SIZES = (1 << 28, 10_000_000, 524_288), (1 << 12, 5_000, 1_024)  # numbers copied, rows, addresses
CASES = {
    "64 bytes": (16, "float32"),
    "128 bytes": (32, "float32"),
    "256 bytes": (64, "float32"),
    "512 bytes": (128, "float32"),
    "64 bfloat16": (64, "bfloat16"),
    "64 float8": (64, "float8"),
    "128 float8": (128, "float8"),
    "256 float8": (256, "float8"),
}


def run(case: str, backend: str | None = None) -> list[dict]:
    """Times one kind of row; prints and returns one row for each backend."""
    copied, rows, addresses = GPU_SIZES if has_device_timer() else CPU_SIZES
    width, dtype = CASES[case]
    held = (row_words(width), jnp.uint32) if dtype == "float8" else (width, jnp.dtype(dtype))
    table = jnp.zeros((rows, held[0]), held[1])
    address = jax.random.randint(jax.random.key(width), (addresses,), 0, rows, jnp.int32)
    jobs: dict[str, tuple[Callable, tuple]] = {"copy": (lambda x: x + 1, (jnp.zeros((copied,), jnp.float32),))}
    for name in (backend,) if backend else BACKENDS:
        jobs[name] = (functools.partial(embedding_lookup, backend=name), (table, address))
    compiled, failed = compile_all(jobs)
    for name, message in failed.items():
        print(f"FAILED {case}, {name}: {message}", flush=True)
    timings = time_all({name: (compiled[name], jobs[name][1]) for name in compiled}, warm_seconds=0.02)
    written = 2 if dtype == "float8" else held[1].itemsize
    size = {"copy": 8 * copied}
    found = []
    for name, timing in timings.items():
        moved = size.get(name, addresses * (held[0] * table.dtype.itemsize + width * written + 4))
        row = {"row": case, "backend": name, "ms": timing.median * 1e3, "gb_s": moved / timing.median / 1e9}
        row["of_copy"] = row["gb_s"] / (size["copy"] / timings["copy"].median / 1e9)
        found.append(row)
        print(
            f"{case:12s} {name:8s} {row['ms']:8.4f} ms {row['gb_s']:8.1f} GB/s, {row['of_copy']:.3f} of a copy",
            flush=True,
        )
    return found


def parts(backend: str | None) -> dict[str, Callable[[], list[dict]]]:
    """The table in parts: name -> function that measures and prints its rows."""
    return {case: functools.partial(run, case, backend) for case in CASES}
