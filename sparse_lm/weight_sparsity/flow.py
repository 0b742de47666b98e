"""Synaptic flow through a transformer: what a vector of ones becomes when every weight is replaced by its magnitude.

Tanaka et al. 2020 (arXiv 2006.05467) define it for feed-forward networks: no data, no normalisation, activations taken as identity.
Here attention has no positions: each head passes its values on, times the product of its queries and keys; a gated feed-forward
multiplies gate and up; experts are averaged; residual connections stay. So the flow is a polynomial with non-negative
coefficients, of degree one in every matrix, and sum(w dR/dw) is the same for all matrices of a chain (their conservation law).
Products and blocks are divided by their means, held constant, so that nothing overflows; within a layer that changes no order.

Legend: D model, F ffn, E experts, H heads, J key heads, N head dim.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from sparse_lm.layers.parameter import RUN_KEY

KNOWN = (
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.out",
    "feed_forward.gate",
    "feed_forward.up",
    "feed_forward.down",
    "feed_forward.shared.gate",
    "feed_forward.shared.up",
    "feed_forward.shared.down",
)
"""Matrices of a block that the flow passes through."""


def by_layer(weights: Mapping[str, jax.Array]) -> dict[int, dict[str, jax.Array]]:
    """Returns {block: {"attention.query": matrix}} of flat parameters, runs of stacked blocks unrolled."""
    found: dict[int, dict[str, jax.Array]] = {}
    for path, weight in weights.items():
        parts = path.split(".")
        name = ".".join(parts[2:-1])
        if parts[0] != "blocks" or name not in KNOWN:
            continue
        match = RUN_KEY.match(parts[1])
        blocks = range(int(match[1]), int(match[2]) + 1) if match else [int(parts[1])]
        for i, block in enumerate(blocks):
            found.setdefault(block, {})[name] = weight[i] if match else weight
    return dict(sorted(found.items()))


def even(x: jax.Array) -> jax.Array:
    """Divides by the mean, held constant."""
    return x / jnp.maximum(jax.lax.stop_gradient(jnp.mean(x)), 1e-30)


def total_flow(weights: Mapping[str, jax.Array], heads: int, key_heads: int) -> jax.Array:
    """Returns R, the sum of what a vector of ones becomes.

    Args:
      weights: {path: weights}, all that `KNOWN` names of every block; magnitudes are taken here.
      heads: H.
      key_heads: J.
    """
    x_D: jax.Array | None = None
    for block in by_layer({path: jnp.abs(weight) for path, weight in weights.items()}).values():
        if x_D is None:
            x_D = jnp.ones(block["attention.query"].shape[0], jnp.float32)
        q_HN = (x_D @ block["attention.query"]).reshape(heads, -1)
        k_JN, v_JN = ((x_D @ block[f"attention.{name}"]).reshape(key_heads, -1) for name in ("key", "value"))
        k_HN, v_HN = (jnp.repeat(array, heads // key_heads, axis=0) for array in (k_JN, v_JN))
        gain_H = even(jnp.sum(q_HN * k_HN, axis=-1))
        x_D = x_D + (gain_H[:, None] * v_HN).reshape(-1) @ block["attention.out"]
        for part in ("feed_forward", "feed_forward.shared"):
            if f"{part}.down" in block:
                x_D = x_D + _feed_forward(x_D, *(block.get(f"{part}.{name}") for name in ("gate", "up", "down")))
        x_D = even(x_D)
    assert x_D is not None, "a model has blocks"
    return jnp.sum(x_D)


def _feed_forward(x_D: jax.Array, gate: jax.Array, up: jax.Array | None, down: jax.Array) -> jax.Array:
    hidden = x_D @ gate if up is None else even(x_D @ gate) * (x_D @ up)
    if down.ndim == 2:
        return hidden @ down
    return jnp.einsum("ef,efd->d", hidden, down) / down.shape[0]
