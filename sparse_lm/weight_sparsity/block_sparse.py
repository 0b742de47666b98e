"""Multiplying by packed matrices: on one device, over a mesh, and for rows that are sorted by expert.

On a mesh the blocks of a matrix are stored over `tensor` and `fsdp` in the order of its columns. Every device gathers the blocks
that it multiplies, in the compute dtype, and the backward pass gathers them again. A matrix whose outputs are split over `tensor`
(query, gate, ...) computes its own columns; one whose inputs are split (out, down) its own range of rows, of which every column
has equally many blocks, and the partial outputs are summed.

Legend: B batch, L length, K/N inputs and outputs, J blocks, R/C block rows and columns, T shards of `tensor`, A rows sorted by
expert, E experts, M rows of an expert computed at once.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.block_sparse_matmul import BlockTopology, block_sparse_matmul, topology_from_indices
from sparse_lm.config import ConfigError
from sparse_lm.parallel.collectives import gathering_again, sum_of_copies
from sparse_lm.parallel.mesh import current
from sparse_lm.parallel.rules import axes_of, spec_of, split_tokens
from sparse_lm.weight_sparsity.packed_matrix import BlockPattern, PackedMatrix

HEADROOM = 1.25
"""Rows of an expert computed at once, in multiples of the mean: at loads more even than this one round serves all experts."""


def product(
    x: jax.Array,
    values_Jbb: jax.Array,
    topology: BlockTopology,
    pattern: BlockPattern,
    dims: tuple[str, str],
    permutation_K: jax.Array | None = None,
) -> jax.Array:
    """Multiplies rows by a packed matrix, on the current mesh if there is one.

    Args:
      x: [..., K]; on a mesh [B, L, K].
      values_Jbb: the blocks, in x's dtype.
      topology: their places.
      pattern: of the matrix.
      dims: logical dims of the two sides.
      permutation_K: order in which inputs meet the rows of the matrix; None: their own. Where `tensor` splits them, all are gathered.
    """
    mesh = current()
    if mesh is None:
        return block_sparse_matmul(x, values_Jbb, topology, input_permutation=permutation_K)
    tokens = split_tokens(x.shape[0], x.shape[1], mesh)
    side = tensor_side(pattern, dims, mesh)
    shards = mesh.shape["tensor"]
    stored = spec_of(("blocks", "block_in", "block_out"), values_Jbb.shape, mesh)
    axes = axes_in(stored)
    # In the order of columns, a shard of `tensor` holds those that it computes: only `fsdp` needs gathering.
    own_columns = side == "out" and "tensor" in axes
    gather = tuple(axis for axis in axes if not (own_columns and axis == "tensor"))

    def device(x: jax.Array, values: jax.Array, topology: BlockTopology, permutation_K: jax.Array | None) -> jax.Array:
        index = jax.lax.axis_index("tensor")
        if side is not None:
            topology = _part(topology, pattern, side, shards, index)
        if side == "in" and permutation_K is not None:
            x, permutation_K = own_inputs(x, permutation_K), None

        def multiply(x: jax.Array, values: jax.Array) -> jax.Array:
            if gather:
                values = jax.lax.all_gather(values, gather, axis=0, tiled=True)
            if side is not None and not own_columns:
                values = _own_blocks(values, pattern, side, shards, index)
            return block_sparse_matmul(x, values, topology, input_permutation=permutation_K)

        y = (gathering_again(multiply) if gather else multiply)(x, values)
        return sum_of_copies(y, "tensor") if side == "in" else y

    run = jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(tokens.spec("tensor" if side == "in" else None), stored, P(), P()),
        out_specs=tokens.spec("tensor" if side == "out" else None),
        check_vma=False,
    )
    return run(x, values_Jbb, topology, permutation_K)


def tensor_side(pattern: BlockPattern, dims: tuple[str, str], mesh: AbstractMesh | Mesh) -> str | None:
    """Returns which side of a matrix `tensor` splits: "in", "out", or None where it splits neither."""
    shards = mesh.shape["tensor"]
    if shards == 1:
        return None
    if "tensor" in axes_of(dims[1]):
        return "out" if pattern.columns % shards == 0 else None
    return "in" if "tensor" in axes_of(dims[0]) else None


def axes_in(spec: P) -> tuple[str, ...]:
    """Returns the mesh axes that a partition splits the first dimension over."""
    return () if spec[0] is None else (spec[0],) if isinstance(spec[0], str) else tuple(spec[0])


def own_inputs(x: jax.Array, order_K: jax.Array) -> jax.Array:
    """Returns this shard's range of reordered inputs [..., K / T] from its range of them in their own order; inside shard_map.

    Any input may be anywhere, so all of them are gathered over `tensor`.
    """
    here = own_range(order_K, x.shape[-1], 0)
    return jnp.take(jax.lax.all_gather(x, "tensor", axis=x.ndim - 1, tiled=True), here, axis=-1, mode="clip")


def own_range(a: jax.Array, own: int, axis: int) -> jax.Array:
    """Returns this shard's range, `own` long, of a dimension that `tensor` splits; inside shard_map."""
    return jax.lax.dynamic_slice_in_dim(a, jax.lax.axis_index("tensor") * own, own, axis)


def among_zeros(a: jax.Array, size: int) -> jax.Array:
    """Returns this shard's range of the last dimension at its place among zeros, `size` long in all; inside shard_map."""
    place = jax.lax.axis_index("tensor") * a.shape[-1]
    return jax.lax.dynamic_update_slice_in_dim(jnp.zeros((*a.shape[:-1], size), a.dtype), a, place, a.ndim - 1)


def check_mesh(packed: dict[str, PackedMatrix], mesh: AbstractMesh | Mesh) -> None:
    """Raises ConfigError where `tensor` cannot split the packed matrices of a model as it splits its activations."""
    shards = mesh.shape["tensor"]
    for path, matrix in packed.items():
        side, pattern = tensor_side(matrix.pattern, matrix.dims, mesh), matrix.pattern
        if side is not None and not pattern.constant_fan_in:
            raise ConfigError("projection.fan_in", "free", f"constant where mesh.tensor ({shards}) splits {path}")
        if side == "in" and pattern.row_shards % shards:
            allowed = f"a multiple of mesh.tensor ({shards}), which splits the rows of {path}"
            raise ConfigError("projection.row_shards", pattern.row_shards, allowed)


def _own_blocks(a: jax.Array, pattern: BlockPattern, side: str, shards: int, index: jax.Array) -> jax.Array:
    """Returns one shard's part of an array with an entry for every block of a matrix, [J, ...]."""
    columns, fan_in = pattern.columns, pattern.fan_in
    if side == "out":
        own = columns // shards * fan_in
        return jax.lax.dynamic_slice_in_dim(a, index * own, own, 0)
    split = a.reshape(columns, shards, fan_in // shards, *a.shape[1:])
    return jax.lax.dynamic_index_in_dim(split, index, 1, keepdims=False).reshape(-1, *a.shape[1:])


def _part(topology: BlockTopology, pattern: BlockPattern, side: str, shards: int, index: jax.Array) -> BlockTopology:
    """Returns the topology of one shard's part of a matrix.

    Its lists are derived where they are used: a checkpoint then holds one pattern for every mesh.
    """
    columns, fan_in, rows, first_row = pattern.columns, pattern.fan_in, pattern.rows, jnp.int32(0)
    if side == "out":
        columns = columns // shards
    else:
        fan_in, rows = fan_in // shards, rows // shards
        first_row = index * rows
    own, _ = topology_from_indices(
        _own_blocks(topology.row_index, pattern, side, shards, index) - first_row,
        jnp.repeat(jnp.arange(columns, dtype=jnp.int32), fan_in),
        features_in=rows * pattern.block,
        features_out=columns * pattern.block,
        block_in=pattern.block,
        block_out=pattern.block,
    )
    return own


def of_experts(
    values_EJbb: jax.Array, topology: BlockTopology, pattern: BlockPattern, side: str
) -> tuple[jax.Array, BlockTopology]:
    """Returns blocks and topologies of one shard's part of every expert's matrix, of which `tensor` splits a side; inside shard_map.

    Args:
      values_EJbb: all blocks, or those of the shard's range of the order of columns.
      topology: of the whole matrices.
      pattern: of one.
      side: "in" or "out", see `tensor_side`.
    """
    split = side, jax.lax.axis_size("tensor"), jax.lax.axis_index("tensor")
    own_columns = side == "out" and values_EJbb.shape[1] < pattern.blocks
    if not own_columns:
        if values_EJbb.shape[1] < pattern.blocks:
            values_EJbb = jax.lax.all_gather(values_EJbb, "tensor", axis=1, tiled=True)
        values_EJbb = jnp.moveaxis(_own_blocks(jnp.moveaxis(values_EJbb, 1, 0), pattern, *split), 0, 1)
    return values_EJbb, jax.vmap(lambda topology: _part(topology, pattern, *split))(topology)


def rows_at_once(rows: int, experts: int) -> int:
    """Returns M for A rows of E experts."""
    return min(rows, 8 * math.ceil(HEADROOM * rows / experts / 8))


@jax.custom_vjp
def grouped_product(x_AK: jax.Array, values_EJbb: jax.Array, topology: BlockTopology, sizes_E: jax.Array) -> jax.Array:
    """Multiplies the rows of each expert by its packed matrix; rows past the sum of sizes give zeros.

    The kernels want equally many rows of every expert. So M rows of each are taken at a time, and as many rounds are made as the
    fullest expert needs: no row is dropped whatever the loads, and even loads need one round.

    Args:
      x_AK: rows sorted by expert.
      values_EJbb: blocks of each expert, in x's dtype.
      topology: the pattern of each expert.
      sizes_E: int32 rows of each expert.
    """
    rounds, take, give = _rounds(x_AK.shape[0], sizes_E)

    def one(index: jax.Array, y_AN: jax.Array) -> jax.Array:
        return give(index, block_sparse_matmul(take(index, x_AK), values_EJbb, topology), y_AN)

    return jax.lax.fori_loop(0, rounds, one, jnp.zeros((x_AK.shape[0], topology.features_out), x_AK.dtype))


def _rounds(rows: int, sizes_E: jax.Array):
    """Returns (number of rounds, take(round, [A, .]) -> [E, M, .], give(round, [E, M, .], [A, .]) -> [A, .] with the round's rows)."""
    experts = sizes_E.shape[0]
    size = rows_at_once(rows, experts)
    end_E = jnp.cumsum(sizes_E)
    start_E = end_E - sizes_E
    row_A = jnp.arange(rows, dtype=jnp.int32)
    expert_A = jnp.searchsorted(end_E, row_A, side="right").astype(jnp.int32)
    live_A = expert_A < experts
    expert_A = jnp.minimum(expert_A, experts - 1)
    place_A = row_A - start_E[expert_A]

    def take(index: jax.Array, rows_AX: jax.Array) -> jax.Array:
        place_M = index * size + jnp.arange(size, dtype=jnp.int32)
        live_EM = place_M < sizes_E[:, None]
        row_EM = jnp.where(live_EM, start_E[:, None] + place_M, 0)
        return jnp.where(live_EM[..., None], rows_AX[row_EM], 0)

    def give(index: jax.Array, found_EMX: jax.Array, rows_AX: jax.Array) -> jax.Array:
        own_A = live_A & (place_A // size == index)
        flat = found_EMX.reshape(-1, found_EMX.shape[-1])
        return jnp.where(own_A[:, None], flat[jnp.where(own_A, expert_A * size + place_A % size, 0)], rows_AX)

    return -(-jnp.max(sizes_E) // size), take, give


def _grouped_forward(x_AK, values_EJbb, topology, sizes_E):
    return grouped_product(x_AK, values_EJbb, topology, sizes_E), (x_AK, values_EJbb, topology, sizes_E)


def _grouped_backward(residuals, dy_AN):
    x_AK, values_EJbb, topology, sizes_E = residuals
    rounds, take, give = _rounds(x_AK.shape[0], sizes_E)
    multiply = functools.partial(block_sparse_matmul, topology=topology)

    def one(index, sums):
        dx_AK, dvalues = sums
        _, pull = jax.vjp(multiply, take(index, x_AK), values_EJbb)
        dx_EMK, found = pull(take(index, dy_AN))
        return give(index, dx_EMK, dx_AK), dvalues + found.astype(jnp.float32)

    start = jnp.zeros_like(x_AK), jnp.zeros(values_EJbb.shape, jnp.float32)
    dx_AK, dvalues = jax.lax.fori_loop(0, rounds, one, start)
    return dx_AK, dvalues.astype(values_EJbb.dtype), None, None


grouped_product.defvjp(_grouped_forward, _grouped_backward)
