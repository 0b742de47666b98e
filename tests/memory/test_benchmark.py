"""The benchmark of memories runs and says what it promises."""

import pathlib

import pytest
import tiny

from sparse_lm.memory.engram import Engram
from sparse_lm.memory.placement import OnDevice, OnHost, Placement
from sparse_lm.memory.row_optimizer import RowAdagrad
from sparse_lm.train import memory_benchmark


@pytest.mark.slow
@pytest.mark.parametrize("placement", [OnDevice(), OnHost(room=0.3)], ids=lambda p: type(p).__name__)
def test_sizes_take_turns(tmp_path: pathlib.Path, placement: Placement) -> None:
    """Eight batches of 128 tokens with 4 addresses each; with a room of 0.3 both programs of host tables run."""
    memory = Engram(at=(0,), heads=2, width=8, optimizer=RowAdagrad(), placement=placement)
    recipe = tiny.recipe(tmp_path, model__layers=1, model__memory=memory)
    found = memory_benchmark.step_table(recipe, (400, 4000), repeats=7, text="words", generation=False, together=True)
    assert [line["rows"] for line in found] == [0, 400, 4000]
    for line in found:
        assert 0 < line["min_ms"] <= line["median_ms"] and 0 < line["run_ms"] and 0 < line["min_cpu_ms"]
        assert ("memory/fetched_rows" in line) == (line["rows"] > 0 and placement.on_host)
    # 1024 rows of 4 floats and a sum of squares: 20 bytes each, and what addresses them.
    assert found[0]["table_gb"] == 0 < 20 * 512 / 1e9 < found[1]["table_gb"] < found[2]["table_gb"]
