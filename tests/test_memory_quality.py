"""What a memory is worth: arms of equal size, held-out tokens sorted into kinds, gains that add up, and a run of the driver."""

import argparse
import dataclasses
import itertools
import json
import sys
import time
import types

import numpy as np
import pytest

from experiments import memory_batches, memory_quality
from experiments.memory_arms import KINDS, Sizes, count, models
from experiments.memory_batches import Making
from experiments.memory_data import (
    FURTHEST,
    PARTS,
    SEEN_KINDS,
    by_frequency,
    by_truth,
    moved,
    synthetic,
    training_batches,
)
from experiments.memory_probe import probe
from experiments.memory_quality import Comparison
from experiments.memory_report import PAIRS, by, split, write
from experiments.memory_runs import SMOKE, Setup, made, tune
from experiments.paired import interval, paired
from sparse_lm.data.packing import row_from_pieces
from sparse_lm.data.pipeline import prepare, train_stream
from sparse_lm.memory.compression import uncompressed
from sparse_lm.memory.hashing import addresses_on_host, make_hash
from sparse_lm.model.definition import define
from sparse_lm.train.step import PULSE
from sparse_lm.train.validation import MODEL_ARRAYS

LENGTH = 64


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory):
    """The generated sources for a run of 40,960 tokens, ten people."""
    data = synthetic(LENGTH, 8, 40_960, str(tmp_path_factory.mktemp("data")))
    return data, prepare(data, report=lambda line: None)


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(vocabulary=4096, length=256)], ids=["generated", "text"])
def test_arms_are_equal_in_operations_and_parameters(sizes: Sizes) -> None:
    found = models(sizes)
    assert set(found) == set(KINDS)
    accounts = {name: count(model, sizes) for name, model in found.items()}
    base = accounts["moe"]
    for name, one in accounts.items():
        assert one.train_flops == pytest.approx(base.train_flops, rel=0.002), name
        if name != "dense":
            assert one.parameters == pytest.approx(base.parameters, rel=0.002), name
    assert accounts["dense"].parameters < base.parameters / 2
    for kind in ("dense", "moe"):
        rows = [sum(t.rows for t in found[f"{kind}_{m}"].memory.tables().values()) for m in ("engram", "shuffled")]
        (single,) = found[f"{kind}_unigram"].memory.tables().values()
        assert rows[0] == rows[1] == single.rows and rows[0] > 10_000
        assert len({found[f"{kind}_{m}"].leading for m in ("engram", "shuffled", "unigram")}) == 1


def test_the_account_of_an_arm_is_that_of_its_arrays() -> None:
    found = models(SMOKE.sizes)
    for name in ("dense", "moe_engram", "dense_unigram"):
        assert define(found[name]).parameters() == count(found[name], SMOKE.sizes).parameters


def test_sizes_that_cannot_be_equal_are_refused() -> None:
    with pytest.raises(ValueError, match="first_hidden = 64 cannot pay for what dense_engram computes"):
        models(dataclasses.replace(Sizes(), first_hidden=64))
    with pytest.raises(ValueError, match=r"moe_engram has .* parameters, moe .*; allowed: within 2%"):
        models(dataclasses.replace(Sizes(), experts_beside_memory=17))


def test_generated_tokens_are_sorted_by_what_is_known_of_them(generated) -> None:
    data, dataset = generated
    held_out = by_truth(dataset, data, max_tokens=2048)
    assert held_out.kinds == (*PARTS["recall"], *PARTS["reasoning"], "rest")
    words = ["<|endoftext|>", *itertools.chain(*(source.symbols() for source in data.sources))]
    kinds = len(held_out.kinds)
    counted = np.zeros(kinds, np.int64)
    for batch, cell_BL in held_out.batches:
        for b, t in np.argwhere(cell_BL >= 0):
            domain, kind = divmod(int(cell_BL[b, t]), kinds)
            name, target = held_out.kinds[kind], words[batch["targets_BL"][b, t]]
            counted[kind] += 1
            if held_out.domains[domain] == "biographies":
                assert (name == "facts") == target.startswith("value")
            elif held_out.domains[domain] == "markov":
                assert (name == "statistics") == target.startswith("state")
            elif name.startswith("hop_"):
                # A query is its depth, a node and the answer.
                assert words[batch["tokens_BL"][b, t - 1]] == name.replace("_", "")
            elif name == "association":
                assert target.startswith("value") and words[batch["tokens_BL"][b, t]].startswith("key")
    assert (counted == held_out.tokens_DK.sum(0)).all() and (counted > 0).all()
    # Losses of 2 at every position, those of padding included, sum up to twice the tokens of each cell.
    twice = held_out.sums([np.full((3, *cell_BL.shape), 2.0) for _, cell_BL in held_out.batches])
    assert twice.shape == (3, 4, kinds) and (twice == 2 * held_out.tokens_DK).all()
    assert held_out.optimum_DK is not None
    best = dict(zip(held_out.kinds, held_out.optimum_DK.sum(0)))
    assert all(best[kind] == 0 for kind in ("facts", *PARTS["reasoning"])) and best["statistics"] > 0


def test_a_moved_document_is_the_same_to_rotary_attention_but_not_to_the_shuffled_control(generated) -> None:
    data, dataset = generated
    batch, _ = next(iter(train_stream(dataset, data, seed=0)))
    other = next(iter(training_batches(dataset, data, range(1))))
    assert (other["tokens_BL"] == batch["tokens_BL"]).all() and other["positions_BL"].max() > LENGTH
    start_BL = other["positions_BL"] - batch["positions_BL"]
    same_BL = batch["segments_BL"][:, 1:] == batch["segments_BL"][:, :-1]
    assert (np.diff(start_BL, axis=1)[same_BL] == 0).all() and 0 <= start_BL.min() and start_BL.max() < FURTHEST
    assert (moved(batch, 1)["positions_BL"] != moved(batch, 2)["positions_BL"]).any()
    # Two biographies of one person give the name, up to its third word, the same shuffled rows unless documents are moved.
    tokens_BL = np.tile(np.arange(1, 5, dtype=np.int32), (2, 1))
    segments_BL, positions_BL = np.ones_like(tokens_BL), np.tile(np.arange(4, dtype=np.int32), (2, 1))
    hashing = make_hash(uncompressed(8), 0, 1, (3,), (1009, 1013))
    pair = {"tokens_BL": tokens_BL, "targets_BL": tokens_BL, "positions_BL": positions_BL, "segments_BL": segments_BL}
    for found, equal in ((positions_BL, True), (moved(pair, 0)["positions_BL"], False)):
        address = addresses_on_host(hashing, (3,), tokens_BL, segments_BL, salt_BL=found)
        assert (address[0, 3] == address[1, 3]).all() == equal


def test_processes_make_the_batches_that_one_makes(generated, monkeypatch) -> None:
    data, dataset = generated
    expected = list(training_batches(dataset, data, range(5)))
    monkeypatch.setattr(memory_batches, "STRETCH", 2)  # the last stretch has one step
    found = Making(data, 5, workers=2).batches()
    assert len(found) == 5
    for one, other in zip(found, expected):
        assert one.keys() == other.keys() == set(MODEL_ARRAYS)
        assert all((one[name] == other[name]).all() and one[name].dtype == other[name].dtype for name in one)
    with pytest.raises(ValueError, match="steps = 0; allowed: at least 1"):
        Making(data, 0, workers=2)


def test_text_is_sorted_by_how_often_its_ngrams_were_trained_on() -> None:
    def row(*documents: list[int]) -> dict[str, np.ndarray]:
        made = row_from_pieces([np.array(d) for d in documents], [0] * len(documents), 0, 8, 0)
        return {**made, "documents_BL": made["segments_BL"] - 1}

    training = [{name: value[None] for name, value in row([1, 2, 3], [1, 2, 3, 4]).items()}]
    held_out_row = row([1, 2, 3], [5, 1, 2, 3])
    dataset = types.SimpleNamespace(
        domains=("text",),
        tokenizer=types.SimpleNamespace(end_of_text=0),
        validation_rows=lambda domain, length, overlap: iter([held_out_row]),
    )
    data = types.SimpleNamespace(sequence_length=8, batch_size=1)
    hashing = make_hash(uncompressed(8), 0, 1, (3,), (1009,))
    held_out = by_frequency(dataset, data, 100, hashing, 3, training)  # type: ignore[arg-type]
    ((_, cell_BL),) = held_out.batches
    # Trigrams, * for what lies before a document: **1 *12 123 twice each, 234 once. Held out: **1 *12 123 were shown twice,
    # **5 *51 512 never, 123 twice; the last position is padding.
    assert cell_BL.tolist() == [[1, 1, 1, 0, 0, 0, 1, -1]]
    assert dict(zip(SEEN_KINDS, held_out.tokens_DK[0])) == {
        kind: {0: 3, 1: 4}.get(i, 0) for i, kind in enumerate(SEEN_KINDS)
    }
    assert held_out.optimum_DK is None


def test_impossible_sizes_are_refused() -> None:
    for change, message in (
        ({"steps": 1}, "steps = 1; allowed: at least 2"),
        ({"tuning_share": 0.0}, "tuning_share = 0.0; allowed: above 0, at most 1"),
        ({"multipliers": (0.5, 1.0)}, r"multipliers = \(0.5, 1.0\); allowed: with each tuning seed 5, seeds"),
        ({"tuning_seeds": (4,)}, r"tuning_seeds = \(4,\); allowed: none of seeds"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SMOKE, **change)
    assert Setup().tuning_steps == 780 and SMOKE.tuning_steps == 2
    with pytest.raises(ValueError, match="3 values; allowed: 5, 6, 7, 8"):
        interval(np.arange(3.0))


@pytest.fixture(scope="module")
def arm(generated):
    """The dense arm of the smoke sizes, not compiled."""
    return made("dense", SMOKE, generated[1])


def test_runs_of_every_length_finish_the_schedule_in_one_program(arm, monkeypatch) -> None:
    given = []

    def step(state, batch, factor_P):
        given.append(factor_P)
        return state, factor_P[:, None] * np.ones(len(PULSE)), ()

    monkeypatch.setattr(arm, "_step", {False: step})
    monkeypatch.setattr(arm, "create", lambda seeds: ())
    for steps in (10, 50):
        given.clear()
        arm.run(SMOKE.seeds, SMOKE.multipliers, [{}] * steps)
        scale_S = np.stack(given)[:, 2]
        np.testing.assert_allclose(np.stack(given), np.outer(scale_S, SMOKE.multipliers), rtol=1e-6)
        assert scale_S.max() == 1 and 0 < scale_S[-1] < 0.2
        assert (scale_S == 1).sum() == pytest.approx(0.57 * steps, abs=2)
    # The fake loss is the rate: the lowest is the best, and the lowest tried.
    found = tune(arm, SMOKE, [{}] * SMOKE.steps)
    assert found["factor"] == SMOKE.multipliers[0] and found["edge"] and len(found["losses"]) == 5
    with pytest.raises(ValueError, match="2 seeds and 5 rates; allowed: 5 each"):
        arm.run((0, 1), SMOKE.multipliers, [{}])
    said: list[str] = []
    probe({"dense": arm}, SMOKE, [{}] * 5, said.append)
    assert said[0].startswith("dense: ") and "training of 1 arms, 2 + 6 steps each" in said[1]


def test_what_time_does_not_allow_waits_for_another_call(tmp_path, monkeypatch, capsys) -> None:
    calls = []

    def tune(arm, setup, batches):
        calls.append("tune")
        return {"factor": 1.0, "rate": 1.0, "edge": False, "losses": {}, "seconds": 10.0}

    def result(arm, setup, tuned, batches, held_out, tokens):
        calls.append("result")
        return row(1.0, 1.0)

    monkeypatch.setattr(memory_quality, "tune", tune)
    monkeypatch.setattr(memory_quality, "result", result)
    head = {**report({"dense": row(1.0, 1.0)}), "results": {}, "tuned": {}}

    def call(seconds: float) -> dict:
        options = argparse.Namespace(seconds=seconds, out=tmp_path, source="synthetic")
        comparison = Comparison(options, SMOKE, head, time.perf_counter())
        comparison.take("dense", None, [], None)  # type: ignore[arg-type]
        return comparison.report

    # Ten seconds for two steps are thirty for six; a tuned arm is not tuned again.
    assert call(-1.0)["tuned"] == {} and calls == []
    assert call(20.0)["results"] == {} and calls == ["tune"]
    written = json.loads((tmp_path / "memory_quality_synthetic.json").read_text())
    assert list(written["tuned"]) == ["dense"] and written["results"] == {}
    assert (
        "dense: its final run is left for another call, 20 s are left and it may take 36 s" in capsys.readouterr().out
    )
    assert list(call(60.0)["results"]) == ["dense"] and calls == ["tune", "result"]


def test_equal_differences_are_certain() -> None:
    assert paired([1.0, 2, 3, 4, 5], [1.0, 2, 3, 4, 5])["p"] == 1
    assert paired([1.0, 2, 3, 4, 5], [2.0, 3, 4, 5, 6])["p"] == 0


def report(results: dict) -> dict:
    """A report of made-up numbers: 40 tokens of facts, 20 of hop_1, 40 of the rest."""
    size = {"parameters": 10, "row_parameters": 5, "flops_per_token": 1e6}
    held_out = {
        "domains": {"a": 60, "b": 40},
        "kinds": {"facts": 40, "hop_1": 20, "rest": 40},
        "parts": {"recall": ["facts"], "reasoning": ["hop_1"]},
        "optimum": {"facts": 0.0, "hop_1": 0.0, "rest": 1.0},
    }
    head = {"device": "cpu", "jax": "0", "date": "today", "command": "x", "source": "synthetic"}
    sized = {"setup": dataclasses.asdict(SMOKE), "sizes": dict.fromkeys(results, size), "held_out": held_out}
    tuning = {"steps": 2, "tokens": 5_000_000}
    return {**head, **sized, "tuning": tuning, "tokens": 10, "unique_tokens": 10, "results": results}


def row(facts: float, hop: float) -> dict:
    """An arm of five seeds whose facts and hops lose this much at first."""
    kinds = {"facts": np.arange(5) + facts, "hop_1": np.arange(5) * 2 + hop, "rest": np.full(5, 3.0)}
    losses = 0.4 * kinds["facts"] + 0.2 * kinds["hop_1"] + 0.4 * kinds["rest"]
    return {
        "learning_rate": 1.0,
        "learning_rate_at_edge": True,
        "tuning": {"1": 1.0},
        "losses": losses.tolist(),
        "loss": interval(losses),
        "domains": {"a": losses.tolist(), "b": losses.tolist()},
        "kinds": {name: values.tolist() for name, values in kinds.items()},
    }


def test_gains_split_into_parts_that_add_up(tmp_path) -> None:
    found = report({"dense": row(2.0, 1.0), "dense_engram": row(1.0, 1.5), "dense_unigram": row(2.0, 1.0)})
    first, second = split(found)
    assert (first["arm"], first["other"], second["other"]) == (*PAIRS[0], "dense_unigram")
    # 40 of 100 tokens gain 1 nat each and 20 lose 0.5: +0.4 and -0.1 of all, +0.3 together, the same for every seed.
    gains = {name: one["difference"][0] for name, one in first["gains"].items()}
    assert gains == pytest.approx({"all": 0.3, "recall": 0.4, "reasoning": -0.1, "rest": 0.0})
    assert by(found, "kinds")[0]["gains"]["hop_1"]["difference"][0] == pytest.approx(-0.5)
    write(found, tmp_path)
    table = (tmp_path / "memory_quality_synthetic.md").read_text()
    assert "| dense_engram | dense | +0.3000 ± " in table and "(recall: facts; reasoning: hop_1)" in table
    assert "| best possible | 0.0000 | 0.0000 | 1.0000 |" in table and "moe_engram" not in table
    assert "of 2 steps (5.00 M tokens), seed 100, which no final run has" in table and "(all unique)" in table
    assert "these arms: dense, dense_engram, dense_unigram" in table and "| dense | **1.0000** |" in table
    assert (tmp_path / "memory_quality_synthetic.svg").stat().st_size > 1000


def test_a_report_without_pairs_is_written(tmp_path) -> None:
    write(report({"moe": row(1.0, 1.0)}), tmp_path)
    assert "Gains" not in (tmp_path / "memory_quality_synthetic.md").read_text()


@pytest.mark.slow  # two programs of a step for five members, half a minute each
def test_the_driver_goes_on_with_the_arms_that_are_missing(tmp_path, monkeypatch, capsys) -> None:
    def call(*arms: str) -> dict:
        words = [
            "memory_quality",
            "--smoke",
            "--out",
            str(tmp_path),
            "--data-directory",
            str(tmp_path),
            "--arms",
            *arms,
        ]
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(memory_quality, "keep_compiled", lambda directory: None)
        assert memory_quality.main() == 0
        return json.loads((tmp_path / "memory_quality_synthetic.json").read_text())

    before = call("dense_engram")["results"]["dense_engram"]
    after = call("dense", "dense_engram")
    assert "dense_engram: compiled" not in capsys.readouterr().out.split("data ready")[-1]
    assert list(after["results"]) == ["dense", "dense_engram"] and after["results"]["dense_engram"] == before
    # About ln(384): nobody has learned anything yet. Equal operations; rows are what the dense arm lacks.
    assert all(5 < loss < 6.2 for row in after["results"].values() for loss in row["losses"])
    assert len(set(before["losses"])) == 5
    kinds, tokens = before["kinds"], after["held_out"]["kinds"]
    total = sum(np.array(kinds[name]) * tokens[name] for name in tokens) / sum(tokens.values())
    assert total == pytest.approx(np.array(before["losses"]))
