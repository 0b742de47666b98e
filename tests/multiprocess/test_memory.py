"""Tables in host memory over real processes: each keeps its rows, and the run is that with tables on the devices, to the bit."""

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
import tiny
from processes import STEPS, Child, pair, run_all

from sparse_lm.evaluate.load import open_run
from sparse_lm.memory.engram import Engram
from sparse_lm.memory.placement import OnDevice, OnHost, Placement, StaleHost
from sparse_lm.memory.row_optimizer import RowAdagrad
from sparse_lm.train.checkpoint import read_checkpoint

pytestmark = pytest.mark.faults

HOST = OnHost(room=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("memory")
    tiny.corpus(folder / "text")
    return folder


def changes(placement: Placement, **more: Any) -> dict[str, Any]:
    memory = Engram(at=(0,), heads=2, width=8, rows=500, deviation=0.5, optimizer=RowAdagrad(), placement=placement)
    start = {"model__memory": memory, "validation__every": 6, "checkpoint__every": 6, "checkpoint__keep_last": 9}
    return {**start, **more}


def run_pair(folder: pathlib.Path, name: str, placement: Placement, **more: Any) -> pathlib.Path:
    """Two processes with two devices each."""
    run_dir = folder / name
    codes = run_all(*pair(folder, run_dir, devices=2, **changes(placement, **more)))
    assert codes == [0, 0], "\n".join((folder / f"{name}.{number}.log").read_text() for number in range(2))
    return run_dir


def run_one(folder: pathlib.Path, name: str, placement: Placement, **more: Any) -> pathlib.Path:
    """One process with four devices."""
    child = Child(str(folder), str(folder / name), changes(placement, **more), devices=4)
    assert run_all(child) == [0], child.log().read_text()
    return folder / name


def saved(run_dir: pathlib.Path, step: int = STEPS) -> dict[str, Any]:
    return read_checkpoint(run_dir / "checkpoints", step).state


def rows(run_dir: pathlib.Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def losses(run_dir: pathlib.Path, kind: str = "train") -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows(run_dir, kind)]


@pytest.fixture(scope="module")
def two(folder: pathlib.Path) -> pathlib.Path:
    return run_pair(folder, "two", HOST)


def test_two_processes_train_as_with_tables_on_their_devices(two: pathlib.Path, folder: pathlib.Path) -> None:
    device = run_pair(folder, "device", OnDevice())
    assert [step for step, _ in losses(two)] == list(range(1, STEPS + 1))
    assert losses(two) == losses(device) and losses(two, "validation") == losses(device, "validation")
    for step in (6, STEPS):
        tiny.assert_same(saved(two, step), saved(device, step))


@pytest.mark.slow
def test_two_processes_are_one(two: pathlib.Path, folder: pathlib.Path) -> None:
    one = run_one(folder, "one", HOST)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    left, right = saved(two), saved(one)
    # gloo adds in another order than threads do
    tiny.assert_close(left["tables"]["rows"], right["tables"]["rows"], rtol=1e-4, atol=1e-4)
