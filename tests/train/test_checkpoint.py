"""Checkpoints of a small state: bitwise round trips, layouts, what is kept, and what does not fit."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath

from sparse_lm.parallel.mesh import MeshShape
from sparse_lm.parallel.rules import replicated
from sparse_lm.train import checkpoint_reader
from sparse_lm.train.checkpoint import Checkpointer, Checkpoints, checkpoint_directory, mismatches
from sparse_lm.train.checkpoint_files import newest_sound_step
from sparse_lm.train.checkpoint_reader import CheckpointError, DamagedCheckpoint, read_checkpoint
from sparse_lm.train.state import TrainState


def state(execution: str = "scanned", fill: float = 0.1, members: int = 0, width: int = 4) -> TrainState:
    """A state whose three blocks hold the same numbers whether stacked or not."""
    lead = (members,) if members else ()
    draw = np.random.default_rng(0).normal

    def array(*shape: int) -> np.ndarray:
        return (draw(size=(*lead, *shape)) + fill).astype(np.float32)

    blocks_w = [array(width, 2) for _ in range(3)]
    blocks = {str(i): {"w": w} for i, w in enumerate(blocks_w)}
    if execution == "scanned":
        blocks = {"0": blocks["0"], "1_to_2": {"w": np.stack(blocks_w[1:], len(lead))}}
    params = {"blocks": blocks, "embedding": array(7, width)}
    scalar = np.full(lead, 3, np.int32)
    moments = jax.tree.map(lambda leaf: (leaf * 1e-20).astype(jnp.bfloat16), params)
    out = TrainState(scalar, params, {"count": scalar, "mu": moments}, {}, {}, {}, array(2).view(np.uint32), scalar * 0)
    return jax.tree.map(jnp.asarray, out)


def dims_like(execution: str, members: int) -> TrainState:
    lead = ("members",) if members else ()
    blocks = {str(i): {"w": (*lead, "embed", "ffn")} for i in range(3)}
    if execution == "scanned":
        blocks = {"0": blocks["0"], "1_to_2": {"w": (*lead, "layers", "embed", "ffn")}}
    params = {"blocks": blocks, "embedding": (*lead, "vocab", "embed")}
    return TrainState(lead, params, {"count": lead, "mu": params}, {}, {}, {}, (*lead, "key"), lead)


MESH = MeshShape(data=1).build(jax.devices()[:1])


def open_(
    directory: pathlib.Path, execution: str = "scanned", members: int = 0, width: int = 4, **fields
) -> Checkpointer:
    like = jax.eval_shape(lambda: state(execution, members=members, width=width))
    return Checkpointer(
        directory, Checkpoints(**fields), like, dims_like(execution, members), MESH, population=members > 0
    )


def shardings(execution: str = "scanned", members: int = 0):
    return jax.tree.map(lambda _: replicated(MESH), state(execution, members=members))


def save(checkpointer: Checkpointer, step: int, value: TrainState, loss: float = float("nan")) -> None:
    checkpointer.save(
        step, value, {"windows": 10 * step, "stream": "abc"}, {"schema": 1, "recipe": {"name": "x"}}, loss
    )


def test_a_state_reads_back_to_the_bit_with_its_data_state_and_recipe(tmp_path: pathlib.Path) -> None:
    checkpointer = open_(tmp_path)
    assert checkpointer.steps() == []
    save(checkpointer, 3, state())
    checkpointer.wait()
    restored, data_state = checkpointer.restore(3, shardings())
    tiny.assert_same(dataclasses.asdict(restored), dataclasses.asdict(state()))
    assert jax.tree.map(lambda leaf: leaf.dtype, restored) == jax.tree.map(lambda leaf: leaf.dtype, state())
    assert data_state == {"windows": 30, "stream": "abc"}
    checkpointer.close()
    source = read_checkpoint(tmp_path)
    assert (source.step, source.data_state, source.recipe) == (3, data_state, {"schema": 1, "recipe": {"name": "x"}})
    assert sorted(source.state["params"]["blocks"]) == ["0", "1", "2"]


@pytest.mark.parametrize(("written", "read"), [("scanned", "unrolled"), ("unrolled", "scanned")])
@pytest.mark.parametrize("members", [0, 2])
def test_scanned_and_unrolled_runs_read_each_other(
    written: str, read: str, members: int, tmp_path: pathlib.Path
) -> None:
    with_one = open_(tmp_path, written, members)
    save(with_one, 1, state(written, members=members))
    with_one.close()
    other = open_(tmp_path, read, members)
    restored, _ = other.restore(1, shardings(read, members))
    other.close()
    tiny.assert_same(dataclasses.asdict(restored), dataclasses.asdict(state(read, members=members)))


def test_what_does_not_fit_is_listed_by_path(tmp_path: pathlib.Path) -> None:
    first = open_(tmp_path, "scanned")
    save(first, 1, state())
    first.close()
    wider = open_(tmp_path, "scanned", width=5)
    with pytest.raises(CheckpointError) as error:
        wider.restore(1, shardings())
    wider.close()
    message = str(error.value)
    assert f"checkpoint 1 in {tmp_path} does not fit this recipe" in message
    assert "reshaped:   params.embedding (7, 4) -> (7, 5)" in message
    assert "reshaped:   params.blocks.2.w (4, 2) -> (5, 2)" in message


def test_missing_unexpected_and_reshaped_leaves() -> None:
    wanted = {"a": {"b": np.zeros(2), "c": np.zeros(3)}, "same": np.zeros(1)}
    found = {"a": {"b": np.zeros(4), "d": np.zeros(5)}, "same": np.ones(1)}
    assert mismatches(wanted, found) == [
        "  missing:    a.c (3,)",
        "  unexpected: a.d (5,)",
        "  reshaped:   a.b (4,) -> (2,)",
    ]


@pytest.mark.parametrize(
    ("fields", "losses", "kept"),
    [
        ({"keep_last": 2}, {}, [5, 6]),
        ({"keep_last": 1, "keep_every": 3}, {}, [3, 6]),
        # best: 2 and 4, latest: 6; 5 has no loss and is not among the best
        ({"keep_last": 1, "keep_best": 2}, {1: 3.0, 2: 1.0, 3: 2.5, 4: 1.5, 6: 2.0}, [2, 4, 6]),
    ],
)
def test_what_is_kept(fields: dict, losses: dict, kept: list[int], tmp_path: pathlib.Path) -> None:
    checkpointer = open_(tmp_path, **fields)
    for step in range(1, 7):
        save(checkpointer, step, state(), losses.get(step, float("nan")))
    checkpointer.wait()
    assert checkpointer.steps() == kept
    checkpointer.close()
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == kept


def test_a_step_is_saved_once(tmp_path: pathlib.Path) -> None:
    checkpointer = open_(tmp_path)
    save(checkpointer, 1, state(fill=0.1))
    checkpointer.wait()
    save(checkpointer, 1, state(fill=0.9))
    restored, _ = checkpointer.restore(1, shardings())
    checkpointer.close()
    tiny.assert_same(dataclasses.asdict(restored), dataclasses.asdict(state(fill=0.1)))


def test_a_save_may_go_on_while_the_state_is_overwritten(tmp_path: pathlib.Path) -> None:
    checkpointer, value = open_(tmp_path), state()
    save(checkpointer, 1, value)
    jax.tree.map(lambda leaf: leaf.delete(), value)  # as donation does in the next step
    checkpointer.wait()
    restored, _ = checkpointer.restore(1, shardings())
    checkpointer.close()
    tiny.assert_same(dataclasses.asdict(restored), dataclasses.asdict(state()))


def test_a_save_that_fails_is_reported_with_what_is_there(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = open_(tmp_path)
    save(checkpointer, 1, state())
    checkpointer.wait()

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpointer._manager, "save", full)
    save(checkpointer, 2, state())
    with pytest.raises(CheckpointError, match=r"No space left on device\. Finished checkpoints: \[1\]"):
        checkpointer.wait()
    checkpointer.close()


def test_an_unfinished_checkpoint_is_not_seen(tmp_path: pathlib.Path) -> None:
    checkpointer = open_(tmp_path)
    save(checkpointer, 1, state())
    checkpointer.close()
    # What a process killed while saving leaves behind.
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    again = open_(tmp_path)
    assert again.steps() == [1]
    again.close()


@pytest.mark.parametrize(
    ("step", "words"),
    [(None, "has no finished checkpoint; finished: none"), (4, "has no finished checkpoint 4; finished: none")],
)
def test_reading_where_nothing_is(step: int | None, words: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(tmp_path / "empty", step)
    with pytest.raises(CheckpointError, match="no checkpoint to read"):
        read_checkpoint(tmp_path / "nowhere", step)


def test_reading_a_step_that_is_not_there_names_those_that_are(tmp_path: pathlib.Path) -> None:
    checkpointer = open_(tmp_path)
    save(checkpointer, 1, state())
    save(checkpointer, 2, state(fill=0.5))
    checkpointer.close()
    with pytest.raises(CheckpointError, match=r"has no finished checkpoint 7; finished: \[1, 2\]"):
        read_checkpoint(tmp_path, 7)
    assert read_checkpoint(tmp_path).step == 2 and read_checkpoint(tmp_path, 1).step == 1


def saved_steps(directory: pathlib.Path, *steps: int) -> None:
    checkpointer = open_(directory, keep_last=9)
    for step in steps:
        save(checkpointer, step, state(fill=step))
    checkpointer.close()


def data_file(step: pathlib.Path) -> pathlib.Path:
    """The largest file of a step: the arrays."""
    return max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(step: pathlib.Path) -> pathlib.Path:
    path = data_file(step)
    path.write_bytes(path.read_bytes()[:-7])
    return path


def remove(step: pathlib.Path) -> pathlib.Path:
    path = step / "state" / "manifest.ocdbt"
    path.unlink()
    return path


def add(step: pathlib.Path) -> pathlib.Path:
    path = step / "state" / "stray.bin"
    path.write_bytes(b"not ours")
    return path


def alter(step: pathlib.Path) -> pathlib.Path:
    path = step / "data" / "metadata"
    path.write_bytes(path.read_bytes().replace(b"2", b"3"))
    return path


def without_inventory(step: pathlib.Path) -> pathlib.Path:
    path = step / "inventory" / "inventory.json"
    path.unlink()
    return path


@pytest.mark.parametrize(
    ("harm", "word"),
    [
        (truncate, "truncated"),
        (remove, "missing"),
        (add, "foreign"),
        (alter, "altered"),
        (without_inventory, "missing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_file_is_named_and_the_step_before_it_used(harm, word: str, tmp_path: pathlib.Path) -> None:
    saved_steps(tmp_path, 1, 2)
    directory = epath.Path(tmp_path)
    assert newest_sound_step(directory) == (2, [])
    harmed = harm(tmp_path / "2")
    # Who only reads leaves it where it is.
    with pytest.raises(CheckpointError, match=f"checkpoint 2 is damaged: {word} {harmed}"):
        read_checkpoint(tmp_path, 2)
    assert read_checkpoint(tmp_path).step == 1
    found, notes = newest_sound_step(directory)
    assert found == 1 and len(notes) == 1
    assert f"{word} {harmed}" in notes[0] and f"set aside as {tmp_path / 'damaged-2'}" in notes[0]
    # The step can be saved anew; what was set aside stays.
    again = open_(tmp_path, keep_last=9)
    restored, _ = again.restore(1, shardings())
    tiny.assert_same(dataclasses.asdict(restored), dataclasses.asdict(state(fill=1)))
    save(again, 2, state(fill=2))
    again.close()
    assert newest_sound_step(directory) == (2, []) and (tmp_path / "damaged-2").is_dir()


def test_no_sound_step_is_none_with_a_note_for_each(tmp_path: pathlib.Path) -> None:
    saved_steps(tmp_path, 1, 2)
    (tmp_path / "7").mkdir()
    truncate(tmp_path / "1")
    remove(tmp_path / "2")
    found, notes = newest_sound_step(epath.Path(tmp_path))
    assert found is None and [note.split()[1] for note in notes] == ["7", "2", "1"]
    assert "missing" in notes[0] and "not a finished checkpoint of a run" in notes[0]
    assert newest_sound_step(epath.Path(tmp_path / "nowhere")) == (None, [])


def test_a_file_that_cannot_be_read_is_damage_and_a_device_that_fails_is_none(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged checkpoint is set aside by a run; a sound one must not be, because there was no memory for it."""
    saved_steps(tmp_path, 1)
    for error, seen in (
        (ValueError("cut"), DamagedCheckpoint),
        (jax.errors.JaxRuntimeError("full"), jax.errors.JaxRuntimeError),
    ):

        def fails(*_, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(checkpoint_reader, "read_leaves", fails)
        checkpointer = open_(tmp_path)
        with pytest.raises(seen, match=str(error)):
            checkpointer.restore(1, shardings())
        checkpointer.close()
        with pytest.raises(seen, match=str(error)):
            read_checkpoint(tmp_path, 1)


def test_restoring_leaves_no_array_but_those_of_the_state(tmp_path: pathlib.Path) -> None:
    saved_steps(tmp_path, 1)
    checkpointer = open_(tmp_path)
    live_before = {id(a) for a in jax.live_arrays()}
    restored, _ = checkpointer.restore(1, shardings())
    checkpointer.close()
    mine = sum(leaf.nbytes for leaf in jax.tree.leaves(restored))
    alive = sum(a.nbytes for a in jax.live_arrays() if id(a) not in live_before)
    assert alive == mine


def test_a_checkpoint_directory_may_be_remote() -> None:
    config = Checkpoints(directory="gs://bucket/run/checkpoints")
    directory = checkpoint_directory(pathlib.Path("runs/x"), config)
    assert str(directory) == "gs://bucket/run/checkpoints" and str(directory / "3" / "state").startswith("gs://bucket/")
    assert str(checkpoint_directory("gs://bucket/run", Checkpoints())) == "gs://bucket/run/checkpoints"
    assert str(checkpoint_directory(pathlib.Path("runs/x"), Checkpoints())) == "runs/x/checkpoints"


def test_nothing_is_pickled(tmp_path: pathlib.Path) -> None:
    root = pathlib.Path(__file__).parents[2]
    sources = [
        path
        for name in ("sparse_lm", "pallas_kernels", "experiments", "scripts")
        for path in (root / name).rglob("*.py")
    ]
    assert len(sources) > 100
    banned = re.compile(
        r"^\s*(import|from)\s+(pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal)\b|allow_pickle\s*=\s*True", re.M
    )
    assert [str(path) for path in sources if banned.search(path.read_text())] == []
    saved_steps(tmp_path, 1)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            # A pickle of protocol 2 and above begins with 0x80 and its version, and ends with a full stop.
            content = path.read_bytes()
            assert not (content[:1] == b"\x80" and content[1:2] <= b"\x05" and content.endswith(b".")), path
            assert b"numpy.core.multiarray" not in content and b"_reconstruct" not in content, path
