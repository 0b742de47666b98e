"""Projections that store only the blocks of a matrix that exist, alone or beside a low-rank companion.

    y = S x                       block_sparse: J blocks of b x b
    y = S x + (x A) B             block_sparse_low_rank: with a dense matrix of rank r beside them

Values, gradient and optimizer moments exist for stored blocks only. Which blocks are stored is model state: random at first,
changed by an algorithm of `topology_update`, or taken from a dense matrix (`packing`). Initial values follow the fan-in of the
sparse matrix; the companion starts at zero (B = 0, as in LoRA, Hu et al. 2022, arXiv 2106.09685).

Legend: A rows sorted by expert, E experts, K inputs, N outputs, J blocks, b block size.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.block_sparse_matmul.topology import BLOCK_SIZES
from pallas_kernels.grouped_matmul import grouped_matmul
from sparse_lm.config import ConfigError
from sparse_lm.layers.parameter import ModelState, StandsFor, declare
from sparse_lm.layers.projection import Projection
from sparse_lm.layers.projection import product as dense_product
from sparse_lm.parallel.mesh import current, inside_shard_map
from sparse_lm.weight_sparsity.block_sparse import (
    among_zeros,
    grouped_product,
    of_experts,
    own_inputs,
    own_range,
    product,
    tensor_side,
)
from sparse_lm.weight_sparsity.gradient_probe import Probe, observed
from sparse_lm.weight_sparsity.mixed_inputs import SOFT_DIMS, mixed
from sparse_lm.weight_sparsity.packed_matrix import BlockPattern, TopologyState

PermutationKind = Literal["none", "random", "learned"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSparseProjection(Projection):
    """A matrix of which only some blocks exist."""

    packed: ClassVar[bool] = True

    density: float = 0.1
    """Fraction of the blocks that exist, rounded to a whole number of blocks a column (of the matrix, where fan_in is free)."""
    block: int = 128
    """Side of a block: 64 or 128 for the Hopper kernels, a multiple of 128 for TPU, 16 and above elsewhere."""
    fan_in: Literal["constant", "free"] = "constant"
    """Equally many blocks in every block column, or in the whole matrix only."""
    row_shards: int = 1
    """Ranges of rows that hold equally many blocks of each column: a multiple of mesh.tensor where that splits the rows."""
    permutation: PermutationKind = "none"
    """Order in which the inputs meet the rows of the matrix: their own, a random one that stays, or one learned beside the blocks
    (see `learned_permutation`; needs weight_sparsity = packed)."""

    def check(self) -> None:
        """See Config.check."""
        self.require(0.0 < self.density <= 1.0, "density", "a fraction above 0, at most 1")
        self.require(self.block in BLOCK_SIZES, "block", f"one of {', '.join(map(str, BLOCK_SIZES))}")
        self.require(self.row_shards >= 1, "row_shards", "at least 1")
        self.require(self.row_shards == 1 or self.fan_in == "constant", "row_shards", "1 where fan_in is free")

    def pattern(self, inputs: int, outputs: int) -> BlockPattern:
        """Returns the static pattern of a matrix.

        Raises:
          ConfigError: if blocks do not tile it.
        """
        for size in (inputs, outputs):
            if size % self.block:
                allowed = f"a divisor of both sides of every matrix, here {inputs} x {outputs}"
                raise ConfigError("projection.block", self.block, allowed)
        rows, columns, shards = inputs // self.block, outputs // self.block, self.row_shards
        if rows % shards:
            allowed = f"a divisor of the {rows} block rows of a matrix {inputs} x {outputs}"
            raise ConfigError("projection.row_shards", shards, allowed)
        if self.fan_in == "free":
            blocks = max(1, round(self.density * rows * columns))
        else:
            blocks = columns * shards * max(1, round(self.density * rows / shards))
        return BlockPattern(inputs, outputs, self.block, blocks, self.fan_in == "constant", shards)

    def build(self, inputs: int, outputs: int, dims: tuple[str, str], *, experts: int = 0) -> "BlockSparseMatrix":
        """See Projection.build."""
        return self._matrix(inputs, outputs, dims, experts, 0)

    def _matrix(self, inputs: int, outputs: int, dims: tuple[str, str], experts: int, rank: int) -> "BlockSparseMatrix":
        if self.learns_order and experts:
            raise ConfigError("projection.permutation", "learned", "none or random for the matrices of experts")
        return BlockSparseMatrix(self.pattern(inputs, outputs), dims, experts, order=self.permutation, rank=rank)

    def cost(self, inputs: int, outputs: int) -> tuple[int, int]:
        """See Projection.cost."""
        parameters = self.pattern(inputs, outputs).parameters
        return parameters + self._soft(inputs), 2 * parameters

    @property
    def learns_order(self) -> bool:
        """See Projection.learns_order."""
        return self.permutation == "learned"

    def _soft(self, inputs: int) -> int:
        """Returns the weights of the soft permutation; its product, done until it is hardened, is not counted as operations."""
        return inputs * inputs if self.learns_order else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSparseLowRankProjection(BlockSparseProjection):
    """A matrix of which only some blocks exist, plus a dense matrix of low rank."""

    rank: int = 64
    """Rank of the companion."""

    def check(self) -> None:
        """See Config.check."""
        super().check()
        self.require(self.rank >= 1, "rank", "at least 1")

    def build(self, inputs: int, outputs: int, dims: tuple[str, str], *, experts: int = 0) -> "BlockSparseMatrix":
        """See Projection.build."""
        return self._matrix(inputs, outputs, dims, experts, self.rank)

    def cost(self, inputs: int, outputs: int) -> tuple[int, int]:
        """See Projection.cost."""
        parameters = self.pattern(inputs, outputs).parameters + self.rank * (inputs + outputs)
        return parameters + self._soft(inputs), 2 * parameters


class BlockSparseMatrix(nnx.Module):
    """A packed matrix, or one for each expert; computes in the input's dtype."""

    def __init__(
        self, pattern: BlockPattern, dims: tuple[str, str], experts: int, *, order: PermutationKind, rank: int
    ):
        self.pattern, self.dims, self.experts = pattern, dims, experts
        batch, batch_dims = ((experts,), ("experts",)) if experts else ((), ())
        sides = (*batch, pattern.inputs, pattern.outputs)
        self.values = declare(
            (*batch, pattern.blocks, pattern.block, pattern.block),
            (*batch_dims, "blocks", "block_in", "block_out"),
            stands_for=StandsFor((*batch_dims, *dims), sides, pattern.density),
        )
        self.topology = TopologyState(pattern, experts)
        learned, list_K = order == "learned", jnp.zeros((pattern.inputs,), jnp.int32)
        self.permutation = None if order == "none" else ModelState(list_K, dims=("list",), initial=0)
        self.soft = declare((pattern.inputs, pattern.inputs), SOFT_DIMS, "zeros") if learned else None
        self.hard = ModelState(jnp.zeros((), jnp.float32), dims=(), initial=0) if learned else None
        nothing = jnp.zeros((), jnp.float32)
        self.probe, self.slab = Probe(nothing, dims=(*batch_dims, "list", "list")), Probe(nothing, dims=())
        dense = StandsFor((*batch_dims, *dims), sides, 1.0)
        into, out = (*batch, pattern.inputs, rank), (*batch, rank, pattern.outputs)
        self.into = declare(into, (*batch_dims, dims[0], "rank"), stands_for=dense) if rank else None
        self.out = declare(out, (*batch_dims, "rank", dims[1]), "zeros") if rank else None

    def _order(self) -> jax.Array | None:
        return None if self.permutation is None else self.permutation[...]

    def __call__(self, x: jax.Array) -> jax.Array:
        order_K, values, met = self._order(), self.values[...].astype(x.dtype), x
        if self.soft is not None and self.hard is not None and order_K is not None:
            met = mixed(x, self.soft[...], order_K, self.hard[...], self.pattern, self.dims)
            order_K = None
        y = product(met, values, self.topology(), self.pattern, self.dims, order_K)
        y = self._observed(met, y, order_K, None)
        if self.into is not None and self.out is not None:
            y = y + dense_product(dense_product(x, self.into[...].astype(x.dtype)), self.out[...].astype(x.dtype))
        return y

    def grouped(self, x_AK: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
        """Multiplies each expert's rows by its matrix; rows past the sum of sizes give zeros.

        Inside a shard_map whose `tensor` splits a side of the matrix: its part of the inputs gives a part of the sum, or a part of the outputs.
        """
        order_K, dtype, side = self._order(), x_AK.dtype, self._split_side()
        values, topology = self.values[...].astype(dtype), self.topology()
        met_AK = x_AK
        if order_K is not None:
            met_AK = own_inputs(x_AK, order_K) if side == "in" else jnp.take(x_AK, order_K, axis=1)
        if side is not None:
            values, topology = of_experts(values, topology, self.pattern, side)
        y_AN = grouped_product(met_AK, values, topology, group_sizes_E)
        y_AN = self._observed(met_AK, y_AN, None, group_sizes_E)
        if self.into is not None and self.out is not None:
            low_AR = grouped_matmul(x_AK, self.into[...].astype(dtype), group_sizes_E)
            y_AN = y_AN + grouped_matmul(low_AR, self.out[...].astype(dtype), group_sizes_E)
        return y_AN

    def _split_side(self) -> str | None:
        """Returns which side of the matrix is split where it runs inside a shard_map."""
        mesh = current()
        return tensor_side(self.pattern, self.dims, mesh) if mesh is not None and inside_shard_map() else None

    def _observed(
        self, x: jax.Array, y: jax.Array, order_K: jax.Array | None, group_sizes_E: jax.Array | None
    ) -> jax.Array:
        probe, side, own = self.probe[...], self._split_side(), y.shape[-1]
        if not probe.ndim:
            return y
        x = x if order_K is None else jnp.take(x, order_K, axis=-1)
        # The gradient of a part is that of the whole with zeros elsewhere, and the parts add up.
        x = among_zeros(x, self.pattern.inputs) if side == "in" else x
        y = among_zeros(y, self.pattern.outputs) if side == "out" else y
        y = observed(self.pattern, self._spread(probe), x, y, probe, self.slab[...], group_sizes_E)
        return own_range(y, own, y.ndim - 1) if side == "out" else y

    def _spread(self, probe: jax.Array) -> tuple[str, ...] | None:
        """Returns over which devices the rows of a matrix are spread, as `observed` takes it."""
        mesh = current()
        if mesh is None or not inside_shard_map():
            return None if mesh is None else ()
        # Rows of an expert have come to the shard that owns it; of a matrix that `tensor` splits, a shard has a part of every row.
        apart = [*(["expert"] if probe.shape[0] < self.experts else []), *(["tensor"] if self._split_side() else [])]
        return tuple(axis for axis in mesh.axis_names if axis not in apart)
