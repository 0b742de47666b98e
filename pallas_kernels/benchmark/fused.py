"""What fusing saves in the grouped feed-forward: SwiGLU in one kernel, the summed input gradient, rows gathered by the kernel, each beside its plain form.

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

    def weight_gradient(gather):
        def run(x_T, w, sizes, token_A, dy):
            def forward(w):
                return (
                    product(x_T, w, sizes, row_index_A=token_A)
                    if gather == "kernel"
                    else product(x_T[token_A], w, sizes)
                )

            return jax.vjp(forward, w)[1](dy)[0]

        return run

    swiglu_operands, token_operands = (x, w, up, sizes), (x_T, w, sizes, token_A)
    return {
        "SwiGLU": {"one kernel": (swiglu, swiglu_operands), "two products": (two_products, swiglu_operands)},
        "SwiGLU dx": {
            "summed in a kernel": (input_gradient(swiglu), (*swiglu_operands, dy)),
            "two products": (input_gradient(two_products), (*swiglu_operands, dy)),
        },
        "rows by index": {
            "index": (lambda x, w, s, i: product(x, w, s, row_index_A=i), token_operands),
            "copy": (lambda x, w, s, i: product(x[i], w, s), token_operands),
        },
        "dw, rows by index": {
            "index": (weight_gradient("index"), (*token_operands, dy)),
            "copy": (weight_gradient("copy"), (*token_operands, dy)),
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


def parts(backend: str | None) -> dict[str, Callable[[], list[dict]]]:
    """The table in parts: name -> function that measures and prints its rows."""
    del backend
    return {
        what: functools.partial(run, what) for what in ("SwiGLU", "SwiGLU dx", "rows by index", "dw, rows by index")
    }
