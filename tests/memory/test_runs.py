"""Whole runs with tables: they go on bitwise, with host memory in place of the device too, and are evaluated with their rows."""

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from sparse_lm.config import ConfigError
from sparse_lm.evaluate.generate import Generator, Sampling
from sparse_lm.evaluate.load import open_run
from sparse_lm.evaluate.memory import SEEN_OFTEN, evaluate_memory, occupancy, summary, training_batches, without_memory
from sparse_lm.memory.engram import Engram
from sparse_lm.memory.host_array import HostArray
from sparse_lm.memory.placement import OnDevice, OnHost
from sparse_lm.parallel.distributed import Distributed
from sparse_lm.plan import make_plan
from sparse_lm.recipe import Recipe
from sparse_lm.train.checkpoint_reader import CheckpointError, read_checkpoint
from sparse_lm.train.loop import train
from sparse_lm.train.metrics import read_rows
from sparse_lm.train.session import check_addresses, open_session, starting_point
from sparse_lm.train.validation import MODEL_ARRAYS, build_eval_step

PLACES = {"device": OnDevice(), "host": OnHost(room=0.6)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny.corpus(folder / "text")
    return folder


def recipe(folder: pathlib.Path, place: str, **changes: Any) -> Recipe:
    # The host draws the rows of its tables itself, and the normal numbers of a GPU differ from those in the last bits.
    deviation = 0.5 if jax.default_backend() == "cpu" else 0.0
    memory = Engram(at=(0,), heads=2, width=8, rows=500, deviation=deviation, placement=PLACES[place])
    kept = {"model__layers": 1, "model__memory": memory, "checkpoint__keep_last": 9, "train__microbatches": 2}
    return tiny.recipe(folder, **kept, **changes)


@pytest.fixture(scope="module")
def runs(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    for place in PLACES:
        assert train(recipe(folder, place), folder / place) == 0
    return {place: folder / place for place in PLACES}


def saved(run: pathlib.Path, step: int) -> dict[str, Any]:
    return read_checkpoint(run / "checkpoints", step).state


def test_host_and_device_runs_are_bitwise_equal(runs: dict[str, pathlib.Path]) -> None:
    for step in (4, 8):
        device, host = (saved(run, step) for run in runs.values())
        assert {"address", "rows", "slots"} == set(host["tables"])
        tiny.assert_same(host, device)
    for kind, names in (("train", ("loss", "grad_norm")), ("validation", ("loss", "bits_per_byte"))):
        device, host = (read_rows(run / "metrics.jsonl", kind) for run in runs.values())
        assert [[row[name] for name in names] for row in device] == [[row[name] for name in names] for row in host]
    # A row is written when the next step has got its rows and reports those too, so the rows at a save have none left to report.
    rows = read_rows(runs["host"] / "metrics.jsonl", "train")
    fetched = {row["step"]: row["memory/fetched_rows"] for row in rows if "memory/fetched_rows" in row}
    assert sorted(fetched) == [1, 2, 3, 5, 6, 7] and min(fetched.values()) > 0
    assert "memory/fetch_wait_ms" not in read_rows(runs["device"] / "metrics.jsonl", "train")[0]


@pytest.mark.parametrize(
    ("first", "then"),
    [("device", "device"), ("device", "host"), *(pytest.param("host", p, marks=pytest.mark.slow) for p in PLACES)],
)
def test_a_run_goes_on_bitwise_in_either_place(
    runs: dict[str, pathlib.Path], folder: pathlib.Path, first: str, then: str
) -> None:
    other = folder / f"{first} {then}"
    shutil.copytree(runs[first], other)
    shutil.rmtree(other / "checkpoints" / "8")
    assert train(recipe(folder, then), other) == 0
    tiny.assert_same(saved(other, 8), saved(runs["device"], 8))


def test_a_finished_run_is_evaluated_with_its_rows(runs: dict[str, pathlib.Path]) -> None:
    loaded = open_run(runs["device"])
    assert set(loaded.model_state["tables"]) == {"address", "rows"}
    assert loaded.definition.classes is not None and loaded.definition.classes.number == 228
    touched = (np.asarray(saved(runs["device"], 8)["tables"]["slots"]["0"]["clock"]) != 0).mean()
    assert 0.05 < touched < 0.9
    with pytest.raises(CheckpointError, match=r"addressed by other hashes: 0\.multipliers_N2"):
        address = loaded.model_state["tables"]["address"]["0"]
        bad = {"address": {"0": {**address, "multipliers_N2": address["multipliers_N2"] + 2}}}
        check_addresses(loaded.definition, bad, "a checkpoint")


@pytest.mark.slow
def test_a_host_run_generates(runs: dict[str, pathlib.Path]) -> None:
    prompts = [np.arange(5, dtype=np.int32), np.array([7, 9], np.int32)]
    texts = []
    for run in map(open_run, runs.values()):
        generator = Generator(run.definition, run.params, run.model_state, 263)
        texts.append(np.concatenate(generator.generate(prompts, 6, Sampling(temperature=1.0), seed=1)))
    np.testing.assert_array_equal(*texts)


def test_a_host_run_is_evaluated(runs: dict[str, pathlib.Path]) -> None:
    device, host = (open_run(run) for run in runs.values())
    assert host.model_state["tables"]["rows"]["0"].sharding.memory_kind == "pinned_host"
    batch = next(training_batches(device, 1))
    arrays = {name: batch[name] for name in MODEL_ARRAYS}
    losses, host_losses = (
        np.asarray(build_eval_step(run.definition, run.population)(run.params, run.model_state, arrays))
        for run in (device, host)
    )
    np.testing.assert_allclose(host_losses, losses, rtol=1e-6)
    zeroed = without_memory(host)
    assert zeroed.model_state["tables"]["rows"]["0"].shape[0] == 0
    step = build_eval_step(host.definition, host.population)
    assert (np.asarray(step(zeroed.params, zeroed.model_state, arrays)) != host_losses).any()
    assert occupancy(host, [batch]) == occupancy(device, [batch])


@pytest.mark.parametrize("place", list(PLACES))
def test_rows_come_along_with_the_parameters(runs: dict[str, pathlib.Path], folder: pathlib.Path, place: str) -> None:
    """A run that starts from another's parameters has its rows, and fresh slots."""
    branch = recipe(folder, place, start_from__run=str(runs["device"]))
    encoder = open_run(runs["device"]).dataset.tokenizer
    state, data_state = starting_point(open_session(branch, encoder=encoder))
    assert isinstance(state.tables["rows"]["0"], HostArray) == (place == "host")
    tiny.assert_same(state.tables["rows"], saved(runs["device"], 8)["tables"]["rows"])
    assert data_state is None and not np.asarray(state.tables["slots"]["0"]["clock"]).any()


@pytest.mark.slow
def test_a_run_may_leave_its_rows_behind(runs: dict[str, pathlib.Path], folder: pathlib.Path) -> None:
    start_from = dataclasses.replace(tiny.recipe(folder).start_from, run=str(runs["device"]), exclude=("memory.*",))
    plain = tiny.recipe(folder, model__layers=1, start_from=start_from)
    assert starting_point(open_session(plain))[0].tables == {}


def test_processes_that_do_not_divide_the_rows_are_refused(folder: pathlib.Path) -> None:
    """2304 rows in all, which 3 processes share, 7 do not."""

    def planned(processes: int) -> int:
        several = Distributed(coordinator="node:1", processes=processes, process=0)
        return make_plan(
            recipe(folder, "host", distributed=several, mesh__data=1, mesh__tensor=-1), processes
        ).host_bytes

    assert planned(3) == planned(1) // 3
    with pytest.raises(
        ConfigError,
        match=r"model\.memory\.placement = 'OnHost' .* processes that keep rows \(7\) do not divide .* table 0",
    ):
        planned(7)


def test_the_plan_says_where_bytes_live(folder: pathlib.Path) -> None:
    """2 orders x 2 heads of 500 rows and more, rounded up to 2304; a row of 4 floats has two moments of 4 and a clock: 52 bytes."""
    device, host = (make_plan(recipe(folder, place), 1) for place in PLACES)
    rows = device.recipe.model.memory.tables()["0"].rows
    assert (device.host_bytes, host.host_bytes) == (0, 52 * rows)
    address = device.bytes["memory_rows"]["tables"] - 52 * rows
    # 4 x 32 tokens have 4 addresses each, 0.6 of them make 308 rows of 52 bytes; three working sets are held at once.
    assert host.bytes["memory_rows"]["tables"] == address + 3 * (52 * 308 + 4 * 512)
    # Each of two devices holds half of a working set.
    halves = make_plan(recipe(folder, "host"), 2)
    assert halves.bytes["memory_rows"]["tables"] == address + 3 * (52 * 154 + 4 * 256)


def test_ngrams_are_listed_by_gain_and_by_gate(runs: dict[str, pathlib.Path]) -> None:
    run = open_run(runs["device"])
    (domain,) = run.dataset.domains
    found = evaluate_memory(run, [domain], batch_size=4, max_tokens=400, training_steps=2)
    row = found["domains"][domain]
    gates = row["top_gates"]["0"]
    assert gates and all(entry["tokens"] >= SEEN_OFTEN and 0 < entry["gate"] < 1 for entry in gates)
    assert [entry["gate"] for entry in gates] == sorted((entry["gate"] for entry in gates), reverse=True)
    assert len({entry["text"] for entry in gates}) == len(gates)
    assert len({entry["gain"] for entry in row["top"]}) > 1 and row["loss"] != row["loss_without"]
    assert any("widest gate of block 0 after: " in line for line in summary(found))
