"""The kernel benchmark: parts in processes of their own, which compile side by side and time one at a time.

    python scripts/benchmark.py kernels

A process for each part frees its memory, survives a neighbour's crash, and lets compilation, some seconds for each Mosaic kernel, use all cores of the host.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable

import jax

from pallas_kernels.benchmark import block_sparse, feed_forward, fused, grouped
from pallas_kernels.benchmark.timing import LOCK, has_device_timer


def _norms() -> list[dict]:
    rows = block_sparse.measure(block_sparse.Case(*block_sparse.SQUARE, 128, 1.0))
    for row in rows:
        print(block_sparse.show(row), flush=True)
    return rows


OPERATIONS: dict[str, Callable[[str | None], dict[str, Callable[[], list[dict]]]]] = {
    "block_sparse": block_sparse.parts,
    "norms": lambda backend: {"norms": _norms},
    "grouped": grouped.parts,
    "libraries": grouped.library_parts,
    "fused": fused.parts,
    "feed_forward": feed_forward.parts,
}
DRAW = {"block_sparse": block_sparse.draw, "grouped": grouped.draw}
PACKAGES = ("jax", "jaxlib", "torch", "triton", "jax-triton", "tokamax")


def versions() -> dict[str, str]:
    """Versions of the packages whose numbers the table holds."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _one(operation: str, part: str, backend: str | None, lock: str) -> list[dict]:
    """Runs a part in a process of its own, prints what it says, returns its rows."""
    root = str(pathlib.Path(__file__).resolve().parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", __name__, operation, part, file.name, *([backend] if backend else [])]
        environment = os.environ | {LOCK: lock, "PYTHONPATH": paths}
        ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(f"--- {operation} {part}\n{ran.stdout}", end="", flush=True)
        return json.loads(pathlib.Path(file.name).read_text() or "[]")


def run(
    operation: str, *, backend: str | None = None, jobs: int | None = None, json_path=None, picture=None, only: str = ""
) -> dict:
    """Runs the parts of an operation, prints them, writes the numbers and the picture.

    Args:
        operation: A key of `OPERATIONS`.
        backend: Name of the backend to time; None for the automatic choice.
        jobs: Processes at a time; default: all with a GPU, else one.
        json_path: Where the numbers go; None prints only. Written after every part.
        picture: Where the picture goes; None draws none.
        only: Parts in whose name this regular expression is found.

    Returns:
        {"device", "versions", "date", "backend", "timer", "rows"}.
    """
    gpu = has_device_timer()
    result: dict = {
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "backend": backend or "automatic choice",
        "timer": "CUPTI, sum of kernels, steady state" if gpu else "wall clock",
        "rows": [],
    }
    names = [name for name in OPERATIONS[operation](backend) if re.search(only, name)]
    found: dict[str, list[dict]] = {}
    jobs = jobs or (max(1, len(names)) if gpu else 1)
    with tempfile.NamedTemporaryFile() as lock, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        shared = os.environ.get(LOCK, lock.name)
        running = {pool.submit(_one, operation, name, backend, shared): name for name in names}
        for done in concurrent.futures.as_completed(running):
            found[running[done]] = done.result()
            result["rows"] = [row for name in names for row in found.get(name, [])]
            if json_path:
                pathlib.Path(json_path).write_text(json.dumps(result, indent=1) + "\n")
    if picture and operation in DRAW:
        DRAW[operation](result["rows"], pathlib.Path(picture))
    return result


def main(arguments: list[str] | None = None) -> None:
    """One part, in this process."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("operation", choices=list(OPERATIONS))
    parser.add_argument("part")
    parser.add_argument("json")
    parser.add_argument("backend", nargs="?")
    options = parser.parse_args(arguments)
    rows = OPERATIONS[options.operation](options.backend)[options.part]()
    pathlib.Path(options.json).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
