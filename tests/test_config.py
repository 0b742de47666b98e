"""Config machinery: swaps, overrides, JSON that reads back equal, and the command line that drives them."""

import ast
import dataclasses
import inspect
import json
import pathlib
import textwrap
from typing import ClassVar, get_args, get_type_hints

import pytest

import experiments
from experiments import command_line
from sparse_lm import components
from sparse_lm.config import Config, ConfigError, children, component, from_dict, override, swap, to_dict, validate
from sparse_lm.layers.feed_forward import DenseFeedForward
from sparse_lm.layers.parametrization import MuP, PathDensity, SparseMuP
from sparse_lm.model.transformer import Model
from sparse_lm.recipe import Recipe, differences, load_recipe, save_recipe
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.routing.top_k import TopKRouter
from sparse_lm.train.adafactor import Adafactor
from sparse_lm.train.muon import Muon
from sparse_lm.train.optimizer import AdamW, Group
from sparse_lm.train.schedule import Linear, WarmupStableDecay

COMPONENTS = [(kind, name) for kind, entries in components.TABLE.items() for name in entries]

MIXED = Recipe(
    model=Model(
        leading=(DenseFeedForward(hidden=96),),
        pattern=(MoEFeedForward(experts=4, router=TopKRouter(k=3)), DenseFeedForward(), MoEFeedForward(experts=16)),
    )
)
"""A recipe with routers at two places and feed-forwards in both tuples."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Everything(Config):
    """A config with every kind of field."""

    number: int = 1
    ratio: float = 0.5
    maybe: float | None = None
    names: tuple[str, ...] = ("a",)
    pair: tuple[int, float] = (1, 2.0)
    group: Group = Group(path="x")
    groups: tuple[Group, ...] = (Group(path="y"), Group(path="z", weight_decay=0.0))
    schedule: Linear = component("schedule", Linear())
    optional: Group | None = Group(path="o")


# --- swap ---------------------------------------------------------------------------------------------------------------


def test_swap_by_kind_replaces_the_kind_everywhere_by_fresh_defaults() -> None:
    swapped = swap(MIXED, "router=top_k")
    assert [f.router for f in swapped.model.pattern if isinstance(f, MoEFeedForward)] == [TopKRouter(), TopKRouter()]
    assert swapped.model.pattern[0].experts == 4  # what holds the component keeps its own numbers
    assert swapped.model.pattern[1] == DenseFeedForward()


def test_swap_by_kind_reaches_every_entry_of_tuples() -> None:
    swapped = swap(MIXED, "feed_forward=moe")
    assert swapped.model.leading == (MoEFeedForward(),)
    assert swapped.model.pattern == (MoEFeedForward(),) * 3


def test_swap_by_path_touches_one_place() -> None:
    swapped = swap(MIXED, "model.pattern.2.router=top_k")
    assert swapped == MIXED  # its router had defaults already
    swapped = swap(MIXED, "model.pattern.0.router=top_k")
    assert differences(MIXED.model.pattern[0], swapped.model.pattern[0]) == ["router.k: 3 -> 2"]
    assert swapped.model.pattern[1:] == MIXED.model.pattern[1:]
    assert swap(MIXED, "optimizer.schedule=linear").optimizer == AdamW(schedule=Linear())


def test_swap_by_path_replaces_one_entry_of_a_tuple_or_all_of_it() -> None:
    assert swap(MIXED, "model.pattern.0=dense").model.pattern == (DenseFeedForward(), *MIXED.model.pattern[1:])
    assert swap(MIXED, "model.pattern=dense").model.pattern == (DenseFeedForward(),) * 3
    assert swap(MIXED, "model.pattern=dense").model.leading == MIXED.model.leading


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("router", ["--with 'router'", "KIND=NAME"]),
        ("router=", ["KIND=NAME"]),
        ("router=topk", ["unknown router 'topk'", "allowed: top_k", "Did you mean 'top_k'?"]),
        ("ruoter=top_k", ["'ruoter'", "Did you mean 'router'?"]),
        ("optimizer.shedule=linear", ["not a component field", "Did you mean 'optimizer.schedule'?"]),
        ("model.patern.0=dense", ["'model.patern.0'", "not a component field"]),
        ("modle.pattern=dense", ["'modle.pattern'"]),
        ("model.pattern.7=dense", ["3 entries", "'7'"]),
        ("model.d_model=dense", ["not a component field"]),
    ],
)
def test_swap_refuses_with_the_nearest_name(assignment: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        swap(MIXED, assignment)
    assert all(word in str(error.value) for word in words), error.value


def test_swap_of_a_kind_the_recipe_lacks_is_an_error() -> None:
    with pytest.raises(ValueError, match="no router to replace"):
        swap(Recipe(), "router=top_k")


# --- override ---------------------------------------------------------------------------------------------------------


def test_override_by_dotted_path_and_index() -> None:
    changed = override(MIXED, "model.pattern.2.router.k", 5)
    assert differences(MIXED.model.pattern[2], changed.model.pattern[2]) == ["router.k: 2 -> 5"]
    assert override(MIXED, "model.pattern.1", MoEFeedForward()).model.pattern[1] == MoEFeedForward()
    assert override(MIXED, "seed", 3).seed == 3


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("sed", ["Recipe has no field 'sed'", "Did you mean 'seed'?"]),
        ("model.d_modle", ["Model has no field 'd_modle'", "Did you mean 'd_model'?"]),
        ("model.pattern.3.hidden", ["pattern has 3 entries", "'3'"]),
        ("model.pattern.x.hidden", ["pattern has 3 entries", "'x'"]),
        ("seed.value", ["seed is a plain value", "'value'"]),
    ],
)
def test_override_of_a_field_that_does_not_exist(path: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        override(MIXED, path, 1)
    assert all(word in str(error.value) for word in words), error.value


# --- JSON -------------------------------------------------------------------------------------------------------------


def through_json(config: Config, cls: type, kind: str | None = None) -> Config:
    return from_dict(cls, json.loads(json.dumps(to_dict(config, kind))))


@pytest.mark.parametrize(("kind", "name"), COMPONENTS)
def test_every_component_reads_back_equal_from_json_with_its_name(kind: str, name: str) -> None:
    cls = components.lookup(kind, name)
    config = cls()
    assert through_json(config, cls, kind) == config
    assert to_dict(config, kind)["component"] == name
    assert components.name_of(kind, cls) == name


@pytest.mark.parametrize("name", experiments.names())
def test_every_recipe_reads_back_equal_from_its_run_directory(name: str, tmp_path: pathlib.Path) -> None:
    recipe = experiments.load(name)
    save_recipe(recipe, tmp_path)
    assert load_recipe(tmp_path) == recipe


def test_a_recipe_of_other_components_reads_back_equal(tmp_path: pathlib.Path) -> None:
    parametrization = SparseMuP(densities=(PathDensity(path="*ffn*", density=0.25),))
    recipe = dataclasses.replace(
        MIXED,
        model=dataclasses.replace(MIXED.model, parametrization=parametrization, logit_softcap=30),
        optimizer=Muon(schedule=WarmupStableDecay(decay_steps=10), groups=(Group(path="*norm*", learning_rate=2),)),
    )
    save_recipe(recipe, tmp_path)
    read = load_recipe(tmp_path)
    assert read == recipe
    assert isinstance(read.model.logit_softcap, float)  # a float field written as 30 reads back as 30.0


def test_every_kind_of_field_reads_back_equal() -> None:
    config = Everything(maybe=3, names=(), pair=(4, 5), groups=(), optional=None)
    assert through_json(config, Everything) == config
    assert through_json(Everything(), Everything) == Everything()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["model"].update(d_modle=1), ["model.d_modle = 1", "a field of Model", "Did you mean 'd_model'?"]),
        (lambda d: d["model"]["pattern"][0].pop("component"), ["model.pattern.0", "key component", "dense, moe"]),
        (lambda d: d["optimizer"].update(component="adam"), ["unknown optimizer 'adam'", "Did you mean 'adamw'?"]),
        (lambda d: d.update(model="large"), ["model = 'large'", "fields of Model"]),
        (lambda d: d["optimizer"].update(schedule=3), ["optimizer.schedule = 3", "key component"]),
    ],
)
def test_json_that_is_no_recipe_is_refused_by_path(change, words: list[str]) -> None:
    document = to_dict(MIXED)
    change(document)
    with pytest.raises(ValueError) as error:
        from_dict(Recipe, document)
    assert all(word in str(error.value) for word in words), error.value


def test_another_schema_is_refused(tmp_path: pathlib.Path) -> None:
    save_recipe(MIXED, tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**document, "schema": 99}))
    with pytest.raises(ValueError, match="schema 99; this version reads schema 1"):
        load_recipe(tmp_path)


def test_a_directory_without_a_run_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not the directory of a run"):
        load_recipe(tmp_path)


def test_differences_name_the_paths() -> None:
    other = override(override(MIXED, "train.steps", 7), "optimizer", Adafactor())
    assert differences(MIXED, other) == ["optimizer: AdamW -> Adafactor", "train.steps: 1000 -> 7"]


def test_an_unregistered_component_is_refused_when_written() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Local(AdamW):
        pass

    with pytest.raises(ValueError, match="Local is not a registered optimizer"):
        to_dict(dataclasses.replace(MIXED, optimizer=Local()))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="Did you mean 'router'"):
        components.lookup("routr", "top_k")


# --- checks -----------------------------------------------------------------------------------------------------------


def test_validate_returns_the_config_and_completes_paths() -> None:
    assert validate(MIXED) is MIXED
    with pytest.raises(ConfigError, match=r"^model\.pattern\.2\.router\.k = 17 is not possible; allowed: .* 16$"):
        validate(override(MIXED, "model.pattern.2.router.k", 17))


def test_children_are_checked_before_their_parents() -> None:
    # The recipe divides its batch by the number of microbatches: zero must be refused by Train first.
    with pytest.raises(ConfigError, match=r"^train\.microbatches = 0 "):
        validate(override(MIXED, "train.microbatches", 0))


def config_classes() -> list[type]:
    """Every config class: those in the table, those in a recipe, those in tuples that are empty by default, their bases."""
    found = {components.lookup(kind, name) for kind, name in COMPONENTS} | {type(node) for _, node in children(MIXED)}
    found |= {Group, PathDensity, MuP}
    bases = {base for cls in found for base in cls.__mro__ if issubclass(base, Config)}
    return sorted((found | bases) - {Config}, key=lambda cls: cls.__qualname__)


@pytest.mark.parametrize("cls", config_classes(), ids=lambda cls: cls.__qualname__)
def test_every_field_is_explained_by_a_string_below_it(cls: type) -> None:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    body = definition.body
    for here, below in zip(body, [*body[1:], None]):
        if not isinstance(here, ast.AnnAssign) or "ClassVar" in ast.unparse(here.annotation):
            continue
        explained = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and below.value.value
        assert explained, f"{cls.__qualname__}.{ast.unparse(here.target)} has no string below it"
    assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("), f"{cls.__qualname__} has no docstring"


@pytest.mark.parametrize("cls", config_classes(), ids=lambda cls: cls.__qualname__)
def test_no_class_constant_is_mistaken_for_a_field(cls: type) -> None:
    hints = get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}
    constants = {
        name for name, hint in hints.items() if hint is ClassVar or getattr(hint, "__origin__", None) is ClassVar
    }
    assert fields == hints.keys() - constants


# --- command line -------------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str):
    monkeypatch.setattr("sys.argv", ["pretrain.py", *arguments])
    parser = command_line.parser("Trains a recipe.")
    parser.add_argument("--run-dir")
    return command_line.read_recipe("Trains a recipe.", parser)


def test_typed_overrides_reach_every_level(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = "--train.steps 50 --model.layers 5 --optimizer.learning-rate 1e-2 --optimizer.schedule.warmup-steps 7"
    recipe, options = command(
        monkeypatch, "quickstart", "--run-dir", "there", *arguments.split(), "--model.logit-softcap", "30"
    )
    base = experiments.load("quickstart")
    assert options.run_dir == "there"
    assert sorted(differences(base, recipe)) == [
        f"model.layers: {base.model.layers} -> 5",
        "model.logit_softcap: None -> 30.0",
        f"optimizer.learning_rate: {base.optimizer.learning_rate} -> 0.01",
        f"optimizer.schedule.warmup_steps: {base.optimizer.schedule.warmup_steps} -> 7",
        f"train.steps: {base.train.steps} -> 50",
    ]


def test_swaps_come_before_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--with", "optimizer=muon", "--with", "optimizer.schedule=linear", "--optimizer.momentum", "0.9")
    recipe, _ = command(monkeypatch, "quickstart", *arguments)
    assert recipe.optimizer == Muon(schedule=Linear(), momentum=0.9)


def test_a_swap_inside_the_model_can_be_overridden_too(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _ = command(monkeypatch, "quickstart", "--with", "feed_forward=dense", "--model.pattern.0.hidden", "128")
    assert recipe.model.pattern == (DenseFeedForward(hidden=128),)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quickstrat"], ["unknown recipe 'quickstrat'", "Did you mean 'quickstart'?"]),
        (["quickstart", "--with", "optimizer=adam"], ["unknown optimizer 'adam'"]),
        (["quickstart", "--train.steps", "0"], ["train.steps = 0 is not possible; allowed: at least 1"]),
        (["quickstart", "--train.steps", "many"], ["many"]),
        (["quickstart", "--train.stepps", "5"], ["--train.stepps", "--train.steps"]),
    ],
)
def test_mistakes_end_with_code_2_and_say_what(arguments, words, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        command(monkeypatch, *arguments)
    shown = capsys.readouterr()
    assert exit_.value.code == 2
    assert all(word in shown.err + shown.out for word in words), shown


def test_help_explains_every_field_of_the_recipe(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "4000")
    with pytest.raises(SystemExit) as exit_:
        command(monkeypatch, "quickstart", "--help")
    shown = capsys.readouterr().out
    assert exit_.value.code == 0
    assert "--with KIND=NAME" in shown and "--run-dir" in shown
    for path, node in children(experiments.load("quickstart")):
        hints = get_type_hints(type(node))
        for field in dataclasses.fields(node):
            if any(
                isinstance(t, type) and issubclass(t, Config) for t in (hints[field.name], *get_args(hints[field.name]))
            ):
                continue  # its own fields are listed instead
            flag = f"--{path}.{field.name}".replace("--.", "--").replace("_", "-")
            assert flag in shown, flag
    assert "Updates of the whole schedule." in shown  # the string below train.steps
    assert "Weight of the balance loss" in shown  # and below a field deep inside a tuple


def test_without_a_recipe_the_names_are_listed(monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        command(monkeypatch)
    assert exit_.value.code == 2
    assert "quickstart" in capsys.readouterr().out
