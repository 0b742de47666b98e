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

from sparse_lm.evaluate.generate import Generator, Sampling
from sparse_lm.memory.compression import uncompressed
from sparse_lm.memory.hashing import addresses, addresses_on_host, make_hash
from sparse_lm.memory.host_array import HostArray
from sparse_lm.memory.memory import NoMemory
from sparse_lm.memory.ngram import NgramMemory
from sparse_lm.recipe import Recipe
from sparse_lm.train import machine
from sparse_lm.train.benchmark import RepeatedStep, packed_batch
from sparse_lm.train.session import open_session

Tree = dict[str, Any]


def zipf(draw: np.random.Generator, number: int, shape: int | tuple[int, ...]) -> np.ndarray:
    """Draws numbers below `number`, n with a chance of 1 / (n + 1), int32."""
    chance = 1.0 / np.arange(1, number + 1)
    return draw.choice(number, size=shape, p=chance / chance.sum()).astype(np.int32)


def independent_tokens(vocabulary: int, size: int) -> np.ndarray:
    """Draws tokens one by one: the worst case for a memory, since few n-grams repeat."""
    return zipf(np.random.default_rng(1), vocabulary, size)


def word_tokens(vocabulary: int, size: int) -> np.ndarray:
    """Draws 30,000 words of one to three tokens, and text of these words, both by Zipf's law.

    With 32,768 tokens of a vocabulary of 32,768, 47% of the bigrams and 74% of the trigrams are distinct; of as much English text in a BPE
    vocabulary of 4,096, 46% and 76%; of tokens drawn one by one, 83% and 99%.
    """
    draw = np.random.default_rng(1)
    words = zipf(draw, vocabulary, (30_000, 3))
    lengths = draw.integers(1, 4, len(words))
    chosen = zipf(draw, len(words), size)
    return words[chosen][np.arange(3) < lengths[chosen][:, None]][:size]


BATCHES = 8
"""Batches that steps take in turn: more rows than caches hold."""
TURN = 5
"""Steps that a recipe takes before the next one does."""
TEXTS = {"words": word_tokens, "independent": independent_tokens}
"""How the tokens of a batch repeat."""


def touch(tables: Tree) -> None:
    """Writes tables in host memory once: the first write to a page costs a fault, which a run pays once and a step should not."""
    held = [leaf.values for leaf in jax.tree.leaves(tables, is_leaf=_is_host) if _is_host(leaf)]
    pieces = [part for values in held for part in np.array_split(values, 64)]
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda part: np.copyto(part, part), pieces))


def _is_host(leaf: Any) -> bool:
    return isinstance(leaf, HostArray)


class Arm:
    """The compiled step of a recipe and its batches, run a few times; tables in host memory were written to once.

    Args:
      recipe: what is trained.
      text: a key of `TEXTS`.
    """

    def __init__(self, recipe: Recipe, text: str):
        session = open_session(recipe)
        data, vocabulary = recipe.data, recipe.model.vocab_size
        tokens = TEXTS[text](vocabulary, BATCHES * data.batch_size * data.sequence_length)
        batches = []
        for seed, part in enumerate(np.split(tokens, BATCHES)):
            batch = packed_batch(data.batch_size, data.sequence_length, vocabulary, mean_document=500, seed=seed)
            batches.append({**batch, "tokens_BL": part.reshape(data.batch_size, data.sequence_length)})
        self._step = RepeatedStep(session, *batches)
        self._tables_gb = (
            sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(session.abstract.tables)) / 1e9
        )
        touch(self._step.state.tables)
        self._step.tables.find(batches[0])
        start = time.perf_counter()
        self._step.tables.find(batches[1])
        self._find_ms = 1e3 * (time.perf_counter() - start)
        self._waited: list[tuple[float, float]] = []
        self._run: list[tuple[float, float]] = []
        self.wait_for(BATCHES)
        self._waited.clear()
        self._step.tables.read()

    def wait_for(self, steps: int) -> None:
        """Takes steps, each waited for."""
        for _ in range(steps):
            start, start_cpu = time.perf_counter(), time.process_time()
            self._step()
            jax.block_until_ready(self._step.state)
            self._waited.append((time.perf_counter() - start, time.process_time() - start_cpu))

    def enqueue(self, steps: int) -> None:
        """Takes steps one after another, as a run enqueues them."""
        start, start_cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self._step()
        jax.block_until_ready(self._step.state)
        self._run.append(((time.perf_counter() - start) / steps, (time.process_time() - start_cpu) / steps))

    def row(self) -> dict[str, float]:
        """Ends the arm and returns its numbers; see `time_steps`."""
        moved = self._step.tables.read()
        self._step.tables.close()
        memory = machine.memory_statistics()
        wall_W, cpu_W = 1e3 * np.array(self._waited).T
        run, run_cpu = 1e3 * np.median(self._run, axis=0)
        return {
            "min_ms": float(wall_W.min()),
            "median_ms": float(np.median(wall_W)),
            "mean_ms": float(wall_W.mean()),
            "min_cpu_ms": float(cpu_W.min()),
            "median_cpu_ms": float(np.median(cpu_W)),
            "run_ms": float(run),
            "cpu_ms": float(run_cpu),
            "table_gb": self._tables_gb,
            "compile_s": self._step.compile_s,
            "peak_gb": memory["peak_bytes"] / 1e9 if memory else float("nan"),
            **({"find_ms": self._find_ms, **moved} if moved else {}),
        }


def time_steps(recipes: Sequence[Recipe], *, repeats: int, text: str = "words") -> list[dict[str, float]]:
    """Times the bare steps of recipes: `repeats` steps each waited for, then as many one after another, as a run enqueues them.

    The recipes take turns of `TURN` steps, so that what slows a machine down slows all of them.

    Returns:
      For each {"min_ms", "median_ms", "mean_ms" (of steps waited for), "min_cpu_ms", "median_cpu_ms" (their processor time over all
      threads), "run_ms", "cpu_ms" (mean of steps one after another, median over turns), "table_gb", "compile_s", "peak_gb"}; with tables
      in host memory also "find_ms" (addresses and distinct rows of a batch; a run does it in the thread of the data) and what
      `Tables.read` reports of all these steps.
    """
    arms = [Arm(recipe, text) for recipe in recipes]
    for take in (Arm.wait_for, Arm.enqueue):
        for done in range(0, repeats, TURN):
            for arm in arms:
                take(arm, min(TURN, repeats - done))
    return [arm.row() for arm in arms]


def with_rows(recipe: Recipe, rows: int) -> Recipe:
    """Returns the recipe with so many rows in each of its tables, about; 0: without memory."""
    memory = recipe.model.memory
    if not isinstance(memory, NgramMemory):
        raise ValueError(f"recipe {recipe.name} has no memory of n-grams; allowed: --with memory=engram and the like")
    changed = dataclasses.replace(memory, rows=rows // (memory.heads * len(memory.orders))) if rows else NoMemory()
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, memory=changed))


def time_generation(
    recipe: Recipe, *, batch: int = 16, prompt: int = 64, tokens: int = 128, repeats: int = 3
) -> dict[str, float]:
    """Times generation with parameters and rows of step 0.

    Returns:
      {"generate_ms": milliseconds for each token of the batch, the fastest of `repeats`, "generate_median_ms"}.
    """
    session = open_session(recipe)
    state = session.create()
    touch(state.tables)
    held = {name: state.tables[name] for name in ("address", "rows") if name in state.tables}
    held = jax.tree.map(lambda leaf: leaf.readable() if _is_host(leaf) else leaf, held, is_leaf=_is_host)
    model_state = {**state.model_state, "tables": held} if held else state.model_state
    generator = Generator(session.definition, state.params, model_state, recipe.model.vocab_size - 1)
    texts = word_tokens(recipe.model.vocab_size - 1, batch * prompt).reshape(batch, prompt)
    times = []
    for seed in range(repeats + 1):
        start = time.perf_counter()
        written = sum(map(len, generator.generate(list(texts), tokens, Sampling(), seed=seed))) - texts.size
        times.append((time.perf_counter() - start) * batch / written)
    return {"generate_ms": 1e3 * min(times[1:]), "generate_median_ms": 1e3 * float(np.median(times[1:]))}


def step_table(
    recipe: Recipe, sizes: Sequence[int], *, repeats: int, text: str, generation: bool, together: bool
) -> list[dict[str, Any]]:
    """Times the recipe without memory and with tables of each size, one after another or, `together`, in turns."""
    lines = []
    for group in [(0, *sizes)] if together else [(rows,) for rows in (0, *sizes)]:
        recipes = [with_rows(recipe, rows) for rows in group]
        for rows, own, timed in zip(group, recipes, time_steps(recipes, repeats=repeats, text=text), strict=True):
            lines.append({"rows": rows, **timed, **(time_generation(own) if generation else {})})
            print("  ".join(f"{k} {v:.4g}" for k, v in lines[-1].items()), flush=True)
    return lines


def host_hashing(
    memory: NgramMemory, vocabulary: int, *, batches: int = 32, threads: int | None = None
) -> dict[str, float]:
    """Times hashing on the host, batch after batch of 32,768 positions, and one step's worth on the device.

    Returns:
      {"threads", "million_heads_per_s" (token-heads, all threads), "million_heads_per_cpu_s" (per second of processor time),
      "device_ms" (16384 positions)}.
    """
    threads = threads or len(os.sched_getaffinity(0))
    name, spec = next(iter(memory.tables().items()))
    hashing = make_hash(uncompressed(vocabulary), memory.seed, memory.at[0], memory.orders, spec.primes)
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, vocabulary, (16, 2048)).astype(np.int32)
    segments = np.ones_like(tokens)
    best, best_cpu = float("inf"), float("inf")
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for _ in range(4):
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in range(batches):
                addresses_on_host(hashing, memory.orders, tokens, segments, threads=pool)
            best = min(best, time.perf_counter() - start)
            best_cpu = min(best_cpu, time.process_time() - start_cpu)
    heads = batches * tokens.size * len(spec.primes) / 1e6
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


def measure(
    recipe: Recipe,
    sizes: Sequence[int],
    *,
    repeats: int,
    text: str = "words",
    generation: bool = False,
    together: bool = False,
) -> dict[str, Any]:
    """Measures and prints what the benchmark says: hashing, and the step by table size; arguments as for `step_table`."""
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
        "text": text,
        "steps": step_table(recipe, sizes, repeats=repeats, text=text, generation=generation, together=together),
    }
