"""Compares masked algorithms at equal tokens: python -m experiments.masked_orderings --out DIR [--smoke] [--seconds 300].

Every arm trains the model of `population_small` as one population. First its learning rate is tuned (four rates, two seeds); then eight
other seeds, the same for all arms, train at the best rate, so that differences between arms are paired: equal seeds have equal initial
values (but in the small dense model) and all members read the same data in the same order. Masks cover all matrices but embedding and
head, each matrix at the same density. Every run finishes its learning-rate schedule.

Writes DIR/masked_orderings.json after every arm, then .md and .svg. Called again with the same sizes and data it goes on after the last
finished arm.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.comparison import Arm, outcome, thinned
from experiments.masked_report import write
from experiments.population import population_small
from experiments.smoke import shrink
from sparse_lm.data.packaged import Packaged
from sparse_lm.data.pipeline import DataConfig, prepare, train_stream
from sparse_lm.data.tokenizer import BPE
from sparse_lm.layers.feed_forward import DenseFeedForward
from sparse_lm.model.definition import define
from sparse_lm.model.transformer import Model
from sparse_lm.train.step import Train
from sparse_lm.train.validation import MODEL_ARRAYS
from sparse_lm.weight_sparsity.algorithms import Magnitude
from sparse_lm.weight_sparsity.behind import STE
from sparse_lm.weight_sparsity.door import NoSparsity, WeightSparsity
from sparse_lm.weight_sparsity.growth import SET, RigL
from sparse_lm.weight_sparsity.masked import Masked
from sparse_lm.weight_sparsity.schedules import CubicSparsity, Periodic

TUNING_SEEDS, SEEDS = (100, 101), tuple(range(8))
MULTIPLIERS = (0.25, 0.5, 1.0, 2.0)
"""Of the recipe's learning rate; with each tuning seed as many members as there are seeds."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the comparison."""

    steps: int = 2000
    batch: int = 4
    density: float = 0.1
    every: int = 50
    """Steps between two changes of the masks."""
    validation_tokens: int = 131072
    smoke: bool = False


SMOKE = Setup(steps=8, batch=2, density=0.25, every=2, validation_tokens=256, smoke=True)


def base_model(setup: Setup) -> Model:
    """Returns the model of all arms but the small one; stacked, as hundreds of small arrays a step would be the host's work."""
    model = population_small().model
    attention = dataclasses.replace(model.attention, backend="plain", max_documents=256)
    model = dataclasses.replace(model, attention=attention, execution="scanned")
    return dataclasses.replace(shrink(model), vocab_size=512, compute_dtype="float32") if setup.smoke else model


def arms(setup: Setup) -> dict[str, tuple[Model, WeightSparsity]]:
    """Returns the model and the sparsity of each arm, as the literature orders them."""
    model = base_model(setup)
    # As many parameters in all, embedding included, as a sparse arm has weights that are not zero: 1.50 M.
    narrow = dataclasses.replace(model.attention, heads=2, head_dim=32)
    small = dataclasses.replace(model, d_model=192, attention=narrow, pattern=(DenseFeedForward(hidden=120),))
    if setup.smoke:
        small = dataclasses.replace(model, pattern=(DenseFeedForward(hidden=16),))
    exchange, rise = Periodic(every=setup.every), CubicSparsity(every=setup.every)
    masked = functools.partial(Masked, density=setup.density)
    return {
        "dense": (model, NoSparsity()),
        "ste": (model, masked(algorithm=STE(), schedule=rise)),
        "magnitude": (model, masked(algorithm=Magnitude(), schedule=rise)),
        "rigl": (model, masked(algorithm=RigL(), schedule=exchange)),
        "set": (model, masked(algorithm=SET(), schedule=exchange)),
        "static": (model, masked()),
        "small_dense": (small, NoSparsity()),
    }


def made(name: str, setup: Setup, length: int) -> Arm:
    """Returns an arm, not yet compiled."""
    model, sparsity = arms(setup)[name]
    train, shape = Train(steps=setup.steps), (setup.batch, length)
    optimizer = population_small().optimizer
    return Arm(define(model), optimizer, train, members=len(SEEDS), shape=shape, sparsity=sparsity)


def parameters(arm: Arm) -> tuple[int, int]:
    """Returns (all parameters, those that are not zero in the end)."""
    rows = arm.sparsifier.description().get("matrices", [])
    missing = sum(row["matrices"] * math.prod(row["shape"]) - row["kept"] for row in rows)
    return arm.definition.parameters(), arm.definition.parameters() - missing


def density(sparsity: Any) -> float:
    """Returns the share of the weights of sparse matrices that exist, from a step's numbers; 1 where nothing is sparse."""
    rows = jax.device_get(list(sparsity.values()))
    active, weights = (sum(float(np.sum(row[name])) for row in rows) for name in ("active", "weights"))
    return active / weights if weights else 1.0


def result(arm: Arm, batches: list[Any], dataset: Any, data: DataConfig, validation_tokens: int) -> dict[str, Any]:
    """Tunes and trains one arm; returns its row."""
    start = time.perf_counter()
    tuned = arm.tune(MULTIPLIERS, TUNING_SEEDS, batches)
    final = arm.run(SEEDS, [tuned["factor"]] * len(SEEDS), batches)
    losses = arm.held_out(final.state, dataset, data, validation_tokens)
    everything, present = parameters(arm)
    sparsity = final.state.sparsity
    tokens = len(SEEDS) * len(batches) * math.prod(arm.shape)
    return {
        **outcome(tuned, losses),
        "curve": thinned(final.losses_SP.mean(-1)),
        "density": density(jax.jit(jax.vmap(arm.sparsifier.numbers))(sparsity) if sparsity else {}),
        "parameters": everything,
        "nonzeros": present,
        "tokens_per_s": tokens / final.seconds,
        "wall_s": time.perf_counter() - start,
    }


def main() -> int:
    """Runs the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/benchmarks"))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--seconds", type=float, default=math.inf, help="arms whose turn would come too late wait")
    parser.add_argument("--steps", type=int, help="steps of each run")
    parser.add_argument("--arms", nargs="*", choices=tuple(arms(SMOKE)), help="arms to run; default all")
    parser.add_argument("--data-directory", default="data", help="where prepared data is kept")
    options = parser.parse_args()
    began = time.perf_counter()
    setup = SMOKE if options.smoke else Setup()
    if options.steps:
        setup = dataclasses.replace(setup, steps=options.steps)
    data = dataclasses.replace(
        population_small().data,
        sources=(Packaged(documents_per_domain=40) if options.smoke else Packaged(),),
        batch_size=setup.batch,
        directory=options.data_directory,
    )
    if options.smoke:
        data = dataclasses.replace(data, sequence_length=32, tokenizer=BPE(vocab_size=300))
    dataset = prepare(data)
    say = functools.partial(print, flush=True)
    say(f"data ready after {time.perf_counter() - began:.0f} s: {dataset.train_tokens:,} unique training tokens")
    stream = train_stream(dataset, data, seed=0)
    put = functools.partial(jax.tree.map, jnp.asarray)
    batches = [put({name: batch[name] for name in MODEL_ARRAYS}) for batch, _ in itertools.islice(stream, setup.steps)]
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m experiments.masked_orderings",
        "setup": {**dataclasses.asdict(setup), "length": data.sequence_length},
        "seeds": [len(TUNING_SEEDS), len(SEEDS)],
        "tokens": setup.steps * setup.batch * data.sequence_length,
        "unique_tokens": dataset.train_tokens,
        "results": {},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "masked_orderings.json"
    if file.exists():
        past = json.loads(file.read_text())
        if all(past[name] == report[name] for name in ("device", "setup", "seeds", "unique_tokens")):
            report["results"] = past["results"]
    results: dict[str, Any] = report["results"]
    wanted = [name for name in arms(setup) if name not in results and name in (options.arms or arms(setup))]
    chosen = {name: made(name, setup, data.sequence_length) for name in wanted}
    with concurrent.futures.ThreadPoolExecutor(max_workers=2 if options.smoke else 8) as pool:
        compiling = {name: pool.submit(arm.compile) for name, arm in chosen.items()}
        for name, future in compiling.items():
            say(f"{name}: compiled in {future.result():.1f} s")
    slowest = 0.0
    for name, arm in chosen.items():
        left = options.seconds - (time.perf_counter() - began)
        if left < 1.1 * slowest:
            say(f"{name}: left for another call, {left:.0f} s are left")
            continue
        results[name] = result(arm, batches, dataset, data, setup.validation_tokens)
        slowest = max(slowest, results[name]["wall_s"])
        mean, half = results[name]["loss"]
        say(f"{name}: {mean:.4f} +- {half:.4f} at {results[name]['learning_rate']:.1e}, {slowest:.1f} s")
        report["results"] = {name: results[name] for name in arms(setup) if name in results}
        file.write_text(json.dumps(report, indent=1) + "\n")
    write(report, options.out)
    say(
        f"{len(results)} of {len(arms(setup))} arms after {time.perf_counter() - began:.0f} s; written to {options.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
