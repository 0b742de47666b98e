"""The scripts as a test runs them: in this process, on a recipe of its own."""

import pathlib
import runpy
import sys

import pytest

import experiments
from sparse_lm.recipe import Recipe

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
