"""Changing which blocks exist, at a constant number: drop the smallest, grow others, let values and moments follow.

Of all blocks of a matrix the n with the smallest norm are dropped; ties go to the first in row order. With constant fan-in every
column (and range of rows, see `packed_matrix`) that lost a block grows one again, so n need be no multiple of anything. Blocks
just dropped are candidates again (as in RigL); one that grows back in the same change keeps its values and moments. All others
grow as zeros with zero moments.

Algorithms differ in what they grow:

    static       nothing changes
    set          at random (Mocanu et al. 2018, arXiv 1707.04780)
    rigl         where the gradient of a block, summed over the batch, has the largest norm (Evci et al. 2020, arXiv 1911.11134)
    magnitude    where the low-rank companion has the largest norm: the matrix as a whole keeps its largest blocks sparse

Legend: R, C block rows and columns, J blocks, b block size, P places of a group, G groups.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul.topology import BlockTopology
from sparse_lm.config import Config
from sparse_lm.weight_sparsity.packed_matrix import BlockPattern, ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockAlgorithm(Config):
    """Base of the algorithms."""

    changes: ClassVar[bool] = True
    """Whether it changes the topology at all."""
    reads: ClassVar[str] = ""
    """What growth is scored by besides chance: "gradient" (a pass of its own) or "companion"."""
    replaces_step: ClassVar[bool] = False
    """Whether a change takes the place of the optimizer's step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticBlocks(BlockAlgorithm):
    """The blocks of the first step stay."""

    changes: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class SETBlocks(BlockAlgorithm):
    """Drop the smallest blocks, grow random ones."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RigLBlocks(BlockAlgorithm):
    """Drop the smallest blocks, grow those with the largest gradient."""

    reads: ClassVar[str] = "gradient"
    replaces_step: ClassVar[bool] = True

    slabs: int = 1
    """Pieces of a matrix's columns whose dense gradient is held at a time, where a step has several microbatches: each takes a pass."""

    def check(self) -> None:
        """See Config.check."""
        self.require(self.slabs >= 1, "slabs", "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MagnitudeBlocks(BlockAlgorithm):
    """Drop the smallest blocks, grow those where the low-rank companion is largest."""

    reads: ClassVar[str] = "companion"


def on_grid(of_blocks_J: jax.Array, topology: BlockTopology, fill: float | int) -> jax.Array:
    """Returns a number of each stored block at its place, [R, C], and `fill` elsewhere."""
    grid = jnp.full((topology.block_rows, topology.block_columns), fill, of_blocks_J.dtype)
    return grid.at[topology.row_index, topology.block_column].set(of_blocks_J, unique_indices=True)


def next_mask(
    mask_RC: jax.Array, norm_RC: jax.Array, score_RC: jax.Array, count: jax.Array, pattern: BlockPattern
) -> jax.Array:
    """Returns which blocks exist after a change.

    Args:
      mask_RC: bool, which exist.
      norm_RC: their norms, or any monotone function of them; ignored elsewhere.
      score_RC: how much each block wants to grow; ignored for blocks that stay.
      count: int32, blocks to drop, at most J.
      pattern: of the matrix.
    """
    order_RC = ranks(jnp.where(mask_RC, -norm_RC, -jnp.inf).reshape(-1)).reshape(mask_RC.shape)
    stays_RC = mask_RC & (order_RC >= count)
    lost_G = jnp.sum(pattern.grouped(mask_RC & ~stays_RC), axis=-1, dtype=jnp.int32)
    score_GP = pattern.grouped(jnp.where(stays_RC, -jnp.inf, score_RC))
    return stays_RC | pattern.ungrouped(ranks(score_GP) < lost_G[:, None])


def change_topology(
    topology: BlockTopology, norm_J: jax.Array, score_RC: jax.Array, count: jax.Array, pattern: BlockPattern
) -> tuple[BlockTopology, jax.Array, jax.Array, jax.Array]:
    """Drops and grows `count` blocks.

    Returns:
      (the next topology, int32 [J] `source`: the stored block that becomes block j, or -1 where it is new, the masks before and
      after, bool [R, C]).
    """
    slots_J = jnp.arange(pattern.blocks, dtype=jnp.int32)
    slot_RC = on_grid(slots_J, topology, -1)
    mask_RC = slot_RC >= 0
    after_RC = next_mask(mask_RC, on_grid(norm_J, topology, 0.0), score_RC, count, pattern)
    new = pattern.topology(after_RC)
    return new, slot_RC[new.row_index, new.block_column], mask_RC, after_RC


def moved(blocks_Jbb: jax.Array, source_J: jax.Array) -> jax.Array:
    """Returns [..., J, b, b] in the order of a changed topology, zeros where a block is new."""
    taken = jnp.take_along_axis(blocks_Jbb, jnp.maximum(source_J, 0)[..., None, None], axis=-3)
    return jnp.where(source_J[..., None, None] >= 0, taken, jnp.zeros((), blocks_Jbb.dtype))


def square_norms(values_Jbb: jax.Array) -> jax.Array:
    """Returns the squared Frobenius norm of every block, float32 [..., J]."""
    return jnp.sum(jnp.square(values_Jbb.astype(jnp.float32)), axis=(-2, -1))


def companion_norms(into_Kr: jax.Array, out_rN: jax.Array, block: int) -> jax.Array:
    """Returns the squared norm of every block of A B, float32 [R, C], without computing A B.

    ||A_r B_c||^2 is the sum of the entries of A_r^T A_r times those of B_c B_c^T, both of rank x rank.
    """
    rank = into_Kr.shape[-1]
    rows_Rbr = into_Kr.astype(jnp.float32).reshape(-1, block, rank)
    columns_rCb = out_rN.astype(jnp.float32).reshape(rank, -1, block)
    high = {"precision": jax.lax.Precision.HIGHEST}
    left = jnp.einsum("Rbi,Rbj->Rij", rows_Rbr, rows_Rbr, **high)
    right = jnp.einsum("iCb,jCb->Cij", columns_rCb, columns_rCb, **high)
    return jnp.einsum("Rij,Cij->RC", left, right, **high)
