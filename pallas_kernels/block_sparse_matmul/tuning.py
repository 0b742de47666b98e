"""Which tiling a kernel uses: a small table per kind of device, found by ``python scripts/benchmark.py tune``.

An unknown device gets the table of the default kind and says so once.
"""

from __future__ import annotations

import warnings

from pallas_kernels.backend import attached_multiprocessors, device_kind
from pallas_kernels.block_sparse_matmul.tuned_tiles import DEFAULT_KIND, TILES

DEFAULT_MULTIPROCESSORS = 132  # H100 SXM, H200
STEP = 64  # contracted features of one ring slot
SLAB_BYTES = 16 << 20  # most of x that stays in the L2 cache while W streams by

_said: set[str] = set()


def say_once(message: str) -> None:
    """Warns, the first time this message comes up in a process."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=3)


def multiprocessors() -> int:
    """Streaming multiprocessors of the attached CUDA device, or those of an H100 when compiling ahead of time."""
    return attached_multiprocessors() or DEFAULT_MULTIPROCESSORS


def tuned(operation: str, steps: float) -> dict:
    """The tuned fields of an operation whose mean output tile has `steps` ring steps, on the present device."""
    kind = device_kind("cuda") or DEFAULT_KIND
    if kind not in TILES:
        say_once(f"{operation}: no tilings for {kind!r} yet, using those of {DEFAULT_KIND!r}; run the autotuner.")
        kind = DEFAULT_KIND
    return next(fields for most, fields in TILES[kind][operation] if steps <= most)


def steps_per_tile(topology, transposed: bool) -> float:
    """Ring steps of a mean output tile: stored blocks per output column times steps per block."""
    columns, block = (topology.block_columns, topology.block_in)
    if transposed:
        columns, block = (topology.block_rows, topology.block_out)
    return topology.blocks / columns * block / STEP


def product_tile(rows: int, topology, transposed: bool):
    """The tiling of one product.

    Args:
        rows: Rows of x (one expert).
        topology: The pattern.
        transposed: dx instead of y.

    Returns:
        A ``mosaic_gpu_product.ProductTile`` that fits shared memory for these blocks.
    """
    from pallas_kernels.block_sparse_matmul.mosaic_gpu_product import ProductTile

    fields = dict(tuned("product_transposed" if transposed else "product", steps_per_tile(topology, transposed)))
    if rows <= 128:
        return ProductTile(rows=128, width=1)
    contracted = topology.features_out if transposed else topology.features_in
    fields["width"] = max(1, min(fields["width"], SLAB_BYTES // (256 * contracted * 2)))
    block_out = topology.block_in if transposed else topology.block_out
    if block_out == 64:
        fields["swapped"] = False  # half of 64 columns is too narrow for a store
    return ProductTile(rows=256, **fields)


def sampled_tile(topology):
    """The tiling of the sampled product, a ``mosaic_gpu_sampled.SampledTile``."""
    from pallas_kernels.block_sparse_matmul.mosaic_gpu_sampled import SampledTile

    steps = topology.blocks / max(1, topology.block_columns)
    return SampledTile(**tuned("sampled_product", steps))
