"""Which tile sizes the Hopper kernels use: measured ones per device kind, and a safe default that says so once.

The table is written by hand from the output of `python scripts/benchmark.py tune --op grouped`, which prints the best candidate for each product and shape.

Legend: K contraction, N outer dim of a product.
"""

from __future__ import annotations

import functools
import warnings

from pallas_kernels.grouped_matmul.mosaic_gpu_product import ProductTiles
from pallas_kernels.grouped_matmul.mosaic_gpu_weight import WeightTiles

MEASURED_KINDS = ("H100", "H200")


@functools.cache
def _say_once(kind: str) -> None:
    warnings.warn(
        f"grouped_matmul: no tile sizes were measured on {kind!r}; using those of the H100. "
        "`python scripts/benchmark.py tune --op grouped` measures them.",
        stacklevel=3,
    )


def _known(kind: str | None) -> None:
    if kind is not None and not any(measured in kind for measured in MEASURED_KINDS):
        _say_once(kind)


def product_tiles(kind: str | None, rows: int, inner: int, outer: int, parts: int = 1) -> ProductTiles:
    """Tiles of a product with contraction `inner` and `outer` columns; `parts` 2 for SwiGLU."""
    _known(kind)
    if parts == 2:
        return ProductTiles(bm=128, bn=128, minor=1, width=4)
    if outer % 256 == 0:
        return ProductTiles(bm=128, bn=256, minor=1, width=4)
    return ProductTiles(bm=256 if rows >= 256 else 128, bn=128, minor=0, width=8)


def weight_tiles(kind: str | None, inner: int, outer: int, outer_by_index: bool = False) -> WeightTiles:
    """Tiles of the weight gradient [inner, outer]; `outer_by_index`: the rows of dy are gathered, those of x are not."""
    _known(kind)
    # Lives of 8 items even out groups of very different sizes (Zipf: 1.35 -> 1.15 of the uniform time) and cost uniform ones nothing measurable.
    # What threads gather costs more than what the copy engine brings, so it is the narrow side (E=64: 0.566 -> 0.506 ms).
    if outer % 256 == 0 and not (outer_by_index and inner % 256 == 0):
        return WeightTiles(bm=128, bn=256, minor=1, width=4, life=8)
    return WeightTiles(bm=256 if inner % 256 == 0 else 128, bn=128, minor=0, width=8, life=8)
