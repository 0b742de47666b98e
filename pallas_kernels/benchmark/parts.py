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
from pallas_kernels.benchmark.timing import NoneChosenError, chosen, has_device_timer


def _norms() -> list[dict]:
    rows = block_sparse.measure(block_sparse.Case(*block_sparse.SQUARE, 128, 1.0))
    for row in rows:
        print(block_sparse.show(row), flush=True)
    return rows


Parts = dict[str, Callable[[], list[dict]]]
# Operations of which one backend can be timed by its name, and those that compare what they compare.
OF_BACKENDS: dict[str, Callable[[str | None], Parts]] = {
    "block_sparse": block_sparse.parts,
    "grouped": grouped.parts,
    "lookup": lookup.parts,
}
OTHERS: dict[str, Callable[[], Parts]] = {
    "norms": lambda: {"norms": _norms},
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


def parts_of(operation: str, backend: str | None) -> Parts:
    """The parts of an operation by name.

    Raises:
        NoneChosenError: a backend is named for an operation that has no choice.
    """
    if operation in OF_BACKENDS:
        return OF_BACKENDS[operation](backend)
    if backend is not None:
        raise NoneChosenError(f"backend = {backend!r}; allowed: none here, only for {', '.join(OF_BACKENDS)}")
    return OTHERS[operation]()


def run(operation: str, *, backend: str | None = None, json_path=None, picture=None, only: str = "") -> dict:
    """Runs the parts of an operation, prints them, writes the numbers and the picture.

    Args:
        operation: A key of `OF_BACKENDS` or `OTHERS`.
        backend: Name of the backend to time; None for the automatic choice.
        json_path: Where the numbers go; None prints only. Written after every part.
        picture: Where the picture goes; None draws none.
        only: Parts in whose name this regular expression is found.

    Returns:
        {"device", "versions", "date", "backend", "timer", "rows"}.

    Raises:
        NoneChosenError: `only` is found in no part's name, or the operation has no choice of backends.
    """
    result: dict = {
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "backend": backend or "automatic choice",
        "timer": "CUPTI, sum of kernels, steady state" if has_device_timer() else "wall clock",
        "rows": [],
    }
    for name, part in chosen(parts_of(operation, backend), only).items():
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
