"""Real processes that train together on loopback: the numbers of one process, and a clear end when one of them dies or differs."""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import tiny
from processes import STEPS, Child, free_port, pair, run_all

from sparse_lm.train.checkpoint_reader import read_checkpoint

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("processes")
    tiny.corpus(folder / "text")
    return folder


@pytest.fixture(scope="module")
def whole(folder: pathlib.Path) -> pathlib.Path:
    """A run of one process with eight devices."""
    run_dir = folder / "whole"
    assert run_all(Child(str(folder), str(run_dir), {}, devices=8)) == [0]
    return run_dir


def logs(run_dir: pathlib.Path) -> list[str]:
    return [run_dir.with_name(f"{run_dir.name}.{number}.log").read_text() for number in range(2)]


def losses(run_dir: pathlib.Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def steps_of(run_dir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit())


def test_a_run_that_loses_a_process_and_is_stopped_ends_like_one_process(
    whole: pathlib.Path, folder: pathlib.Path
) -> None:
    run_dir = folder / "two"
    # Process 1 is killed; process 0 ends with its name, to be started again.
    kill = ("at_step", 5, "signal_self", "SIGKILL")
    assert run_all(*pair(folder, run_dir, (), kill)) == [75, -9]
    pattern = r"stopped: no sign of life for 10 s .* from process 1 \(\S+, pid \d+\); process 0 \(\S+, pid \d+\) stops\. Start all"
    assert re.search(pattern, logs(run_dir)[0]), logs(run_dir)[0]
    saved = steps_of(run_dir)[-1]
    assert saved in (2, 4)

    # Started again, it goes on; SIGTERM to process 1 alone saves and stops both.
    stop = ("at_step", 3, "signal_self", "SIGTERM")
    assert run_all(*pair(folder, run_dir, (), stop)) == [75, 75], logs(run_dir)
    stopped = steps_of(run_dir)[-1]
    assert saved + 3 <= stopped <= saved + 6 < STEPS  # seen a step late by everybody

    assert run_all(*pair(folder, run_dir)) == [0, 0], logs(run_dir)
    found, expected = losses(run_dir), losses(whole)
    assert sorted(found) == sorted(expected) == list(range(1, STEPS + 1))
    np.testing.assert_allclose([found[s] for s in found], [expected[s] for s in found], rtol=1e-5)
    # One checkpoint, which one process reads.
    left, right = (read_checkpoint(d / "checkpoints", STEPS) for d in (run_dir, whole))
    assert left.data_state == right.data_state
    # gloo adds in another order than threads do; Adam divides by small second moments, which magnifies the rounding
    tiny.assert_close(left.state["params"], right.state["params"], rtol=1e-4, atol=1e-4)
    # Process 0 alone reports.
    assert "finished" not in logs(run_dir)[1] and sorted(p.name for p in run_dir.iterdir()) == sorted(
        p.name for p in whole.iterdir()
    )


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_in_two_and_back(whole: pathlib.Path, folder: pathlib.Path) -> None:
    run_dir = folder / "one_two_one"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / str(STEPS))
    assert run_all(*pair(folder, run_dir, mesh__fsdp=8, mesh__data=1)) == [0, 0], logs(run_dir)
    np.testing.assert_allclose(losses(run_dir)[STEPS], losses(whole)[STEPS], rtol=1e-5)


@pytest.mark.slow
def test_when_process_0_dies_the_other_says_so(folder: pathlib.Path) -> None:
    run_dir = folder / "first_dies"
    kill = ("at_step", 3, "signal_self", "SIGKILL")
    assert run_all(*pair(folder, run_dir, kill)) == [-9, 75]
    assert re.search(r"stopped: (no sign of life .* from )?process 0 \(\S+, pid \d+\)", logs(run_dir)[1])


@pytest.mark.slow
def test_a_frozen_process_stops_the_others(folder: pathlib.Path) -> None:
    run_dir = folder / "frozen"
    children = pair(folder, run_dir, (), ("at_step", 3, "signal_self", "SIGSTOP"))
    started = [child.start() for child in children]
    started[0].join(120)
    assert started[0].exitcode == 75
    assert re.search(r"no sign of life for 10 s .* from process 1", logs(run_dir)[0])
    started[1].kill()
    started[1].join()


@pytest.mark.slow
def test_a_process_that_hangs_while_it_breathes_is_named(folder: pathlib.Path) -> None:
    run_dir = folder / "hangs"
    hang = ("at_step", 3, "sleep_forever")
    assert run_all(*pair(folder, run_dir, (), hang, limits={"stall_timeout_s": 30.0})) == [75, 75]
    for log in logs(run_dir):
        assert re.search(r"process 1 \(\S+, pid \d+\) hangs: 'waiting for the batch of step 4' for 3\d s", log), log


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_with_its_words(folder: pathlib.Path) -> None:
    run_dir = folder / "error"
    codes = run_all(*pair(folder, run_dir, (), ("at_step", 3, "raise_error")))
    assert codes == [2, 1]  # not resumable: starting again would meet the same
    pattern = r"stopped: process 1 \(\S+, pid \d+\) failed: OSError: the disk of this process is gone"
    assert re.search(pattern, logs(run_dir)[0])


@pytest.mark.slow
def test_all_agree_on_a_run_that_is_not_finite(folder: pathlib.Path) -> None:
    run_dir = folder / "diverged"
    assert run_all(*pair(folder, run_dir, ("poison", 5), ("poison", 5), train__skip_limit=1)) == [2, 2]
    for log in logs(run_dir):
        assert "2 steps in a row up to step 6 were not finite (train.skip_limit = 1)" in log
        assert "last good checkpoint: 4" in log
    assert steps_of(run_dir) == [2, 4]


def test_processes_that_differ_are_told_apart(folder: pathlib.Path) -> None:
    run_dir = folder / "differ"
    codes = run_all(*pair(folder, run_dir, changes_1={"optimizer__learning_rate": 1e-2, "seed": 5}))
    assert codes == [2, 2]
    for log in logs(run_dir):
        assert "the processes of this run differ in their setup:" in log
        assert re.search(
            r"process 1 \(\S+, pid \d+\): optimizer.learning_rate = 0\.01; process 0 \(\S+, pid \d+\): 0\.003", log
        )
        assert re.search(r"process 1 .*: seed = 5; process 0 .*: 0", log)
    assert not (run_dir / "config.json").exists()


@pytest.mark.parametrize("cluster", ["slurm", "auto"])
def test_slurm_says_who_is_who(cluster: str, folder: pathlib.Path) -> None:
    # The variables that srun sets. That the processes meet, and which is number 1, shows in what they find to differ.
    run_dir, port = folder / f"slurm_{cluster}", free_port()

    def child(number: int) -> Child:
        variables = {
            "SLURM_JOB_ID": "4711",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(number),
            "SLURM_LOCALID": str(number),
            "JAX_COORDINATOR_PORT": str(port),
        }
        return Child(
            str(folder),
            f"{run_dir}_{number}",
            {"seed": number},
            distributed={"cluster": cluster},
            hook=("environment", variables),
        )

    children = [child(0), child(1)]
    assert run_all(*children) == [2, 2]
    for one in children:
        assert re.search(r"process 1 \(\S+, pid \d+\): seed = 1; process 0 \(\S+, pid \d+\): 0", one.log().read_text())


def test_processes_that_see_different_data_are_told_apart(folder: pathlib.Path) -> None:
    # The same config on another disk: hidden behind a path that means something else on each host.
    for number in range(2):
        tiny.corpus(folder / f"host{number}" / "text", documents=24 + 8 * number)
    run_dir = folder / "other_data"
    children = pair(folder, run_dir)
    children = [
        Child(**{**child.__dict__, "hook": ("chdir", str(folder / f"host{number}")), "changes": relative()})
        for number, child in enumerate(children)
    ]
    assert run_all(*children) == [2, 2], logs(run_dir)
    for log in logs(run_dir):
        assert re.search(r"differ in their data:\n  process 1 .*: hash = '\w+'; process 0 .*: '\w+'", log), log


def relative() -> dict:
    from sparse_lm.data.files import Files

    return {
        "data__sources": (Files(paths=("text",), validation=("held_out/*",)),),
        "data__directory": "data",
    }


def test_a_missing_process_is_reported(folder: pathlib.Path) -> None:
    run_dir = folder / "missing"
    first, _ = pair(folder, run_dir, limits={"connect_timeout_s": 3.0})
    assert run_all(first) == [75]
    text = first.log().read_text()
    wanted = f"not all 2 processes met at {first.distributed['coordinator']} within distributed.connect_timeout_s = 3."
    assert wanted in text
