"""Loss at equal seconds: the report on made-up numbers, lengths of runs, and the programs whose schedules come from outside."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.time_to_loss import DENSE, comparable, data_of, jobs, main
from experiments.time_to_loss_report import best_run, first_below, halved, markdown, smoothed, times_to_loss, write
from experiments.timed_arm import SMOKE, Arm, planned
from sparse_lm.train.benchmark import packed_batch
from sparse_lm.train.session import open_session
from sparse_lm.train.step import Train
from sparse_lm.weight_sparsity.schedules import Periodic


def run(arm: str, multiplier: float, share: float, held_out: float, losses: list[float], probes: list[float]) -> dict:
    """A run whose steps take a second each, with a reading after every second step."""
    seconds = [float(step + 1) for step in range(len(losses))]
    readings = [(2 * n + 2, 2.0 * n + 2.0, loss) for n, loss in enumerate(probes)]
    about = {"arm": arm, "multiplier": multiplier, "share": share, "learning_rate": 1e-3 * multiplier, "parameters": 7}
    length = {"steps": len(losses), "tokens": 10, "seconds": seconds[-1], "changes": 0}
    ends = {"held_out": held_out, "domains": {"talk": held_out}, "training_loss": float(np.mean(losses[-2:]))}
    return {**about, **length, **ends, "curve": {"seconds": seconds, "loss": losses}, "probes": readings}


def report() -> dict:
    runs = [
        run("wide_dense", 1.0, 1.0, 3.5, [9, 8, 7, 6, 5, 4], [8, 6, 4]),
        run("wide_dense", 2.0, 1.0, 3.6, [9, 8, 7, 6, 5, 5], [8, 6, 5]),
        run("wide_sparse_25", 1.0, 1.0, 3.2, [8, 6, 4, 2, 2, 2], [7, 3, 2]),
        run("wide_sparse_25", 2.0, 1.0, 3.0, [8, 6, 4, 2, 1, 1], [6, 2, 1]),
        run("wide_sparse_10", 1.0, 1.0, 5.0, [9, 9, 9, 9, 9, 9], [9, 9, 9]),
        run("wide_sparse_10", 2.0, 1.0, float("nan"), [9, 9, 9, 9, 9, float("nan")], [9, 9, float("nan")]),
        run("wide_sparse_25", 2.0, 0.5, 3.4, [8, 6, 4], [6]),
        run("wide_sparse_10", 1.0, 0.5, 5.5, [9, 9, 9], [9]),
    ]
    setup = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(SMOKE, smoothing=2, probes=3))))
    head = {"device": "cpu", "jax": "0", "date": "today", "command": "x", "setup": setup, "unique_tokens": 20}
    return {**head, "runs": {str(n): found for n, found in enumerate(runs)}}


def test_curves_by_hand() -> None:
    seconds, loss = smoothed({"seconds": [1.0, 2.0, 3.0], "loss": [9.0, 5.0, 1.0]}, 2)
    assert seconds.tolist() == [2.0, 3.0] and loss.tolist() == [7.0, 3.0]
    # From 7 at 2 s to 3 at 3 s: 6 lies a quarter of the way.
    assert first_below(seconds, loss, 6.0) == 2.25
    assert first_below(seconds, loss, 7.0) == 2.0 and first_below(seconds, loss, 2.9) is None


def test_times_to_the_loss_of_the_twin_by_hand() -> None:
    found = times_to_loss(report())
    # The twin's best rate is the first; the mean of its last two losses is 4.5, reached after 6 s, and its last reading 4, after 6 s.
    assert found["wide_dense"]["training"] == {"target": 4.5, "seconds": 6.0, "speed_up": 1.0}
    assert found["wide_dense"]["held_out"] == {"target": 4.0, "seconds": 6.0, "speed_up": 1.0}
    # Second rate; means 7, 5, 3 after 2, 3, 4 s: 4.5 after 3.25 s. Readings 6 and 2 after 2 and 4 s: 4 after 3 s.
    assert found["wide_sparse_25"]["training"]["seconds"] == 3.25
    assert found["wide_sparse_25"]["training"]["speed_up"] == pytest.approx(6 / 3.25)
    assert found["wide_sparse_25"]["held_out"]["speed_up"] == 2.0
    assert found["wide_sparse_10"]["training"] == {"target": 4.5, "seconds": None, "speed_up": None}


def test_the_best_run_is_a_sound_one_over_all_seconds() -> None:
    runs = report()["runs"]
    assert best_run(runs, "wide_sparse_25")["held_out"] == 3.0 and best_run(runs, "wide_sparse_10")["multiplier"] == 1.0
    assert best_run(runs, "other") is None


def test_the_table_says_what_was_not_reached(tmp_path) -> None:
    write(report(), tmp_path)
    table = (tmp_path / "time_to_loss.md").read_text()
    assert table == markdown(report()) and "One seed" in table
    assert (
        "| wide_sparse_10 | not reached | not reached |" in table
        and "| wide_sparse_25 | 3.2 s, 1.85x | 3.0 s, 2.00x |" in table
    )
    assert "| wide_dense | 0.0 M | 1.0e-03 (edge) | 6 |" in table
    first, second = halved(report())
    assert "3.4000, at or below the dense twin's 3.5000 after 6.0 s (-0.1000)" in first and "above" in second
    assert (tmp_path / "time_to_loss.svg").stat().st_size > 1000


def test_steps_that_fit() -> None:
    # 10 / 0.25 = 40 steps without changes. One change in ten adds 1 s: 32 steps are 8 s and three changes 3 s, which is more than 10;
    # 29 steps are 7.25 s and with two changes 9.25 s; 30 steps with three 10.5 s.
    timing = {"step": 0.25, "change": 1.25}
    assert planned(10.0, {"step": 0.25}, lambda steps: 0) == 40
    assert planned(10.0, timing, lambda steps: steps // 10) == 29
    assert planned(0.1, timing, lambda steps: 0) == 2


def test_the_order_of_runs_follows_the_best_rate() -> None:
    setup = dataclasses.replace(SMOKE, multipliers=(1.0, 2.0))
    names = ("wide_dense", "wide_sparse_25", "wide_sparse_10")
    order = list(jobs(setup, names, report()["runs"]))
    assert order[:4] == [(name, 1.0, 1.0) for name in names] + [("wide_dense", 2.0, 1.0)]
    assert order[6:] == [
        ("wide_sparse_25", 2.0, 0.5),
        ("wide_sparse_10", 1.0, 0.5),
        ("wide_sparse_25_static", 2.0, 1.0),
        ("wide_sparse_10_static", 1.0, 1.0),
    ]
    assert list(jobs(setup, (DENSE,), {})) == [(DENSE, 1.0, 1.0), (DENSE, 2.0, 1.0)]


def test_runs_at_other_learning_rates_may_join_a_report() -> None:
    first, second = report(), report()
    second["setup"]["multipliers"] = [0.25]
    assert comparable(first)["setup"] == comparable(second)["setup"] and first["setup"] != second["setup"]
    second["setup"]["seconds"] += 1.0
    assert comparable(first)["setup"] != comparable(second)["setup"]


@pytest.mark.slow
def test_a_share_from_outside_changes_what_the_schedule_changes(tmp_path) -> None:
    """Against the program of a session that knows the length of its run."""
    data = data_of(SMOKE, str(tmp_path))
    arm, steps = Arm("wide_sparse_10", SMOKE, data), 100
    session = open_session(dataclasses.replace(arm.recipe, train=Train(steps=steps)))
    assert arm.changes(steps) == [step for step in range(steps) if session.sparsifier.apart(step)]
    batch = session.put(packed_batch(data.batch_size, data.sequence_length, 300, mean_document=20, seed=0))
    begin = [dataclasses.replace(arm.fresh(), step=jnp.int32(3)) for _ in range(3)]
    expected, _ = session.compile_step(changes=True)[0](begin[0], batch)
    found, _ = arm.lower()["change"].compile()(begin[1], batch, np.float32(arm.topology.drop_fraction(3, steps)))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), found, expected)
    assert all(jax.tree.leaves(same))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), found.model_state, begin[2].model_state)
    assert any(jax.tree.leaves(moved))


@pytest.mark.slow
def test_the_driver_at_smoke_size(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["x", "--smoke", "--out", str(tmp_path / "out"), "--arms", "wide_dense", "wide_sparse_10"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--multipliers", "1", "--data-directory", str(tmp_path / "data")])
    assert main() == 0
    file = tmp_path / "out" / "time_to_loss.json"
    runs = json.loads(file.read_text())["runs"]
    assert [(row["arm"], row["share"]) for row in runs.values()] == [
        ("wide_dense", 1.0),
        ("wide_sparse_10", 1.0),
        ("wide_sparse_10", 0.5),
        ("wide_sparse_10_static", 1.0),
    ]
    for row in runs.values():
        assert len(row["curve"]["loss"]) == row["steps"] and row["probes"][-1][0] == row["steps"]
        due = [step for step in range(row["steps"]) if Periodic(every=SMOKE.every).due(step, row["steps"])]
        assert np.isfinite(row["held_out"]) and row["changes"] == (len(due) if row["arm"] == "wide_sparse_10" else 0)
    # Again: nothing is left to do, so nothing is compiled.
    written = file.stat().st_mtime_ns
    assert main() == 0 and file.stat().st_mtime_ns == written
