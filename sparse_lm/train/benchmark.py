"""Times training on this machine: the bare step on fixed packed batches, and the whole loop with data, logging and saves.

All variants of a call run in one process, so their ratios hold on this machine. The bare step shows what the device does; the
loop shows what a user gets; their difference is the host's overhead.
"""

import dataclasses
import itertools
import json
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sparse_lm.accounting import FORMULA, account
from sparse_lm.recipe import Recipe
from sparse_lm.train import machine
from sparse_lm.train.loop import train
from sparse_lm.train.metrics import read_rows
from sparse_lm.train.schedule import Constant
from sparse_lm.train.session import Session, open_session


def packed_batch(batch: int, length: int, vocabulary: int, *, mean_document: int, seed: int) -> dict[str, np.ndarray]:
    """Draws a batch of packed documents with exponentially distributed lengths of at least 64 tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (batch, length), dtype=np.int32)
    segments, positions = np.empty_like(tokens), np.empty_like(tokens)
    for row in range(batch):
        start, number = 0, 1
        while start < length:
            size = min(length - start, 64 + int(rng.exponential(mean_document)))
            segments[row, start : start + size] = number
            positions[row, start : start + size] = np.arange(size)
            start, number = start + size, number + 1
    targets = np.roll(tokens, -1, axis=1)
    return {"tokens_BL": tokens, "targets_BL": targets, "positions_BL": positions, "segments_BL": segments}


def time_calls(function: Callable[[], Any], *, warmup: int = 2, repeats: int = 10) -> float:
    """Returns seconds per call of asynchronous calls in a loop, with one wait at the end."""
    result = None
    for _ in range(warmup):
        result = function()
    jax.block_until_ready(result)
    start = time.perf_counter()
    for _ in range(repeats):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


class RepeatedStep:
    """The compiled step of a session on a few batches in turn, again and again; rows of tables in host memory travel as in a run.

    For one process.

    Args:
      session: the recipe on its devices.
      batches: in numpy.

    Attributes:
      programs: the compiled step by whether it is the full program of tables in host memory (`Session.trace_step`).
      compile_s: seconds that they took to compile.
      tables: what moves the rows.
      state: after the calls so far.
    """

    def __init__(self, session: Session, *batches: dict[str, np.ndarray]):
        self.state = session.create()
        self.tables = session.tables(self.state)
        placed = [(self.tables.find(batch), session.put(batch)) for batch in batches]
        most = max(int(batch["segments_BL"].max()) for batch in batches)
        fulls = {wanted.full for wanted, _ in placed if wanted is not None}
        programs = {full: session.compile_step(most, full=full) for full in fulls}
        self.programs = {full: program for full, (program, _) in programs.items()}
        self.compile_s = sum(seconds for _, seconds in programs.values())
        self._coming, self._batches = itertools.cycle(placed), itertools.cycle(batch for _, batch in placed)
        for _ in range(2):
            self.tables.prefetch(*next(self._coming))

    def __call__(self) -> dict[str, Any]:
        """Enqueues a step and returns its metrics."""
        self.tables.prefetch(*next(self._coming))
        program = self.programs[self.tables.full()]
        lent = dataclasses.replace(self.state, tables=self.tables.lend(self.state.tables, program))
        state, metrics = program(lent, next(self._batches))
        self.state = dataclasses.replace(state, tables=self.tables.give_back(state.tables))
        return metrics


def time_step(
    recipe: Recipe, *, repeats: int = 10, mean_document: int = 2000, devices: list[jax.Device] | None = None
) -> dict[str, Any]:
    """Compiles and times the bare training step of a recipe, populations included, on the given devices or all.

    Returns:
      {"step_ms", "host_ms" (time to enqueue a step), "tokens_per_s" (over all members), "mfu", "compile_s", "peak_gib", "loss"}.
    """
    session = open_session(recipe, devices)
    length = recipe.data.sequence_length
    vocabulary, rows = recipe.model.vocab_size, recipe.data.batch_size
    fixed = packed_batch(rows, length, vocabulary, mean_document=mean_document, seed=0)
    step = RepeatedStep(session, fixed)

    def call() -> Any:
        return step()["pulse"]

    seconds = time_calls(call, warmup=3, repeats=repeats)
    start = time.perf_counter()
    last = call()
    host = time.perf_counter() - start
    step.tables.close()
    tokens = rows * length * (session.members or 1)
    device = jax.devices()[0]
    peak = machine.peak_flops(device.device_kind, recipe.model.compute_dtype)
    flops = account(recipe.model, length).train_flops * tokens
    memory = machine.memory_statistics()
    return {
        "step_ms": seconds * 1e3,
        "host_ms": host * 1e3,
        "tokens_per_s": tokens / seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": flops / seconds / (peak * session.mesh.size) if peak else None,
        "compile_s": step.compile_s,
        "peak_gib": memory["peak_bytes"] / 2**30 if memory else None,
        "loss": float(np.asarray(last)[..., 0].mean()),
    }


def time_loop(recipe: Recipe, *, steps: int, save_every: int = 0) -> dict[str, Any]:
    """Trains for some steps through the real loop (real data, logging) in a temporary directory and reads its metrics.

    Returns:
      {"step_ms", "tokens_per_s", "mfu", "data_wait_ms"}: means over the logged rows but the first, saves included.
    """
    with tempfile.TemporaryDirectory() as directory:
        recipe = dataclasses.replace(
            recipe,
            train=dataclasses.replace(recipe.train, steps=steps),
            optimizer=dataclasses.replace(recipe.optimizer, schedule=Constant()),
            validation=dataclasses.replace(recipe.validation, every=0, tokens_per_domain=4096),
            checkpoint=dataclasses.replace(recipe.checkpoint, every=save_every),
            log=dataclasses.replace(recipe.log, display="off", tensorboard=True),
        )
        train(recipe, pathlib.Path(directory) / "run")
        rows = read_rows(pathlib.Path(directory) / "run" / "metrics.jsonl", "train")[1:]
    step_ms = 1e3 * float(np.mean([row["step_s"] for row in rows]))
    return {
        "step_ms": step_ms,
        "tokens_per_s": float(np.mean([row["tokens_per_s"] for row in rows])),
        "mfu": None if rows[0]["mfu"] is None else float(np.mean([row["mfu"] for row in rows])),
        "data_wait_ms": 1e3 * float(np.mean([row["data_wait_s"] for row in rows])),
    }


def report(name: str, row: dict[str, Any], rows: list[dict[str, Any]], path: pathlib.Path | None) -> None:
    """Prints one result and adds it to the JSON file."""
    device = jax.devices()[0]
    if not rows:
        print(f"{device.device_kind}, jax {jax.__version__}. {FORMULA}.", flush=True)
    rows.append({"name": name, **row})
    parts = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()]
    print(f"{name:36s} {'  '.join(parts)}", flush=True)
    if path is not None:
        document = {"device": device.device_kind, "jax": jax.__version__, "formula": FORMULA, "rows": rows}
        path.write_text(json.dumps(document, indent=1) + "\n")
