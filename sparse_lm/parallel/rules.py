"""The one table from logical dims to mesh axes, and the shardings that follow from it."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparse_lm.layers.parameter import map_leaves
from sparse_lm.parallel.mesh import current

RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "experts": "expert",
    "embed": "fsdp",
    "ffn": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "vocab": "tensor",
    "routes": None,
    "members": None,
    "memory": None,
    "tap": None,
    "branch": None,
    "blocks": ("tensor", "fsdp"),
    "block_in": None,
    "block_out": None,
    "rank": None,
    "permuted": ("tensor", "fsdp"),
    "list": None,
    "rows": ("data", "fsdp", "expert", "context"),
    "row": None,
    "address": None,
    "key": None,
    "bins": None,
}
"""Logical dim -> mesh axis, or several; None keeps the dim whole. Rows of tables are split as the tokens that read
them. Blocks of a sparse matrix are in the order of its columns, so `tensor` splits columns and `fsdp` the blocks of a column range."""

BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes that split the sequences of a batch."""


def spec_of(dims: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """Returns the partition of an array: each dim on its axis, whole where the axis does not divide it."""
    used: set[str] = set()
    axes: list[str | tuple[str, ...] | None] = []
    for dim, size in zip(dims, shape, strict=True):
        wanted = [axis for axis in axes_of(dim) if mesh.shape[axis] > 1 and axis not in used]
        if not wanted or size % math.prod(mesh.shape[axis] for axis in wanted):
            axes.append(None)
            continue
        used.update(wanted)
        axes.append(wanted[0] if len(wanted) == 1 else tuple(wanted))
    return P(*axes)


def axes_of(dim: str) -> tuple[str, ...]:
    """Returns the mesh axes that a logical dim is split over."""
    axes = RULES[dim]
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def shardings(dims: Any, shapes: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Returns the NamedShardings of nested dicts of dims and shapes."""
    return map_leaves(lambda _, d, s: NamedSharding(mesh, spec_of(d, s, mesh)), dims, shapes)


def undivided(dims: Any, shapes: Any, mesh: Mesh | AbstractMesh) -> list[str]:
    """Names the dims that a mesh axis should split but does not divide, for the run's start table."""
    found: list[str] = []

    def leaf(path: str, leaf_dims: tuple[str, ...], shape: tuple[int, ...]) -> None:
        for dim, size in zip(leaf_dims, shape, strict=True):
            for axis in axes_of(dim):
                if mesh.shape[axis] > 1 and size % mesh.shape[axis]:
                    found.append(f"{path}: {dim} = {size} is whole on {axis} = {mesh.shape[axis]}")

    map_leaves(leaf, dims, shapes)
    return list(dict.fromkeys(found))


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of [B, L] batches: sequences over data, fsdp and expert, positions over context."""
    return NamedSharding(mesh, P(BATCH_AXES, "context"))


class TokenSplit(NamedTuple):
    """How the tokens of a program are split.

    Attributes:
      rows: axes that split the sequences.
      context: axis that splits each sequence, or None.
    """

    rows: tuple[str, ...]
    context: str | None

    @property
    def axes(self) -> tuple[str, ...]:
        """All of them."""
        return self.rows if self.context is None else (*self.rows, self.context)

    def spec(self, *rest: str | None) -> P:
        """Returns the partition of an array [rows, length, *rest]."""
        return P(self.rows, self.context, *rest)


def split_tokens(rows: int, length: int, mesh: Mesh | AbstractMesh) -> TokenSplit:
    """Returns the split of arrays [rows, length, ...] of tokens inside the program.

    As `batch_sharding` says, but an axis that does not divide what is left of the rows (an evaluation batch) keeps them whole.
    """
    axes: list[str] = []
    for axis in BATCH_AXES:
        if mesh.shape[axis] > 1 and rows % mesh.shape[axis] == 0:
            axes.append(axis)
            rows //= mesh.shape[axis]
    context = mesh.shape["context"]
    return TokenSplit(tuple(axes), "context" if context > 1 and length % context == 0 else None)


def as_tokens(x: jax.Array) -> jax.Array:
    """Pins an array [B, L, ...] to the split of the tokens, other dims whole; without a mesh it is returned as it is.

    GSPMD carries shardings forth from here; without it a parameter split over fsdp may win over the batch.
    """
    mesh = current()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, split_tokens(x.shape[0], x.shape[1], mesh).spec())


def as_whole(x: jax.Array) -> jax.Array:
    """Pins an array to every device of the mesh, whole; without a mesh it is returned as it is."""
    return x if current() is None else jax.lax.with_sharding_constraint(x, P())


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding that keeps an array whole on every device."""
    return NamedSharding(mesh, P())


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of pieces that a batch is split into along its sequences."""
    size = 1
    for axis in BATCH_AXES:
        size *= mesh.shape[axis]
    return size


def place(tree: Any, target: Any) -> Any:
    """Puts a tree of arrays where a matching tree of shardings says; an array that every process has becomes one of all."""

    def put(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        if sharding.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
            return jax.device_put(leaf, sharding)
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(put, tree, target)
