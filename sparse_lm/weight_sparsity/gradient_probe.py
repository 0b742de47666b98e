"""How large the gradient of blocks that do not exist would be, read off the backward pass.

A probe is an argument whose value is never used and whose "gradient" is what is asked for: its cotangent is defined to be what
`observed` computes of the inputs x and the output gradients dy of a matrix. It passes scan and rematerialisation like any argument.
Its shape says what is asked:

    ()                       nothing: what training uses
    [*experts, R, C]         the squared norm of every block of x^T dy (needs the whole step in one microbatch: norms do not add)
    [*experts, K, columns]   the gradient of a slab of block columns, which adds over microbatches and devices

Legend: K inputs, N outputs, R and C block rows and columns, A rows sorted by expert, E experts.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.block_gradient_norms import block_gradient_norms, gradient_slab, slab_square_norms
from pallas_kernels.grouped_matmul import grouped_matmul
from sparse_lm.weight_sparsity.packed_matrix import BlockPattern

SLAB = 1024
"""Columns of a gradient held at a time while norms are taken on a mesh or of experts."""


class Probe(nnx.Variable):
    """What is asked of a matrix's gradient; see the module."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def observed(
    pattern: BlockPattern,
    axes: tuple[str, ...] | None,
    x: jax.Array,
    y: jax.Array,
    probe: jax.Array,
    first: jax.Array,
    sizes_E: jax.Array | None,
) -> jax.Array:
    """Returns y, and gives the probe its cotangent in the backward pass.

    Args:
      pattern: of the matrix.
      axes: where the rows of a matrix are spread over devices. None: they are not; (): sums over them are left to XLA; names: those of
        the mesh, inside a shard_map that holds copies of the probe over them and adds the cotangents of the copies.
      x: inputs [..., K], or [A, K] sorted by expert.
      y: outputs.
      probe: zeros, see the module.
      first: float32 scalar, first block column of the slab (floating so that probes are differentiated as one tree).
      sizes_E: rows of each expert; None: one matrix.
    """
    return y


def _forward(pattern, axes, x, y, probe, first, sizes_E):
    return y, (x, probe, first, sizes_E)


def _backward(pattern, axes, residuals, dy):
    x, probe, first, sizes_E = residuals
    block = pattern.block
    if probe.shape[-2:] != (pattern.rows, pattern.columns):
        found = _slab(x, dy, first.astype(jnp.int32), probe.shape[-1] // block, block, sizes_E)
    elif sizes_E is None and axes is None:
        found = block_gradient_norms(x, dy, block_in=block, block_out=block)
    else:
        per_slab = next(c for c in range(max(1, SLAB // block), 0, -1) if pattern.columns % c == 0)

        def norms(start: jax.Array) -> jax.Array:
            slab = _slab(x, dy, start, per_slab, block, sizes_E)
            return slab_norms(jax.lax.psum(slab, axes) if axes else slab, block)

        slabs = jax.lax.map(norms, jnp.arange(0, pattern.columns, per_slab))
        found = jnp.moveaxis(slabs, 0, -2).reshape(probe.shape)
        if axes:  # every copy has the norms of the sum: each gives its share
            found = found / jax.lax.axis_size(axes)
    return jnp.zeros_like(x), dy, found, jnp.zeros_like(first), None


observed.defvjp(_forward, _backward)


def slab_norms(slab: jax.Array, block: int) -> jax.Array:
    """Squared norms of the blocks of a slab [..., K, W]: float32 [..., R, W / b]."""
    norms = functools.partial(slab_square_norms, block_in=block, block_out=block)
    for _ in slab.shape[:-2]:
        norms = jax.vmap(norms)
    return norms(slab)


def _slab(x, dy, first, columns: int, block: int, sizes_E):
    """x^T dy for `columns` block columns from block column `first` on, float32; for experts one each."""
    if sizes_E is None:
        return gradient_slab(x, dy, first, columns=columns, block_out=block)
    dy_AW = jax.lax.dynamic_slice_in_dim(dy, first * block, columns * block, 1).astype(jnp.float32)
    zeros_EKW = jnp.zeros((sizes_E.shape[0], x.shape[-1], columns * block), jnp.float32)
    _, pull = jax.vjp(lambda w: grouped_matmul(x.astype(jnp.float32), w, sizes_E), zeros_EKW)
    return pull(dy_AW)[0]
