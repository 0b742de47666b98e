"""Times the training step of a recipe on this machine: real packed batches, document masks on, loop timing.

Each variant is a named change of the recipe; all run in one process, so their ratios hold on this machine.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.accounting import FORMULA, account
from sparse_lm.config import override, validate
from sparse_lm.model.definition import define
from sparse_lm.model.transformer import Model
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.state import initial_state
from sparse_lm.train.step import Train, build_step


def packed_batch(batch: int, length: int, vocabulary: int, *, mean_document: int, seed: int) -> dict[str, np.ndarray]:
    """Draws a batch of packed documents with exponentially distributed lengths."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (batch, length), dtype=np.int32)
    segments, positions = np.empty_like(tokens), np.empty_like(tokens)
    for row in range(batch):
        start, number = 0, 1
        while start < length:
            size = min(length - start, 16 + int(rng.exponential(mean_document)))
            segments[row, start : start + size] = number
            positions[row, start : start + size] = np.arange(size)
            start, number = start + size, number + 1
    return {
        "tokens_BL": tokens,
        "targets_BL": np.roll(tokens, -1, axis=1),
        "positions_BL": positions,
        "segments_BL": segments,
    }


def time_calls(function: Callable[[], Any], *, warmup: int = 2, repeats: int = 10) -> float:
    """Returns seconds per call of asynchronous calls in a loop."""
    for _ in range(warmup):
        result = function()
    jax.block_until_ready(result)
    start = time.perf_counter()
    for _ in range(repeats):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def peak_memory() -> float | None:
    """Returns the peak bytes in use on the first device, in GiB, where the backend says."""
    statistics = jax.devices()[0].memory_stats()
    return statistics["peak_bytes_in_use"] / 2**30 if statistics else None


def time_step(model: Model, *, batch: int, length: int, train: Train, repeats: int, mean_document: int = 700) -> dict[str, Any]:
    """Compiles and times one variant of the training step.

    Returns:
      {"step_ms", "tokens_per_s", "tflops", "compile_s", "peak_gib", "loss"}.
    """
    definition = define(validate(model))
    optimizer = AdamW()
    transformation = optimizer.build(definition.dims)
    state = jax.jit(lambda seed: initial_state(definition, transformation, seed, with_ema=False))(0)
    step = jax.jit(build_step(definition, optimizer, train), donate_argnums=0)
    arrays = {
        name: jnp.asarray(value)
        for name, value in packed_batch(batch, length, model.vocab_size, mean_document=mean_document, seed=0).items()
    }
    start = time.perf_counter()
    compiled = step.lower(state, arrays, jnp.float32(1.0)).compile()
    compile_s = time.perf_counter() - start
    holder = [state]

    def call() -> Any:
        holder[0], metrics = compiled(holder[0], arrays, jnp.float32(1.0))
        return metrics["pulse"]

    seconds = time_calls(call, warmup=3, repeats=repeats)
    tokens = batch * length
    flops = account(model, length).train_flops
    return {
        "step_ms": seconds * 1e3,
        "tokens_per_s": tokens / seconds,
        "tflops": flops * tokens / seconds / 1e12,
        "compile_s": compile_s,
        "peak_gib": peak_memory(),
        "loss": float(call()[0]),
    }


def run(
    model: Model,
    variants: dict[str, dict[str, Any]],
    *,
    batch: int,
    length: int,
    repeats: int,
    peak: float | None,
    path: pathlib.Path | None,
) -> list[dict[str, Any]]:
    """Times every variant; prints one line each and writes JSON.

    Args:
      model: the base model.
      variants: {name: {dotted model field or "batch" or "microbatches": value}}.
      batch: sequences.
      length: tokens of a sequence.
      repeats: timed steps.
      peak: operations per second of the device at the compute dtype, or None when unknown.
      path: JSON file to write, or None.
    """
    rows = []
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}; {FORMULA}; peak {peak}", flush=True)
    for name, changes in variants.items():
        variant, size, train = model, batch, Train()
        for field, value in changes.items():
            if field == "batch":
                size = value
            elif field == "microbatches":
                train = dataclasses.replace(train, microbatches=value)
            else:
                variant = override(variant, field, value)
        try:
            row = time_step(variant, batch=size, length=length, train=train, repeats=repeats)
        except Exception as error:  # a variant may not fit; the others still count
            print(f"{name:32s} failed: {type(error).__name__}: {str(error)[:200]}", flush=True)
            rows.append({"variant": name, "error": str(error)[:500]})
            continue
        row = {"variant": name, "batch": size, "length": length, **row, "mfu": row["tflops"] * 1e12 / peak if peak else None}
        rows.append(row)
        mfu = "unknown" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%"
        print(
            f"{name:32s} {row['step_ms']:9.2f} ms {row['tokens_per_s']:11.0f} tok/s {row['tflops']:7.1f} TFLOP/s  MFU {mfu} "
            f"compile {row['compile_s']:5.1f} s  peak {row['peak_gib'] or 0:5.1f} GiB  loss {row['loss']:.3f}",
            flush=True,
        )
        if path is not None:
            path.write_text(json.dumps({"device": device.device_kind, "jax": jax.__version__, "rows": rows}, indent=1))
    return rows
