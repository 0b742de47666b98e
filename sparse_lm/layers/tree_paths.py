"""Paths and roles of the leaves of a parameter tree: nested dicts -> "blocks.0.attention.query.weight".

Parameters and their logical dims are two nested dicts of one structure; the leaves of the second are tuples of dim names
(tuples are nodes to jax.tree, so the walks here, like `layers.parameter.map_leaves`, take every dict as a node and everything
else as a leaf). What an optimizer or an initialiser does to a leaf follows from its dims alone: see `role`.
"""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any, Literal

from sparse_lm.layers.parameter import RUN_KEY, Dims

Tree = dict[Any, Any]
Role = Literal["vector", "embedding", "head", "router", "matrix"]

BATCH_DIMS = ("layers", "experts", "tap", "branch")


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {dotted path: leaf} of a nested dict, in its order; everything but a dict is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat.update(flatten(value, path))
        else:
            flat[path] = value
    return flat


def prune(tree: Mapping[Any, Any], keep: Callable[[str], bool], prefix: str = "") -> Tree:
    """Returns the nested dict of the leaves whose path is kept; a dict left empty is dropped."""
    out: Tree = {}
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            inner = prune(value, keep, path)
            if inner:
                out[key] = inner
        elif keep(path):
            out[key] = value
    return out


def matches(pattern: str, path: str) -> bool:
    """Says whether a glob matches a path, or the path without block numbers ("blocks.3.norm" also as "blocks.norm").

    `*` crosses dots. A pattern without block numbers therefore means the same for stacked runs and for unrolled blocks.
    """
    parts = [part for part in path.split(".") if not part.isdigit() and not RUN_KEY.match(part)]
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(".".join(parts), pattern)


def core_dims(dims: Dims) -> Dims:
    """Returns the dims of one parameter: those after the leading batch dims (layers, experts, taps of a convolution, branches)."""
    start = 0
    while start < len(dims) and dims[start] in BATCH_DIMS:
        start += 1
    return dims[start:]


def role(dims: Dims) -> Role:
    """Returns what a leaf is to the optimizer and the initialiser, from its dims.

    vector: norms, biases and scalars (at most one dim per layer or expert); embedding: (vocab, ...); head: (..., vocab);
    router: (..., routes); matrix: every other weight.
    """
    core = core_dims(dims)
    if len(core) < 2:
        return "vector"
    if core[0] == "vocab":
        return "embedding"
    if core[-1] == "vocab":
        return "head"
    if core[-1] == "routes":
        return "router"
    return "matrix"
