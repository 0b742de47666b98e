"""kill -9 at any moment, inside a save too, loses only what came after the last finished save; the rest goes on to the same bits."""

import hashlib
import json
import pathlib
import random

import processes
import pytest
import tiny
from etils import epath
from processes import Child, run_all

from sparse_lm.data.pipeline import prepare, train_stream
from sparse_lm.train.checkpoint_files import newest_sound_step, step_directories
from sparse_lm.train.checkpoint_reader import read_checkpoint

EVERY = 10
INSIDE = [
    ("kill_in_save", 1, "submitted"),
    ("kill_in_save", 1, "begun", 0.02),
    ("kill_in_save", 2, "arrays"),
    ("kill_in_save", 1, "listed"),
    ("kill_in_save", 1, "named"),
]
"""Kills inside a save; each costs at most two save intervals."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("kills")
    tiny.corpus(folder / "text")
    return folder


def changes(steps: int) -> dict:
    return {"train__steps": steps, "checkpoint__every": EVERY, "data__batch_size": 4, "log__tensorboard": True}


def state_of(run_dir: pathlib.Path, steps: int, folder: pathlib.Path) -> tuple[dict, list[str]]:
    """The last checkpoint's leaves, and hashes of the ten batches that would follow."""
    source = read_checkpoint(run_dir / "checkpoints", steps)
    recipe = processes.recipe(folder, changes(steps))
    dataset = prepare(recipe.data, report=lambda line: None)
    stream = train_stream(dataset, recipe.data, seed=recipe.seed, state=source.data_state)
    batches = [next(stream)[0] for _ in range(10)]
    return source.state, [
        hashlib.sha256(b"".join(b[name].tobytes() for name in sorted(b))).hexdigest() for b in batches
    ]


def scalars(run_dir: pathlib.Path) -> list[tuple[int, float]]:
    """What TensorBoard shows of the loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def rows(run_dir: pathlib.Path) -> list[dict]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: row[key] for key in ("step", "loss", "grad_norm", "tokens")} for row in found if row["kind"] == "train"
    ]


def campaign(folder: pathlib.Path, kills: int, seed: int) -> None:
    """Kills a run over and over, then lets it finish and compares it with one that was never killed."""
    draw = random.Random(seed)
    inside = [INSIDE[i % len(INSIDE)] for i in range(kills // 4)]
    at_start = [("kill_after", 0, draw.uniform(0.0, 1.5)) for _ in range(kills // 10)]
    while_running = [
        ("kill_after", draw.randint(1, 12), draw.uniform(0.0, 0.01)) for _ in range(kills - len(inside) - len(at_start))
    ]
    hooks = inside + at_start + while_running
    draw.shuffle(hooks)
    # Each kill comes at most 15 steps or two save intervals after a finished save, so at most 20 steps are gained by it and most
    # gain 10 or none: the run cannot be over before the last kill.
    steps = 12 * kills
    straight, killed = folder / f"straight_{kills}", folder / f"killed_{kills}"
    assert run_all(Child(str(folder), str(straight), changes(steps))) == [0]

    newest = 0
    for hook in hooks:
        child = Child(str(folder), str(killed), changes(steps), hook=hook)
        assert run_all(child) == [-9], (hook, child.log().read_text())
        found, notes = newest_sound_step(epath.Path(killed / "checkpoints"), keep_damaged=True)
        assert not notes and max(step_directories(epath.Path(killed / "checkpoints")), default=None) == found
        assert (found or 0) >= newest, f"{hook} lost a finished save: {newest} -> {found}"
        newest = found or 0
    assert newest > 0

    child = Child(str(folder), str(killed), changes(steps))
    assert run_all(child) == [0], child.log().read_text()
    (state, batches), (expected, expected_batches) = (state_of(d, steps, folder) for d in (killed, straight))
    tiny.assert_same(state, expected)
    assert batches == expected_batches and len(set(batches)) == 10
    # Rows past the step that a run went on from were cut, so each step is there once, with the same numbers.
    assert rows(killed) == rows(straight) and [row["step"] for row in rows(killed)] == list(range(1, steps + 1))
    assert scalars(killed) == scalars(straight)


@pytest.mark.faults
def test_twenty_kills_change_no_bit(folder: pathlib.Path) -> None:
    campaign(folder, kills=20, seed=1)


@pytest.mark.slow
def test_a_hundred_kills_change_no_bit(folder: pathlib.Path) -> None:
    campaign(folder, kills=100, seed=2)


@pytest.mark.faults
def test_a_full_disk_is_an_error_that_leaves_earlier_steps_intact(folder: pathlib.Path) -> None:
    run_dir = folder / "full"
    child = Child(str(folder), str(run_dir), changes(24), hook=("limit_file_size", 20, 40_000))
    assert run_all(child) == [2]
    text = child.log().read_text()
    assert (
        f"error: saving step 20 to {run_dir / 'checkpoints'} failed:" in text and "Finished checkpoints: [10]" in text
    )
    checkpoints = epath.Path(run_dir / "checkpoints")
    assert newest_sound_step(checkpoints, keep_damaged=True) == (10, [])
    assert [path.name for path in checkpoints.iterdir()] == ["10"]  # the unfinished save no longer fills the disk
    assert run_all(Child(str(folder), str(run_dir), changes(24))) == [0]
    assert read_checkpoint(checkpoints).step == 24
