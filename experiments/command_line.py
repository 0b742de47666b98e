"""The command line of every script that takes a recipe: RECIPE [--smoke] [--with kind=name ...] [typed overrides].

It lives beside the recipes because it is what turns a recipe's name into a recipe; the library never imports it.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import tyro

import experiments
from experiments.smoke import smoke
from sparse_lm.config import swap, validate
from sparse_lm.recipe import Recipe

T = TypeVar("T")


def parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser of what every script that takes a recipe understands; the rest goes to typed overrides."""
    result = argparse.ArgumentParser(description=description, add_help=False, allow_abbrev=False)
    result.add_argument("recipe", nargs="?", help=f"one of: {', '.join(experiments.names())}")
    result.add_argument("--smoke", action="store_true", help="a tiny variant of the recipe: seconds on a CPU")
    result.add_argument(
        "--with",
        dest="swaps",
        action="append",
        default=[],
        metavar="KIND=NAME",
        help="replace a component by its name, wherever its kind occurs or at one path: --with router=top_k",
    )
    result.add_argument(
        "-h", "--help", action="store_true", help="this text; after a recipe: every field of the recipe"
    )
    return result


def read_recipe(description: str, arguments: argparse.ArgumentParser) -> tuple[Recipe, argparse.Namespace]:
    """Parses the command line: (validated recipe, the script's own options). Ends the process with a message on a mistake."""
    options, overrides = arguments.parse_known_args()
    if options.recipe is None:
        arguments.print_help()
        sys.exit(0 if options.help else 2)

    def build() -> Recipe:
        recipe = experiments.load(options.recipe)
        for assignment in options.swaps:
            recipe = swap(recipe, assignment)
        return smoke(recipe) if options.smoke else recipe

    recipe = or_exit(build)
    if options.help:
        arguments.print_help()
        overrides = ["--help"]
    recipe = tyro.cli(
        Recipe, default=recipe, args=overrides, prog=f"{sys.argv[0]} {options.recipe}", description=description
    )
    return or_exit(lambda: validate(recipe)), options


def or_exit(action: Callable[[], T], *errors: Any) -> T:
    """Runs an action; a user's mistake (ValueError, or the given errors) becomes one line and exit code 2."""
    try:
        return action()
    except (ValueError, *errors) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def keep_compiled(data_directory: str) -> None:
    """Keeps compiled programs beside the prepared data, so that the next process need not compile them again."""
    jax.config.update(
        "jax_compilation_cache_dir", str(pathlib.Path(data_directory).expanduser().absolute() / "compiled")
    )
