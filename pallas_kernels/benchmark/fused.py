"""What fusing saves in the grouped products: SwiGLU in one kernel, the summed input gradient, rows gathered and scattered by the kernel, each beside its plain form.

    python scripts/benchmark.py kernels --op fused

Legend: A rows, T tokens, E experts, K, N dims.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.benchmark.grouped import problem
from pallas_kernels.benchmark.timing import compile_all, has_device_timer, time_all
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu

READS = 8  # sorted rows that read one token


def pairs(shape: str, dtype):
    """What is compared -> {fused form, plain form} -> (function, arguments)."""
    x, w, dy, sizes = problem(shape, "uniform", dtype)
    up = w[::-1]
    token_A = jax.random.randint(jax.random.key(3), x.shape[:1], 0, x.shape[0] // READS)
    x_T = x[: x.shape[0] // READS]
    product, swiglu = grouped_matmul, grouped_swiglu

    def two_products(x, w, up, sizes):
        return jax.nn.silu(product(x, w, sizes)) * product(x, up, sizes)

    def input_gradient(forward):
        return lambda x, w, up, sizes, dy: jax.vjp(lambda x: forward(x, w, up, sizes), x)[1](dy)[0]

    def weight_gradient(forward):
        return lambda x, w, sizes, index, dy: jax.vjp(lambda w: forward(x, w, sizes, index), w)[1](dy)[0]

    def from_index(x, w, sizes, index):
        return product(x, w, sizes, row_index_A=index)

    def from_copy(x, w, sizes, index):
        return product(x[index], w, sizes)

    def to_index(x, w, sizes, index):
        return product(x, w, sizes, output_index_A=index)

    def copied_to(x, w, sizes, index):
        y = product(x, w, sizes)
        return jnp.zeros_like(y).at[index].set(y, unique_indices=True)

    swiglu_operands, token_operands = (x, w, up, sizes), (x_T, w, sizes, token_A)
    place_operands = (x, w, sizes, jax.random.permutation(jax.random.key(4), x.shape[0]))
    return {
        "SwiGLU": {"one kernel": (swiglu, swiglu_operands), "two products": (two_products, swiglu_operands)},
        "SwiGLU dx": {
            "summed in a kernel": (input_gradient(swiglu), (*swiglu_operands, dy)),
            "two products": (input_gradient(two_products), (*swiglu_operands, dy)),
        },
        "rows by index": {"index": (from_index, token_operands), "copy": (from_copy, token_operands)},
        "dw, rows by index": {
            "index": (weight_gradient(from_index), (*token_operands, dy)),
            "copy": (weight_gradient(from_copy), (*token_operands, dy)),
        },
        "output by index": {"index": (to_index, place_operands), "copy": (copied_to, place_operands)},
        "dw, output by index": {
            "index": (weight_gradient(to_index), (*place_operands, dy)),
            "copy": (weight_gradient(copied_to), (*place_operands, dy)),
        },
    }


def run(what: str, shape: str | None = None) -> list[dict]:
    """Times one pair on one shape; prints and returns one row for each form."""
    gpu = has_device_timer()
    shape = shape or ("E64" if gpu else "cpu")
    jobs = pairs(shape, jnp.bfloat16 if gpu else jnp.float32)[what]
    compiled, failed = compile_all(jobs)
    for name, message in failed.items():
        print(f"FAILED {shape} {what}, {name}: {message}", flush=True)
    timings = time_all({name: (compiled[name], jobs[name][1]) for name in compiled}, rounds=2)
    rows = []
    for name, timing in timings.items():
        memory = compiled[name].memory_analysis().temp_size_in_bytes / 1e6
        rows.append({"shape": shape, "what": what, "form": name, "ms": timing.median * 1e3, "temporary_mb": memory})
        print(f"{shape} {what:18s} {name:20s} {timing.median * 1e3:9.4f} ms, temporary {memory:8.1f} MB", flush=True)
    return rows


def parts() -> dict[str, Callable[[], list[dict]]]:
    """The table in parts: name -> function that measures and prints its rows."""
    names = ["SwiGLU", "SwiGLU dx", "rows by index", "dw, rows by index", "output by index", "dw, output by index"]
    return {what: functools.partial(run, what) for what in names}
