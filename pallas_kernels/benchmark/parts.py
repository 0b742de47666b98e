"""The kernel benchmark: an operation's table, part after part in one process.

    python scripts/benchmark.py kernels

One process, because a GPU's host compiles the few Mosaic kernels of a part in seconds, and several processes that share a card
slow each other down by far more than their compilations overlap.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import pathlib
from collections.abc import Callable

import jax

from pallas_kernels.benchmark import block_sparse, feed_forward, fused, grouped, lookup
from pallas_kernels.benchmark.timing import chosen, has_device_timer


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
    "lookup": lookup.parts,
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


def run(operation: str, *, backend: str | None = None, json_path=None, picture=None, only: str = "") -> dict:
    """Runs the parts of an operation, prints them, writes the numbers and the picture.

    Args:
        operation: A key of `OPERATIONS`.
        backend: Name of the backend to time; None for the automatic choice.
        json_path: Where the numbers go; None prints only. Written after every part.
        picture: Where the picture goes; None draws none.
        only: Parts in whose name this regular expression is found.

    Returns:
        {"device", "versions", "date", "backend", "timer", "rows"}.

    Raises:
        NoneChosenError: `only` is found in no part's name.
    """
    result: dict = {
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "backend": backend or "automatic choice",
        "timer": "CUPTI, sum of kernels, steady state" if has_device_timer() else "wall clock",
        "rows": [],
    }
    for name, part in chosen(OPERATIONS[operation](backend), only).items():
        print(f"--- {operation} {name}", flush=True)
        try:
            result["rows"] += part()
        except Exception as error:  # a part that does not fit the device must not cost the others
            print(f"FAILED {operation} {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        jax.clear_caches()
        if json_path:
            pathlib.Path(json_path).write_text(json.dumps(result, indent=1) + "\n")
    if picture and operation in DRAW:
        DRAW[operation](result["rows"], pathlib.Path(picture))
    return result
