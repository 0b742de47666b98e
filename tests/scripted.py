"""The scripts as a test runs them: in this process, on a recipe of its own."""

import dataclasses
import pathlib
import runpy
import sys

import jax
import pytest

import experiments
from sparse_lm.config import validate
from sparse_lm.parallel.mesh import MeshShape
from sparse_lm.recipe import Recipe
from sparse_lm.train.loop import train

ROOT = pathlib.Path(__file__).parents[1]


def pretrain(recipe: Recipe, run_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs scripts/pretrain.py on a recipe."""

    def tiny_recipe() -> Recipe:
        return recipe

    monkeypatch.setattr(experiments, "_all", lambda: {"tiny": tiny_recipe})
    monkeypatch.setattr(sys, "argv", ["pretrain", "tiny", "--run-dir", str(run_dir)])
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(str(ROOT / "scripts" / "pretrain.py"), run_name="__main__")
    assert not exited.value.code


def train_on_one_device(recipe: Recipe, run_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains a recipe without its mesh, as if the first device were the only one."""
    devices = jax.devices()[:1]
    with monkeypatch.context() as alone:
        alone.setattr(jax, "devices", lambda *_: devices)
        assert train(validate(dataclasses.replace(recipe, mesh=MeshShape())), run_dir) == 0
