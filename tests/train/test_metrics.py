"""Rows survive kills and resumption, numbers keep their value on the way to disk, and the meter counts only training time."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm import config
from sparse_lm.train import machine, metrics


def row(step, kind="train", **measured):
    return {"kind": kind, "step": step, "tokens": 100 * step, "seconds": float(step), "flops": 1e9 * step} | measured


def test_plain_numbers_are_exact_and_json_is_standard():
    written = metrics.plain(
        {
            "f32": np.float32(0.1),
            "bf16": jnp.asarray(1.5, jnp.bfloat16),
            "jax": jnp.arange(3) / 8,
            "nan": [float("nan"), np.float32("inf"), 1.0],
            "int": np.int64(7),
            "bool": np.bool_(True),
            "nested": {"a": (1, None)},
        }
    )
    assert written == {
        "f32": 0.1,
        "bf16": 1.5,
        "jax": [0.0, 0.125, 0.25],
        "nan": [None, None, 1.0],
        "int": 7,
        "bool": True,
        "nested": {"a": [1, None]},
    }
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    read = json.loads(json.dumps(metrics.plain(values), allow_nan=False))
    np.testing.assert_array_equal(np.asarray(read, np.float32), values)


def test_plain_refuses_what_is_not_a_number():
    with pytest.raises(ValueError, match="object"):
        metrics.plain({"x": object()})


def test_json_lines_cut_and_append_after_a_kill(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = metrics.JsonLines(path)
    for step in (10, 20, 30):
        writer.write(row(step, loss=1.0 / step))
    writer.close()
    with path.open("a") as file:
        file.write('{"kind": "train", "st')  # a kill in the middle of a line

    writer = metrics.JsonLines(path)
    assert [r["step"] for r in metrics.read_rows(path)] == [10, 20, 30]
    assert writer.cut(20) == 1
    writer.write(row(21, "validation", loss=2.0))
    writer.close()
    writer.close()
    assert [r["step"] for r in metrics.read_rows(path)] == [10, 20, 21]
    assert metrics.read_rows(path, "validation") == [row(21, "validation", loss=2.0)]
    assert sorted(p.name for p in path.parent.iterdir()) == ["metrics.jsonl"]


def test_read_rows_names_a_damaged_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(row(1))}\nnonsense\n{json.dumps(row(2))}\n")
    with pytest.raises(ValueError, match="line 2"):
        metrics.read_rows(path)


def test_a_row_of_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'traing'; allowed: train, validation, event"):
        metrics.JsonLines(tmp_path / "m.jsonl").write(row(1, "traing"))


def test_names_for_flat_writers():
    validation = row(5, "validation", loss=2.0, domains={"speeches": {"loss": 1.0}}, note="text", mfu=None)
    assert dict(metrics.scalars_and_lists(validation)) == {
        "validation/loss": 2.0,
        "validation/domains/speeches/loss": 1.0,
    }
    load = {"router/blocks.3/load": [[0.25, 0.75], [0.5, 0.5]], "loss": [1.0, float("nan")], "tokens_per_s": 7.0}
    assert dict(metrics.scalars_and_lists(row(5, **load), members=2)) == {
        "train/router/blocks.3/load/member 0": [0.25, 0.75],
        "train/router/blocks.3/load/member 1": [0.5, 0.5],
        "train/loss/member 0": 1.0,
        "train/tokens_per_s": 7.0,
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the reader's own imports
def test_tensorboard_purges_the_superseded_future(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config_ = metrics.LogConfig()
    with metrics.open_writers(tmp_path, config_) as writers:
        for step in (10, 20, 30):
            writers.write(row(step, loss=float(step), **{"router/blocks.0/load": [0.1, 0.9, None]}))
        writers.write(row(30, "event", event="started"))
    with metrics.open_writers(tmp_path, config_, resumed_step=20) as writers:
        writers.write(row(25, loss=25.0))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 10.0), (20, 20.0), (25, 25.0)]
    assert events.Tags()["histograms"] == ["train/router/blocks.0/load"]
    assert [r["step"] for r in metrics.read_rows(tmp_path / "metrics.jsonl")] == [10, 20, 25]


def test_wandb_is_optional_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install 'sparse_lm\[wandb\]'"):
        metrics.open_writers(tmp_path, metrics.LogConfig(wandb_project="p", tensorboard=False))


def test_closing_reaches_every_writer():
    closed = []

    class Probe:
        def __init__(self, name):
            self.name = name

        def close(self):
            closed.append(self.name)
            if self.name == "b":
                raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), metrics.Writers(Probe("a"), Probe("b"), Probe("c")):
        pass
    assert closed == ["c", "b", "a"]


def test_meter_separates_training_waiting_and_pauses():
    now = [0.0]
    meter = metrics.Meter(
        flops_per_token=50.0, peak_flops=10_000.0, tokens=1000, seconds=5.0, flops=50_000.0, clock=lambda: now[0]
    )
    for _ in range(2):
        with meter.waiting():
            now[0] += 0.5
        now[0] += 1.5
        meter.step(100)
    with meter.paused():
        now[0] += 100.0
    # 200 tokens in 4 s: 50 tokens/s x 50 FLOPs / 10,000 FLOP/s = 0.25
    assert meter.read() == {
        "tokens": 1200,
        "seconds": 9.0,
        "flops": 60_000.0,
        "tokens_per_s": 50.0,
        "step_s": 2.0,
        "data_wait_s": 0.5,
        "mfu": 0.25,
    }
    now[0] += 1.0
    meter.step(10)
    again = meter.read()
    assert (again["tokens_per_s"], again["data_wait_s"], again["seconds"]) == (10.0, 0.0, 10.0)
    assert metrics.Meter(1.0, None).read()["mfu"] is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("log_every", 0), ("profile_steps", 0), ("profile_start", -1), ("wandb_project", " "), ("display", "loud")],
)
def test_impossible_settings_are_named(field, value):
    with pytest.raises(config.ConfigError, match=f"{field} = .* allowed: "):
        config.validate(metrics.LogConfig(**{field: value}))


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA GB200", "bfloat16", 2500e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5", "bfloat16", 459e12),
        ("TPU v4", "float32", None),
        ("cpu", "float32", None),
    ],
)
def test_peak_of_known_devices(kind, dtype, peak):
    assert machine.peak_flops(kind, dtype) == peak
    assert ("not given" in machine.peak_statement(kind, dtype)) == (peak is None)


def test_environment_is_json_and_energy_gives_its_reason():
    found = machine.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["jax"] and found["cpus"] >= 1
    energy = machine.Energy()
    assert (energy.joules() is None) == (energy.reason is not None)
