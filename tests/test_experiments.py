"""Recipes: each is named once, documented with its command, and has a smoke variant that validates; the quickstart's trains."""

import dataclasses
import json
import pathlib

import pytest
import tiny

import experiments
from experiments.smoke import SMALL, smoke
from sparse_lm.accounting import account
from sparse_lm.config import children, override, validate
from sparse_lm.data.pipeline import DataConfig
from sparse_lm.data.tokenizer import Bytes
from sparse_lm.model.definition import define
from sparse_lm.train.loop import train


def functions() -> list:
    """Every recipe function, duplicates included."""
    import importlib
    import pkgutil

    modules = [
        importlib.import_module(f"experiments.{module.name}") for module in pkgutil.iter_modules(experiments.__path__)
    ]
    return [recipe for module in modules for recipe in getattr(module, "RECIPES", ())]


def test_names_are_unique() -> None:
    named = [function.__name__ for function in functions()]
    assert len(named) == len(set(named)) == len(experiments.names())
    assert "quickstart" in named


@pytest.mark.parametrize("function", functions(), ids=lambda function: function.__name__)
def test_docstrings_say_the_command(function) -> None:
    assert function.__doc__ and "Command:" in function.__doc__


@pytest.mark.parametrize("name", experiments.names())
def test_a_recipe_and_its_smoke_variant_validate(name: str) -> None:
    recipe = experiments.load(name)
    validate(recipe)
    assert recipe.name == name
    small = smoke(recipe)
    validate(small)
    assert small.name == f"{name}_smoke"
    assert [type(node) for _, node in children(small)] == [type(node) for _, node in children(recipe)]
    for path, node in children(small):
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if field.name in SMALL and isinstance(value, int):
                # leading blocks are all kept, with one of the pattern after them
                least = len(getattr(node, "leading", ())) + 1 if field.name == "layers" else 0
                bound = max(SMALL[field.name], least)
                assert value <= bound, f"{path}.{field.name}"


@pytest.mark.parametrize("name", experiments.names())
def test_the_account_of_a_recipe_adds_up_to_its_tree(name: str) -> None:
    for recipe in (experiments.load(name), smoke(experiments.load(name))):
        assert account(recipe.model, recipe.data.sequence_length).parameters == define(recipe.model).parameters()


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'quickstart'"):
        experiments.load("quikstart")


def test_the_smoke_variant_of_the_quickstart_trains(tmp_path: pathlib.Path) -> None:
    """On two folders of local text: the packaged corpus is another test's."""
    tiny.corpus(tmp_path / "text")
    recipe = smoke(experiments.load("quickstart"))
    local = tiny.recipe(tmp_path).data
    recipe = override(
        recipe, "data", DataConfig(**{**vars(recipe.data), "sources": local.sources, "tokenizer": Bytes()})
    )
    recipe = override(override(recipe, "data.directory", local.directory), "log.display", "off")
    recipe = override(override(recipe, "log.tensorboard", False), "train.steps", 4)
    assert train(recipe, tmp_path / "run") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [4]
