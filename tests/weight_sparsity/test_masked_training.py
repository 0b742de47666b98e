"""Masked runs through scripts/pretrain.py, and what a state with masks must keep: bits on resume, members apart, numbers reported."""

import dataclasses
import functools
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scripted import pretrain

from sparse_lm.components import lookup
from sparse_lm.evaluate.load import open_run
from sparse_lm.layers.tree_paths import flatten
from sparse_lm.recipe import Recipe
from sparse_lm.train.checkpoint_reader import read_checkpoint
from sparse_lm.train.initialize import StartFrom
from sparse_lm.train.loop import train
from sparse_lm.train.metrics import read_rows
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.population import MEMBERS, Population, member_arrays, over_members
from sparse_lm.train.schedule import Constant
from sparse_lm.train.state import TrainState, dims_of, initial_state, unrolled
from sparse_lm.train.step import Train, build_step
from sparse_lm.weight_sparsity.growth import RigL
from sparse_lm.weight_sparsity.masked import Masked
from sparse_lm.weight_sparsity.schedules import CubicSparsity, OneShot, Periodic

DENSITY = 0.25
SCHEDULES: dict[str, str] = {
    "magnitude": "cubic",
    "snip": "one_shot",
    "wanda": "one_shot",
    "set": "periodic",
    "rigl": "periodic",
    "chts": "periodic",
    "srigl": "periodic",
    "ste": "cubic",
    "movement": "cubic",
    "abs_top_k": "linear",
}
STRUCTURES = {"srigl": "constant_fan_in", "wanda": "constant_fan_in"}
FIELDS: dict[str, dict[str, Any]] = {"synflow": {"rounds": 10}, "abs_top_k": {"least_fan_in": 1}}
EVERY_STEP = ("ste", "sr_ste", "top_k_ast", "abs_top_k")
ALGORITHMS = ("static", "synflow", "sr_ste", "top_k_ast", *SCHEDULES)
BEHIND = ("ste", "sr_ste", "top_k_ast", "movement")


def masked(name: str, every: int) -> Masked:
    """An algorithm in its usual company."""
    schedule = SCHEDULES.get(name, "constant")
    fields = {} if schedule == "one_shot" else {"every": 1 if name in EVERY_STEP else every}
    return Masked(
        density=DENSITY,
        algorithm=lookup("sparse_algorithm", name)(**FIELDS.get(name, {})),
        structure=lookup("sparse_structure", STRUCTURES.get(name, "unstructured"))(),
        schedule=lookup("sparse_schedule", schedule)(**fields),
    )


def densities(run_dir: pathlib.Path) -> dict[str, float]:
    """The share of weights that are not zero, of the matrices that the model computes with."""
    flat = flatten(open_run(run_dir).params)
    return {path: float(np.mean(np.asarray(leaf) != 0)) for path, leaf in flat.items() if leaf.ndim > 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_trains_for_a_hundred_steps(name: str, tmp_path, monkeypatch) -> None:
    tiny.corpus(tmp_path / "text")
    recipe = tiny.recipe(
        tmp_path,
        model__layers=1,
        train__steps=100,
        weight_sparsity=masked(name, 10),
        validation__every=0,
        checkpoint__every=50,
        log__log_every=10,
    )
    pretrain(recipe, tmp_path / "run", monkeypatch)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl", "train")
    last = rows[-1]
    assert last["loss"] < rows[0]["loss"] - 0.5
    assert last["sparsity/density"] == pytest.approx(DENSITY, abs=0.02 if name == "srigl" else 0.003)
    if name != "srigl":  # whose fan-in is a whole number after ablation
        assert last["sparsity/density"] == last["sparsity/requested"]
    for path, found in densities(tmp_path / "run").items():
        assert found == pytest.approx(DENSITY, abs=0.06) if path.startswith("blocks") else found > 0.99, path
    assert DENSITY <= last["sparsity/mean_density"] + 0.01 <= 1.01
    assert "<h2" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.faults
def test_rigl_trains_stops_and_goes_on_to_the_same_bits(tmp_path, monkeypatch) -> None:
    """Stopped between two exchanges, with bits of masks in the checkpoint; the report shows what happened."""
    tiny.corpus(tmp_path / "text")
    sparsity = Masked(density=DENSITY, algorithm=RigL(), schedule=Periodic(every=3, end=1.0), storage="bits")
    recipe = tiny.recipe(
        tmp_path,
        model__layers=2,
        model__execution="scanned",
        weight_sparsity=sparsity,
        validation__every=0,
        train__ema_decay=0.5,
    )
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    pretrain(recipe, straight, monkeypatch)
    shutil.copytree(straight, stopped)
    shutil.rmtree(stopped / "checkpoints" / "8")
    assert train(recipe, stopped) == 0
    ends = [read_checkpoint(run / "checkpoints", 8).state for run in (straight, stopped)]
    tiny.assert_same(*ends)
    rows = read_rows(straight / "metrics.jsonl", "train")
    kept = [{k: v for k, v in row.items() if k.startswith("sparsity/") or k == "loss"} for row in rows]
    again = read_rows(stopped / "metrics.jsonl", "train")
    assert kept == [{k: v for k, v in row.items() if k.startswith("sparsity/") or k == "loss"} for row in again]
    last = rows[-1]
    # exchanges after 3 and 6 steps, in the steps that finish as numbers 4 and 7
    changed = [row["step"] for row, before in zip(rows[1:], rows) if row["sparsity/churn"] != before["sparsity/churn"]]
    assert changed == [4, 7] and 0 < last["sparsity/churn"] < 0.5
    assert last["sparsity/density"] == last["sparsity/requested"] == last["sparsity/mean_density"]
    assert len(last["sparsity/feed_forward.up/density"]) == 2 and last["sparsity/feed_forward.up/never"][0] < 0.75
    assert last["sparsity/flops_per_token"] < last["flops"] / last["tokens"]
    # a weight that is masked is zero, and so are its moments and its average
    state = ends[0]
    mask = np.unpackbits(
        np.asarray(state["sparsity"]["masks"]["mask"]["blocks"]["1"]["feed_forward"]["up"]["weight"]),
        axis=-1,
        bitorder="little",
    ).astype(bool)
    for tree in (state["params"], state["opt_state"]["mu"], state["opt_state"]["nu"], state["ema"]):
        leaf = np.asarray(tree["blocks"]["1"]["feed_forward"]["up"]["weight"])
        assert (leaf[~mask] == 0).all() and (leaf[mask] != 0).any()
    page = (straight / "report.html").read_text()
    assert "Weight sparsity</h2>" in page and "data:image/png" in page
    described = json.loads((straight / "sparsity.json").read_text())
    assert described["dense"]["embedding"] == "embedding" and described["dense"]["head"] == "head"
    assert sum(row["kept"] for row in described["matrices"]) == described["allocations"]["uniform"]["weights"]


MODEL = tiny.model(layers=2, execution="scanned")
OPTIMIZER = AdamW(learning_rate=0.01, schedule=Constant(warmup_steps=1))
EXCHANGED = Masked(density=0.3, algorithm=RigL(), schedule=Periodic(every=2, end=1.0))


@functools.cache
def build(execution: str, members: bool = False) -> tuple[Any, Any]:
    """(step, create) of the tiny model with RigL."""
    definition, _, _ = tiny.materialized(dataclasses.replace(MODEL, execution=execution))
    sparse = EXCHANGED.build(definition, OPTIMIZER, 6, 1)
    step = build_step(definition, OPTIMIZER, Train(steps=6), sparse, MEMBERS if members else None)

    def create(seed: Any) -> TrainState:
        return initial_state(definition, OPTIMIZER.build(definition.dims), seed, with_ema=False, sparsifier=sparse)

    return step, create


def three_steps(execution: str) -> TrainState:
    step, create = build(execution)
    step, state = tiny.jit(step), tiny.jit(create)(0)
    for seed in range(3):
        state, _ = step(state, tiny.full_batch(4, seed=seed), jnp.float32(1))
    return state


@pytest.mark.slow
def test_stacked_layers_choose_as_unrolled_ones() -> None:
    stacked, loose = (unrolled(three_steps(execution)) for execution in ("scanned", "unrolled"))
    tiny.assert_same(stacked["sparsity"]["masks"], loose["sparsity"]["masks"])
    assert stacked["sparsity"]["counts"]["grown"]["blocks"]["0"]["feed_forward"]["up"]["weight"] > 0


@pytest.mark.slow
def test_members_of_a_population_choose_by_themselves() -> None:
    population = Population(seeds=(0, 5))
    step, create = build("scanned", True)
    seeds, factors = member_arrays(population, 0)
    together = tiny.jit(over_members(step, population, (0, None, 0)))
    state = tiny.jit(over_members(create, population, (0,)))(seeds)
    traced = jax.make_jaxpr(over_members(step, population, (0, None, 0)))(state, tiny.full_batch(4), factors)
    assert " cond[" in str(traced)  # members are at one step: the exchange is still a condition, not a selection
    for seed in range(3):
        state, _ = together(state, tiny.full_batch(4, seed=seed), factors)
    alone = three_steps("scanned")
    tiny.assert_same(jax.tree.map(lambda leaf: leaf[0], state.sparsity["masks"]), alone.sparsity["masks"])
    first, second = (jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), state.sparsity["masks"]) for i in (0, 1))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)))


def test_the_state_knows_its_dims() -> None:
    definition, _, _ = tiny.materialized(MODEL)
    for algorithm in ("rigl", "movement", "top_k_ast"):
        config = dataclasses.replace(EXCHANGED, algorithm=lookup("sparse_algorithm", algorithm)())
        sparse = config.build(definition, OPTIMIZER, 6, 1)

        def create(sparse=sparse):
            return initial_state(definition, OPTIMIZER.build(definition.dims), 0, with_ema=False, sparsifier=sparse)

        state = jax.eval_shape(create)
        dims = flatten(dims_of(definition, state, sparse).sparsity)
        leaves = flatten(state.sparsity)
        assert dims.keys() == leaves.keys()
        assert all(len(dims[path]) == leaf.ndim for path, leaf in leaves.items())


@pytest.mark.slow
def test_a_trained_run_is_pruned_and_a_ticket_is_rewound(tmp_path, monkeypatch) -> None:
    """Pruning after training by magnitude and by Wanda, and a lottery ticket with its control, from one dense run."""
    tiny.corpus(tmp_path / "text")
    base = tiny.recipe(
        tmp_path, model__layers=1, train__steps=40, checkpoint__every=4, checkpoint__keep_last=9, validation__every=0
    )
    pretrain(base, tmp_path / "dense", monkeypatch)
    trained = flatten(read_checkpoint(tmp_path / "dense" / "checkpoints", 40).state["params"])
    early = flatten(read_checkpoint(tmp_path / "dense" / "checkpoints", 8).state["params"])
    path = "blocks.0.feed_forward.up.weight"
    largest = np.abs(trained[path]) >= np.sort(np.abs(trained[path]).reshape(-1))[-trained[path].size // 4]

    source = StartFrom(run=str(tmp_path / "dense"))
    for name in ("magnitude", "wanda"):
        sparsity = dataclasses.replace(masked(name, 1), schedule=OneShot())
        pruned = dataclasses.replace(base, weight_sparsity=sparsity, start_from=source)
        pruned = dataclasses.replace(pruned, train=dataclasses.replace(base.train, steps=8))
        pretrain(pruned, tmp_path / name, monkeypatch)
        found = open_run(tmp_path / name)
        weight = np.asarray(flatten(found.params)[path])
        assert np.mean(weight != 0) == 0.25
        if name == "magnitude":
            assert np.mean((weight != 0) == largest) > 0.97  # one step at a small rate came before the choice

    ticket = Masked(density=0.25, algorithm=lookup("sparse_algorithm", "lottery")())
    for rewind, origin in ((8, early), (-1, None)):
        start = dataclasses.replace(source, rewind=rewind)
        recipe = dataclasses.replace(base, weight_sparsity=ticket, start_from=start)
        recipe = dataclasses.replace(recipe, train=dataclasses.replace(base.train, steps=8))
        recipe = dataclasses.replace(recipe, optimizer=AdamW(learning_rate=1e-9, schedule=Constant()))
        pretrain(recipe, tmp_path / f"ticket{rewind}", monkeypatch)
        weight = np.asarray(flatten(open_run(tmp_path / f"ticket{rewind}").params)[path])
        np.testing.assert_array_equal(weight != 0, largest)
        if origin is not None:
            np.testing.assert_allclose(weight, np.where(largest, origin[path], 0), atol=1e-6)


def test_sparsity_is_part_of_the_recipe(tmp_path) -> None:
    from sparse_lm.config import from_dict, swap, to_dict

    recipe = swap(swap(Recipe(), "weight_sparsity=masked"), "sparse_algorithm=rigl")
    recipe = swap(recipe, "weight_sparsity.schedule=cubic")
    assert recipe.weight_sparsity == Masked(algorithm=RigL(), schedule=CubicSparsity())
    assert from_dict(Recipe, json.loads(json.dumps(to_dict(recipe)))) == recipe
