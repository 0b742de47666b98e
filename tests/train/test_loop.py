"""Whole runs on a few text files: stopping and going on changes no bit, and what cannot go on says why."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny

from sparse_lm.config import ConfigError
from sparse_lm.parallel.watchdog import RESUMABLE
from sparse_lm.recipe import Recipe, save_recipe
from sparse_lm.routing.top_k import TopKRouter
from sparse_lm.train import session as session_module
from sparse_lm.train.checkpoint_reader import CheckpointError, read_checkpoint
from sparse_lm.train.loop import TrainingDiverged, train
from sparse_lm.train.population import Population
from sparse_lm.train.session import open_session, starting_point

FEED_FORWARD = dataclasses.replace(
    tiny.MOE, experts=2, activation="relu_squared", router=TopKRouter(k=1, bias_rate=0.01, balance_coefficient=0.1)
)

STOP_AFTER_SAVE = """
import os, pathlib, signal, sys
from sparse_lm.recipe import load_recipe
from sparse_lm.train import loop

save = loop.Checkpointer.save
def save_and_signal(self, step, *rest):
    save(self, step, *rest)
    if step == 4:
        os.kill(os.getpid(), signal.SIGTERM)
loop.Checkpointer.save = save_and_signal
sys.exit(loop.train(load_recipe(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2])))
"""
"""A run that gets SIGTERM after the save of step 4, while it goes on with step 5."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny.corpus(folder / "text")
    return folder


def recipe(folder: pathlib.Path, **changes) -> Recipe:
    start = {"model__layers": 1, "train__ema_decay": 0.9, "checkpoint__keep_last": 9}
    return tiny.recipe(folder, FEED_FORWARD, **{**start, **changes})


@pytest.fixture(scope="module")
def straight(folder: pathlib.Path) -> pathlib.Path:
    """The directory of a run of eight steps without a stop."""
    run_dir = folder / "straight"
    assert train(recipe(folder), run_dir) == 0
    return run_dir


def rows(run_dir: pathlib.Path, kind: str | None = None) -> list[dict]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if kind in (None, row["kind"])]


def computed(run_dir: pathlib.Path) -> list[dict]:
    """The rows without what is measured."""
    keep = ("kind", "step", "loss", "learning_rate", "grad_norm", "skipped", "tokens", "bits_per_byte", "domains")
    return [{k: v for k, v in row.items() if k in keep or k.startswith("router/")} for row in rows(run_dir)]


def final(run_dir: pathlib.Path, step: int = 8) -> dict:
    return read_checkpoint(run_dir / "checkpoints", step).state


def steps_of(run_dir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit())


def test_a_run_writes_what_it_promises(straight: pathlib.Path, folder: pathlib.Path) -> None:
    assert steps_of(straight) == [4, 8]
    assert [row["step"] for row in rows(straight, "train")] == list(range(1, 9))
    assert [row["step"] for row in rows(straight, "validation")] == [4, 8]
    for name in ("config.json", "environment.json", "data.json", "accounting.json", "metrics.jsonl"):
        assert (straight / name).stat().st_size > 0
    last = rows(straight, "train")[-1]
    assert last["tokens"] == 8 * 4 * 32  # steps x rows x length: windows of a stream are full
    assert sum(last["router/blocks.0/load"]) == pytest.approx(1.0)
    losses = [row["loss"] for row in rows(straight, "train")]
    assert losses[-1] < losses[0] and losses[0] == pytest.approx(np.log(264), rel=0.2)
    state = final(straight)
    assert {"params", "opt_state", "model_state", "ema", "key", "step", "skipped"} == set(state)
    assert int(state["step"]) == 8


def test_a_finished_run_is_left_as_it_is(straight: pathlib.Path, folder: pathlib.Path) -> None:
    before = (straight / "metrics.jsonl").read_text()
    assert train(recipe(folder), straight) == 0
    assert (straight / "metrics.jsonl").read_text() == before and steps_of(straight) == [4, 8]


def test_sigterm_saves_and_exits_with_75_and_the_run_goes_on_to_the_same_bits(
    straight: pathlib.Path, folder: pathlib.Path
) -> None:
    run_dir, config = folder / "stopped", folder / "recipe"
    config.mkdir()
    save_recipe(recipe(folder), config)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-c", STOP_AFTER_SAVE, str(config), str(run_dir)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == RESUMABLE == 75, process.stderr
    # The signal came at step 4 or 5: the step under way is finished and saved.
    stopped_at = steps_of(run_dir)[-1]
    assert stopped_at in (4, 5) and rows(run_dir, "train")[-1]["step"] == stopped_at

    assert train(recipe(folder), run_dir) == 0
    tiny.assert_same(final(run_dir), final(straight))
    assert computed(run_dir) == computed(straight)


def test_rows_past_the_resumed_step_are_cut_and_written_anew(straight: pathlib.Path, folder: pathlib.Path) -> None:
    run_dir = folder / "crashed"
    shutil.copytree(straight, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "8")  # as if the machine had gone down after step 8, before its save
    assert train(recipe(folder), run_dir) == 0
    assert [row["step"] for row in rows(run_dir, "train")] == list(range(1, 9))
    assert computed(run_dir) == computed(straight)
    tiny.assert_same(final(run_dir), final(straight))


def test_a_branch_that_starts_from_everything_ends_in_the_same_bits(
    straight: pathlib.Path, folder: pathlib.Path
) -> None:
    start = {"start_from__run": str(straight), "start_from__step": 4, "start_from__keep": "everything"}
    run_dir = folder / "branch"
    assert train(recipe(folder, name="branch", **start), run_dir) == 0
    assert [row["step"] for row in rows(run_dir, "train")] == [5, 6, 7, 8]
    tiny.assert_same(final(run_dir), final(straight))


def test_a_decay_branches_off_a_stable_stretch(straight: pathlib.Path, folder: pathlib.Path) -> None:
    from sparse_lm.train.schedule import WarmupStableDecay

    schedule = WarmupStableDecay(warmup_steps=2, decay_start=4, decay_steps=2, decay_shape="linear")
    start = {"start_from__run": str(straight), "start_from__step": 4, "start_from__keep": "everything"}
    branch = recipe(folder, train__steps=6, optimizer__schedule=schedule, **start)
    state, data_state = starting_point(open_session(branch))
    tiny.assert_same(dataclasses.asdict(state) | {"tables": {}}, final(straight, 4) | {"tables": {}})
    assert data_state == read_checkpoint(straight / "checkpoints", 4).data_state
    assert [float(branch.optimizer.schedule_at(step, 6)) for step in (3, 4, 5)] == [1.0, 1.0, 0.5]


def test_parameters_alone_start_a_new_run(straight: pathlib.Path, folder: pathlib.Path) -> None:
    session = open_session(recipe(folder, seed=5, start_from__run=str(straight), start_from__exclude=("embedding",)))
    state, data_state = starting_point(session)
    fresh, old = session.create(), final(straight)
    assert data_state is None and int(state.step) == 0
    tiny.assert_same(state.opt_state, fresh.opt_state)
    np.testing.assert_array_equal(state.params["head"], old["params"]["head"])
    np.testing.assert_array_equal(state.params["embedding"], fresh.params["embedding"])
    tiny.assert_same(state.ema, state.params)


def test_a_source_that_does_not_fit_is_refused_by_path(straight: pathlib.Path, folder: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match=r"reshaped:   params\.embedding \(264, 16\) -> \(264, 32\)"):
        starting_point(open_session(recipe(folder, model__d_model=32, start_from__run=str(straight))))
    with pytest.raises(CheckpointError, match="no checkpoint to read"):
        starting_point(open_session(recipe(folder, start_from__run=str(folder / "nowhere"))))


def test_a_changed_recipe_does_not_go_on_in_the_same_directory(straight: pathlib.Path, folder: pathlib.Path) -> None:
    changed = recipe(folder, optimizer__learning_rate=1e-2, model__pattern__0__router__k=2, log__log_every=3)
    with pytest.raises(ConfigError) as error:
        train(changed, straight)
    message = str(error.value)
    assert "optimizer.learning_rate: 0.003 -> 0.01" in message and "router" in message
    assert "log_every" not in message  # how often a run reports changes nothing that is trained
    assert "start_from.run branches from it" in message


def poisoned(monkeypatch: pytest.MonkeyPatch, from_step: int) -> None:
    """Sets a parameter to NaN before the given step, once compiled."""
    compile_step = session_module.Session.compile_step

    def compile_and_poison(self, documents):
        step, seconds = compile_step(self, documents)

        def run(state, batch):
            if int(state.step) == from_step:
                scale = state.params["final_norm"]["scale"].at[0].set(np.nan)
                state = dataclasses.replace(state, params={**state.params, "final_norm": {"scale": scale}})
            return step(state, batch)

        return run, seconds

    monkeypatch.setattr(session_module.Session, "compile_step", compile_and_poison)


def test_divergence_names_step_groups_and_the_last_good_checkpoint(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, from_step=5)
    run_dir = folder / "diverged"
    with pytest.raises(TrainingDiverged) as error:
        train(recipe(folder, train__skip_limit=1), run_dir)
    message = str(error.value)
    # Step 6 is skipped, step 7 is one too many; step 4 was saved before.
    assert "2 steps in a row up to step 7 were not finite (train.skip_limit = 1)" in message
    assert "blocks.0, embedding" in message and "final_norm.scale" in message
    assert f"last good checkpoint: 4 in {run_dir / 'checkpoints'}" in message
    assert steps_of(run_dir) == [4]
    events = rows(run_dir, "event")
    assert [(row["step"], row["event"]) for row in events] == [(6, "skipped"), (7, "skipped")]
    assert np.isfinite(tiny.flatten(final(run_dir, 4)["params"])["final_norm.scale"]).all()


@pytest.mark.slow
def test_a_population_goes_on_to_the_same_bits(folder: pathlib.Path) -> None:
    small = recipe(
        folder,
        model__pattern=(tiny.DENSE,),
        train__steps=4,
        train__ema_decay=None,
        checkpoint__every=2,
        population=Population(seeds=(0, 1), learning_rate_multipliers=(0.5, 1.0)),
    )
    whole, resumed = folder / "population", folder / "population_resumed"
    assert train(small, whole) == 0
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "4")
    assert train(small, resumed) == 0
    tiny.assert_same(final(resumed, 4), final(whole, 4))
    assert computed(resumed) == computed(whole)
    last = rows(whole, "train")[-1]
    assert len(last["loss"]) == 4 and last["learning_rate"] == pytest.approx([0.0015, 0.003] * 2)
    assert len(rows(whole, "validation")[-1]["loss"]) == 4
