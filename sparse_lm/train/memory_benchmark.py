"""Times training with tables of several sizes, without a memory, and hashing: what a memory costs should not grow with its table."""

import concurrent.futures
import dataclasses
import math
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.memory.compression import uncompressed
from sparse_lm.memory.hashing import addresses, addresses_on_host, make_hash
from sparse_lm.memory.memory import NoMemory
from sparse_lm.memory.ngram import NgramMemory
from sparse_lm.recipe import Recipe
from sparse_lm.train import machine
from sparse_lm.train.benchmark import RepeatedStep, packed_batch
from sparse_lm.train.session import open_session


def time_steps(recipe: Recipe, *, repeats: int) -> dict[str, float]:
    """Times the bare step: the smallest and the median of `repeats` steps, each waited for.

    Returns:
      {"min_ms", "median_ms", "cpu_ms" (processor time of a step over all threads), "table_gb", "compile_s", "peak_gb"}; with tables in
      host memory also "find_ms" (addresses and distinct rows of a batch; a run does it in the thread of the data) and means of what
      `Tables.read` reports.
    """
    session = open_session(recipe)
    data = recipe.data
    fixed = packed_batch(data.batch_size, data.sequence_length, recipe.model.vocab_size, mean_document=500, seed=0)
    # Tokens of natural text repeat: ids by Zipf's law, so that rows repeat too.
    draw = np.random.default_rng(1)
    chance = 1.0 / np.arange(1, recipe.model.vocab_size + 1)
    tokens = draw.choice(recipe.model.vocab_size, size=fixed["tokens_BL"].shape, p=chance / chance.sum())
    fixed["tokens_BL"] = tokens.astype(np.int32)
    step = RepeatedStep(session, fixed)
    leaves = jax.tree.leaves(session.abstract.tables)
    start = time.perf_counter()
    step.tables.find(fixed)
    find_ms = 1e3 * (time.perf_counter() - start)
    wall, cpu = [], []
    for i in range(repeats + 2):
        start, start_cpu = time.perf_counter(), time.process_time()
        step()
        jax.block_until_ready(step.state)
        if i >= 2:
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - start_cpu)
        else:
            step.tables.read()
    moved = step.tables.read()
    step.tables.close()
    memory = machine.memory_statistics()
    return {
        "min_ms": 1e3 * min(wall),
        "median_ms": 1e3 * float(np.median(wall)),
        "cpu_ms": 1e3 * float(np.median(cpu)),
        "table_gb": sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves) / 1e9,
        "compile_s": step.compile_s,
        "peak_gb": memory["peak_bytes"] / 1e9 if memory else float("nan"),
        **({"find_ms": find_ms, **moved} if moved else {}),
    }


def with_rows(recipe: Recipe, rows: int) -> Recipe:
    """Returns the recipe with so many rows in each of its tables, about; 0: without memory."""
    memory = recipe.model.memory
    if not isinstance(memory, NgramMemory):
        raise ValueError(f"recipe {recipe.name} has no memory of n-grams; allowed: --with memory=engram and the like")
    changed = dataclasses.replace(memory, rows=rows // (memory.heads * len(memory.orders))) if rows else NoMemory()
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, memory=changed))


def step_table(recipe: Recipe, sizes: Sequence[int], *, repeats: int) -> list[dict[str, Any]]:
    """Times the recipe without memory and with tables of each size."""
    lines = []
    for rows in (0, *sizes):
        line = {"rows": rows, **time_steps(with_rows(recipe, rows), repeats=repeats)}
        lines.append(line)
        print("  ".join(f"{k} {v:.4g}" for k, v in line.items()), flush=True)
    return lines


def host_hashing(
    memory: NgramMemory, vocabulary: int, *, positions: int = 1 << 20, threads: int | None = None
) -> dict[str, float]:
    """Times hashing on the host, and one step's worth on the device.

    Returns:
      {"threads", "million_heads_per_s" (token-heads, all threads), "million_heads_per_cpu_s" (per second of processor time),
      "device_ms" (16384 positions)}.
    """
    threads = threads or len(os.sched_getaffinity(0))
    name, spec = next(iter(memory.tables().items()))
    hashing = make_hash(uncompressed(vocabulary), memory.seed, memory.at[0], memory.orders, spec.primes)
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, vocabulary, (64, positions // 64)).astype(np.int32)
    segments = np.ones_like(tokens)
    best, best_cpu = float("inf"), float("inf")
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for _ in range(4):
            start, start_cpu = time.perf_counter(), time.process_time()
            addresses_on_host(hashing, memory.orders, tokens, segments, threads=pool)
            best = min(best, time.perf_counter() - start)
            best_cpu = min(best_cpu, time.process_time() - start_cpu)
    heads = tokens.size * len(spec.primes) / 1e6
    bits = max(spec.primes).bit_length()
    on_device = jax.jit(lambda own, t, s: addresses(own, memory.orders, t, s, bits=bits))
    arguments = jax.tree.map(jnp.asarray, (hashing, tokens[:8, :2048], segments[:8, :2048]))
    jax.block_until_ready(on_device(*arguments))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(on_device(*arguments))
        times.append(time.perf_counter() - start)
    return {
        "threads": threads,
        "million_heads_per_s": heads / best,
        "million_heads_per_cpu_s": heads / best_cpu,
        "device_ms": 1e3 * min(times),
    }


def measure(recipe: Recipe, sizes: Sequence[int], *, repeats: int) -> dict[str, Any]:
    """Measures and prints what the benchmark says: hashing, and the step by table size."""
    memory = recipe.model.memory
    if not isinstance(memory, NgramMemory):
        raise ValueError(f"recipe {recipe.name} has no memory of n-grams; allowed: --with memory=engram and the like")
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}", flush=True)
    hashing = host_hashing(memory, recipe.model.vocab_size)
    print("hashing  " + "  ".join(f"{name} {value:.4g}" for name, value in hashing.items()), flush=True)
    return {
        "device": device,
        "jax": jax.__version__,
        "hashing": hashing,
        "steps": step_table(recipe, sizes, repeats=repeats),
    }
