"""The comparison of masked algorithms: paired tests by hand, and the table."""

import dataclasses

import numpy as np
import pytest

from experiments.masked_orderings import SMOKE
from experiments.masked_report import comparisons, verdict, write
from experiments.paired import interval, paired


def test_a_paired_test_by_hand() -> None:
    # differences 1, 2, 3, 4, 5: mean 3, deviation sqrt(2.5), t = 3 / sqrt(2.5 / 5) = 4.2426; with 4 degrees of freedom
    # P(|T| > t) = 1 - (3 / 2) s + s^3 / 2 with s = t / sqrt(4 + t^2) = 0.904534: 0.013236
    found = paired([1.0, 1, 1, 1, 1], [2.0, 3, 4, 5, 6])
    assert found["p"] == pytest.approx(0.013236, rel=1e-4)
    assert found["difference"] == pytest.approx((3.0, 2.776 * 0.5**0.5)) and found["lower"] == 5
    assert verdict(found) == "as there"
    assert verdict(paired([2.0, 3, 4, 5, 6], [1.0, 1, 1, 1, 1])) == "the other way round"
    assert verdict(paired([1.0, 2, 1, 2, 1], [2.0, 1, 2, 1, 1])) == "no difference shown"


def test_the_table_has_what_there_is(tmp_path) -> None:
    def row(losses: list[float]) -> dict:
        shared = {
            "learning_rate": 1.0,
            "learning_rate_at_edge": True,
            "tuning": {"1": 1.0},
            "curve": [[0.0, 3.0], [1.0, 2.0]],
        }
        sizes = {"parameters": 10, "nonzeros": 5, "tokens_per_s": 1.0}
        return {"losses": losses, "loss": interval(np.array(losses)), **shared, **sizes}

    results = {"dense": row([1.0, 1.1, 1.2, 1.3, 1.5]), "ste": row([2.0, 2.1, 2.2, 2.3, 2.4])}
    assert [(c["first"], c["second"]) for c in comparisons(results, (("dense", "ste"), ("ste", "rigl")))] == [
        ("dense", "ste")
    ]
    setup = {**dataclasses.asdict(SMOKE), "length": 32}
    head = {"device": "cpu", "jax": "0", "date": "today", "command": "x", "setup": setup, "seeds": [2, 5]}
    write({**head, "tokens": 10, "unique_tokens": 20, "results": results}, tmp_path)
    table = (tmp_path / "masked_orderings.md").read_text()
    assert "| dense | 1.0e+00 (edge) | 1 | 1.2200 ± " in table and "| dense < ste | +0.9800 ± " in table
    assert "rigl" not in table.split("##")[1] and (tmp_path / "masked_orderings.svg").stat().st_size > 1000


def test_the_small_model_has_as_many_weights_as_are_not_zero_in_a_sparse_one() -> None:
    from experiments.masked_orderings import Setup, made, parameters

    setup = Setup()
    _, nonzeros = parameters(made("static", setup, 256))
    whole, same = parameters(made("small_dense", setup, 256))
    assert whole == same and whole == pytest.approx(nonzeros, rel=0.01)
