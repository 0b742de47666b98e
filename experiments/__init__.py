"""Recipes: functions that return a Recipe; each docstring says command, expected result, hardware and date."""

import importlib
import pkgutil
from collections.abc import Callable

from sparse_lm.components import did_you_mean
from sparse_lm.recipe import Recipe


def names() -> list[str]:
    """Returns the names of all recipes: the functions listed in RECIPES of every module of this package."""
    return sorted(_all())


def _all() -> dict[str, Callable[[], Recipe]]:
    found: dict[str, Callable[[], Recipe]] = {}
    for module in pkgutil.iter_modules(__path__):
        for recipe in getattr(importlib.import_module(f"{__name__}.{module.name}"), "RECIPES", ()):
            found[recipe.__name__] = recipe
    return found


def load(name: str) -> Recipe:
    """Builds a recipe by name.

    Raises:
      ValueError: for an unknown name, with the nearest one.
    """
    recipes = _all()
    if name not in recipes:
        raise ValueError(
            f"unknown recipe {name!r}; allowed: {', '.join(sorted(recipes))}.{did_you_mean(name, recipes)}"
        )
    return recipes[name]()
