"""Time and memory of the routed feed-forward against a dense SwiGLU of the same active size, as experts get smaller and more numerous.

    python scripts/benchmark.py kernels --op feed_forward

"stored" is what the forward pass keeps for the backward pass, weights excluded; "temporary" is what XLA allocates beside arguments and results of one whole forward
and backward pass. The least a dense SwiGLU stores is its input and the gate and up products.

Legend: T tokens, D model, E experts, S experts of a token, F ffn dim of an expert.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.benchmark.timing import compile_all, has_device_timer, time_all
from pallas_kernels.grouped_matmul import grouped_feed_forward

SPLITS = ((16, 2), (64, 8), (256, 32))


def route(tokens: int, experts: int, per_token: int, seed: int = 0):
    """Random distinct experts for every token: group sizes [E], token of each row [A], rows of each token [T, S], int32."""
    chosen = np.argsort(np.random.default_rng(seed).random((tokens, experts)), axis=1)[:, :per_token].reshape(-1)
    order = np.argsort(chosen, kind="stable")
    row = np.empty(order.size, np.int32)
    row[order] = np.arange(order.size)
    sizes = np.bincount(chosen, minlength=experts)
    return tuple(jnp.asarray(a, jnp.int32) for a in (sizes, order // per_token, row.reshape(tokens, per_token)))


def normal(seed: int, shape, dtype, scale: float = 1.0) -> jax.Array:
    """Random values."""
    return (jax.random.normal(jax.random.key(seed), shape) * scale).astype(dtype)


def dense_step(x, gate, up, down, dy):
    """Output and all gradients of a dense SwiGLU."""
    y, vjp = jax.vjp(lambda x, g, u, d: (jax.nn.silu(x @ g) * (x @ u)) @ d, x, gate, up, down)
    return y, vjp(dy)


def routed_step(x, gate, up, down, weight, sizes, token, row, dy):
    """Output and all gradients of the routed feed-forward."""
    f = lambda x, g, u, d, s: grouped_feed_forward(x, g, u, d, sizes, token, row, s)  # noqa: E731
    y, vjp = jax.vjp(f, x, gate, up, down, weight)
    return y, vjp(dy)


def stored_bytes(arguments) -> int:
    """Bytes of the residuals of the routed feed-forward, weights excluded."""
    x, gate, up, down, weight, sizes, token, row = arguments

    def residuals(x, gate, up, down, weight):
        return jax.vjp(
            lambda x, g, u, d, s: grouped_feed_forward(x, g, u, d, sizes, token, row, s), x, gate, up, down, weight
        )[1]

    leaves = jax.tree.leaves(jax.eval_shape(residuals, x, gate, up, down, weight))
    weights = [w.shape for w in (gate, up, down)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.shape not in weights)


def run(splits=SPLITS, tokens: int | None = None, model: int | None = None, active: int | None = None) -> list[dict]:
    """Times splits of `active` ffn features among the experts of a token and the dense layer; prints and returns one row for each."""
    gpu = has_device_timer()
    defaults = (16384, 2048, 4096) if gpu else (2048, 256, 1024)
    tokens, model, active = (given or default for given, default in zip((tokens, model, active), defaults, strict=True))
    dtype = jnp.bfloat16 if gpu else jnp.float32
    x, dy = normal(0, (tokens, model), dtype), normal(9, (tokens, model), dtype)
    dense = [normal(i, s, dtype, 0.02) for i, s in enumerate(((model, active), (model, active), (active, model)))]
    jobs: dict[str, tuple] = {"dense": (dense_step, (x, *dense, dy))}
    for experts, per_token in splits:
        ffn = active // per_token
        sides = ((model, ffn), (model, ffn), (ffn, model))
        weights = [normal(i, (experts, *s), dtype, 0.02) for i, s in enumerate(sides)]
        weight = jax.random.uniform(jax.random.key(5), (tokens, per_token))
        arguments = (x, *weights, weight, *route(tokens, experts, per_token))
        jobs[f"E{experts} S{per_token}"] = (routed_step, (*arguments, dy))
    compiled, failed = compile_all(jobs)
    for name, message in failed.items():
        print(f"FAILED {name}: {message}", flush=True)
    timings = time_all({name: (compiled[name], jobs[name][1]) for name in compiled}, rounds=2)
    least = x.dtype.itemsize * tokens * (model + 2 * active)
    rows = []
    for name, timing in timings.items():
        row = {
            "what": name,
            "tokens": tokens,
            "model": model,
            "active": active,
            "ms": timing.median * 1e3,
            "over_dense": timing.median / timings["dense"].median if "dense" in timings else None,
            "tflops": 18 * tokens * model * active / timing.median / 1e12,
            "stored_mb": (least if name == "dense" else stored_bytes(jobs[name][1][:-1])) / 1e6,
            "stored_over_dense": 1.0 if name == "dense" else stored_bytes(jobs[name][1][:-1]) / least,
            "temporary_mb": compiled[name].memory_analysis().temp_size_in_bytes / 1e6,
        }
        rows.append(row)
        print(
            f"feed-forward {name:10s} {row['ms']:9.3f} ms {row['tflops']:6.0f} TF, {row['over_dense'] or 0:5.2f}x the time of dense; "
            f"stored {row['stored_mb']:7.1f} MB ({row['stored_over_dense']:.3f} of the least dense), temporary {row['temporary_mb']:8.1f} MB",
            flush=True,
        )
    return rows


def parts() -> dict[str, Callable[[], list[dict]]]:
    """The table in parts: name -> function that measures and prints its rows."""
    return {
        f"E{experts} S{per_token}": functools.partial(run, ((experts, per_token),)) for experts, per_token in SPLITS
    }
