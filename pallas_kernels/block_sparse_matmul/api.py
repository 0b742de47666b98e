"""block_sparse_matmul: y = x @ W where only the blocks of W that exist are stored, multiplied and differentiated.

Legend: E experts (or population), M rows, K/N features in and out, J stored blocks, k/n features inside a block.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.custom_batching
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.backend import Backend, dispatch, vary_together
from pallas_kernels.block_sparse_matmul import mosaic_gpu, mosaic_tpu, reference, triton, xla
from pallas_kernels.block_sparse_matmul.topology import BlockTopology, check_topology

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def _anything(shapes, dtypes, device_kind):
    return None


def _backends(name: str, precision) -> tuple[Backend, ...]:
    with_precision = {"precision": precision}
    return (
        Backend("mosaic_gpu", ("cuda",), mosaic_gpu.supports, getattr(mosaic_gpu, name)),
        Backend("triton", ("cuda",), triton.supports, functools.partial(getattr(triton, name), **with_precision)),
        Backend("mosaic_tpu", ("tpu",), mosaic_tpu.supports, getattr(mosaic_tpu, name)),
        Backend("xla", None, _anything, functools.partial(getattr(xla, name), **with_precision)),
        Backend("reference", None, _anything, functools.partial(getattr(reference, name), **with_precision), False),
    )


@functools.cache
def _operation(name: str, backend: str | None, precision):
    """One of the three products over [E, ...] arguments, with a rule for `vmap` that enlarges E or the rows."""
    backends = _backends(name, precision)

    @jax.custom_batching.custom_vmap
    def operation(first, second, topology: BlockTopology):
        values_shape = (topology.blocks, topology.block_in, topology.block_out)
        shapes = {"x": first.shape, "values": (first.shape[0], *values_shape)}
        dtypes = {"x": jnp.dtype(first.dtype), "values": jnp.dtype(second.dtype)}
        return dispatch(
            f"block_sparse_{name}", backends, (first, second, topology), shapes=shapes, dtypes=dtypes, backend=backend
        )

    @operation.def_vmap
    def rule(axis_size, in_batched, first, second, topology):
        first_batched, second_batched, topology_batched = in_batched
        topology_batched = jax.tree.leaves(topology_batched)
        if name != "sampled_product" and not second_batched and not any(topology_batched):
            rows = jnp.moveaxis(first, 0, 1)  # one weight for all members: they are only more rows
            out = operation(rows.reshape(rows.shape[0], -1, rows.shape[3]), second, topology)
            out = out.reshape(*rows.shape[:3], out.shape[-1])
            return jnp.moveaxis(out, 1, 0), True
        leaves, tree = jax.tree.flatten((first, second, topology))
        batched = [first_batched, second_batched, *topology_batched]
        merged = []
        for leaf, is_batched in zip(leaves, batched, strict=True):
            if not is_batched:
                leaf = jnp.broadcast_to(leaf[None], (axis_size, *leaf.shape))
            merged.append(leaf.reshape(-1, *leaf.shape[2:]))
        out = operation(*jax.tree.unflatten(tree, merged))
        return out.reshape(axis_size, -1, *out.shape[1:]), True

    return operation


def _permuted(x_EMK, permutation_K):
    return x_EMK if permutation_K is None else jnp.take(x_EMK, permutation_K, axis=-1, mode="clip")


def _inverse(permutation_K):
    places = jnp.arange(permutation_K.shape[0], dtype=jnp.int32)
    return jnp.zeros_like(places).at[permutation_K].set(places, unique_indices=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _matmul(x_EMK, values_EJkn, topology, permutation_K, backend, precision):
    return _operation("product", backend, precision)(_permuted(x_EMK, permutation_K), values_EJkn, topology)


def _matmul_forward(x_EMK, values_EJkn, topology, permutation_K, backend, precision):
    y_EMN = _matmul(x_EMK, values_EJkn, topology, permutation_K, backend, precision)
    return y_EMN, (x_EMK, values_EJkn, topology, permutation_K)


def _matmul_backward(backend, precision, residuals, dy_EMN):
    x_EMK, values_EJkn, topology, permutation_K = residuals
    dx = _operation("product_transposed", backend, precision)(dy_EMN, values_EJkn, topology)
    if permutation_K is not None:
        dx = _permuted(dx, _inverse(permutation_K))
    x_EMK = _permuted(x_EMK, permutation_K)
    dvalues = _operation("sampled_product", backend, precision)(x_EMK, dy_EMN, topology)
    no_gradient = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), (topology, permutation_K))
    return dx, dvalues, *no_gradient


_matmul.defvjp(_matmul_forward, _matmul_backward)
_jitted_matmul = jax.jit(_matmul, static_argnums=(4, 5))


def _validate(x, values, topology: BlockTopology) -> None:
    if not isinstance(topology, BlockTopology):
        raise ValueError(f"topology is a {type(topology).__name__}: expected a BlockTopology.")
    block = (topology.blocks, topology.block_in, topology.block_out)
    if values.ndim not in (3, 4) or values.shape[-3:] != block:
        raise ValueError(f"values has shape {values.shape}: expected [*experts, blocks, block_in, block_out] = "
                         f"[*experts, {', '.join(map(str, block))}].")  # fmt: skip
    batch = values.shape[:-3]
    if topology.batch_shape not in ((), batch):
        raise ValueError(f"topology has batch shape {topology.batch_shape}: expected () or {batch}, that of values.")
    if x.ndim < 1 + len(batch) or x.shape[-1] != topology.features_in or x.shape[: len(batch)] != batch:
        raise ValueError(
            f"x has shape {x.shape}: expected [{', '.join([*map(str, batch), '...', str(topology.features_in)])}]."
        )
    if x.dtype != values.dtype:
        raise ValueError(f"x has dtype {x.dtype} and values {values.dtype}: expected the same.")
    if x.dtype not in DTYPES and x.dtype != jnp.float64:
        raise ValueError(f"x has dtype {x.dtype}: expected one of {[jnp.dtype(d).name for d in DTYPES]}.")


def _check_permutation(permutation) -> None:
    if permutation is None:
        return
    if isinstance(permutation, jax.core.Tracer):
        raise ValueError("input_permutation is traced: check mode needs concrete arrays, call it outside jax.jit.")
    if not np.array_equal(np.sort(np.asarray(permutation)), np.arange(permutation.shape[0])):
        raise ValueError(f"input_permutation must list each of 0 .. {permutation.shape[0] - 1} once.")


def block_sparse_matmul(
    x: jax.Array,
    values: jax.Array,
    topology: BlockTopology,
    *,
    input_permutation: jax.Array | None = None,
    precision: lax.PrecisionLike = None,
    backend: str | None = None,
    check: bool = False,
) -> jax.Array:
    """Multiplies by a block-sparse matrix: y = x @ W, W[r, c] = values[j] for the stored blocks j = (r, c).

    Only stored blocks are read or computed, in both directions: dx = dy @ W^T reads them through the transposed
    lists, and the gradient of `values` has one block for each stored block (a sampled dense-dense product). The
    storage follows blocked-CSR with transposed lists (MegaBlocks, Gale et al. 2022, arXiv:2211.15841, section 5.1).
    Results are deterministic: no atomics, every output is accumulated by one program in a fixed order (float32).

    Args:
        x: [..., K], or [E, ..., K] if `values` has an expert dimension. bfloat16, float16 or float32.
        values: [J, block_in, block_out] or [E, J, block_in, block_out], same dtype, in the order of the topology.
        topology: The pattern; int32 arrays with batch shape () or, one pattern per expert, (E,).
        input_permutation: int32 [K], a permutation of the columns of `x` shared by all experts: y = x[..., p] @ W. The
            permuted copy is not stored for the backward pass; in the XLA path it is fused into the pass that brings x
            into the order of the blocks, elsewhere it is one pass over x.
        precision: Of float32 dots in the XLA path; None means HIGHEST (tf32 only by name). 16-bit inputs ignore it.
        backend: "mosaic_gpu", "triton", "mosaic_tpu", "xla", "reference", or None for the best one on each platform.
        check: Also verify the values in `topology` (sorted, in range, lists consistent) and `input_permutation`. Needs concrete arrays, so
            it cannot be used inside ``jax.jit``; costs a transfer to the host.

    Returns:
        [..., N] (or [E, ..., N]), dtype of `x`.

    Raises:
        ValueError: shapes or dtypes do not fit, `backend` is unknown or unsupported, or `check` finds a fault.
    """
    x, values = jnp.asarray(x), jnp.asarray(values)
    _validate(x, values, topology)
    if input_permutation is not None:
        input_permutation = jnp.asarray(input_permutation)
        if input_permutation.shape != x.shape[-1:] or not jnp.issubdtype(input_permutation.dtype, jnp.integer):
            raise ValueError(
                f"input_permutation is {input_permutation.dtype}{list(input_permutation.shape)}: "
                f"expected integers [{x.shape[-1]}], one per column of x."
            )
    if check:
        check_topology(topology)
        _check_permutation(input_permutation)
    batch = values.shape[:-3]
    experts = batch[0] if batch else 1
    rows_shape = x.shape[len(batch) : -1]
    rows = math.prod(rows_shape)
    out_shape = (*batch, *rows_shape, topology.features_out)
    if rows == 0 or experts == 0 or topology.blocks == 0:
        return jnp.zeros(out_shape, x.dtype)
    x_EMK = x.reshape(experts, rows, topology.features_in)
    values_EJkn = values.reshape(experts, *values.shape[-3:])
    if not topology.batch_shape:
        topology = jax.tree.map(lambda a: jnp.broadcast_to(a[None], (experts, *a.shape)), topology)
    resolved = lax.Precision.HIGHEST if precision is None else lax.Precision(precision)
    operands = vary_together(x_EMK, values_EJkn, topology, input_permutation)
    return _jitted_matmul(*operands, backend, resolved).reshape(out_shape)
