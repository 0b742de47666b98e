"""The comparison of routers: intervals and paired differences by hand, parts joined into one table."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.paired import interval
from experiments.routing_comparison import SMOKE, joined
from experiments.routing_report import write


def row(losses: list[float], causal: bool = True) -> dict:
    zeros = dict.fromkeys(("learning_rate", "flops_per_token", "tokens_per_s"), 1.0)
    nothing = dict.fromkeys(("experts_per_token", "max_violation", "dropped"))
    loss = interval(np.array(losses))
    edge = {"learning_rate_at_edge": False, "curve": [[0.0, 3.0], [1.0, 2.0]]}
    return {"causal": causal, "losses": losses, "loss": loss, **zeros, **nothing, **edge}


def test_interval_by_hand() -> None:
    # mean 3, deviations -2 -1 0 1 2: variance 10 / 4, half width 2.776 * sqrt(2.5 / 5)
    assert interval(np.array([1.0, 2, 3, 4, 5])) == pytest.approx((3.0, 2.776 * 0.5**0.5))


def test_parts_are_joined_and_compared_with_their_own_kind(tmp_path) -> None:
    results = [
        {"hash": row([2.0, 2.5, 3.0, 3.5, 4.0])},
        {"top_k": row([1.0, 1.5, 2.0, 2.5, 3.5]), "sinkhorn": row([1.0, 1, 1, 1, 2], causal=False)},
    ]
    shared = {
        "setup": dataclasses.asdict(SMOKE),
        "tokens": 10,
        "unique_tokens": 20,
        "device": "cpu",
        "jax": "0",
        "seeds": [2, 5],
    }
    folders = [tmp_path / "a", tmp_path / "b"]
    for number, (folder, part) in enumerate(zip(folders, results)):
        folder.mkdir()
        report = {**shared, "results": part, "seconds": number, "date": "today", "command": "x"}
        (folder / "routing_comparison.json").write_text(json.dumps(report))
    report = joined(folders)
    assert list(report["results"]) == ["top_k", "hash", "sinkhorn"] and report["seconds"] == 1
    # differences of hash from top_k by seed: 1, 1, 1, 1, 0.5
    difference = report["results"]["hash"]["difference"]
    assert difference["from"] == "top_k" and difference["mean"][0] == pytest.approx(0.9)
    assert "difference" not in report["results"]["sinkhorn"] and "difference" not in report["results"]["top_k"]
    write(report, tmp_path / "all")
    table = (tmp_path / "all" / "routing_comparison.md").read_text()
    assert "| hash | 1.0e+00 | 3.0000 ± " in table and "## Not causal" in table and "5 paired seeds" in table
    assert (tmp_path / "all" / "routing_comparison.svg").stat().st_size > 1000
    other = json.loads((folders[1] / "routing_comparison.json").read_text())
    (folders[1] / "routing_comparison.json").write_text(json.dumps({**other, "tokens": 11}))
    with pytest.raises(ValueError, match="tokens differs"):
        joined(folders)
