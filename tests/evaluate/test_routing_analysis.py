"""What the analysis of routes says, by hand on a few tokens."""

import math

import numpy as np
import pytest

from sparse_lm.evaluate.routing_analysis import (
    Routed,
    divergence,
    loads,
    loss_by_expert,
    paths,
    tokens_by_expert,
    without,
)
from sparse_lm.evaluate.routing_page import write_page

ROUTED = Routed(
    tokens_T=np.array([5, 5, 7, 7, 7, 9]),
    losses_T=np.array([1.0, 2.0, 3.0, 3.0, 5.0, 4.0]),
    experts={
        0: np.array([[0, 1], [0, 1], [1, -1], [1, 2], [1, 2], [-1, -1]]),
        1: np.array([[0], [0], [0], [1], [1], [1]]),
    },
)


def test_loads_and_losses_by_hand() -> None:
    # expert 0: tokens 0, 1; expert 1: 0 to 4; expert 2: 3, 4; expert 3: none; 9 assignments
    np.testing.assert_allclose(loads(ROUTED.experts[0], 4), [2 / 9, 5 / 9, 2 / 9, 0])
    assert loss_by_expert(ROUTED, 0, 4) == [1.5, 2.8, 4.0, None]


def test_divergence_by_hand() -> None:
    assert divergence(np.array([0.5, 0.5]), np.array([0.5, 0.5]), 100) == 0.0
    # with half a token added: (9.5, 1.5) / 11 against (5.5, 5.5) / 11
    expected = 9.5 / 11 * math.log(9.5 / 5.5) + 1.5 / 11 * math.log(1.5 / 5.5)
    assert divergence(np.array([0.9, 0.1]), np.array([0.5, 0.5]), 10) == pytest.approx(expected)


def test_tokens_by_expert_by_hand() -> None:
    # expert 2 takes two of three 7s and nothing else: 2 of 6 tokens, so it would take 1 of the 7s by its load
    assert tokens_by_expert(ROUTED, 0, 3)[2] == [(7, pytest.approx(2 / 3))]
    assert tokens_by_expert(ROUTED, 0, 3)[0] == [(5, 1.0)]


def test_paths_by_hand() -> None:
    # first experts: (0, 0) twice, (1, 0), (1, 1) twice, (-1, 1)
    found = paths(ROUTED)
    assert found["distinct"] == 4
    assert {tuple(p["path"]): (p["share"], p["loss"]) for p in found["frequent"]} == {
        (0, 0): (pytest.approx(2 / 6), 1.5), (1, 1): (pytest.approx(2 / 6), 4.0),
        (1, 0): (pytest.approx(1 / 6), 3.0), (-1, 1): (pytest.approx(1 / 6), 4.0),
    }  # fmt: skip
    # mean 3: within paths 2 * 0.25 + 2 * 1 of a total of 4 + 1 + 0 + 0 + 4 + 1 = 10 squares
    assert found["explained"] == pytest.approx(1 - 2.5 / 10)


def test_taking_an_expert_out_of_recorded_choices() -> None:
    stacked = np.array([[[[0, 1]]], [[[1, 0]]]])  # two layers of one token
    choices = {"0": {"feed_forward": np.array([[[0, 1]]])}, "1_to_2": {"feed_forward": stacked}}
    changed = without(choices, 2, 1, 4)
    assert changed["1_to_2"]["feed_forward"].tolist() == [[[[0, 1]]], [[[4, 0]]]]
    assert changed["0"] is choices["0"] and stacked.tolist() == [[[[0, 1]]], [[[1, 0]]]]
    assert without(choices, 0, 0, 4)["0"]["feed_forward"].tolist() == [[[4, 1]]]


def test_the_page_shows_every_section(tmp_path) -> None:
    layer = {
        "experts": 3,
        "loads": {"a": [0.5, 0.25, 0.25], "b": [0.2, 0.2, 0.6]},
        "loss": [1.0, 2.0, None],
        "tokens": [[["<the>", 0.5]], [], []],
        "shift": {"a": 0.01, "b": 0.2},
        "ablation": [0.1, 0.0, 0.02],
    }
    domains = {"a": {"tokens": 60, "loss": 1.5, "trained": True}, "b": {"tokens": 9, "loss": 2.0, "trained": False}}
    found = {"step": 8, "domains": domains, "paths": paths(ROUTED), "layers": {"0": layer, "1": layer}}
    text = write_page(tmp_path, "tiny", found).read_text()
    for words in (
        "Load by domain",
        "Shift of routing",
        "0.2000",
        "Effect of each expert",
        "&lt;the&gt;",
        "1.50",
        "Loss by expert",
        "Paths",
    ):
        assert words in text, words
    assert text.count("<svg") == 4 and "http" not in text.replace("http://www.w3.org", "")
    without_ablation = {**layer, "ablation": None}
    text = write_page(tmp_path, "tiny", {**found, "layers": {"0": without_ablation}}).read_text()
    assert "Effect of each expert" not in text
