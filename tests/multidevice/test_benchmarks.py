"""The kernel benchmark with a device for each core."""

from pallas_kernels.benchmark import block_sparse


def test_rows_split_over_devices_give_the_products_of_one() -> None:
    """The dense product beside it has the same inputs; a weight gradient that is not summed over devices would be far off."""
    rows = block_sparse.measure(block_sparse.Case(128, 128, 128, 64, 0.5, dtype="float32"), rounds=1)
    assert [row["product"] for row in rows] == ["forward", "dx", "dvalues", "all three"]
    for row in rows[:3]:
        assert row["error"] <= 1e-6 and row["dense_ms"] > 0
