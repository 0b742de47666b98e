"""The benchmark commands on tiny problems: they run, their numbers add up, their files are written."""

import json

import jax
import numpy as np
import pytest

from pallas_kernels.benchmark import block_sparse, feed_forward, grouped
from pallas_kernels.grouped_matmul import grouped_feed_forward

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="tiny problems say nothing on an accelerator")


def test_routes_are_plans_of_the_routed_feed_forward():
    sizes, token_A, row_TS = (np.asarray(a) for a in feed_forward.route(10, 6, 3))
    assert sizes.sum() == token_A.size == 30
    assert (token_A[row_TS] == np.arange(10)[:, None]).all()
    expert_A = np.repeat(np.arange(6), sizes)
    assert all(len(set(expert_A[rows])) == 3 for rows in row_TS)
    assert grouped_feed_forward.__module__.endswith("feed_forward")


@pytest.mark.slow
def test_feed_forward_rows_count_what_is_stored():
    rows = feed_forward.run(64, 32, 64, rounds=1)
    assert [row["what"] for row in rows] == ["dense", "E16 S2", "E64 S8", "E256 S32"]
    # x, gate and up in float32: 64 * (32 + 2 * 64) * 4 bytes.
    assert rows[0]["stored_mb"] == pytest.approx(64 * 160 * 4 / 1e6)
    # The plan adds token and row indices and weights, 12 bytes a row, and the sizes.
    assert rows[1]["stored_mb"] == pytest.approx((64 * 160 * 4 + 12 * 128 + 4 * 16) / 1e6)


@pytest.mark.slow
def test_block_sparse_table_and_files(tmp_path):
    pytest.importorskip("matplotlib")
    cases = [block_sparse.Case(128, 128, 128, 64, d) for d in (1.0, 0.5)]
    result = block_sparse.run(str(tmp_path / "table.json"), str(tmp_path / "table.png"), cases)
    assert json.loads((tmp_path / "table.json").read_text())["rows"] == result["rows"]
    products = {row["product"] for row in result["rows"]}
    assert products == {"forward", "dx", "dvalues", "norms", "all three"}
    assert all(row["error"] <= 1e-6 for row in result["rows"] if row.get("error") is not None)
    assert (tmp_path / "table.png").stat().st_size > 0


@pytest.mark.slow
def test_grouped_table_and_files(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(grouped.SHAPES, "cpu", (256, 16, 32, 4))
    grouped.main(["table", "--rounds", "1", "--json", str(tmp_path / "t.json"), "--picture", str(tmp_path / "t.png")])
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert {(r["skew"], r["product"], r["label"]) for r in rows} == {
        (skew, product, label)
        for skew in ("uniform", "zipf")
        for product in ("forward", "dx", "dw")
        for label in ("dense", "ours")
    }
    assert (tmp_path / "t.png").stat().st_size > 0
