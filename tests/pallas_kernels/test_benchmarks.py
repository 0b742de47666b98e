"""The benchmark commands on tiny problems: they run, their numbers add up, their files are written."""

import json
import pathlib
import re
import runpy
import sys

import jax
import numpy as np
import pytest

from pallas_kernels.backend import jax_version
from pallas_kernels.benchmark import block_sparse, feed_forward, fused, grouped, parts, tuning
from pallas_kernels.benchmark.grouped_check import check
from pallas_kernels.benchmark.timing import NoneChosenError, Timing, chosen
from pallas_kernels.benchmark.tuning import block_sparse_candidates, grouped_candidates, tune_block_sparse
from pallas_kernels.block_sparse_matmul import tuned_tiles
from pallas_kernels.grouped_matmul import grouped_feed_forward

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="tiny problems say nothing on an accelerator")


ROOT = pathlib.Path(__file__).parents[2]


def test_routes_are_plans_of_the_routed_feed_forward():
    sizes, token_A, row_TS = (np.asarray(a) for a in feed_forward.route(10, 6, 3))
    assert sizes.sum() == token_A.size == 30
    assert (token_A[row_TS] == np.arange(10)[:, None]).all()
    expert_A = np.repeat(np.arange(6), sizes)
    assert all(len(set(expert_A[rows])) == 3 for rows in row_TS)
    assert grouped_feed_forward.__module__.endswith("feed_forward")


@pytest.mark.slow
def test_feed_forward_rows_count_what_is_stored():
    rows = feed_forward.run(tokens=64, model=32, active=64)
    assert [row["what"] for row in rows] == ["dense", "E16 S2", "E64 S8", "E256 S32"]
    # x, gate and up in float32: 64 * (32 + 2 * 64) * 4 bytes.
    assert rows[0]["stored_mb"] == pytest.approx(64 * 160 * 4 / 1e6)
    # The plan adds token and row indices and weights, 12 bytes a row, and the sizes.
    assert rows[1]["stored_mb"] == pytest.approx((64 * 160 * 4 + 12 * 128 + 4 * 16) / 1e6)


@pytest.mark.slow
def test_block_sparse_rows_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    cases = [block_sparse.Case(128, 128, 128, 64, d, dtype="float32") for d in (1.0, 0.5)]
    rows = [row for case in cases for row in block_sparse.measure(case, rounds=1)]
    assert [row["product"] for row in rows] == [
        *("forward", "dx", "dvalues", "norms", "all three"),
        *("forward", "dx", "dvalues", "all three"),
    ]
    assert all(row["error"] <= 1e-6 for row in rows if row.get("error") is not None)
    assert all(np.isclose(row["speedup"], row["dense_ms"] / row["ms"]) for row in rows)
    block_sparse.draw(rows, tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 0


@pytest.mark.slow
def test_grouped_rows_and_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(grouped.SHAPES, "cpu", (256, 16, 32, 4))
    rows = grouped.parts(None)["cpu"]()
    assert {(r["skew"], r["product"], r["label"]) for r in rows} == {
        (skew, product, label)
        for skew in ("uniform", "zipf")
        for product in ("forward", "dx", "dw")
        for label in ("dense", "ours")
    }
    grouped.draw(rows, tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 0


@pytest.mark.slow
def test_fused_forms_and_their_plain_forms_agree(monkeypatch):
    monkeypatch.setitem(grouped.SHAPES, "cpu", (256, 16, 32, 4))
    for what, forms in fused.pairs("cpu", np.float32).items():
        one, other = (np.asarray(function(*arguments)) for function, arguments in forms.values())
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, err_msg=what)
    assert set(fused.parts()) == set(fused.pairs("cpu", np.float32))
    assert [row["form"] for row in fused.run("SwiGLU")] == ["one kernel", "two products"]


def test_a_part_that_fails_is_said_and_is_not_a_number(tmp_path, monkeypatch, capsys):
    def broken():
        raise MemoryError("too large")

    table = {"small 1": lambda: [{"ms": 1.0}], "small 2": broken, "large": broken, "small 3": lambda: [{"ms": 3.0}]}
    monkeypatch.setitem(parts.OTHERS, "norms", lambda: table)
    found = parts.run("norms", json_path=str(tmp_path / "table.json"), only="^small")
    assert found["rows"] == [{"ms": 1.0}, {"ms": 3.0}]
    assert json.loads((tmp_path / "table.json").read_text()) == found
    said = capsys.readouterr().out
    assert "FAILED norms small 2: MemoryError: too large" in said and "large: " not in said.replace("too large", "")


def test_parts_and_candidates_are_chosen_by_name():
    named = {"0.5 product": 1, "0.25 product": 2, "0.5 sampled": 3}
    assert chosen(named, "^0.5") == {"0.5 product": 1, "0.5 sampled": 3} and chosen(named, "") == named
    with pytest.raises(
        NoneChosenError, match=r"only = 'dx'; allowed: .* one of 0.5 product, 0.25 product, 0.5 sampled"
    ):
        chosen(named, "dx")


@pytest.mark.parametrize(
    "choice, message",
    [
        (("--only", "("), r"argument --only: '\(' is not a regular expression"),
        (("--only", "no such part"), "error: norms: only = 'no such part'; allowed: .* one of norms"),
        (("--backend", "tritn"), "argument --backend: invalid choice: 'tritn'"),
        (
            ("--backend", "triton"),
            "error: norms: backend = 'triton'; allowed: none here, only for block_sparse, grouped",
        ),
    ],
)
def test_a_choice_that_means_nothing_is_one_line(monkeypatch, capsys, choice, message):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "kernels", "--op", "norms", *choice])
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(str(ROOT / "scripts" / "benchmark.py"), run_name="__main__")
    assert exited.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.skipif(jax_version() < (0, 11, 0), reason="the Hopper kernels need JAX 0.11")
def test_candidates_hold_the_tilings_in_use():
    """Else a search could not find them again."""
    from pallas_kernels.block_sparse_matmul.mosaic_gpu_product import ProductTile
    from pallas_kernels.block_sparse_matmul.mosaic_gpu_sampled import SampledTile
    from pallas_kernels.grouped_matmul.tiles import product_tiles, weight_tiles

    tiles = list(block_sparse_candidates().values())
    for operation, classes in tuned_tiles.H100.items():
        kind = SampledTile if operation == "sampled_product" else ProductTile
        assert all((operation, kind(**fields)) in tiles for _, fields in classes), operation
    of_weights = [weight for _, weight in grouped_candidates().values()]
    assert all(weight_tiles("NVIDIA H200", 2048, 1024, by_index) in of_weights for by_index in (False, True))
    assert product_tiles("NVIDIA H200", 65536, 2048, 1024) in [product for product, _ in grouped_candidates().values()]


def test_the_check_of_grouped_products_tells_right_from_wrong(capsys):
    forward = grouped.products(None)["forward"]
    assert check({"right": {"forward": forward}})
    assert not check({"wrong": {"forward": lambda *operands: forward(*operands) * 1.01}})
    verdicts = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    # The last groups have no rows, where every product is zeros, wrong by a factor or not.
    assert verdicts == ["ok", "ok", "ok", "ok", "WRONG", "WRONG", "WRONG", "ok"]


@pytest.mark.skipif(jax_version() < (0, 11, 0), reason="the Hopper kernels need JAX 0.11")
def test_the_autotuner_times_the_candidates_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "BLOCK_SPARSE_CASES", [block_sparse.Case(256, 256, 256, 128, 0.5)])
    monkeypatch.setattr(tuning, "compile_all", lambda jobs: ({name: job[0] for name, job in jobs.items()}, {}))
    seconds = {"product width 1 straight 3 stages": 2e-3, "product width 1 swapped 3 stages": 1e-3}

    def time_all(todo, rounds):
        return {name: Timing(*[seconds[name.removeprefix("256x256 0.5 ")]] * 3, rounds) for name in todo}

    monkeypatch.setattr(tuning, "time_all", time_all)
    found = tune_block_sparse(str(tmp_path / "tune.json"), "0.5 product width 1 .* 3 stages")
    assert json.loads((tmp_path / "tune.json").read_text()) == found
    assert [(row["m"], row["density"], row["tile"]["swapped"], row["ms"]) for row in found] == [
        (256, 0.5, True, 1.0),
        (256, 0.5, False, 2.0),
    ]
    assert capsys.readouterr().out.startswith("256x256 0.5 product width 1 swapped 3 stages: 1.0000 ms")
