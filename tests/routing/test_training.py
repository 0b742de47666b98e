"""Routers trained through scripts/pretrain.py: a run that is stopped and goes on ends with the same bits; then it is diagnosed."""

import dataclasses
import json
import pathlib
import runpy
import shutil
import sys

import numpy as np
import pytest
import tiny

import experiments
from sparse_lm.components import lookup
from sparse_lm.model.depth import AdaptiveDepth
from sparse_lm.recipe import Recipe
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.routing.router import Router
from sparse_lm.routing.variable import ExpertThresholdRouter
from sparse_lm.routing.zero_computation import ZeroComputation
from sparse_lm.train.checkpoint_reader import read_checkpoint
from sparse_lm.train.metrics import read_rows

ROOT = pathlib.Path(__file__).parents[2]
ROUTERS: dict[str, dict] = {
    "expert_threshold": {"rows_per_token": 3.0, "most_experts": 3},
    "top_k": {"balance_over": "step", "capacity_factor": 1.5},
    "switch": {},
    "noisy_top_k": {},
    "gshard": {},
    "bias_balanced": {},
    "group_limited": {},
    "remoe": {},
    "hash": {"k": 2},
    "expert_choice": {},
    "sinkhorn": {},
}
DIAGNOSED = ("expert_threshold",)


def router_of(name: str) -> Router:
    return lookup("router", name)(**ROUTERS[name])


def script(name: str, *arguments: str) -> int:
    """Runs a script in this process; returns its exit code."""
    before = sys.argv
    sys.argv = [name, *arguments]
    try:
        with pytest.raises(SystemExit) as exited:
            runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = before
    return int(exited.value.code or 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_trains_stops_and_goes_on_to_the_same_bits(name: str, tmp_path, monkeypatch) -> None:
    tiny.corpus(tmp_path / "text")
    extra = ZeroComputation(identity=1) if name == "top_k" else ZeroComputation()
    moe = MoEFeedForward(experts=4, hidden=8, activation="relu_squared", router=router_of(name), zero_computation=extra)
    base = tiny.recipe(tmp_path, moe, model__layers=1, checkpoint__keep_last=9)
    if name == "bias_balanced":
        # one of them with a routed block before the routed feed-forward
        depth = AdaptiveDepth(router=ExpertThresholdRouter(k=0.5), every=2)
        base = dataclasses.replace(
            base, model=dataclasses.replace(base.model, layers=2, leading=(tiny.DENSE,), depth=depth)
        )

    def tiny_recipe() -> Recipe:
        return base

    monkeypatch.setattr(experiments, "_all", lambda: {"tiny": tiny_recipe})
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert script("pretrain", "tiny", "--run-dir", str(straight)) == 0
    shutil.copytree(straight, stopped)
    shutil.rmtree(stopped / "checkpoints" / "8")  # as if the machine had gone down before the last save
    assert script("pretrain", "tiny", "--run-dir", str(stopped)) == 0
    tiny.assert_same(*(read_checkpoint(run / "checkpoints", 8).state for run in (straight, stopped)))

    rows = read_rows(straight / "metrics.jsonl", "train")
    routed = [{k: v for k, v in row.items() if k.startswith("router/") or k == "loss"} for row in rows]
    again = read_rows(stopped / "metrics.jsonl", "train")
    assert routed == [{k: v for k, v in row.items() if k.startswith("router/") or k == "loss"} for row in again]
    layer = base.model.layers - 1
    last = rows[-1]
    for measure in (
        "load",
        "max_violation",
        "dead_experts",
        "entropy",
        "dropped",
        "top_probability",
        "experts_per_token",
    ):
        assert np.isfinite(last[f"router/blocks.{layer}/{measure}"]).all(), measure
    # Checkpoints of steps 4 and 8 are compared on the same text.
    assert 0 <= last[f"router/blocks.{layer}/churn"] <= 1 and f"router/blocks.{layer}/churn" not in rows[0]
    assert last["flops_per_token"] > 0
    assert last["loss"] < rows[0]["loss"]
    assert "<h2" in (straight / "report.html").read_text()

    if name in DIAGNOSED:
        other = tmp_path / "other.txt"
        other.write_text("1 2 3 4 5 6 7 8 9 " * 20)
        assert (
            script("diagnose", str(straight), "--text", str(other), "--tokens", "256", "--ablation-tokens", "64") == 0
        )
        found = json.loads((straight / "routing.json").read_text())
        numbers = found["layers"]["0"]
        assert numbers["experts"] == 4 and len(numbers["ablation"]) == 4 and "other.txt" in numbers["shift"]
        assert (straight / "routing.html").stat().st_size > 1000
