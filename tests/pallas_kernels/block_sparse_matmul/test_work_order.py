"""Dealing of tiles: unequal columns leave no multiprocessor much behind; shares of a cut item cover it."""

import numpy as np
import pytest

from pallas_kernels.block_sparse_matmul.work_order import imbalance, plan_order


@pytest.mark.parametrize(
    ("row_tiles", "columns", "rows"), [(32, 64, 64), (64, 32, 32), (32, 128, 32), (64, 64, 16), (64, 16, 64)]
)
@pytest.mark.parametrize("density", [0.25, 0.1])
def test_a_binomial_pattern_is_balanced(row_tiles, columns, rows, density):
    order = plan_order(row_tiles, columns, 132, 4)
    assert row_tiles % order.width == 0
    rng = np.random.default_rng(0)
    loads = [np.sort(rng.binomial(rows, density, columns))[::-1] + 1.0 for _ in range(5)]
    assert np.mean([imbalance(order, row_tiles, columns, 132, load) for load in loads]) < 1.1


def test_without_it_some_geometry_is_not_balanced():
    order = plan_order(64, 16, 132, 4)
    load = np.linspace(1.6, 0.4, 16)
    naive = type(order)(4, False, False)
    assert imbalance(naive, 64, 16, 132, load) > 1.15 > imbalance(order, 64, 16, 132, load)


@pytest.mark.parametrize(("items", "workers"), [(1, 4), (5, 4), (8, 4), (192, 132), (48, 132)])
def test_rounds_cover_every_item(items, workers):
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    from pallas_kernels.block_sparse_matmul.mosaic_gpu_sampled import plan_rounds

    plan = plan_rounds(items, 16, workers, True)
    assert plan.whole + plan.rest == items
    assert plan.rest * plan.parts <= workers
    assert plan_rounds(items, 16, workers, False).rest == 0
