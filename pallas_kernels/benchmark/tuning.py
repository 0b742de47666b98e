"""The autotuner: times every candidate tiling of the Hopper kernels. The tables of tilings are made from what it finds.

python scripts/benchmark.py tune --op block_sparse        block_sparse_matmul/tuned_tiles.py
python scripts/benchmark.py tune --op grouped             grouped_matmul/tiles.py
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp

from pallas_kernels.benchmark import grouped
from pallas_kernels.benchmark.block_sparse import DENSITIES, OTHER_SHAPES, SQUARE, Case, make_mask, random
from pallas_kernels.benchmark.timing import chosen, compile_all, time_all
from pallas_kernels.block_sparse_matmul import topology_from_mask
from pallas_kernels.grouped_matmul.groups import contiguous

# Output tiles of 128 steps down to 2.
BLOCK_SPARSE_CASES = [Case(*SQUARE, 128, d) for d in DENSITIES[::-1]] + [
    Case(*OTHER_SHAPES[2], 128, d) for d in (0.1, 0.05)
]


def block_sparse_candidates() -> dict[str, tuple]:
    """Tilings of the block-sparse kernels: name -> (operation, tile)."""
    from pallas_kernels.block_sparse_matmul.mosaic_gpu_product import ProductTile
    from pallas_kernels.block_sparse_matmul.mosaic_gpu_sampled import SampledTile

    found: dict[str, tuple] = {}
    for width, swapped, (stages, stores) in itertools.product((1, 2, 4, 8), (False, True), ((4, 2), (3, 4))):
        tile = ProductTile(width=width, swapped=swapped, stages=stages, stores=stores)
        for operation in ("product", "product_transposed"):
            found[f"{operation} width {width} {'swapped' if swapped else 'straight'} {stages} stages"] = (
                operation,
                tile,
            )
    for split in (False, True):
        found[f"sampled_product {'split' if split else 'whole'}"] = ("sampled_product", SampledTile(split=split))
    return found


def tune_block_sparse(json_path: str | None = None, only: str = "") -> list[dict]:
    """Times every candidate tiling for tiles of 128 steps down to 2; what ``tuned_tiles.py`` is made from.

    Args:
        json_path: Where the numbers go; None prints only.
        only: Candidates in whose name, for example "8192x8192 0.5 product_transposed width 4 swapped 4 stages", this regular expression is found.

    Raises:
        NoneChosenError: it is found in none.
    """
    from pallas_kernels.block_sparse_matmul import mosaic_gpu

    pairs = itertools.product(BLOCK_SPARSE_CASES, block_sparse_candidates().items())
    every = {f"{case.k}x{case.n} {case.density} {name}": (case, *of) for case, (name, of) in pairs}
    picked, report = chosen(every, only), []
    for case, names in itertools.groupby(picked, key=lambda name: picked[name][0]):
        tiles = {name: picked[name][1:] for name in names}
        x, dy = random(1, (1, case.m, case.k), jnp.bfloat16), random(2, (1, case.m, case.n), jnp.bfloat16)
        topology = jax.tree.map(lambda a: a[None], topology_from_mask(make_mask(case), case.block, case.block))
        values = random(3, (1, topology.blocks, case.block, case.block), jnp.bfloat16, 0.02)
        operands = {"product": (x, values), "product_transposed": (dy, values), "sampled_product": (x, dy)}
        jobs = {}
        for name, (operation, tile) in tiles.items():
            function = functools.partial(getattr(mosaic_gpu, operation), tile=tile)
            jobs[name] = (function, (*operands[operation], topology))
        compiled, failed = compile_all(jobs)
        for name, message in failed.items():
            print("FAILED", name, message)
        timings = time_all({name: (compiled[name], jobs[name][1]) for name in compiled}, rounds=2)
        for name, timing in sorted(timings.items(), key=lambda item: (tiles[item[0]][0], item[1].median)):
            operation, tile = tiles[name]
            print(f"{name}: {timing.median * 1e3:.4f} ms, spread {timing.spread:.2f}", flush=True)
            numbers = {"ms": timing.median * 1e3, "spread": timing.spread}
            shape = {"m": case.m, "k": case.k, "n": case.n, "density": case.density}
            report.append({"operation": operation, **shape, "tile": dataclasses.asdict(tile), **numbers})
    if json_path:
        pathlib.Path(json_path).write_text(json.dumps(report, indent=1) + "\n")
    return report


def grouped_candidates():
    """Tile sizes of the grouped kernels: name -> (product tiles, weight tiles)."""
    from pallas_kernels.grouped_matmul.mosaic_gpu_product import ProductTiles
    from pallas_kernels.grouped_matmul.mosaic_gpu_weight import WeightTiles

    found = {}
    tiles = ((128, 256, 0), (128, 256, 8), (256, 128, 0), (256, 128, 8))
    orders = ((0, 8), (1, 4), (0, 32))
    for (bm, bn, life), (minor, width) in itertools.product(tiles, orders):
        order = {"minor": minor, "width": width}
        product_tiles = None if life else ProductTiles(bm, bn, **order)  # only the weight gradient has lives
        found[f"{bm}x{bn} minor{minor} width{width} life{life}"] = (
            product_tiles,
            WeightTiles(bm, bn, **order, life=life),
        )
    return found


def tile_functions(product_tiles, weight_tiles):
    """The three products by the Hopper kernels with given tiles."""
    from pallas_kernels.grouped_matmul.mosaic_gpu_product import grouped_product
    from pallas_kernels.grouped_matmul.mosaic_gpu_weight import grouped_weight_gradient

    ctas = jax.devices()[0].core_count
    found = {"dw": lambda x, w, dy, s: grouped_weight_gradient(x, dy, contiguous(s), tiles=weight_tiles, ctas=ctas)}
    if product_tiles is not None:
        options = {"tiles": product_tiles, "ctas": ctas}
        found["forward"] = lambda x, w, dy, s: grouped_product((x,), (w,), contiguous(s), **options)[0]
        found["dx"] = lambda x, w, dy, s: grouped_product((dy,), (w,), contiguous(s), transpose=True, **options)[0]
    return found


def tune_grouped(json_path: str | None = None, only: str = "") -> None:
    """Times every tile candidate of every product; what `tiles.py` is made from.

    Args:
        json_path: Where the numbers go; None prints only.
        only: Candidates in whose name, for example "E64 128x256 minor1 width4 life8", this regular expression is found.

    Raises:
        NoneChosenError: it is found in none.
    """
    pairs = itertools.product(("E64", "E128", "E8"), grouped_candidates().items())
    every = {f"{shape} {name}": (shape, name, of) for shape, (name, of) in pairs}
    picked, report = chosen(every, only), []
    for shape, names in itertools.groupby(picked, key=lambda name: picked[name][0]):
        functions = {label: tile_functions(*of) for _, label, of in (picked[name] for name in names)}
        found = grouped.measure(shape, ("uniform", "zipf"), functions, jnp.bfloat16, 2)
        grouped.show(found)
        report += found
    if json_path:
        pathlib.Path(json_path).write_text(json.dumps(report, indent=1) + "\n")
