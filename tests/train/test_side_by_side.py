"""Recipes timed side by side."""

import dataclasses
import pathlib

import numpy as np
import pytest
import tiny

from sparse_lm.train.side_by_side import side_by_side


def test_ratios_are_to_the_first_recipe(tmp_path: pathlib.Path) -> None:
    tiny.corpus(tmp_path / "text")
    one = tiny.recipe(tmp_path, model__layers=1)
    two = dataclasses.replace(tiny.recipe(tmp_path, model__layers=2), name="two")
    first, second = side_by_side([one, two], rounds=3, repeats=2)
    assert [row["name"] for row in (first, second)] == [one.name, "two"]
    assert first["times_faster"] == first["state_ratio"] == 1.0
    assert len(second["rounds_ms"]) == 3 and second["step_ms"] == np.median(second["rounds_ms"]) > 0
    assert second["times_faster"] == first["step_ms"] / second["step_ms"]
    # AdamW: two moments beside each parameter, float32, and a count.
    assert second["state_gb"] * 1e9 - 12 * second["parameters"] == 4
    assert second["state_ratio"] == second["state_gb"] / first["state_gb"] > 1


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds = 0; allowed: at least 1"):
        side_by_side([tiny.recipe(pathlib.Path())], rounds=0)
    with pytest.raises(ValueError, match="recipes = 0; allowed: at least 1"):
        side_by_side([])
