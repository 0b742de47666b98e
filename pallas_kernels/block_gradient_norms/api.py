"""block_gradient_norms: how large the gradient of every block of a weight would be, existing or not.

Block topologies grow where the gradient is largest (RigL, Evci et al. 2020, arXiv:1911.11134, applied to blocks).
The gradient of a [K, N] weight of y = x @ W is x^T dy; these functions reduce it to one number per block without
storing it. Norms do not add over microbatches or shards: with more than one, add slabs first.

Legend: E experts, M tokens, K/N features, R/C block rows and columns.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.custom_batching
import jax.numpy as jnp
from jax import lax

from pallas_kernels.backend import Backend, dispatch, vary_together
from pallas_kernels.block_gradient_norms import mosaic_gpu, mosaic_tpu, reference, xla
from pallas_kernels.block_sparse_matmul.topology import check_geometry
from pallas_kernels.block_sparse_matmul.xla import accumulating_dot


@functools.cache
def _operation(block_in: int, block_out: int, backend: str | None, precision):
    sizes = {"block_in": block_in, "block_out": block_out}
    with_precision = {**sizes, "precision": precision}

    def anything(shapes, dtypes, device_kind):
        return None

    backends = (
        Backend("mosaic_gpu", ("cuda",), mosaic_gpu.supports, functools.partial(mosaic_gpu.square_norms, **sizes)),
        Backend("mosaic_tpu", ("tpu",), mosaic_tpu.supports, functools.partial(mosaic_tpu.square_norms, **sizes)),
        Backend("xla", None, anything, functools.partial(xla.square_norms, **with_precision)),
        Backend("reference", None, anything, functools.partial(reference.square_norms, **with_precision), False),
    )

    @jax.custom_batching.custom_vmap
    def operation(x_EMK, dy_EMN):
        # "values" is the shape the weight would have in packed form: what the kernels' limits are about.
        shapes = {"x": x_EMK.shape, "dy": dy_EMN.shape, "values": (x_EMK.shape[0], 1, block_in, block_out)}
        dtypes = {"x": jnp.dtype(x_EMK.dtype), "dy": jnp.dtype(dy_EMN.dtype), "values": jnp.dtype(x_EMK.dtype)}
        return dispatch(
            "block_gradient_norms", backends, (x_EMK, dy_EMN), shapes=shapes, dtypes=dtypes, backend=backend
        )

    @operation.def_vmap
    def rule(axis_size, in_batched, *arguments):
        merged = []
        for argument, is_batched in zip(arguments, in_batched, strict=True):
            if not is_batched:
                argument = jnp.broadcast_to(argument[None], (axis_size, *argument.shape))
            merged.append(argument.reshape(-1, *argument.shape[2:]))
        out = operation(*merged)
        return out.reshape(axis_size, -1, *out.shape[1:]), True

    return jax.jit(operation)


def _validate(x, dy, block_in, block_out, leading: int):
    if x.ndim < 1 + leading or x.shape[:-1] != dy.shape[:-1]:
        raise ValueError(f"x has shape {x.shape} and dy {dy.shape}: expected equal shapes but for the last dimension.")
    if x.dtype != dy.dtype:
        raise ValueError(f"x has dtype {x.dtype} and dy {dy.dtype}: expected the same.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}: expected a floating-point dtype.")
    features_in, block_in = (x.shape[-1], block_in) if block_in else (block_out, block_out)  # a slab is cut in columns
    check_geometry(features_in, dy.shape[-1], block_in, block_out)


def block_gradient_norms(
    x: jax.Array,
    dy: jax.Array,
    *,
    block_in: int,
    block_out: int,
    experts: bool = False,
    precision: lax.PrecisionLike = None,
    backend: str | None = None,
) -> jax.Array:
    """Squared Frobenius norm of every block of x^T dy, without storing x^T dy.

    Args:
        x: [..., K], or [E, ..., K] with `experts`. All leading dimensions (but E) are tokens and are summed over.
        dy: [..., N] or [E, ..., N], the gradient at the output, same leading dimensions and dtype.
        block_in: Rows of a block, divides K.
        block_out: Columns of a block, divides N.
        experts: The first dimension of `x` and `dy` is an expert dimension.
        precision: Of float32 dots in the XLA path; None means HIGHEST.
        backend: "mosaic_gpu", "mosaic_tpu", "xla", "reference", or None for the best one on each platform.

    Returns:
        float32 [R, C] or [E, R, C]. It is not differentiable.

    Raises:
        ValueError: shapes, dtypes or block sizes do not fit, or `backend` is unknown or unsupported.
    """
    x, dy = jnp.asarray(x), jnp.asarray(dy)
    _validate(x, dy, block_in, block_out, int(experts))
    leading = x.shape[0] if experts else 1
    tokens = math.prod(x.shape[int(experts) : -1])
    if leading == 0 or tokens == 0:
        norms = jnp.zeros((leading, x.shape[-1] // block_in, dy.shape[-1] // block_out), jnp.float32)
    else:
        resolved = lax.Precision.HIGHEST if precision is None else lax.Precision(precision)
        operation = _operation(block_in, block_out, backend, resolved)
        norms = operation(*vary_together(x.reshape(leading, tokens, -1), dy.reshape(leading, tokens, -1)))
    return norms if experts else norms[0]


def gradient_slab(
    x: jax.Array,
    dy: jax.Array,
    first_column: jax.Array | int,
    *,
    columns: int,
    block_out: int,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """The part of x^T dy that belongs to some block columns, to be added over microbatches and shards.

    Args:
        x: [..., K]; leading dimensions are tokens.
        dy: [..., N], same leading dimensions and dtype.
        first_column: First block column of the slab (may be traced).
        columns: Number of block columns of the slab (static).
        block_out: Columns of a block.
        precision: Of float32 dots; None means HIGHEST.

    Returns:
        float32 [K, columns * block_out]. Give the total to :func:`slab_square_norms`.

    Raises:
        ValueError: shapes or dtypes do not fit, or the slab is wider than the gradient.
    """
    _validate(x, dy, None, block_out, 0)
    if not 0 < columns <= dy.shape[-1] // block_out:
        raise ValueError(f"columns={columns}: allowed 1..{dy.shape[-1] // block_out}.")
    x_MK, dy_MN = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dy_MW = lax.dynamic_slice_in_dim(dy_MN, first_column * block_out, columns * block_out, 1)
    resolved = lax.Precision.HIGHEST if precision is None else lax.Precision(precision)
    return accumulating_dot(x_MK, dy_MW, ((0,), (0,)), resolved)


def slab_square_norms(slab: jax.Array, *, block_in: int, block_out: int) -> jax.Array:
    """Squared norms of the blocks of a summed slab: [K, W] -> float32 [R, W / block_out]."""
    if slab.ndim != 2:
        raise ValueError(f"slab has shape {slab.shape}: expected [K, columns * block_out].")
    check_geometry(slab.shape[0], slab.shape[1], block_in, block_out)
    return xla.norms_of_slab(slab, block_in, block_out)
