"""A run that stops on one mesh goes on on another."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny

from sparse_lm.parallel.mesh import MeshShape
from sparse_lm.recipe import Recipe
from sparse_lm.train.checkpoint import read_checkpoint
from sparse_lm.train.loop import train


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
