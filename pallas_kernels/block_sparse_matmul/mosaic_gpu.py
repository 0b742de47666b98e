"""Block-sparse products on Hopper: what the kernels support, which tiling they get, padding of odd row counts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Dtypes, Shapes, jax_version
from pallas_kernels.block_sparse_matmul import tuning
from pallas_kernels.block_sparse_matmul.topology import BlockTopology

KERNEL_BLOCKS = (64, 128)
HOPPER = ("H100", "H200", "H800", "H20", "GH200")
MIN_JAX = (0, 11, 0)


def supports(shapes: Shapes, dtypes: Dtypes, device_kind: str | None) -> str | None:
    """None if the Hopper kernels take these arguments, else the reason; asked before anything is traced.

    Args:
        shapes: "values" ends in (block_in, block_out).
        dtypes: "x" and "values".
        device_kind: Kind of the CUDA device, None if none is attached (a Hopper GPU is then assumed).
    """
    if jax_version() < MIN_JAX:
        return f"needs jax >= {'.'.join(map(str, MIN_JAX))}, found {jax.__version__}"
    if device_kind is not None and not any(name in device_kind for name in HOPPER):
        return f"needs a Hopper GPU (wgmma), found {device_kind}"
    dtype = jnp.dtype(dtypes["values"])
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 or float16, not {dtype}"
    block_in, block_out = shapes["values"][-2:]
    if block_in not in KERNEL_BLOCKS or block_out not in KERNEL_BLOCKS:
        return f"takes blocks of {KERNEL_BLOCKS}, not {block_in} x {block_out}"
    if block_in != block_out:
        return f"takes square blocks, not {block_in} x {block_out}"
    return None


def _pad_rows(x_EMK: jax.Array, multiple: int) -> jax.Array:
    missing = -x_EMK.shape[1] % multiple
    return jnp.pad(x_EMK, ((0, 0), (0, missing), (0, 0))) if missing else x_EMK


def _product(x_EMK, values_EJkn, topology: BlockTopology, *, transposed: bool, interpret=None, tile=None):
    from pallas_kernels.block_sparse_matmul.mosaic_gpu_product import block_product

    m = x_EMK.shape[1]
    tile = tile or tuning.product_tile(m, topology, transposed)
    schedule = topology.row_schedule if transposed else topology.column_schedule
    inner = topology.column_index if transposed else topology.row_index
    y = block_product(
        _pad_rows(x_EMK, tile.rows),
        values_EJkn,
        schedule,
        inner,
        topology.row_order,
        transposed=transposed,
        tile=tile,
        multiprocessors=tuning.multiprocessors() if interpret is None else 4,
        interpret=interpret,
    )
    return y[:, :m] if y.shape[1] != m else y


def product(x_EMK: jax.Array, values_EJkn: jax.Array, topology: BlockTopology, interpret=None, tile=None) -> jax.Array:
    """y = x @ W per expert."""
    return _product(x_EMK, values_EJkn, topology, transposed=False, interpret=interpret, tile=tile)


def product_transposed(
    dy_EMN: jax.Array, values_EJkn: jax.Array, topology: BlockTopology, interpret=None, tile=None
) -> jax.Array:
    """dx = dy @ W^T per expert."""
    return _product(dy_EMN, values_EJkn, topology, transposed=True, interpret=interpret, tile=tile)


def sampled_product(
    x_EMK: jax.Array, dy_EMN: jax.Array, topology: BlockTopology, interpret=None, tile=None
) -> jax.Array:
    """The stored blocks of x^T dy per expert."""
    from pallas_kernels.block_sparse_matmul import mosaic_gpu_sampled

    tile = tile or tuning.sampled_tile(topology)
    return mosaic_gpu_sampled.sampled_product(
        _pad_rows(x_EMK, tile.depth),
        _pad_rows(dy_EMN, tile.depth),
        topology.pairs,
        blocks=topology.blocks,
        block=topology.block_in,
        tile=tile,
        multiprocessors=tuning.multiprocessors() if interpret is None else 4,
        interpret=interpret,
    )
