"""Which blocks of a weight matrix exist, as data: lists of int32 that every kernel reads.

Stored blocks are ordered by output block column, then by input block row (column-major), so a forward pass reads
them in a row. Everything else a kernel needs (the transposed lists, the order of work) is derived once, when the
pattern changes, and travels with it. All shapes depend only on the number of blocks, so a pattern may be edited
inside ``jax.jit`` without recompiling.

Legend: K, N features in and out; R = K / block_k block rows; C = N / block_n block columns; J stored blocks;
P pairs (at most (J + C) / 2).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

BLOCK_SIZES = (16, 32, 64, 128, 256, 512)
PAIR_FIELDS = 6  # block row, block column and slot of the first block, then of the second


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "row_index",
        "column_start",
        "column_index",
        "row_order",
        "row_start",
        "column_schedule",
        "row_schedule",
        "pairs",
    ],
    meta_fields=["features_in", "features_out", "block_in", "block_out"],
)
@dataclasses.dataclass(frozen=True)
class BlockTopology:
    """The pattern of a block-sparse [features_in, features_out] matrix; arrays may carry leading batch dimensions.

    Attributes:
        row_index: int32 [J], block row of each stored block.
        column_start: int32 [C + 1], the stored blocks of column c are column_start[c] .. column_start[c + 1].
        column_index: int32 [J], block column of the blocks in *row* order.
        row_order: int32 [J], stored blocks in row order (row, then column).
        row_start: int32 [R + 1], positions in `row_order` of each row.
        column_schedule: int32 [3, C], (column, start, stop), columns by descending number of blocks.
        row_schedule: int32 [3, R], (row, start, stop) into `row_order`, likewise.
        pairs: int32 [6, P], the order of work of the weight gradient: row, column and slot of two blocks that share
            a column or a row; the slot of an absent block is J.
        features_in: K.
        features_out: N.
        block_in: Rows of a block.
        block_out: Columns of a block.
    """

    row_index: jax.Array
    column_start: jax.Array
    column_index: jax.Array
    row_order: jax.Array
    row_start: jax.Array
    column_schedule: jax.Array
    row_schedule: jax.Array
    pairs: jax.Array
    features_in: int
    features_out: int
    block_in: int
    block_out: int

    @property
    def blocks(self) -> int:
        """Number of stored blocks (per expert)."""
        return self.row_index.shape[-1]

    @property
    def block_rows(self) -> int:
        """K / block_in."""
        return self.features_in // self.block_in

    @property
    def block_columns(self) -> int:
        """N / block_out."""
        return self.features_out // self.block_out

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading dimensions: () for one matrix, (E,) for one pattern per expert."""
        return tuple(self.row_index.shape[:-1])

    @property
    def block_column(self) -> jax.Array:
        """int32 [J], block column of each stored block; batch dimensions are kept."""
        slots = jnp.arange(self.blocks, dtype=jnp.int32)
        found = jnp.vectorize(lambda start: jnp.searchsorted(start, slots, side="right"), signature="(c)->(j)")
        return found(self.column_start).astype(jnp.int32) - 1

    @property
    def geometry(self) -> dict[str, int]:
        """The static fields, as `topology_from_indices` takes them."""
        names = ("features_in", "features_out", "block_in", "block_out")
        return {name: getattr(self, name) for name in names}

    @property
    def density(self) -> float:
        """Fraction of blocks that exist."""
        return self.blocks / max(1, self.block_rows * self.block_columns)


def check_geometry(features_in: int, features_out: int, block_in: int, block_out: int) -> None:
    """Raises ValueError unless the blocks tile the matrix."""
    for name, block in (("block_in", block_in), ("block_out", block_out)):
        if block not in BLOCK_SIZES:
            raise ValueError(f"{name}={block}: block sizes are {BLOCK_SIZES}.")
    for name, features, block in (("features_in", features_in, block_in), ("features_out", features_out, block_out)):
        if features <= 0 or features % block:
            raise ValueError(f"{name}={features}: expected a positive multiple of the block size {block}.")


# The builders below run on NumPy arrays (from masks: immediate, nothing to compile) and on JAX arrays (inside jit);
# `xp` is the module that goes with the arrays.


def _schedule(xp, start):
    first, last = start[:-1], start[1:]
    order = xp.lexsort((first - last,))
    return xp.stack([order, first[order], last[order]]).astype(xp.int32)


def _place(xp, order, values):
    """`out[order] = values` for a permutation, without an indexed update."""
    return values[xp.lexsort((order,))]


def _band(density: float, columns: int) -> int:
    """Block columns per band: makes the columns of x and of dy that 132 concurrent pairs touch about equally many."""
    wanted = math.sqrt(264 / max(density, 1e-3))
    bands = max(1, round(columns / wanted))
    return -(-columns // bands)


def pair_bound(blocks: int, columns: int) -> int:
    """The most pairs any pattern of that many blocks needs: one block may be left over in every column."""
    return min(blocks, (blocks + columns + 1) // 2)


def _pairs(xp, row, column, column_start, rows: int, columns: int):
    """The order of work of the weight gradient: pairs of blocks that share a column, or else a row, or single blocks.

    Pairs are visited by bands of columns, so that those in flight at the same time touch few columns of both x and
    dy (reuse in the L2 cache). Entries that no pattern of this size may need are filled with absent blocks.
    """
    blocks = row.shape[0]
    if blocks == 0:
        return xp.zeros((PAIR_FIELDS, 0), xp.int32)
    slot = xp.arange(blocks, dtype=xp.int32)
    count = (column_start[1:] - column_start[:-1])[column]
    rank = slot - column_start[column]
    single = (rank == count - 1) & (count % 2 == 1)
    # Blocks left over in their column, by row: neighbours in one row become pairs too.
    left_row = xp.where(single, row, rows)
    by_row = xp.lexsort((slot, left_row))
    sorted_row = left_row[by_row]
    rank_in_row = slot - xp.searchsorted(sorted_row, sorted_row)
    follows = xp.concatenate([sorted_row[1:] == sorted_row[:-1], xp.zeros((1,), bool)])
    follower = xp.where(follows, xp.concatenate([by_row[1:], by_row[:1]]), blocks)
    leads = xp.where(single, _place(xp, by_row, rank_in_row % 2 == 0), rank % 2 == 0)
    partner = xp.where(single, _place(xp, by_row, follower), slot + 1)

    band = _band(blocks / (rows * columns), columns)
    visit = xp.lexsort((column, row, column // band, ~leads))[: pair_bound(blocks, columns)]
    present, second = leads[visit], partner[visit]
    other = xp.where(second < blocks, second, visit)
    first_slot, second_slot = xp.where(present, visit, blocks), xp.where(present, second, blocks)
    fields = [row[visit], column[visit], first_slot, row[other], column[other], second_slot]
    return xp.stack(fields).astype(xp.int32)


def topology_from_indices(
    row_index: jax.Array, block_column: jax.Array, *, features_in: int, features_out: int, block_in: int, block_out: int
) -> tuple[BlockTopology, jax.Array]:
    """Builds a topology from block coordinates; usable inside jit, the number of blocks is the static shape.

    Args:
        row_index: int32 [J], block row of each block, any order. Leading batch dimensions are mapped over.
        block_column: int32 [J], block column of each block; coordinates must be distinct.
        features_in: K, a multiple of `block_in`.
        features_out: N, a multiple of `block_out`.
        block_in: 16, 32, 64 or 128.
        block_out: 16, 32, 64 or 128.

    Returns:
        The topology, and int32 [J] `order`: stored block j is given block ``order[j]`` (permute values and
        optimizer moments by it).

    Raises:
        ValueError: shapes differ, dtypes are not integers, or the blocks do not tile the matrix.
    """
    check_geometry(features_in, features_out, block_in, block_out)
    xp = np if isinstance(row_index, np.ndarray) and isinstance(block_column, np.ndarray) else jnp
    row_index, block_column = xp.asarray(row_index), xp.asarray(block_column)
    if row_index.shape != block_column.shape or row_index.ndim < 1:
        raise ValueError(
            f"row_index has shape {row_index.shape} and block_column {block_column.shape}: "
            "expected the same [..., blocks]."
        )
    for name, array in (("row_index", row_index), ("block_column", block_column)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} has dtype {array.dtype}: expected integers.")
    if row_index.ndim > 1:
        build = functools.partial(
            topology_from_indices,
            features_in=features_in,
            features_out=features_out,
            block_in=block_in,
            block_out=block_out,
        )
        if xp is jnp:
            return jax.vmap(build)(row_index, block_column)
        members = [build(r, c) for r, c in zip(row_index, block_column, strict=True)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)

    rows, columns = features_in // block_in, features_out // block_out
    row_index, block_column = row_index.astype(xp.int32), block_column.astype(xp.int32)
    order = xp.lexsort((row_index, block_column)).astype(xp.int32)
    row, column = row_index[order], block_column[order]
    column_start = xp.searchsorted(column, xp.arange(columns + 1)).astype(xp.int32)
    row_order = xp.lexsort((column, row)).astype(xp.int32)
    row_start = xp.searchsorted(row[row_order], xp.arange(rows + 1)).astype(xp.int32)
    arrays = {
        "row_index": row,
        "column_start": column_start,
        "column_index": column[row_order],
        "row_order": row_order,
        "row_start": row_start,
        "column_schedule": _schedule(xp, column_start),
        "row_schedule": _schedule(xp, row_start),
        "pairs": _pairs(xp, row, column, column_start, rows, columns),
    }
    topology = BlockTopology(
        **{name: jnp.asarray(array) for name, array in arrays.items()},
        features_in=features_in,
        features_out=features_out,
        block_in=block_in,
        block_out=block_out,
    )
    return topology, jnp.asarray(order)


def topology_from_mask(mask: np.ndarray | jax.Array, block_in: int, block_out: int) -> BlockTopology:
    """Builds a topology from a block mask; runs outside jit (the number of blocks becomes a shape).

    Args:
        mask: bool [R, C] or [E, R, C], one entry per block. Experts must have equally many blocks.
        block_in: Rows of a block.
        block_out: Columns of a block.

    Returns:
        The topology of a [R * block_in, C * block_out] matrix, with a leading E dimension if the mask has one.

    Raises:
        ValueError: not a two- or three-dimensional boolean array, or unequal numbers of blocks per expert.
    """
    mask = np.asarray(mask)
    if mask.ndim not in (2, 3) or mask.dtype != np.bool_:
        raise ValueError(
            f"mask has shape {mask.shape} and dtype {mask.dtype}: expected bool [rows, columns] in blocks."
        )
    counts = mask.reshape(-1, *mask.shape[-2:]).sum((1, 2))
    if len(set(counts.tolist())) > 1:
        raise ValueError(f"mask has {sorted(set(counts.tolist()))} blocks in different experts: expected equally many.")
    coordinates = [np.nonzero(m.T) for m in mask.reshape(-1, *mask.shape[-2:])]
    column = np.stack([c for c, _ in coordinates]).astype(np.int32)
    row = np.stack([r for _, r in coordinates]).astype(np.int32)
    if mask.ndim == 2:
        row, column = row[0], column[0]
    geometry = {"features_in": mask.shape[-2] * block_in, "features_out": mask.shape[-1] * block_out}
    return topology_from_indices(row, column, **geometry, block_in=block_in, block_out=block_out)[0]


def edit_topology(
    topology: BlockTopology, drop: jax.Array, row_index: jax.Array, block_column: jax.Array
) -> tuple[BlockTopology, jax.Array]:
    """Replaces blocks by others at the same count; usable inside jit.

    Args:
        topology: The pattern to change, without batch dimensions (use ``jax.vmap`` for one pattern per expert).
        drop: int32 [n], stored blocks that go, distinct.
        row_index: int32 [n], block rows of the blocks that come; none of them may exist already.
        block_column: int32 [n], their block columns.

    Returns:
        The new topology, and int32 [J] `source`: the stored block that becomes block j, or -1 if block j is new.
        Values and optimizer moments follow by ``jnp.where(source[:, None, None] < 0, fresh, old[source])``.
    """
    blocks = topology.row_index.shape[-1]
    row = topology.row_index.at[drop].set(jnp.asarray(row_index, jnp.int32))
    column = topology.block_column.at[drop].set(jnp.asarray(block_column, jnp.int32))
    new, order = topology_from_indices(row, column, **topology.geometry)
    is_new = jnp.zeros((blocks,), bool).at[drop].set(True)
    return new, jnp.where(is_new[order], -1, order)


def cost(topology: BlockTopology, rows: int, itemsize: int = 2) -> dict[str, int]:
    """Floating-point operations and bytes of one forward product of `rows` rows (each of dx and dvalues costs as many).

    Args:
        topology: Any topology; experts are summed, each with `rows` rows.
        rows: Rows of x.
        itemsize: Bytes of an element.

    Returns:
        {"flops", "bytes"}: useful operations, and each of x, values and y moved once.
    """
    experts = math.prod(topology.batch_shape)
    weights = topology.blocks * topology.block_in * topology.block_out
    activations = rows * (topology.features_in + topology.features_out)
    return {"flops": experts * 2 * rows * weights, "bytes": experts * (weights + activations) * itemsize}


def check_topology(topology: BlockTopology) -> None:
    """Verifies the values of a topology on the host; needs concrete arrays.

    Raises:
        ValueError: an index is out of range, unsorted or repeated, or two lists disagree; or called under a trace.
    """
    leaves = jax.tree.leaves(topology)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise ValueError("topology is traced: check mode needs concrete arrays, call it outside jax.jit.")
    if topology.batch_shape:
        for expert in range(topology.batch_shape[0]):
            check_topology(jax.tree.map(lambda a, e=expert: a[e], topology))
        return
    check_geometry(topology.features_in, topology.features_out, topology.block_in, topology.block_out)
    rows, columns, blocks = topology.block_rows, topology.block_columns, topology.blocks
    row, start = np.asarray(topology.row_index), np.asarray(topology.column_start)
    if row.size and (row.min() < 0 or row.max() >= rows):
        raise ValueError(f"topology.row_index has values {row.min()}..{row.max()}: allowed 0..{rows - 1}.")
    if start.shape != (columns + 1,) or start[0] != 0 or start[-1] != blocks or (np.diff(start) < 0).any():
        raise ValueError(
            f"topology.column_start must rise from 0 to {blocks} over {columns + 1} entries, found {start}."
        )
    column = np.repeat(np.arange(columns), np.diff(start))
    if (np.diff(column.astype(np.int64) * rows + row) <= 0).any():
        raise ValueError("topology.row_index must rise strictly within a block column (sorted, no repeated block).")
    expected, _ = topology_from_indices(row, column, **topology.geometry)
    for field in dataclasses.fields(topology):
        found, wanted = getattr(topology, field.name), getattr(expected, field.name)
        if not np.array_equal(np.asarray(found), np.asarray(wanted)):
            raise ValueError(f"topology.{field.name} disagrees with row_index and column_start.")
