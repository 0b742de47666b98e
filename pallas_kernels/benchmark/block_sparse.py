"""Times the block-sparse products against dense products, the roofline and PyTorch's BSR linear.

    python scripts/benchmark.py kernels --op block_sparse        the table, as text and JSON, and the picture

On a CPU with several devices (XLA_FLAGS=--xla_force_host_platform_device_count=2: one a core) rows are split over them.

A ratio compares with a dense product of the same run: on fully random weights (the claim), and on the masked weights,
where cuBLAS runs faster because most operands are zero (the harsh check). Legend: M rows, K, N features.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.benchmark.peaks import peak
from pallas_kernels.benchmark.timing import compile_all, has_device_timer, time_all
from pallas_kernels.block_gradient_norms import block_gradient_norms
from pallas_kernels.block_sparse_matmul import cost, to_dense, topology_from_mask
from pallas_kernels.block_sparse_matmul.api import _operation

PRODUCTS = ("forward", "dx", "dvalues")


@dataclasses.dataclass(frozen=True)
class Case:
    """One weight: M rows, K x N features, square blocks, density, how its columns are filled, dtype."""

    m: int
    k: int
    n: int
    block: int
    density: float
    balanced: bool = True
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """All of it in one line."""
        filled = "even" if self.balanced else "binomial"
        return f"{self.m}x{self.k}x{self.n} b{self.block} {self.dtype} {filled} {self.density}"


SQUARE = (8192, 8192, 8192)
OTHER_SHAPES = ((8192, 4096, 16384), (16384, 4096, 4096), (16384, 2048, 8192))
DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.05)
GPU_CASES = (
    [Case(*shape, 128, d) for shape in (SQUARE, *OTHER_SHAPES) for d in DENSITIES]
    + [Case(*SQUARE, 128, d, balanced=False) for d in (0.25, 0.1)]
    + [Case(*SQUARE, 64, d) for d in (0.25, 0.1)]
    + [Case(*SQUARE, 128, d, dtype="float16") for d in (0.25,)]
)
SOME_GPU_CASES = [Case(*SQUARE, 128, d) for d in (0.5, 0.25, 0.1)] + [Case(*SQUARE, 64, 0.1)]  # of a second backend
CPU_CASES = [Case(2048, 2048, 2048, block, 0.1, balanced=False, dtype="float32") for block in (64, 128)]


def make_mask(case: Case, seed: int = 0) -> np.ndarray:
    """bool [K / block, N / block]: equally many blocks per column, or a binomial number."""
    rng = np.random.default_rng(seed)
    rows, columns = case.k // case.block, case.n // case.block
    mask = np.zeros((rows, columns), bool)
    for column in range(columns):
        count = max(1, round(case.density * rows)) if case.balanced else rng.binomial(rows, case.density)
        mask[rng.permutation(rows)[:count], column] = True
    return mask


def random(seed: int, shape, dtype, scale: float = 1.0):
    """Normal values: zeros and constants run faster and hide errors."""
    return (jax.random.normal(jax.random.key(seed), shape, jnp.float32) * scale).astype(dtype)


def sparse_products(backend: str | None = None):
    """The three products of a training step as functions of (x [1, M, K], dy [1, M, N], values, topology)."""
    product = functools.partial(_operation, backend=backend, precision=jax.lax.Precision.HIGHEST)
    return {
        "forward": lambda x, dy, values, topology: product("product")(x, values, topology),
        "dx": lambda x, dy, values, topology: product("product_transposed")(dy, values, topology),
        "dvalues": lambda x, dy, values, topology: product("sampled_product")(x, dy, topology),
    }


DENSE = {
    "forward": lambda x, dy, w: x[0] @ w,
    "dx": lambda x, dy, w: dy[0] @ w.T,
    "dvalues": lambda x, dy, w: x[0].T @ dy[0],
}


def over_devices(jobs: dict[str, tuple]) -> dict[str, tuple]:
    """The same jobs with the rows of x and dy split over all devices, as a training step splits its tokens; weight gradients are summed.

    Args:
        jobs: name -> (function of (x [1, M, K], dy [1, M, N], ...), arguments); a name that ends in dvalues is a weight gradient.
    """
    mesh = jax.make_mesh((jax.device_count(),), ("rows",))

    def spread(name: str, function, arguments) -> tuple:
        whole, split = P(), P(None, "rows")
        specs = (split, split, *[whole] * (len(arguments) - 2))
        summed, dense = name.endswith("dvalues"), name.startswith("dense")

        def run(*own):
            return jax.lax.psum(function(*own), "rows") if summed else function(*own)

        out = whole if summed else P("rows") if dense else split
        placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arguments, specs, strict=True)]
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False), tuple(placed)

    return {name: spread(name, *job) for name, job in jobs.items()}


def relative_error(found, wanted) -> float:
    """Relative Frobenius distance in float32."""
    found, wanted = found.astype(jnp.float32).ravel(), wanted.astype(jnp.float32).ravel()
    return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))


def check_values(case: Case, functions, dense, arguments, w_masked) -> dict[str, float]:
    """Error of each product against the dense product in the same dtype, over memory poisoned with NaN."""
    x, dy, _, topology = arguments
    errors = {}
    for name, function in functions.items():
        poison = jnp.full((case.m, max(case.k, case.n)), jnp.nan, x.dtype)
        jax.block_until_ready(poison)
        del poison  # its memory is the likeliest to be handed out next
        found = function(*arguments)
        wanted = dense[name](x, dy, w_masked)
        if name == "dvalues":
            rows, columns = topology.block_rows, topology.block_columns
            blocks = wanted.reshape(rows, case.block, columns, case.block).transpose(0, 2, 1, 3)
            row, start = np.asarray(topology.row_index[0]), np.asarray(topology.column_start[0])
            wanted = blocks[row, np.repeat(np.arange(columns), np.diff(start))]
        errors[name] = relative_error(found.reshape(wanted.shape), wanted)
    return errors


def measure(case: Case, *, rounds: int = 2, backend: str | None = None) -> list[dict]:
    """Times one case beside the dense products.

    Args:
        case: What to time.
        rounds: Times every function gets its turn.
        backend: Name of the backend to time; None for the automatic choice, at density 1 with the norms.

    Returns:
        One row (a dict) for each product, for their sum, and for the norms.
    """
    dtype = jnp.dtype(case.dtype)
    x, dy = random(1, (1, case.m, case.k), dtype), random(2, (1, case.m, case.n), dtype)
    topology = topology_from_mask(make_mask(case), case.block, case.block)
    values = random(3, (1, topology.blocks, case.block, case.block), dtype, 0.02)
    masked = to_dense(values[0], topology)
    w = random(4, (case.k, case.n), dtype, 0.02)
    arguments = (x, dy, values, jax.tree.map(lambda a: a[None], topology))
    jobs: dict[str, tuple] = {name: (function, arguments) for name, function in sparse_products(backend).items()}
    jobs |= {f"dense {name}": (function, (x, dy, w)) for name, function in DENSE.items()}
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jobs = over_devices(jobs)
        (x, dy, w), arguments = jobs["dense forward"][1], jobs["forward"][1]
        masked = jax.device_put(masked, w.sharding)
    if case.density == 1.0 and backend is None:
        norms = functools.partial(block_gradient_norms, block_in=case.block, block_out=case.block)
        jobs["norms"] = (lambda x, dy: norms(x[0], dy[0]), (x, dy))
    compiled, failed = compile_all(jobs)
    for name, message in failed.items():
        print(f"FAILED {case.name} {name}: {message}", flush=True)
    whole = {name: compiled[f"dense {name}"] for name in DENSE}
    errors = check_values(case, {n: compiled[n] for n in PRODUCTS if n in compiled}, whole, arguments, masked)
    todo = {name: (compiled[name], jobs[name][1]) for name in compiled}
    todo |= {f"masked {name}": (whole[name], (x, dy, masked)) for name in ("forward", "dx")}
    timings = time_all(todo, rounds=rounds)

    peaks = peak()
    dense_flops = 2 * case.m * case.k * case.n
    useful = cost(topology, case.m, dtype.itemsize)
    rows = []
    for name in (*PRODUCTS, "norms"):
        if name not in timings:
            continue
        timing, dense = timings[name], timings["dense dvalues" if name == "norms" else f"dense {name}"]
        flops = dense_flops if name == "norms" else useful["flops"]
        memory = compiled[name].memory_analysis()
        row = {
            **dataclasses.asdict(case),
            "product": name,
            "achieved_density": topology.density,
            "ms": timing.median * 1e3,
            "spread": timing.spread,
            "tflops": flops / timing.median / 1e12,
            "dense_ms": dense.median * 1e3,
            "dense_tflops": dense_flops / dense.median / 1e12,
            "speedup": dense.median / timing.median,
            "error": errors.get(name),
            "peak_mb": (memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes) / 1e6
            if memory
            else None,
        }
        if peaks:
            bytes_moved = case.m * (case.k + case.n) * dtype.itemsize if name == "norms" else useful["bytes"]
            row["of_roofline"] = max(flops / peaks[0], bytes_moved / peaks[1]) / timing.median
        if f"masked {name}" in timings:
            row["speedup_over_masked"] = timings[f"masked {name}"].median / timing.median
        rows.append(row)
    if all(name in timings for name in PRODUCTS):
        total = sum(timings[name].median for name in PRODUCTS)
        dense_total = sum(timings[f"dense {name}"].median for name in PRODUCTS)
        rows.append(
            {
                **dataclasses.asdict(case),
                "product": "all three",
                "achieved_density": topology.density,
                "ms": total * 1e3,
                "dense_ms": dense_total * 1e3,
                "speedup": dense_total / total,
                "tflops": 3 * useful["flops"] / total / 1e12,
            }
        )
    return rows


def show(row: dict) -> str:
    """One line of the table; the last ratio is scaled from the density achieved to the one named."""
    scaled = row["speedup"] * row["achieved_density"] / row["density"] if row["product"] != "norms" else row["speedup"]
    parts = [
        f"M{row['m']} K{row['k']} N{row['n']} b{row['block']} {row['dtype']} {'even' if row['balanced'] else 'binomial':8s}",
        f"d={row['achieved_density']:.4f} {row['product']:9s} {row['ms']:8.4f} ms {row['tflops']:6.0f} TF",
        f"dense {row['dense_ms']:.3f} ms, {row['speedup']:6.2f}x (at d={row['density']:g}: {scaled:.2f}x)",
    ]
    if "speedup_over_masked" in row:
        parts.append(f"masked {row['speedup_over_masked']:.2f}x")
    if "of_roofline" in row:
        parts.append(f"roofline {row['of_roofline']:.2f}")
    if row.get("error") is not None:
        parts.append(f"err {row['error']:.1e}")
    return "  ".join(parts)


def torch_bsr(cases, seconds: float = 0.03) -> list[dict]:
    """Times PyTorch's BSR linear (Triton) forward, by CUDA events over a full queue, warmed like the others."""
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed: no BSR baseline")
        return []
    return [row for case in cases if (row := _torch_bsr(torch, case, seconds)) is not None]


def _torch_bsr(torch, case: Case, seconds: float) -> dict | None:
    mask = torch.from_numpy(make_mask(case).T.copy()).cuda()  # linear keeps [out, in]
    dense = torch.randn(case.n, case.k, device="cuda", dtype=torch.bfloat16) * 0.02
    dense = dense.view(case.n // case.block, case.block, case.k // case.block, case.block) * mask[:, None, :, None]
    weight = dense.view(case.n, case.k).to_sparse_bsr((case.block, case.block))
    x = torch.randn(case.m, case.k, device="cuda", dtype=torch.bfloat16)

    def run(iterations=1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(iterations):
            torch.nn.functional.linear(x, weight)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / iterations

    try:
        run()
        single = run(iterations=3)
        run(iterations=max(3, int(60 / single)))
        milliseconds = float(np.median([run(iterations=max(3, int(seconds * 1e3 / single))) for _ in range(3)]))
    except Exception as error:
        print(f"FAILED torch BSR {case}: {str(error)[:200]}")
        return None
    print(f"torch BSR {case}: {milliseconds:.4f} ms", flush=True)
    return {**dataclasses.asdict(case), "product": "torch_bsr", "ms": milliseconds}


def break_even(densities, speedups) -> float | None:
    """Density at which the speed-up is 1, interpolated in logarithms; None if it never is."""
    order = np.argsort(densities)
    d, s = np.log(np.asarray(densities)[order]), np.log(np.asarray(speedups)[order])
    for (d0, s0), (d1, s1) in itertools.pairwise(zip(d, s, strict=True)):
        if s0 >= 0 >= s1:
            return float(np.exp(d0 + (d1 - d0) * s0 / (s0 - s1))) if s0 != s1 else float(np.exp(d1))
    return None


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """Draws speed-up against density, with the ideal 1 / density and the break-even points."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: no picture")
        return
    drawn = [r for r in rows if r.get("balanced") and "speedup" in r]
    weights = [(r["m"], r["k"], r["n"], r["block"], r["dtype"]) for r in drawn if r["product"] == "forward"]
    weights = sorted({weight for weight in weights if weights.count(weight) >= 2})
    if not weights:
        print("no weight was timed at two densities: no picture")
        return
    figure, axes = plt.subplots(1, len(weights), figsize=(4.2 * len(weights), 4), squeeze=False, sharey=True)
    for axis, weight in zip(axes[0], weights, strict=True):
        ideal = np.geomspace(0.04, 1, 50)
        axis.plot(ideal, 1 / ideal, "k--", linewidth=1, label="ideal, 1 / density")
        axis.axhline(1, color="grey", linewidth=0.8)
        for product in (*PRODUCTS, "all three"):
            points = sorted(
                (r["achieved_density"], r["speedup"])
                for r in drawn
                if (r["m"], r["k"], r["n"], r["block"], r["dtype"]) == weight and r["product"] == product
            )
            if len(points) < 2:
                continue
            point = break_even(*zip(*points, strict=True))
            label = product + (
                f", break-even {point:.2f}" if point else ", faster at every density" if points[-1][1] >= 1 else ""
            )
            axis.plot(*zip(*points, strict=True), "o-", markersize=3, label=label)
        m, k, n, block, _ = weight
        axis.set(xscale="log", yscale="log", xlabel="density", title=f"M {m}, {k} x {n}, blocks of {block}")
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("speed-up over dense (random weights)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def parts(backend: str | None) -> dict[str, Callable[[], list[dict]]]:
    """The table in parts: name -> function that measures and prints its rows."""
    gpu = has_device_timer()
    cases = (SOME_GPU_CASES if backend else GPU_CASES) if gpu else CPU_CASES

    def table(case):
        rows = measure(case, backend=backend)
        for row in rows:
            print(show(row), flush=True)
        return rows

    found: dict[str, Callable[[], list[dict]]] = {case.name: functools.partial(table, case) for case in cases}
    if gpu and backend is None:
        found["torch BSR"] = functools.partial(torch_bsr, [Case(*SQUARE, 128, d) for d in DENSITIES[1:]])
    return found
