"""Measures what a memory is worth: python -m experiments.memory_quality --out DIR [--source packaged] [--steps N] [--seconds 300] [--smoke].

Eight arms of equal active operations and, but for `dense`, equal parameters (`experiments/memory_arms.py`): dense and routed models, each
alone, with Engram, and with its two controls, whose rows belong to single tokens or to n-grams mixed with their position. Every arm
trains as one population: its learning rate is tuned (four rates, two seeds), then eight other seeds, the same for all arms, train at
the best one. Held-out tokens are sorted into kinds (`experiments/memory_data.py`), so that a gain splits into recall and reasoning.

Arms begin as soon as they are compiled. Writes DIR/memory_quality_SOURCE.json, .md and .svg after every arm. Called again with the
same sizes and data it goes on with the arms that are missing.
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
import jax.numpy as jnp
import numpy as np

from experiments.comparison import Arm, outcome, thinned
from experiments.memory_arms import KINDS, Sizes, models, numbers
from experiments.memory_data import HeldOut, by_frequency, by_truth, packaged, synthetic, training_batches
from experiments.memory_report import write
from sparse_lm.data.pipeline import Batch, prepare
from sparse_lm.memory.ngram import NgramMemory
from sparse_lm.model.definition import define, with_classes
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.schedule import WarmupStableDecay
from sparse_lm.train.step import Train

TUNING_SEEDS, SEEDS = (100, 101), tuple(range(8))
MULTIPLIERS = (0.25, 0.5, 1.0, 2.0)
"""Of the learning rate; with each tuning seed as many members as there are seeds."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the comparison."""

    sizes: Sizes = Sizes()
    batch: int = 16
    steps: int = 1600
    learning_rate: float = 4e-3
    validation_tokens: int = 65536
    """Of each domain."""
    documents: int | None = None
    """Of each domain of the packaged text; None: all."""


SMOKE = Setup(
    Sizes(512, 64, 32, 3, 2, 8, 4, 64, 2, 256, 8, 2, "float32"), 4, 6, validation_tokens=512, documents=40
)  # fmt: skip


def made(name: str, setup: Setup, dataset: Any) -> Arm:
    """Returns an arm, not yet compiled."""
    schedule = WarmupStableDecay(warmup_steps=min(100, setup.steps // 3), decay_fraction=0.4)
    return Arm(
        with_classes(define(models(setup.sizes)[name]), dataset.tokenizer),
        AdamW(learning_rate=setup.learning_rate, schedule=schedule),
        Train(steps=setup.steps),
        members=len(SEEDS),
        shape=(setup.batch, setup.sizes.length),
    )


def sorted_tokens(source: str, arm: Arm, setup: Setup, dataset: Any, data: Any, training: list[Batch]) -> HeldOut:
    """Returns the held-out tokens with their kinds; n-grams are those of an arm with Engram."""
    if source == "synthetic":
        return by_truth(dataset, data, setup.validation_tokens)
    memory = arm.definition.config.memory
    assert isinstance(memory, NgramMemory), "an arm with n-grams"
    (hashing,) = arm.definition.hashes().values()
    return by_frequency(dataset, data, setup.validation_tokens, hashing, memory.orders[-1], training)


def result(arm: Arm, batches: list[Any], held_out: HeldOut, tokens: int) -> dict[str, Any]:
    """Tunes, trains and evaluates one arm; returns its row."""
    start = time.perf_counter()
    tuned = arm.tune(MULTIPLIERS, TUNING_SEEDS, batches)
    final = arm.run(SEEDS, [tuned["factor"]] * len(SEEDS), batches)
    inference = arm.inference(final.state)
    nats_PDK = held_out.sums([arm.token_losses(inference, batch) for batch, _ in held_out.batches])
    tokens_DK = held_out.tokens_DK
    by_domain, by_kind = nats_PDK.sum(2) / tokens_DK.sum(1), nats_PDK.sum(1) / np.maximum(tokens_DK.sum(0), 1)
    losses = nats_PDK.sum((1, 2)) / tokens_DK.sum()
    return {
        **outcome(tuned, losses),
        "domains": {name: by_domain[:, i].tolist() for i, name in enumerate(held_out.domains)},
        "kinds": {name: by_kind[:, i].tolist() for i, name in enumerate(held_out.kinds)},
        "curve": thinned(final.losses_SP.mean(1)),
        "tokens_per_s": len(SEEDS) * tokens / final.seconds,
        "wall_s": time.perf_counter() - start,
    }


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


def main() -> int:
    """Runs the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/benchmarks"))
    parser.add_argument("--source", choices=("synthetic", "packaged"), default="synthetic")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--seconds", type=float, default=math.inf, help="arms whose turn would come too late wait")
    parser.add_argument("--steps", type=int, help="steps of each run")
    parser.add_argument("--arms", nargs="*", choices=tuple(KINDS), default=tuple(KINDS), help="default all")
    parser.add_argument("--data-directory", default="data", help="where prepared data is kept")
    options = parser.parse_args()
    began, say = time.perf_counter(), functools.partial(print, flush=True)
    setup = SMOKE if options.smoke else Setup()
    if options.steps:
        setup = dataclasses.replace(setup, steps=options.steps)
    length, slots = setup.sizes.length, setup.steps * setup.batch * setup.sizes.length
    if options.source == "synthetic":
        data = synthetic(length, setup.batch, slots, options.data_directory)
    else:
        vocabulary = 300 if options.smoke else 4096
        data = packaged(length, setup.batch, vocabulary, options.data_directory, setup.documents)
    dataset = prepare(data)
    sizes = dataclasses.replace(setup.sizes, vocabulary=-(-dataset.tokenizer.vocab_size // 128) * 128)
    setup = dataclasses.replace(setup, sizes=sizes)
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m experiments.memory_quality --source {options.source} --steps {setup.steps}",
        "source": options.source,
        "setup": dataclasses.asdict(setup),
        "seeds": [len(TUNING_SEEDS), len(SEEDS)],
        "data": dataset.hash,
        "sizes": {name: numbers(model, sizes) for name, model in models(sizes).items()},
        "results": {},
    }
    for name, size in report["sizes"].items():
        say(
            f"{name}: {size['parameters']:,} parameters ({size['row_parameters']:,} in rows), "
            f"{size['flops_per_token'] / 1e6:.3f} M training operations a token"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"memory_quality_{options.source}.json"
    if file.exists():
        past = json.loads(file.read_text())
        if all(past[name] == report[name] for name in ("device", "setup", "seeds", "data")):
            report["results"] = past["results"]
    results: dict[str, Any] = report["results"]
    arms = {name: made(name, setup, dataset) for name in options.arms if name not in results}
    # Steps of one arm are dispatched while others are lowered: neither may keep the interpreter for long.
    sys.setswitchinterval(5e-4)
    with concurrent.futures.ThreadPoolExecutor(max_workers=2 if options.smoke else 8) as pool:
        # Dense arms compile sooner, and run while the routed ones compile.
        started = {name: pool.submit(arms[name].compile) for name in sorted(arms, key=lambda name: KINDS[name].routed)}
        compiling = {name: started[name] for name in arms}
        training = list(training_batches(dataset, data, setup.steps))
        batches = [jax.tree.map(jnp.asarray, batch) for batch in training]
        tokens = sum(int((batch["segments_BL"] > 0).sum()) for batch in training)
        report |= {"tokens": tokens, "unique_tokens": min(tokens, dataset.train_tokens)}
        with_ngrams = arms.get("dense_engram") or made("dense_engram", setup, dataset)
        held_out = sorted_tokens(options.source, with_ngrams, setup, dataset, data, training)
        report["held_out"] = description(held_out)
        del training
        say(f"data ready after {time.perf_counter() - began:.0f} s: {tokens:,} tokens a member")
        slowest = 0.0
        while compiling:
            # The first in the order of importance among those that are compiled; while there is none, wait.
            concurrent.futures.wait(compiling.values(), return_when=concurrent.futures.FIRST_COMPLETED)
            name = next(name for name, future in compiling.items() if future.done())
            ready = compiling.pop(name)
            left = options.seconds - (time.perf_counter() - began)
            if left < 1.3 * slowest:  # routed arms take longer than dense ones
                say(f"{name}: left for another call, {left:.0f} s are left")
                continue
            try:
                say(f"{name}: compiled in {ready.result():.1f} s")
                results[name] = result(arms[name], batches, held_out, tokens)
            except Exception as error:  # an arm that fails must not cost the others their time
                say(f"{name}: failed, {type(error).__name__}: {str(error)[:500]}")
                continue
            slowest = max(slowest, results[name]["wall_s"])
            mean, half = results[name]["loss"]
            say(
                f"{name}: {mean:.4f} +- {half:.4f} at {results[name]['learning_rate']:.1e}, {results[name]['wall_s']:.1f} s"
            )
            report["results"] = {name: results[name] for name in KINDS if name in results}
            file.write_text(json.dumps(report, indent=1) + "\n")
            write(report, options.out)
    say(f"{len(results)} of {len(KINDS)} arms after {time.perf_counter() - began:.0f} s; written to {options.out}")
    return 0 if results else 1


if __name__ == "__main__":
    sys.exit(main())
