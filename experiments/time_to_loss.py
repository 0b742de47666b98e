"""Compares wide sparse models with their dense twin at equal seconds: python -m experiments.time_to_loss --out DIR [--smoke].

Every run trains for the same seconds and finishes its schedules: an arm's steps are timed first, and as many are planned as fit. All arms
read the same batches in the same order, documents masked; batches lie on the device before the clock starts, which stands still while
held-out text is read. One seed.

Arms: `wide_dense`, `wide_sparse_25` and `wide_sparse_10` as in experiments/wide_sparse.py at each learning rate; then the sparse ones once more in
half of the seconds, and with a topology that stays (`_static`), both at the arm's best rate. The recipe's vocabulary of 32768 stays, so
that a step costs what it costs there; the tokenizer of the packaged corpora uses 4096 of it.

Writes DIR/time_to_loss.json after every run, then .md and .svg. Called again with the same sizes and data it goes on after the last finished run;
other learning rates may be added so.
"""

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments.time_to_loss_report import STATIC, best_run, write
from experiments.timed_arm import SMOKE, Arm, Batches, Setup, compile_all, planned
from sparse_lm.data.packaged import Packaged
from sparse_lm.data.pipeline import DataConfig, prepare, train_stream, validation_batches
from sparse_lm.data.tokenizer import BPE
from sparse_lm.train.validation import Validation, validation_row

DENSE, SPARSE = "wide_dense", ("wide_sparse_25", "wide_sparse_10")


def data_of(setup: Setup, directory: str) -> DataConfig:
    """Returns the data of all arms."""
    source = Packaged(documents_per_domain=40) if setup.smoke else Packaged()
    return DataConfig(
        sources=(source,),
        tokenizer=BPE(vocab_size=300 if setup.smoke else 4096),
        sequence_length=setup.length,
        batch_size=setup.batch,
        directory=directory,
    )


def jobs(setup: Setup, names: tuple[str, ...], runs: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Yields (arm, multiplier of the learning rate, share of the seconds) in the order in which runs take their turn.

    The best multiplier is read from `runs` when its turn has come.
    """
    sparse = [name for name in SPARSE if name in names]
    for multiplier in setup.multipliers:
        yield from ((name, multiplier, 1.0) for name in (DENSE, *sparse) if name in names)
    for share, suffix in ((0.5, ""), (1.0, STATIC)):
        for name in sparse:
            best = best_run(runs, name)
            if best is not None:
                yield name + suffix, best["multiplier"], share


def key_of(name: str, multiplier: float, share: float) -> str:
    """Returns what a run is called in the report."""
    return f"{name}, rate x {multiplier:g}, {share:g} of the seconds"


def result(
    arm: Arm, name: str, multiplier: float, share: float, timing: dict[str, float], batches: Batches, dataset: Any
) -> dict[str, Any]:
    """Trains and evaluates once; returns the row."""
    start = time.perf_counter()
    setup, recipe, moves = arm.setup, arm.recipe, not name.endswith(STATIC)
    evaluate = arm.programs["evaluate"]
    held_out = [
        (jax.block_until_ready(arm.session.put(batch)), batch["documents_BL"] >= 0)
        for domain in dataset.domains
        for batch in itertools.islice(
            validation_batches(dataset, recipe.data, domain, batch_size=setup.batch), setup.probe_batches
        )
    ]

    def probe(state: Any) -> float:
        nats, tokens = 0.0, 0
        for batch, counted in held_out:
            losses = evaluate(state.params, state.inference_state(), batch)
            nats += float(np.asarray(losses, np.float64)[counted].sum())
            tokens += int(counted.sum())
        return nats / tokens

    steps = planned(share * setup.seconds, timing, lambda steps: len(arm.changes(steps)) if moves else 0)
    state, found = arm.run(multiplier, steps, moves, batches, probe)
    everything = Validation(tokens_per_domain=setup.validation_tokens, batch_size=setup.batch)
    losses = validation_row(evaluate, state.params, state.inference_state(), dataset, recipe.data, everything)
    last = found["curve"]["loss"][-setup.smoothing :]
    return {
        "arm": name,
        "multiplier": multiplier,
        "share": share,
        "learning_rate": multiplier * recipe.optimizer.learning_rate,
        "parameters": arm.session.definition.parameters(),
        "steps": steps,
        "tokens": steps * setup.batch * setup.length,
        "held_out": float(losses["loss"]),
        "domains": {domain: float(row["loss"]) for domain, row in losses["domains"].items()},
        "training_loss": float(np.mean(last)),
        **found,
        "wall_s": time.perf_counter() - start,
    }


def comparable(report: dict[str, Any]) -> dict[str, Any]:
    """Returns a report without the learning rates that were asked for: runs at others may join."""
    return {**report, "setup": {**report["setup"], "multipliers": None}}


def main() -> int:
    """Runs the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/benchmarks"))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--seconds", type=float, help="training time of a run")
    parser.add_argument("--multipliers", type=float, nargs="*", help="of the recipe's rate, in the order of their turn")
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="seconds of the call: what would end later waits"
    )
    parser.add_argument("--arms", nargs="*", default=[DENSE, *SPARSE], choices=[DENSE, *SPARSE], help="default: all")
    parser.add_argument("--data-directory", default="data", help="where prepared data is kept")
    options = parser.parse_args()
    began = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - began:6.1f} s] {line}", flush=True)

    setup = SMOKE if options.smoke else Setup()
    asked = {"seconds": options.seconds, "multipliers": options.multipliers and tuple(options.multipliers)}
    setup = dataclasses.replace(setup, **{name: value for name, value in asked.items() if value})
    data = data_of(setup, options.data_directory)
    dataset = prepare(data, report=lambda line: None)
    say(f"data ready: {dataset.train_tokens:,} unique training tokens")
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m experiments.time_to_loss",
        "setup": json.loads(json.dumps(dataclasses.asdict(setup))),
        "unique_tokens": dataset.train_tokens,
        "timing": {},
        "runs": {},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "time_to_loss.json"
    if file.exists():
        past = json.loads(file.read_text())
        if all(comparable(past)[name] == comparable(report)[name] for name in ("device", "setup", "unique_tokens")):
            report |= {"timing": past["timing"], "runs": past["runs"]}
    timing, runs = report["timing"], report["runs"]
    names = tuple(options.arms)
    unfinished = {job[0].removesuffix(STATIC) for job in jobs(setup, names, runs) if key_of(*job) not in runs}
    arms = {name: Arm(name, setup, data) for name in names if name in unfinished}
    compile_all(arms, say, workers=2 if setup.smoke else 8)
    batches = Batches(train_stream(dataset, data, seed=0), list(arms.values()))
    for name, arm in arms.items():
        if name not in timing:
            timing[name] = arm.time(batches)
            say(f"{name}: " + ", ".join(f"{what} {1e3 * s:.1f} ms" for what, s in timing[name].items()))
    around = 2.0 if setup.smoke else 8.0
    for job in jobs(setup, names, runs):
        (name, _, share), key = job, key_of(*job)
        left = options.budget - (time.perf_counter() - began)
        if key in runs:
            continue
        if left < share * setup.seconds + around:
            say(f"{key}: left for another call, {left:.0f} s are left")
            continue
        own = name.removesuffix(STATIC)
        runs[key] = result(arms[own], *job, timing[own], batches, dataset)
        around = max(around, 1.1 * (runs[key]["wall_s"] - runs[key]["seconds"]))
        file.write_text(json.dumps(report) + "\n")
        say(
            f"{key}: {runs[key]['steps']} steps in {runs[key]['seconds']:.2f} s, held-out {runs[key]['held_out']:.4f}, "
            f"training {runs[key]['training_loss']:.4f}, {runs[key]['wall_s']:.1f} s in all"
        )
    write(report, options.out)
    say(f"{len(runs)} runs, written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
