"""Times a whole mixture-of-experts layer - router, permutation, experts, combination; forward and backward - against a dense SwiGLU of
equal active size, on this library's products and on others', and counts what each stores for the backward pass.

Legend: B batch, L length, D model.
"""

import collections
import concurrent.futures
import dataclasses
import json
import pathlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.benchmark.grouped import queue_seconds
from pallas_kernels.benchmark.timing import has_device_timer, kernels_of
from pallas_kernels.grouped_matmul import grouped_matmul
from sparse_lm.layers.feed_forward import DenseFeedForward, FeedForward
from sparse_lm.routing.benchmark_layer import (
    FEW_TOKENS,
    OLMOE,
    SEQUENCE,
    SMALL,
    SPLITS,
    ZIPF,
    OtherProjection,
    Shape,
    abstract,
    drawn,
    step_of,
    stored_bytes,
    tokamax_product,
)


@dataclasses.dataclass
class Job:
    """One line of the table: a layer under a routing, and what is known of it so far."""

    name: str
    shape: Shape
    config: FeedForward
    routing: str = "uniform"
    diagnostics: bool = True
    options: tuple[tuple[str, Any], ...] = ()
    row: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def program(self) -> tuple[Any, ...]:
        """What its compiled program depends on."""
        return self.shape, self.config, self.diagnostics, self.options


def jobs(shape: Shape) -> list[Job]:
    """Every line but torch's."""
    found = [Job("dense", shape, DenseFeedForward(hidden=shape.active), "-")]
    plain = shape.moe(OtherProjection(by=grouped_matmul))
    for routing in ZIPF:
        found += [
            Job("ours", shape, shape.moe(), routing),
            Job("ours, no diagnostics", shape, shape.moe(), routing, diagnostics=False),
            Job("ours, product by product", shape, plain, routing),
        ]
    for experts, k in SPLITS:
        split = dataclasses.replace(shape, experts=experts, k=k)
        if split != shape and shape.active % k == 0:
            found.append(Job("ours", split, split.moe()))
    few = dataclasses.replace(shape, tokens=min(FEW_TOKENS, shape.tokens // 2))
    ragged = few.moe(OtherProjection(by=jax.lax.ragged_dot))
    found += [
        Job("dense", few, DenseFeedForward(hidden=few.active), "-"),
        Job("ours", few, few.moe()),
        Job("lax.ragged_dot", few, ragged),
    ]
    if has_device_timer():
        fusion = (("xla_gpu_experimental_use_ragged_dot_fusion", True),)
        found.append(Job("lax.ragged_dot, cuDNN fusion", few, ragged, options=fusion))
    try:
        tokamax = shape.moe(OtherProjection(by=tokamax_product()))
        found += [Job("tokamax", shape, tokamax, routing) for routing in ZIPF]
    except ImportError as error:
        print(f"tokamax: not importable ({error})", flush=True)
    return found


class Bench:
    """Programs and operands of the jobs; jobs of one program share it."""

    def __init__(self, dtype: Any, memory_limit: float):
        self.dtype, self.memory_limit = dtype, memory_limit
        self.programs: dict[Any, Callable[..., Any]] = {}
        self.facts: dict[Any, dict[str, Any]] = {}
        self._values: dict[str, Any] = {}
        self._lowering = threading.Lock()

    def _x(self, shape: Shape) -> jax.ShapeDtypeStruct:
        rows = (max(1, shape.tokens // SEQUENCE), min(SEQUENCE, shape.tokens), shape.d_model)
        return jax.ShapeDtypeStruct(rows, self.dtype)

    def operands(self, job: Job) -> tuple[Any, ...]:
        """(values, x, dy, key); values are shared by jobs of equal sizes."""
        values = abstract(job.config, job.shape, self.dtype)[1]
        sides = str(jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), values))
        if sides not in self._values:
            self._values.clear()  # one set of experts at a time
            self._values[sides] = drawn(values)
        values = self._values[sides]
        if "router" in values:
            popularity = -ZIPF[job.routing] * jnp.log(jnp.arange(1, job.shape.experts + 1, dtype=jnp.float32))
            values = {**values, "router": {**values["router"], "popularity": popularity}}
        like = self._x(job.shape)
        x, dy = (jax.random.normal(jax.random.key(i), like.shape, like.dtype) for i in (1, 2))
        return values, x, dy, jax.random.key(3)

    def compile(self, job: Job) -> None:
        """Compiles a job's program from shapes alone; what fails says so."""
        facts = self.facts.setdefault(job.program, {})
        shape, x = job.shape, self._x(job.shape)
        try:
            graph, values = abstract(job.config, shape, self.dtype)
            key = jax.eval_shape(lambda: jax.random.key(0))
            begin = time.perf_counter()
            # In turn: threads that lower kernels at the same time can fail.
            with self._lowering:
                lowered = jax.jit(step_of(graph, diagnostics=job.diagnostics)).lower(values, x, x, key)
            program = lowered.compile(compiler_options=dict(job.options) or None)
            memory = program.memory_analysis()
            least = x.dtype.itemsize * shape.tokens * (shape.d_model + 2 * shape.active)
            stored = stored_bytes(graph, values, x)
            facts |= {
                "compile_s": time.perf_counter() - begin,
                "stored_mb": stored / 1e6,
                "stored_over_least_dense": stored / least,
                "temporary_mb": memory.temp_size_in_bytes / 1e6,
            }
            needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
            if needed > self.memory_limit:
                facts["failed"] = f"needs {needed / 2**30:.0f} GiB"
            else:
                self.programs[job.program] = program
        except Exception as error:  # another library's failure is a line of the table
            facts["failed"] = f"{type(error).__name__}: {str(error)[:300]}"

    def time(self, job: Job, rounds: int, *, kernels: bool) -> None:
        """Times a job and, with `kernels`, says which take most of it."""
        job.row |= self.facts[job.program]
        program = self.programs.get(job.program)
        if program is None:
            return
        try:
            arguments = self.operands(job)
            median, spread = median_seconds(lambda: program(*arguments), jax.block_until_ready, rounds)
            job.row |= {"ms": median * 1e3, "spread": spread, "tflops": job.shape.flops / median / 1e12}
            if kernels:
                job.row["kernels"] = heaviest(program, arguments)
        except Exception as error:
            job.row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"

    def difference(self, left: Job, right: Job) -> float:
        """The largest difference between outputs and gradients of two jobs, relative to each one's norm; values of routers left out."""
        found = []
        results = [self.programs[job.program](*self.operands(job))[:2] for job in (left, right)]
        for a, b in zip(*map(jax.tree.leaves, results), strict=True):
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            found.append(float(jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), 1e-30)))
        return max(found)


def median_seconds(function: Callable[[], Any], synchronize: Callable[[Any], Any], rounds: int) -> tuple[float, float]:
    """(median, (most - least) / median) of seconds per call with a full device queue."""
    samples = [queue_seconds(lambda: function(), (), synchronize, least=0.15) for _ in range(rounds)]
    return float(np.median(samples)), (max(samples) - min(samples)) / float(np.median(samples))


def heaviest(call: Callable[..., Any], arguments: tuple[Any, ...], most: int = 24) -> list[list[Any]]:
    """[kernel, milliseconds, launches] of the kernels that take most of one call."""
    total: collections.Counter[str] = collections.Counter()
    launches: collections.Counter[str] = collections.Counter()
    for name, seconds in kernels_of(call, arguments):
        total[name] += seconds * 1e3  # type: ignore[assignment]
        launches[name] += 1
    return [[name, round(milliseconds, 4), launches[name]] for name, milliseconds in total.most_common(most)]


def run(
    shape: Shape | None = None,
    *,
    rounds: int = 3,
    only: Sequence[str] = (),
    seconds: float = 1e9,
    path: str | None = None,
) -> list[dict[str, Any]]:
    """Times every line, prints it and writes them all to a JSON file.

    Args:
      shape: the layer; None: the shape of OLMoE (Muennighoff et al. 2024, arXiv 2409.02060) with 32768 tokens on a GPU, a tiny one elsewhere.
      rounds: times each line is measured.
      only: names of lines; none: all, `torch._grouped_mm` and its compiled form where torch sees the GPU.
      seconds: no line is begun after so long.
      path: the JSON file.
    """
    begin = time.perf_counter()
    gpu = has_device_timer()
    shape = shape or (OLMOE if gpu else SMALL)
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit", 80 * 2**30)
    bench = Bench(jnp.bfloat16 if gpu else jnp.float32, 0.9 * limit)
    work = [job for job in jobs(shape) if not only or job.name in only]
    with concurrent.futures.ThreadPoolExecutor(8 if gpu else 2) as pool:
        list(pool.map(bench.compile, {job.program: job for job in work}.values()))
    print(f"compiled after {time.perf_counter() - begin:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []

    def add(job: Job) -> None:
        rows.append({"name": job.name, "routing": job.routing, **dataclasses.asdict(job.shape), **job.row})
        shown = {name: value for name, value in _with_ratios(rows)[-1].items() if name != "kernels"}
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()), flush=True)
        if path:
            about = {"device": device.device_kind, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
            pathlib.Path(path).write_text(json.dumps({**about, "rows": _with_ratios(rows)}, indent=1) + "\n")

    reference = {job.routing: job for job in work if job.name == "ours, product by product"}
    for job in work:
        if time.perf_counter() - begin > seconds:
            job.row["failed"] = "no time left"
        else:
            bench.time(job, rounds, kernels=gpu and job.shape == shape)
            other = reference.get(job.routing) if job.name == "ours" and job.shape == shape else None
            if other is not None and {job.program, other.program} <= bench.programs.keys():
                job.row["difference_from_product_by_product"] = bench.difference(job, other)
        add(job)
    torch_lines = [("torch._grouped_mm", False), ("torch._grouped_mm, compiled", True)]
    for name, compiled in torch_lines if gpu else []:
        for routing, zipf in ZIPF.items() if not only or name in only else ():
            job = Job(name, shape, shape.moe(), routing)
            add_torch(job, zipf, rounds, compiled=compiled)
            add(job)
    return _with_ratios(rows)


def add_torch(job: Job, zipf: float, rounds: int, *, compiled: bool) -> None:
    """Times the layer in PyTorch."""
    try:
        from sparse_lm.routing import benchmark_torch

        call, job.row["stored_mb"] = benchmark_torch.layer(job.shape, zipf, compiled=compiled)
        median, spread = median_seconds(call, benchmark_torch.synchronize, rounds)
        job.row |= {"ms": median * 1e3, "spread": spread, "tflops": job.shape.flops / median / 1e12}
    except Exception as error:
        job.row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds each line's speed over that of the dense layer with as many tokens and, for ours, what its diagnostics cost."""
    dense = {row["tokens"]: row["ms"] for row in rows if row["name"] == "dense" and "ms" in row}
    bare = {row["routing"]: row["ms"] for row in rows if row["name"] == "ours, no diagnostics" and "ms" in row}
    found = []
    for row in rows:
        added: dict[str, Any] = {}
        if "ms" in row and row["tokens"] in dense:
            added["speed_over_dense"] = dense[row["tokens"]] / row["ms"]
        same = [r for r in rows if r["name"] == "ours" and r["routing"] == row["routing"]][:1]
        if same and row is same[0] and "ms" in row and row["routing"] in bare:
            added["diagnostics"] = row["ms"] / bare[row["routing"]] - 1
        found.append({**row, **added})
    return found
