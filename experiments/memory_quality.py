"""Measures what a memory is worth: python -m experiments.memory_quality --out DIR [--source packaged] [--steps N] [--seconds 570] [--probe 40] [--smoke].

Eight arms of equal active operations and, but for `dense`, equal parameters (`experiments/memory_arms.py`): dense and routed models, each
alone, with Engram, and with its two controls, whose rows belong to single tokens or to n-grams mixed with their position. Every arm
trains as one population: its learning rate is tuned (five rates, one seed, an eighth of the steps), then five other seeds, the same for
all arms, train at the best one. Held-out tokens are sorted into kinds (`experiments/memory_data.py`), so that a gain splits into
recall and reasoning.

Arms begin as soon as they are compiled. Writes DIR/memory_quality_SOURCE.json, .md and .svg after every arm. Called again with the
same sizes and data it goes on with the arms that are missing, and with those that are tuned already. With --probe it only says how
long all of this will take.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import math
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

from experiments.command_line import keep_compiled, or_exit
from experiments.comparison import Arm, as_compiled
from experiments.memory_arms import KINDS, models, numbers
from experiments.memory_batches import Making, processes
from experiments.memory_data import HeldOut, by_frequency, by_truth, packaged, synthetic
from experiments.memory_probe import WARM, probe
from experiments.memory_report import write
from experiments.memory_runs import SMOKE, Setup, final_seconds, made, result, tune
from sparse_lm.data.pipeline import Batch, DataConfig, prepare
from sparse_lm.memory.ngram import NgramMemory

SAME = ("device", "jax", "setup", "data")
"""What two calls must share for the second to go on with the arms of the first."""

say = functools.partial(print, flush=True)


def parsed() -> argparse.Namespace:
    """Returns the command's options."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/benchmarks"))
    parser.add_argument("--source", choices=("synthetic", "packaged"), default="synthetic")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--seconds", type=float, default=math.inf, help="runs that would end too late wait")
    parser.add_argument("--steps", type=int, help="steps of each final run")
    parser.add_argument("--arms", nargs="*", choices=tuple(KINDS), default=tuple(KINDS), help="default all")
    parser.add_argument("--execution", choices=("unrolled", "scanned"), help="equal blocks one by one or as a loop")
    parser.add_argument("--probe", type=int, metavar="STEPS", help="only time so many steps of every arm")
    parser.add_argument("--data-directory", default="data", help="where prepared data and compiled programs are kept")
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> Setup:
    """Returns the sizes that the options ask for; the vocabulary is known when the data is prepared.

    Raises:
      ValueError: for impossible ones.
    """
    if options.probe is not None and options.probe < 1:
        raise ValueError(f"--probe = {options.probe}; allowed: at least 1 step")
    setup = SMOKE if options.smoke else Setup()
    if options.steps is not None:
        setup = dataclasses.replace(setup, steps=options.steps)
    if options.execution:
        setup = dataclasses.replace(setup, sizes=dataclasses.replace(setup.sizes, execution=options.execution))
    return setup


def data_of(options: argparse.Namespace, setup: Setup) -> DataConfig:
    """Returns what the arms train on."""
    length = setup.sizes.length
    if options.source == "synthetic":
        return synthetic(length, setup.batch, setup.steps * setup.batch * length, options.data_directory)
    vocabulary = 300 if options.smoke else 4096
    return packaged(length, setup.batch, vocabulary, options.data_directory, setup.documents)


def sorted_tokens(source: str, arm: Arm, setup: Setup, dataset: Any, data: Any, training: list[Batch]) -> HeldOut:
    """Returns the held-out tokens with their kinds; n-grams are those of an arm with Engram."""
    if source == "synthetic":
        return by_truth(dataset, data, setup.validation_tokens)
    memory = arm.definition.config.memory
    assert isinstance(memory, NgramMemory), "an arm with n-grams"
    (hashing,) = arm.definition.hashes().values()
    return by_frequency(dataset, data, setup.validation_tokens, hashing, memory.orders[-1], training)


def description(held_out: HeldOut) -> dict[str, Any]:
    """Returns what the report says of the held-out tokens; kinds that do not occur are left out of the parts."""
    tokens_K = held_out.tokens_DK.sum(0)
    there = {name: int(tokens) for name, tokens in zip(held_out.kinds, tokens_K) if tokens}
    optimum = held_out.optimum_DK
    return {
        "domains": dict(zip(held_out.domains, held_out.tokens_DK.sum(1).tolist())),
        "kinds": there,
        "parts": {name: [kind for kind in kinds if kind in there] for name, kinds in held_out.parts.items()},
        "optimum": None if optimum is None else dict(zip(held_out.kinds, (optimum.sum(0) / np.maximum(tokens_K, 1)))),
    }


def head_of(options: argparse.Namespace, setup: Setup, dataset: Any) -> dict[str, Any]:
    """Returns the report before anything is tuned or trained."""
    command = f"python -m experiments.memory_quality --source {options.source} --steps {setup.steps}"
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": f"{command} --execution {setup.sizes.execution}",
        "source": options.source,
        "setup": json.loads(json.dumps(dataclasses.asdict(setup))),
        "data": dataset.hash,
        "sizes": {name: numbers(model, setup.sizes) for name, model in models(setup.sizes).items()},
        "tuned": {},
        "results": {},
    }


def found_before(report: dict[str, Any], file: pathlib.Path) -> dict[str, Any]:
    """Returns what an earlier call with the same sizes and data has tuned and trained."""
    past = json.loads(file.read_text()) if file.exists() else {}
    differing = [name for name in SAME if past.get(name) != report[name]]
    if past and differing:
        say(f"{file} is of another comparison ({', '.join(differing)}) and will be replaced")
    return {} if differing else {name: past[name] for name in ("tuned", "results")}


def file_of(options: argparse.Namespace) -> pathlib.Path:
    """Returns the file that calls share."""
    return options.out / f"memory_quality_{options.source}.json"


class Comparison:
    """The arms that a call is to train, and the report that grows with them."""

    def __init__(self, options: argparse.Namespace, setup: Setup, report: dict[str, Any], began: float):
        """Args: the options, the sizes, the report's head, and when the call began."""
        self._options, self._setup, self.report, self._began = options, setup, report, began
        self._tuning = 0.0
        """Seconds of the longest tuning so far."""

    def take(self, name: str, arm: Arm, batches: list[Any], held_out: HeldOut) -> None:
        """Tunes, trains and evaluates an arm as far as time allows, and writes what it found."""
        tuned, setup, start = self.report["tuned"], self._setup, time.perf_counter()
        if name not in tuned:
            # Routed arms take longer than dense ones.
            if not self._enough(name, "tuning", 2 * self._tuning):
                return
            tuned[name] = tune(arm, setup, batches)
            self._tuning = max(self._tuning, tuned[name]["seconds"])
            self._write()
        if not self._enough(name, "its final run", final_seconds(tuned[name], setup)):
            return
        row = result(arm, setup, tuned[name], batches, held_out, self.report["tokens"])
        found = {**self.report["results"], name: row}
        self.report["results"] = {name: found[name] for name in KINDS if name in found}
        self._write()
        mean, half = row["loss"]
        edge = ", the edge," if row["learning_rate_at_edge"] else ""
        seconds = time.perf_counter() - start
        say(f"{name}: {mean:.4f} +- {half:.4f} at {row['learning_rate']:.1e}{edge} {seconds:.1f} s here")

    def _enough(self, name: str, what: str, seconds: float) -> bool:
        left = self._options.seconds - (time.perf_counter() - self._began)
        if left < seconds:
            say(f"{name}: {what} is left for another call, {left:.0f} s are left and it may take {seconds:.0f} s")
        return left >= seconds

    def _write(self) -> None:
        file_of(self._options).write_text(json.dumps(self.report, indent=1) + "\n")
        write(self.report, self._options.out)


def main() -> int:
    """Runs the comparison; returns the exit code."""
    options, began = parsed(), time.perf_counter()
    setup = or_exit(lambda: chosen(options))
    keep_compiled(options.data_directory)
    data = data_of(options, setup)
    dataset = prepare(data)
    making = Making(data, WARM + options.probe if options.probe else setup.steps, processes())
    vocabulary = -(-dataset.tokenizer.vocab_size // 128) * 128
    setup = dataclasses.replace(setup, sizes=dataclasses.replace(setup.sizes, vocabulary=vocabulary))
    report = head_of(options, setup, dataset)
    if not options.probe:
        report |= found_before(report, file_of(options))
    for name, size in report["sizes"].items():
        say(
            f"{name}: {size['parameters']:,} parameters ({size['row_parameters']:,} in rows), "
            f"{size['flops_per_token'] / 1e6:.3f} M training operations a token"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    missing = [name for name in KINDS if name in options.arms and name not in report["results"]]
    arms = {name: made(name, setup, dataset) for name in missing}
    # Steps of one arm are dispatched while others are lowered: neither may keep the interpreter for long.
    sys.setswitchinterval(5e-4)
    with concurrent.futures.ThreadPoolExecutor(max_workers=2 if options.smoke else 8) as pool:
        # Dense arms compile sooner, and run while the routed ones compile.
        started = {name: pool.submit(arms[name].compile) for name in sorted(arms, key=lambda name: KINDS[name].routed)}
        training = making.batches()
        say(f"{len(training):,} batches made after {time.perf_counter() - began:.0f} s")
        batches = jax.block_until_ready(jax.device_put(training))
        if options.probe:
            for name, future in started.items():
                say(f"{name}: compiled in {future.result():.1f} s")
            say(f"all compiled after {time.perf_counter() - began:.0f} s")
            probe(arms, setup, batches, say)
            return 0
        shown = [int((batch["segments_BL"] > 0).sum()) for batch in training]
        tokens, tuning = sum(shown), {"steps": setup.tuning_steps, "tokens": sum(shown[: setup.tuning_steps])}
        report |= {"tokens": tokens, "unique_tokens": min(tokens, dataset.train_tokens), "tuning": tuning}
        with_ngrams = arms.get("dense_engram") or made("dense_engram", setup, dataset)
        held_out = sorted_tokens(options.source, with_ngrams, setup, dataset, data, training)
        report["held_out"] = description(held_out)
        del training
        say(f"data ready after {time.perf_counter() - began:.0f} s: {tokens:,} tokens a member")
        comparison = Comparison(options, setup, report, began)
        for name, future in as_compiled({name: started[name] for name in arms}):
            try:
                say(f"{name}: compiled in {future.result():.1f} s")
                comparison.take(name, arms[name], batches, held_out)
            except Exception as error:  # an arm that fails must not cost the others their time
                say(f"{name}: failed, {type(error).__name__}: {str(error)[:500]}")
    results = report["results"]
    say(f"{len(results)} of {len(KINDS)} arms after {time.perf_counter() - began:.0f} s; written to {options.out}")
    return 0 if results else 1


if __name__ == "__main__":
    sys.exit(main())
