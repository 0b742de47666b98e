"""Tables in host memory over real processes: each keeps its rows, and the run is that with tables on the devices, to the bit."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from processes import Child, pair, run_all

from sparse_lm.evaluate.load import open_run
from sparse_lm.memory.engram import Engram
from sparse_lm.memory.placement import OnDevice, OnHost, Placement, StaleHost
from sparse_lm.memory.row_optimizer import RowAdagrad
from sparse_lm.train.checkpoint import Checkpointer, Checkpoints
from sparse_lm.train.checkpoint_reader import read_checkpoint
from sparse_lm.train.session import open_session
from sparse_lm.train.validation import build_eval_step, validation_row

pytestmark = pytest.mark.faults

HOST = OnHost(room=0.3)
STEPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("memory")
    tiny.corpus(folder / "text")
    return folder


def changes(placement: Placement, **more: Any) -> dict[str, Any]:
    memory = Engram(at=(0,), heads=2, width=8, rows=500, deviation=0.5, optimizer=RowAdagrad(), placement=placement)
    start = {"model__memory": memory, "train__steps": STEPS, "validation__every": 5, "checkpoint__every": 5}
    return {**start, **more}


def run_several(folder: pathlib.Path, name: str, placement: Placement, **more: Any) -> pathlib.Path:
    """Two processes, or as many as `processes` says, with two devices each or `devices`."""
    run_dir = folder / name
    devices = more.pop("devices", 2)
    count = more.pop("processes", 2)
    first, _ = pair(folder, run_dir, devices=devices, **changes(placement, **more))
    assert first.distributed is not None
    children = [
        dataclasses.replace(first, distributed={**first.distributed, "processes": count, "process": number})
        for number in range(count)
    ]
    assert run_all(*children) == [0] * count, "\n".join(child.log().read_text() for child in children)
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


def again(run_dir: pathlib.Path, name: str) -> pathlib.Path:
    """A copy of a run as it was after its first save."""
    copy = run_dir.with_name(name)
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    return copy


@pytest.fixture(scope="module")
def two(folder: pathlib.Path) -> pathlib.Path:
    return run_several(folder, "two", HOST)


@pytest.fixture(scope="module")
def one(folder: pathlib.Path) -> pathlib.Path:
    return run_one(folder, "one", HOST)


def test_two_processes_train_as_with_tables_on_their_devices(two: pathlib.Path, folder: pathlib.Path) -> None:
    device = run_several(folder, "device", OnDevice())
    assert [step for step, _ in losses(two)] == list(range(1, STEPS + 1))
    assert losses(two) == losses(device) and losses(two, "validation") == losses(device, "validation")
    for step in (5, STEPS):
        tiny.assert_same(saved(two, step), saved(device, step))
    # Batches took both programs: with room for some of the rows, and for all.
    assert len({row["memory/fetched_mb"] for row in rows(two, "train") if "memory/fetched_mb" in row}) == 2


@pytest.mark.slow
def test_two_processes_are_one(two: pathlib.Path, one: pathlib.Path) -> None:
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    left, right = (saved(run)["tables"] for run in (two, one))
    # gloo adds in another order than threads do
    tiny.assert_close(left["rows"], right["rows"], rtol=1e-4, atol=1e-4)
    tiny.assert_close(left["slots"], right["slots"], rtol=1e-4, atol=1e-4)
    # Each fetches its own share.
    fetched = [
        [r["memory/fetched_rows"] for r in rows(run, "train") if "memory/fetched_rows" in r] for run in (two, one)
    ]
    assert 0.4 < np.sum(fetched[0]) / np.sum(fetched[1]) < 0.6


@pytest.mark.slow
def test_a_run_that_loses_a_process_goes_on_bitwise(two: pathlib.Path, folder: pathlib.Path) -> None:
    """Process 1 is killed while its rows travel; process 0 ends by itself, however its threads wait for the other's ids."""
    kill = ("at_step", 7, "signal_self", "SIGKILL")
    assert run_all(*pair(folder, folder / "killed", (), kill, devices=2, **changes(HOST))) == [75, -9]
    tiny.assert_same(saved(run_several(folder, "killed", HOST)), saved(two))


@pytest.mark.slow
def test_a_run_starts_from_the_rows_of_another(two: pathlib.Path, folder: pathlib.Path) -> None:
    kept = {"start_from__run": str(two), "train__steps": 5}
    host, device = (run_several(folder, f"branch_{p.on_host}", p, **kept) for p in (HOST, OnDevice()))
    assert losses(host) == losses(device) and losses(host)[0][1] < losses(two)[0][1]
    tiny.assert_same(saved(host, 5), saved(device, 5))


@pytest.mark.slow
def test_a_run_goes_on_in_one_process_and_in_two(two: pathlib.Path, one: pathlib.Path, folder: pathlib.Path) -> None:
    joined = run_one(folder, again(two, "joined").name, HOST)
    parted = run_several(folder, again(one, "parted").name, HOST)
    for run in (joined, parted):
        np.testing.assert_allclose(losses(run), losses(two), rtol=1e-5)
        tiny.assert_close(saved(run)["tables"]["rows"], saved(two)["tables"]["rows"], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_one_process_has_the_rows_of_two_and_evaluates_them(two: pathlib.Path) -> None:
    run = open_run(two)
    session = open_session(run.recipe, jax.devices()[:1], encoder=run.dataset.tokenizer)
    placed = session.abstract, session.dims, session.mesh
    reader = Checkpointer(two / "checkpoints", Checkpoints(), *placed, population=False, owners=session.owners)
    state, _ = reader.restore(STEPS, session.shardings)
    reader.close()
    tiny.assert_same(state.tables, saved(two)["tables"])
    step = build_eval_step(run.definition, run.population)
    data, validation = run.recipe.data, run.recipe.validation
    found = validation_row(step, run.params, run.model_state, run.dataset, data, validation)
    np.testing.assert_allclose(found["loss"], losses(two, "validation")[-1][1], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "processes", "devices", "mesh"),
    [
        ("one_each", 2, 1, {"fsdp": 2}),
        ("copies_inside", 2, 2, {"data": 2, "tensor": 2}),
        ("copies_across", 2, 2, {"tensor": 2, "context": 2}),
        ("context_across", 2, 2, {"context": 4}),
        ("owners_of_two", 4, 1, {"fsdp": 2, "tensor": 2}),
    ],
)
def test_other_meshes(folder: pathlib.Path, name: str, processes: int, devices: int, mesh: dict[str, int]) -> None:
    more = {f"mesh__{axis}": size for axis, size in {"data": 1, **mesh}.items()}
    kept = {"train__steps": 5, "processes": processes, "devices": devices, **more}
    host, device = (run_several(folder, f"{name}_{p.on_host}", p, **kept) for p in (HOST, OnDevice()))
    assert losses(host) == losses(device) and losses(host, "validation") == losses(device, "validation")
    tiny.assert_same(saved(host, 5), saved(device, 5))


@pytest.mark.slow
def test_stale_rows_are_the_same_each_time(folder: pathlib.Path) -> None:
    runs = [run_several(folder, name, StaleHost(room=0.3), train__steps=5) for name in ("stale", "stale_too")]
    assert losses(runs[0]) == losses(runs[1])
    tiny.assert_same(*(saved(run, 5) for run in runs))
