"""A run that stops on one mesh goes on on another."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny

from sparse_lm.parallel.mesh import MeshShape
from sparse_lm.recipe import Recipe
from sparse_lm.train.checkpoint import Checkpointer, Checkpoints
from sparse_lm.train.checkpoint_reader import read_checkpoint
from sparse_lm.train.loop import train
from sparse_lm.train.session import open_session
from sparse_lm.train.state import TrainState


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny.corpus(folder / "text")
    return folder


def recipe(folder: pathlib.Path, **mesh: int) -> Recipe:
    changes = {"train__steps": 4, "checkpoint__every": 2, "data__batch_size": 8, "model__layers": 1}
    return tiny.recipe(folder, **changes, validation__every=0, mesh=MeshShape(**mesh))


def losses(run_dir: pathlib.Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.fixture(scope="module")
def whole(folder: pathlib.Path) -> pathlib.Path:
    run_dir = folder / "whole"
    assert train(recipe(folder, data=2, fsdp=2, tensor=2), run_dir) == 0
    return run_dir


def halfway(whole: pathlib.Path, run_dir: pathlib.Path) -> None:
    """A copy of a run as it was after half of its steps."""
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "4")


def test_a_run_on_a_mesh_stops_and_goes_on_to_the_same_bits(whole: pathlib.Path, folder: pathlib.Path) -> None:
    run_dir = folder / "again"
    halfway(whole, run_dir)
    assert train(recipe(folder, data=2, fsdp=2, tensor=2), run_dir) == 0
    tiny.assert_same(read_checkpoint(run_dir / "checkpoints", 4).state, read_checkpoint(whole / "checkpoints", 4).state)
    assert losses(run_dir) == losses(whole)


@pytest.mark.parametrize(
    "mesh", [{"data": 8}, pytest.param({"data": 1, "fsdp": 4, "expert": 2}, marks=pytest.mark.slow)]
)
def test_a_run_goes_on_on_another_mesh(mesh: dict[str, int], whole: pathlib.Path, folder: pathlib.Path) -> None:
    run_dir = folder / "elsewhere_{}".format("_".join(mesh))
    halfway(whole, run_dir)
    assert train(recipe(folder, **mesh), run_dir) == 0
    found, expected = (read_checkpoint(d / "checkpoints", 4).state for d in (run_dir, whole))
    # two steps apart: Adam divides by small second moments, which magnifies the rounding of sums in another order
    tiny.assert_close(found["params"], expected["params"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(losses(run_dir), losses(whole), rtol=1e-5)
    assert jax.device_count() == 8


def test_a_state_is_handed_from_mesh_to_mesh(tmp_path: pathlib.Path) -> None:
    """8 devices with an expert each, 4 experts on 2 groups of 4, 4 devices, 1: every one restores what the one before it saved."""
    eight_experts = dataclasses.replace(tiny.MOE, experts=8)
    meshes = [{"expert": 8}, {"fsdp": 4, "expert": 2}, {"fsdp": 2, "tensor": 2}, {"data": 1}]
    first: TrainState | None = None
    for step, mesh in enumerate(meshes):
        run = Recipe(model=tiny.model(eight_experts, layers=1), mesh=MeshShape(**{"data": 1, **mesh}))
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, sequence_length=16, batch_size=8))
        session = open_session(run, jax.devices()[: int(np.prod(list(mesh.values())))])
        keeper = Checkpointer(
            tmp_path, Checkpoints(keep_last=9), session.abstract, session.dims, session.mesh, population=False
        )
        state = keeper.restore(step, session.shardings)[0] if step else session.create()
        gate = state.params["blocks"]["0"]["feed_forward"]["gate"]["weight"]
        pieces = {"expert": 8, "fsdp": 8 if mesh.get("expert") else 4, "data": 1}[next(iter(mesh))]
        assert gate.addressable_shards[0].data.size * pieces == gate.size
        keeper.save(step + 1, state, {"windows": step}, {}, 0.0)
        keeper.close()
        first = first or jax.device_get(state)
        tiny.assert_same(dataclasses.asdict(jax.device_get(state)), dataclasses.asdict(first))
