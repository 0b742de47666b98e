"""The inputs of a packed matrix whose order is learned, as its blocks meet them, on one device and on a mesh.

While the order is soft they are x M, a dense product; when it is hard, x[..., p]. On a mesh the rows of M are stored over `tensor` and
`fsdp`. A device gathers, in the compute dtype, those that it multiplies, and gathers them again in the backward pass: all of them, or,
where `tensor` splits the inputs, the rows of its own inputs, and then partial sums of all mixed inputs travel to their shards.

A condition chooses between the two, so that a hard order costs no product; several devices of a CPU compute both. Their programs lose
the order of collectives inside conditions when they are read back from the cache of compiled programs (JAX 0.11.2), and devices then
wait for each other at different ones.

Legend: B batch, L length, K inputs, T shards of `tensor`.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sparse_lm.parallel.collectives import gathering_again
from sparse_lm.parallel.mesh import current
from sparse_lm.parallel.rules import spec_of, split_tokens
from sparse_lm.weight_sparsity.block_sparse import axes_in, own_inputs, own_range, tensor_side
from sparse_lm.weight_sparsity.packed_matrix import BlockPattern

SOFT_DIMS = ("permuted", "permuted")
"""Logical dims of a soft order: inputs, and rows of the blocks that they meet."""


def mixed(
    x: jax.Array,
    soft_KK: jax.Array,
    order_K: jax.Array,
    hard: jax.Array,
    pattern: BlockPattern,
    dims: tuple[str, str],
) -> jax.Array:
    """Returns the inputs as the blocks meet them, in the shape and the split of x.

    Args:
      x: [..., K]; on a mesh [B, L, K].
      soft_KK: float32, M.
      order_K: int32, p.
      hard: float32, 1 where p is used, 0 where M is.
      pattern: of the matrix.
      dims: logical dims of its two sides.
    """
    mesh = current()
    if mesh is None:
        return jax.lax.cond(hard > 0.0, lambda: _taken(x, order_K), lambda: x @ soft_KK.astype(x.dtype))
    split = "tensor" if tensor_side(pattern, dims, mesh) == "in" else None
    stored = spec_of(SOFT_DIMS, soft_KK.shape, mesh)
    gather = tuple(axis for axis in axes_in(stored) if axis != split)
    platform = None if mesh.abstract_device is None else mesh.abstract_device.platform

    def device(x: jax.Array, soft: jax.Array, order_K: jax.Array, hard: jax.Array) -> jax.Array:
        def product() -> jax.Array:
            rows = soft.astype(x.dtype)
            if gather:
                rows = jax.lax.all_gather(rows, gather, axis=0, tiled=True)
            if split is None:
                return x @ rows
            own = x.shape[-1]
            if rows.shape[0] != own:  # M is whole: `tensor` and `fsdp` together do not divide its rows
                rows = own_range(rows, own, 0)
            return jax.lax.psum_scatter(x @ rows, split, scatter_dimension=x.ndim - 1, tiled=True)

        def listed() -> jax.Array:
            return _taken(x, order_K) if split is None else own_inputs(x, order_K)

        if platform == "cpu":
            return jnp.where(hard > 0.0, listed(), product())
        return jax.lax.cond(hard > 0.0, listed, product)

    device = gathering_again(device) if gather else device
    spec = split_tokens(x.shape[0], x.shape[1], mesh).spec(split)
    run = jax.shard_map(device, mesh=mesh, in_specs=(spec, stored, P(), P()), out_specs=spec, check_vma=False)
    return run(x, soft_KK, order_K, hard)


def _taken(x: jax.Array, order_K: jax.Array) -> jax.Array:
    return jnp.take(x, order_K, axis=-1, mode="clip")
