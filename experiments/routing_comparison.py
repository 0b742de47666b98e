"""Compares routers at equal tokens: python -m experiments.routing_comparison --out DIR [--smoke] [--seconds 230].

Parts of it may run in processes or on machines of their own, each with `--routers NAMES --out DIR_i`; then
`--join DIR_1 DIR_2 ... --out DIR` makes the table of all of them.

Every router trains the same small model as one population. First its learning rate is tuned (three rates, two seeds); then six other
seeds, the same for all routers, train at the best rate, so that differences between routers are paired: equal seeds share initial
values wherever the models are equal, and all members read the same data in the same order. Experts are sized so that the nominal
active operations are equal; the measured ones stand in the table, since some routers choose how much they compute.

Writes DIR/routing_comparison.json, .md and .svg.
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

from experiments.comparison import Arm, Trained, outcome, thinned
from experiments.routing_report import compare, write
from sparse_lm.accounting import account, measured_in
from sparse_lm.data.packaged import Packaged
from sparse_lm.data.pipeline import DataConfig, prepare, train_stream
from sparse_lm.data.tokenizer import BPE
from sparse_lm.layers.feed_forward import DenseFeedForward, FeedForward
from sparse_lm.model.attention import Attention
from sparse_lm.model.definition import define
from sparse_lm.model.transformer import Model
from sparse_lm.routing.diagnostics import by_layer, router_row
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.routing.hash_router import HashRouter
from sparse_lm.routing.router import Router
from sparse_lm.routing.token_choice import BiasBalancedRouter, RandomRouter, SinkhornRouter, SwitchRouter
from sparse_lm.routing.top_k import TopKRouter
from sparse_lm.routing.variable import ExpertChoiceRouter, ExpertThresholdRouter, ReMoERouter
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.schedule import WarmupStableDecay
from sparse_lm.train.step import Train
from sparse_lm.train.validation import MODEL_ARRAYS

TUNING_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4, 5)


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the comparison: multiples of 128, which the Hopper kernels take; on others a GPU loops over the groups in plain XLA."""

    experts: int = 16
    hidden: int = 256
    k: int = 2
    d_model: int = 256
    layers: int = 3
    heads: int = 4
    length: int = 256
    batch: int = 16
    steps: int = 400
    vocabulary: int = 4096
    dtype: str = "bfloat16"
    learning_rate: float = 4e-3
    multipliers: tuple[float, ...] = (0.5, 1.0, 2.0)
    validation_tokens: int = 65536


SMOKE = Setup(4, 32, 2, 32, 2, 2, 32, 4, 6, 300, "float32", validation_tokens=256)


def arms(setup: Setup) -> dict[str, FeedForward]:
    """Returns the feed-forward of each arm; all compute 2 x hidden units a token, nominally."""
    k, experts, hidden = setup.k, setup.experts, setup.hidden

    def moe(router: Router) -> MoEFeedForward:
        return MoEFeedForward(experts=experts, hidden=hidden, router=router)

    return {
        "top_k": moe(TopKRouter(k=k)),
        "bias_balanced": moe(BiasBalancedRouter(k=k)),
        "switch": MoEFeedForward(
            experts=experts // k, hidden=k * hidden, router=SwitchRouter(balance_coefficient=0.01)
        ),
        "hash": moe(HashRouter(k=k)),
        "random": moe(RandomRouter(k=k)),
        "expert_threshold": moe(ExpertThresholdRouter(k=float(k), rows_per_token=1.5 * k)),
        "remoe": moe(ReMoERouter(k=float(k))),
        "expert_choice": moe(ExpertChoiceRouter(k=float(k))),
        "sinkhorn": moe(SinkhornRouter(k=k)),
        "dense": DenseFeedForward(hidden=k * hidden),
    }


def is_causal(feed_forward: FeedForward) -> bool:
    """Whether an arm's training loss is that of a causal model."""
    return feed_forward.router.causal if isinstance(feed_forward, MoEFeedForward) else True


def made(feed_forward: FeedForward, setup: Setup, train: Train) -> Arm:
    """Returns an arm, not yet compiled, that watches what its routers report."""
    model = Model(
        vocab_size=setup.vocabulary,
        d_model=setup.d_model,
        layers=setup.layers,
        # The plain path serves any number of documents: one program for all batches.
        attention=Attention(
            heads=setup.heads, head_dim=setup.d_model // setup.heads, backend="plain", max_documents=setup.length
        ),
        pattern=(feed_forward,),
        tied_embeddings=True,
        execution="scanned",
        compute_dtype=setup.dtype,  # type: ignore[arg-type]
    )
    schedule = WarmupStableDecay(warmup_steps=20, decay_fraction=0.4)
    return Arm(
        define(model),
        AdamW(learning_rate=setup.learning_rate, schedule=schedule),
        train,
        members=len(SEEDS),
        shape=(setup.batch, setup.length),
        watch=lambda found: found["blocks"],
    )


def summary(
    arm: Arm, tuned: dict[str, Any], final: Trained, validation: np.ndarray, compile_s: float
) -> dict[str, Any]:
    """Returns what the table says of one arm."""
    rows = [router_row(jax.device_get(blocks), population=True) for blocks in final.watched]
    late = rows[-max(1, len(rows) // 5) :]

    def mean(name: str) -> float | None:
        values = [by_layer(row, name) for row in late]
        found = [value.mean() for row in values for value in row.values()]
        return float(np.mean(found)) if found else None

    model, (batch, length) = arm.definition.config, arm.shape
    nominal = account(model, length)
    flops = [account(model, length, measured=measured_in(row)).train_flops for row in rows]
    return {
        "causal": is_causal(model.feed_forward_of(0)),
        **outcome(tuned, validation),
        "curve": thinned(final.losses_SP.mean(-1)),
        "max_violation": mean("max_violation"),
        "dropped": mean("dropped"),
        "experts_per_token": mean("experts_per_token"),
        "flops_per_token": float(np.mean(flops)),
        "nominal_flops_per_token": nominal.train_flops,
        "parameters": nominal.parameters,
        "tokens_per_s": arm.members * batch * length * len(final.losses_SP) / final.seconds,
        "compile_s": compile_s,
    }


def joined(folders: list[pathlib.Path]) -> dict[str, Any]:
    """Returns the report of several parts.

    Raises:
      ValueError: the parts differ in sizes, data or device.
    """
    parts = [json.loads((folder / "routing_comparison.json").read_text()) for folder in folders]
    for name in ("setup", "tokens", "unique_tokens", "device", "jax"):
        if any(part[name] != parts[0][name] for part in parts):
            raise ValueError(f"--join: {name} differs between {', '.join(map(str, folders))}")
    found = {name: row for part in parts for name, row in part["results"].items()}
    # In the order of the arms, which says what the others are compared with.
    results = {name: found[name] for name in arms(Setup(**parts[0]["setup"])) if name in found}
    compare(results)
    return {**parts[0], "seconds": max(part["seconds"] for part in parts), "results": results}


def main() -> int:
    """Runs the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/benchmarks"))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument(
        "--seconds",
        type=float,
        help="most seconds in all: routers whose turn would come too late are left out, and said",
    )
    parser.add_argument("--steps", type=int, help="steps of each run")
    parser.add_argument("--routers", nargs="*", choices=tuple(arms(SMOKE)), help="arms to run; default all")
    parser.add_argument("--data-directory", default="data", help="where prepared data is kept")
    parser.add_argument("--join", nargs="+", type=pathlib.Path, help="make the table of these folders' results instead")
    options = parser.parse_args()
    if options.join:
        write(joined(options.join), options.out)
        return 0
    began = time.perf_counter()
    setup = SMOKE if options.smoke else Setup()
    if options.steps:
        setup = dataclasses.replace(setup, steps=options.steps)
    data = DataConfig(
        sources=(Packaged(documents_per_domain=40) if options.smoke else Packaged(),),
        tokenizer=BPE(vocab_size=setup.vocabulary),
        sequence_length=setup.length,
        batch_size=setup.batch,
        directory=options.data_directory,
    )
    dataset = prepare(data)
    say = functools.partial(print, flush=True)
    say(f"data ready after {time.perf_counter() - began:.0f} s: {dataset.train_tokens:,} unique training tokens")
    stream = train_stream(dataset, data, seed=0)
    put = functools.partial(jax.tree.map, jnp.asarray)
    batches = [put({name: batch[name] for name in MODEL_ARRAYS}) for batch, _ in itertools.islice(stream, setup.steps)]
    train = Train(steps=setup.steps)
    chosen = {name: forward for name, forward in arms(setup).items() if not options.routers or name in options.routers}
    started = {name: made(forward, setup, train) for name, forward in chosen.items()}
    compiled: dict[str, float] = {}
    with concurrent.futures.ThreadPoolExecutor(max_workers=2 if options.smoke else 8) as pool:
        futures = {pool.submit(arm.compile): name for name, arm in started.items()}
        for future in concurrent.futures.as_completed(futures):
            name = futures[future]
            try:
                compiled[name] = future.result()
                say(f"{name}: compiled in {compiled[name]:.1f} s")
            except Exception as error:  # one arm that cannot be compiled must not cost the others their time
                say(f"{name}: left out, {type(error).__name__}: {str(error)[:500]}")
    results: dict[str, dict[str, Any]] = {}
    for name in [name for name in started if name in compiled]:
        arm = started[name]
        left = math.inf if options.seconds is None else options.seconds - (time.perf_counter() - began)
        if results and left < 1.2 * max(row["wall_s"] for row in results.values()):
            say(f"{name}: left out, {left:.0f} s are left")
            continue
        start = time.perf_counter()
        try:
            tuned = arm.tune(setup.multipliers, TUNING_SEEDS, batches)
            final = arm.run(SEEDS, [tuned["factor"]] * len(SEEDS), batches)
            losses = arm.held_out(final.state, dataset, data, setup.validation_tokens)
            results[name] = summary(arm, tuned, final, losses, compiled[name])
            results[name]["wall_s"] = time.perf_counter() - start
            mean, half = results[name]["loss"]
            say(f"{name}: {mean:.4f} +- {half:.4f} at {tuned['rate']:.1e}, {results[name]['wall_s']:.1f} s")
        except Exception as error:
            say(f"{name}: failed, {type(error).__name__}: {str(error)[:500]}")
    compare(results)
    report = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m experiments.routing_comparison " + " ".join(sys.argv[1:]),
        "setup": dataclasses.asdict(setup),
        "seeds": [len(TUNING_SEEDS), len(SEEDS)],
        "tokens": setup.steps * setup.batch * setup.length,
        "unique_tokens": dataset.train_tokens,
        "seconds": time.perf_counter() - began,
        "results": results,
    }
    write(report, options.out)
    say(f"{len(results)} of {len(started)} arms in {report['seconds']:.0f} s; written to {options.out}")
    return 0 if results else 1


if __name__ == "__main__":
    sys.exit(main())
