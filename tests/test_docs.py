"""The commands of the README and the pages: every recipe in them exists and every field they set is accepted."""

import itertools
import pathlib
import re
import shlex
import sys

import pytest

from experiments import command_line

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"^ *\S*python scripts/(?:pretrain|plan)\.py (?P<arguments>(?:[^#`\n\\]|\\\n)+)", re.MULTILINE)
OWN = {"--run-dir", "--devices", "--topology"}


def commands() -> list[tuple[str, str]]:
    """(page, arguments); without those in which RECIPE stands for any, and --help, which ends the process."""
    found = [(page, match["arguments"]) for page in PAGES for match in COMMAND.finditer(page.read_text())]
    texts = [(page.name, " ".join(text.replace("\\\n", " ").split())) for page, text in found]
    return [(page, text) for page, text in texts if not re.match("[A-Z_]+( |$)", text) and "--help" not in text]


def test_there_are_commands() -> None:
    assert {"README.md", "routing.md", "memory.md", "weight_sparsity.md"} <= {page for page, _ in commands()}


@pytest.mark.parametrize(("page", "text"), commands())
def test_a_command_names_a_possible_recipe(page: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = command_line.parser("")
    for option in OWN:
        parser.add_argument(option)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *shlex.split(text)])
    recipe, _ = command_line.read_recipe("", parser)
    assert recipe.name.startswith(text.split()[0])


def test_commands_of_a_page_write_different_runs() -> None:
    """A second recipe in the directory of a first one is refused; two processes of one run are the same recipe."""
    for page, runs in itertools.groupby(commands(), key=lambda command: command[0]):
        recipe_of: dict[str, str] = {}
        for _, text in runs:
            words = shlex.split(text)
            if "--devices" in words or "--topology" in words:
                continue  # a plan
            where = words[words.index("--run-dir") + 1] if "--run-dir" in words else words[0]
            recipe = re.sub(r" *(--run-dir|--distributed\.process) \S+", "", text)
            assert recipe_of.setdefault(where, recipe) == recipe, f"{page}: {where}"
