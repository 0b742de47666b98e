"""A run directory becomes an evaluation, samples and a report; populations, averages and mistakes."""

import dataclasses
import importlib.util
import io
import json
import math
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny
from rich.console import Console

from experiments import command_line
from sparse_lm.config import to_dict
from sparse_lm.data.pipeline import prepare
from sparse_lm.evaluate.finish import evaluate, finish, opening, sample_prompts
from sparse_lm.evaluate.load import open_run
from sparse_lm.recipe import SCHEMA
from sparse_lm.train.checkpoint import Checkpointer
from sparse_lm.train.checkpoint_reader import CheckpointError
from sparse_lm.train.session import open_session
from sparse_lm.train.start import write_description

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"


pytestmark = pytest.mark.usefixtures("fast_compiles")


def make_run(folder, change=lambda state: state, **changes):
    """Writes the directory of a run that was saved after step 8 with its initial values (no training), and returns its state."""
    if not (folder / "text").exists():
        tiny.corpus(folder / "text")
    recipe = tiny.recipe(folder, tiny.MOE, **changes)
    session, run_dir = open_session(recipe), folder / f"run{len(changes)}"
    run_dir.mkdir()
    write_description(session, prepare(recipe.data, report=lambda line: None), run_dir)
    saver = Checkpointer(
        run_dir / "checkpoints",
        recipe.checkpoint,
        session.abstract,
        session.dims,
        session.mesh,
        population=recipe.population.active,
    )
    state = change(session.create())
    saver.save(8, state, {}, {"schema": SCHEMA, "recipe": to_dict(recipe)}, math.nan)
    saver.close()
    return run_dir, state


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("single"), model__execution="scanned")[0]


@pytest.fixture(scope="module")
def population(tmp_path_factory):
    changes = {"population__seeds": (3, 4), "train__ema_decay": 0.9, "model__execution": "scanned"}

    def averages(state):
        return dataclasses.replace(state, ema=jax.tree.map(lambda a: 2.0 * a, state.params))

    return make_run(tmp_path_factory.mktemp("population"), averages, **changes)


def test_a_run_is_evaluated_sampled_and_reported(run_dir):
    written = io.StringIO()
    finish(run_dir, console=Console(file=written, width=140))
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    dataset = open_run(run_dir).dataset
    (domain,) = dataset.domains
    row = evaluation["domains"][domain]
    texts = dataset.validation_text(domain)
    assert evaluation["step"] == 8
    assert row["documents"] == len(texts) == 3
    assert row["bytes"] == sum(len(text.encode()) for text in texts)
    assert row["tokens"] == row["bytes"] + 3  # a token a byte, and the end of each text
    # Nothing is learnt yet: no better than one of 264 tokens, and not far worse.
    assert math.log(264) - 0.1 < row["loss"] < math.log(264) + 1.5
    assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2) * row["tokens"] / row["bytes"])
    assert row["interval"][0] <= row["bits_per_byte"] <= row["interval"][1]
    assert 0 < row["xz_primed_bits_per_byte"] < row["xz_bits_per_byte"] < 8
    samples = json.loads((run_dir / "samples.json").read_text())
    assert samples and all(set(sample) == {"prompt", "text", "domain"} for sample in samples)
    for sample in samples:
        assert sample["text"].startswith(sample["prompt"])
        assert any(text.startswith(sample["prompt"]) for text in texts)
    report = (run_dir / "report.html").read_text()
    assert f"{row['bits_per_byte']:.3f}" in report
    shown = written.getvalue()
    assert f"{row['bits_per_byte']:.3f}" in shown and f"{row['xz_bits_per_byte']:.3f}" in shown
    assert str(run_dir / "report.html") in shown.replace("\n", "")


def test_parameters_come_back_in_the_models_layout_as_they_were_saved(population):
    run_dir, state = population
    loaded = open_run(run_dir)
    assert loaded.step == 8 and loaded.members == 2 and loaded.averaged
    tiny.assert_same(loaded.params, state.ema)
    tiny.assert_same(loaded.member(1).params, jax.tree.map(lambda leaf: leaf[1], state.ema))
    assert not loaded.member(1).population.active
    with pytest.raises(ValueError, match="member = 2; allowed: 0 to 1"):
        loaded.member(2)


@pytest.mark.slow
def test_members_of_a_population_are_evaluated_at_once_as_one_by_one(population):
    loaded = open_run(population[0])
    together = evaluate(loaded, max_tokens=64, priming_bytes=0)
    (row,) = together["domains"].values()
    (alone,) = evaluate(loaded.member(1), max_tokens=64, priming_bytes=0)["domains"].values()
    first, second = row["members"]["loss"]["values"]
    assert second == pytest.approx(alone["loss"], rel=1e-5) and first != pytest.approx(second, rel=1e-4)
    assert row["loss"] == pytest.approx((first + second) / 2)
    assert row["members"]["loss"]["deviation"] == pytest.approx(np.std([first, second], ddof=1))
    assert "xz_bits_per_byte" in alone and "xz_primed_bits_per_byte" not in alone
    assert "members" not in alone


def test_what_is_missing_is_named(run_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="not the directory of a run"):
        open_run(tmp_path)
    with pytest.raises(CheckpointError, match=r"no finished checkpoint 5; finished: \[8\]"):
        open_run(run_dir, step=5)
    shutil.copy(run_dir / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint to read"):
        open_run(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("d_model", 24), ("layers", 3)])
def test_a_checkpoint_of_another_model_is_refused(run_dir, tmp_path, field, value):
    shutil.copytree(run_dir, tmp_path / "other")
    config = json.loads((run_dir / "config.json").read_text())
    config["recipe"]["model"][field] = value
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not fit the run's config.json"):
        open_run(tmp_path / "other")


def test_openings_are_the_first_words_as_they_stand():
    assert opening("  A raven\n\nflew over  the harbour.", 4) == "  A raven\n\nflew over"
    assert opening("too short", 4) == ""


def test_prompts_take_domains_in_turn():
    class Two:
        domains = ("a", "b", "empty")

        def validation_text(self, domain):
            return {"a": [f"a{i} x y z" for i in range(4)], "b": ["b0 x y z"], "empty": ["-"]}[domain]

    assert sample_prompts(Two(), 3, words=2) == [("a", "a2 x"), ("b", "b0 x"), ("a", "a3 x")]


def script(name, monkeypatch, *arguments):
    """Runs a script's main in this process."""
    specification = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
    monkeypatch.setattr(command_line, "keep_compiled", lambda directory: None)
    return module.main()


def test_evaluate_from_the_command_line(run_dir, monkeypatch, capsys):
    (domain,) = open_run(run_dir).dataset.domains
    options = ("--domain", domain, "--max-tokens", 64, "--batch-size", 2, "--priming-mb", 0)
    assert script("evaluate", monkeypatch, run_dir, *options) == 0
    row = json.loads((run_dir / "evaluation.json").read_text())["domains"][domain]
    assert row["tokens"] == 64 and "xz_primed_bits_per_byte" not in row
    assert f"{row['bits_per_byte']:.3f}" in capsys.readouterr().out


def test_generate_from_the_command_line(run_dir, monkeypatch, capsys):
    options = (run_dir, "A raven", "--tokens", 40, "--temperature", 0)
    assert script("generate", monkeypatch, *options) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("A raven")
    assert "trained on 32" in printed.err


def test_several_answers_are_printed_one_after_the_other(run_dir, monkeypatch, capsys):
    def stream(self, prompts, tokens, sampling, *, seed):
        assert len(prompts) == 2 and (prompts[0] == prompts[1]).all()
        yield [prompts[0][:2], prompts[0][:3]]
        yield [prompts[0], prompts[0][:3]]

    monkeypatch.setattr("sparse_lm.evaluate.generate.Generator.stream", stream)
    assert script("generate", monkeypatch, run_dir, "A raven", "--samples", 2) == 0
    assert capsys.readouterr().out == "--- 1 of 2\nA raven\n--- 2 of 2\nA \n"


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("evaluate", ("--domain", "poems"), "domain = 'poems'; allowed:"),
        ("evaluate", ("--step", 7), "no finished checkpoint 7"),
        ("evaluate", ("--member", 1), "member = 1"),
        ("evaluate", ("--batch-size", 0), "batch-size = 0"),
        ("generate", ("x", "--top-p", 2), "top_p = 2.0; allowed:"),
        ("generate", ("x", "--tokens", 0), "tokens = 0; allowed:"),
        ("report", ("--nothing",), "unrecognized arguments"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(run_dir, monkeypatch, capsys, name, arguments, said):
    with pytest.raises(SystemExit) as stop:
        script(name, monkeypatch, run_dir, *arguments)
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in last and "error: " in last


def test_a_directory_that_is_no_run(tmp_path, monkeypatch, capsys):
    for name in ("evaluate", "generate", "report"):
        with pytest.raises(SystemExit) as stop:
            script(name, monkeypatch, tmp_path)
        assert stop.value.code == 2
        assert str(tmp_path) in capsys.readouterr().err


def test_a_run_without_documents_to_open_a_prompt_is_still_finished(run_dir, monkeypatch):
    monkeypatch.setattr("sparse_lm.evaluate.finish.sample_prompts", lambda dataset: [])
    monkeypatch.setattr(
        "sparse_lm.evaluate.finish.evaluate", lambda loaded: {"step": 8, "averaged": False, "domains": {}}
    )
    written = io.StringIO()
    finish(run_dir, console=Console(file=written, width=140))
    assert json.loads((run_dir / "samples.json").read_text()) == []
