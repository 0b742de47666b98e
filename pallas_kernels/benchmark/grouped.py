"""Times the grouped products against dense products of equal FLOPs, `torch._grouped_mm`, `lax.ragged_dot` and the roofline.

    python scripts/benchmark.py kernels --op grouped          all shapes, uniform and Zipf groups

Times are of full device queues, the same loop for every library, in turn in one process; CUPTI's sum of kernel times stands beside them. Weights and rows are fully random (zeros run faster). Legend: A rows, E experts, K, N dims.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.benchmark.peaks import peak
from pallas_kernels.benchmark.timing import compile_all, has_device_timer, time_all
from pallas_kernels.grouped_matmul import grouped_matmul

SHAPES = {
    "E8": (65536, 4096, 14336, 8),
    "E64": (65536, 2048, 1024, 64),
    "E128": (131072, 2048, 768, 128),
    "cpu": (65536, 512, 1024, 64),
}
MOST_TEMPORARY_BYTES = 30e9  # a product that asks for more is not run


def sizes_of(skew: str, rows: int, experts: int) -> np.ndarray:
    """Group sizes: equal, or falling as 1 / rank and in no way aligned."""
    if skew == "uniform":
        return np.full(experts, rows // experts, np.int32)
    share = 1 / np.arange(1, experts + 1)
    bounds = np.round(np.cumsum(share / share.sum()) * rows).astype(np.int32)
    return np.diff(bounds, prepend=0).astype(np.int32)


def problem(shape: str, skew: str, dtype=jnp.bfloat16):
    """x [A, K], w [E, K, N], dy [A, N], sizes [E]."""
    rows, inner, outer, experts = SHAPES[shape]
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (rows, inner), dtype)
    w = jax.random.normal(keys[1], (experts, inner, outer), dtype) * 0.02
    return (
        x,
        w.astype(dtype),
        jax.random.normal(keys[2], (rows, outer), dtype),
        jnp.asarray(sizes_of(skew, rows, experts)),
    )


def products(backend=None):
    """The three products of a training step as functions of (x, w, dy, sizes)."""

    def forward(x, w, dy, sizes):
        return grouped_matmul(x, w, sizes, backend=backend)

    def dx(x, w, dy, sizes):
        return jax.vjp(lambda x: grouped_matmul(x, w, sizes, backend=backend), x)[1](dy)[0]

    def dw(x, w, dy, sizes):
        return jax.vjp(lambda w: grouped_matmul(x, w, sizes, backend=backend), w)[1](dy)[0]

    return {"forward": forward, "dx": dx, "dw": dw}


def dense(x, w, dy):
    """Dense products of equal FLOPs with the first expert's (random) weight."""
    return {
        "forward": (lambda x, w: x @ w, (x, w[0])),
        "dx": (lambda dy, w: dy @ w.T, (dy, w[0])),
        "dw": (lambda x, dy: x.T @ dy, (x, dy)),
    }


def torch_products(x, w, dy, sizes):
    """`torch._grouped_mm` on the same memory."""
    import torch

    tx, tw, tdy = (torch.from_dlpack(a) for a in (x, w, dy))
    offsets = torch.from_dlpack(jnp.cumsum(sizes, dtype=jnp.int32))
    calls = {
        "forward": lambda: torch._grouped_mm(tx, tw, offs=offsets),
        "dx": lambda: torch._grouped_mm(tdy, tw.transpose(-2, -1), offs=offsets),
        "dw": lambda: torch._grouped_mm(tx.t(), tdy, offs=offsets),
    }

    return calls


def other_libraries(every_product: bool):
    """The products of JAX's and tokamax's `ragged_dot`: label -> product -> function."""

    def of(ragged_dot):
        def forward(x, w, dy, sizes):
            return ragged_dot(x, w, sizes)

        def dx(x, w, dy, sizes):
            return jax.vjp(lambda x: ragged_dot(x, w, sizes), x)[1](dy)[0]

        def dw(x, w, dy, sizes):
            return jax.vjp(lambda w: ragged_dot(x, w, sizes), w)[1](dy)[0]

        return {"forward": forward, **({"dx": dx, "dw": dw} if every_product else {})}

    def tokamax_dot(implementation):
        def run(*operands):
            import tokamax  # needs packages of certain versions

            return tokamax.ragged_dot(*operands, implementation=implementation)

        return run

    return {
        "lax.ragged_dot": of(jax.lax.ragged_dot),
        "tokamax mosaic": of(tokamax_dot("mosaic")),
        "tokamax triton": of(tokamax_dot("triton")),
    }


def queue_seconds(function, arguments, synchronize, least: float = 0.03) -> float:
    """Seconds per call with the device queue kept full: one wait for many calls, the same for every library. Only for calls of 0.2 ms and more."""
    begin = time.perf_counter()
    synchronize(function(*arguments))
    calls = max(3, min(50, int(least / (time.perf_counter() - begin))))
    begin = time.perf_counter()
    for _ in range(calls):
        result = function(*arguments)
    synchronize(result)
    return (time.perf_counter() - begin) / calls


def roofline(shape: str, itemsize: int) -> float:
    """Seconds: the larger of FLOPs over peak and bytes over bandwidth; 0 on devices without an entry."""
    rows, inner, outer, experts = SHAPES[shape]
    peaks = peak()
    moved = itemsize * (rows * inner + rows * outer + experts * inner * outer)
    return max(2 * rows * inner * outer / peaks[0], moved / peaks[1]) if peaks else 0.0


def queue_times(ready, problem_arguments, rounds: int):
    """Samples of `queue_seconds` per name, in turn, round after round; torch's products are added where torch sees a GPU."""
    jobs = {name: (f, arguments, jax.block_until_ready) for name, (f, arguments) in ready.items()}
    if has_device_timer():
        with contextlib.suppress(ImportError):
            import torch

            for product, call in torch_products(*problem_arguments).items():
                jobs[f"torch|{product}"] = (call, (), lambda _: torch.cuda.synchronize())
    samples: dict[str, list[float]] = {name: [] for name in jobs}
    for f, arguments, synchronize in jobs.values():
        synchronize(f(*arguments))
    for _ in range(rounds):
        for name, job in jobs.items():
            samples[name].append(queue_seconds(*job))
    return samples


def measure(shape: str, skews, functions, dtype, rounds: int) -> list[dict]:
    """Time dense, torch and `functions` (label -> product -> function) of one shape in turn.

    Returns one row per group sizes, product and implementation.
    """
    rows, inner, outer, _ = SHAPES[shape]
    flops, report = 2 * rows * inner * outer, []
    x, w, dy, sizes = problem(shape, skews[0], dtype)
    todo = {f"dense|{n}": fa for n, fa in dense(x, w, dy).items()}
    for label, group in functions.items():
        todo |= {f"{label}|{n}": (f, (x, w, dy, sizes)) for n, f in group.items()}
    compiled, failed = compile_all(todo, threads=12)
    for name, message in failed.items():
        print("FAILED", shape, name, message, flush=True)
    for name in list(compiled):
        if (memory := compiled[name].memory_analysis().temp_size_in_bytes) > MOST_TEMPORARY_BYTES:
            print(f"not run: {shape} {name} asks for {memory / 1e9:.0f} GB of temporary memory", flush=True)
            del compiled[name]
    for skew in skews:
        sizes = jnp.asarray(sizes_of(skew, *(SHAPES[shape][i] for i in (0, 3))))
        ready = {n: (f, todo[n][1] if n.startswith("dense") else (x, w, dy, sizes)) for n, f in compiled.items()}
        kernels = {}
        if has_device_timer():
            try:
                kernels = {n: t.median for n, t in time_all(ready, rounds=rounds).items()}
            except (RuntimeError, TypeError) as error:
                print("no kernel times:", error)
        samples_of = queue_times(ready, (x, w, dy, sizes), rounds)
        for name, samples in samples_of.items():
            label, product = name.split("|")
            seconds = float(np.median(samples))
            memory = compiled[name].memory_analysis().temp_size_in_bytes if name in compiled else None
            report.append(
                {
                    "shape": shape,
                    "skew": skew,
                    "product": product,
                    "label": label,
                    "seconds": seconds,
                    "kernel_seconds": kernels.get(name),
                    "spread": (max(samples) - min(samples)) / seconds,
                    "tflops": flops / seconds / 1e12,
                    "roofline": roofline(shape, x.dtype.itemsize) / seconds,
                    "temporary_bytes": memory,
                }
            )
    return report


def parts(backend: str | None) -> dict[str, Callable[[], list[dict]]]:
    """The table in parts: name -> function that measures and prints its rows."""
    shapes = (["E64"] if backend else ["E8", "E64", "E128"]) if has_device_timer() else ["cpu"]
    return {shape: functools.partial(_table, shape, {"ours": products(backend)}) for shape in shapes}


def library_parts() -> dict[str, Callable[[], list[dict]]]:
    """The same for the products of other JAX libraries, uniform groups only; they may ask for more memory than there is."""
    shapes = ("E64", "E128", "E8") if has_device_timer() else ("cpu",)
    return {
        f"{shape} {label}": functools.partial(_table, shape, {label: functions}, ("uniform",))
        for shape in shapes
        for label, functions in other_libraries(every_product=shape == "E64").items()
    }


def _table(shape, functions, skews=("uniform", "zipf")) -> list[dict]:
    report = measure(shape, skews, functions, jnp.bfloat16 if has_device_timer() else jnp.float32, 2)
    show(report)
    return report


def show(report):
    """A table: per problem and product, time, TFLOP/s and ratios to dense and torch (above 1: faster than they)."""
    base = {(r["label"], r["shape"], r["product"], r["skew"]): r["seconds"] for r in report}
    print(
        f"{'shape':5s} {'skew':7s} {'product':7s} {'what':26s} {'ms':>9s} {'kernels':>8s} {'TF/s':>6s} {'/dense':>6s} {'/torch':>6s} {'/roof':>5s} {'spread':>6s} {'temp MB':>8s}"
    )
    for r in sorted(report, key=lambda r: (r["shape"], r["skew"], r["product"], r["seconds"])):
        dense_s = base.get(("dense", r["shape"], r["product"], r["skew"]), float("nan"))
        torch_s = base.get(("torch", r["shape"], r["product"], r["skew"]), float("nan"))
        memory = "" if r["temporary_bytes"] is None else f"{r['temporary_bytes'] / 1e6:8.1f}"
        print(
            f"{r['shape']:5s} {r['skew']:7s} {r['product']:7s} {r['label']:26s} {r['seconds'] * 1e3:9.3f} {(r['kernel_seconds'] or 0) * 1e3:8.3f} {r['tflops']:6.1f} {dense_s / r['seconds']:6.2f} "
            f"{torch_s / r['seconds']:6.2f} {r['roofline']:5.2f} {r['spread']:6.2f} {memory}",
            flush=True,
        )


def draw(report, path: pathlib.Path) -> None:
    """Bars of useful TFLOP/s for every shape, skew and product, one colour for each implementation."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: no picture")
        return
    labels = list(dict.fromkeys(r["label"] for r in report))
    groups = sorted({(r["shape"], r["skew"], r["product"]) for r in report})
    figure, axis = plt.subplots(figsize=(max(6, 0.75 * len(groups)), 4))
    for i, label in enumerate(labels):
        of = {(r["shape"], r["skew"], r["product"]): r["tflops"] for r in report if r["label"] == label}
        places = [g + (i - (len(labels) - 1) / 2) * 0.8 / len(labels) for g in range(len(groups))]
        axis.bar(places, [of.get(group, 0) for group in groups], 0.8 / len(labels), label=label)
    axis.set_xticks(range(len(groups)), ["\n".join(group) for group in groups], fontsize=7)
    axis.set_ylabel("TFLOP/s of useful work")
    axis.legend(fontsize=8, ncols=len(labels), loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")
