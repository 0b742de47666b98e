"""What a router measures of itself in every step, as (sum, count) pairs that add over groups, microbatches and shards.

Legend: G routing groups, S tokens of a group, E experts, R most experts of a token.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sparse_lm.routing.losses import entropy


def chosen_mask(expert_GSR: jax.Array, experts: int) -> jax.Array:
    """Returns float32 [G, S, E]: 1 where a token has an expert."""
    total = jnp.zeros((*expert_GSR.shape[:2], experts), jnp.float32)
    for r in range(expert_GSR.shape[2]):
        total = total + (expert_GSR[..., r, None] == jnp.arange(experts))
    return total


def measure(
    probability_GSE: jax.Array, expert_GSR: jax.Array, valid_GS: jax.Array, dropped: jax.Array
) -> dict[str, Any]:
    """Measures one layer's routing.

    Args:
      probability_GSE: the router's distribution.
      expert_GSR: experts that are executed, E in unused slots.
      valid_GS: False for padding.
      dropped: assignments that were wanted and dropped.

    Returns:
      "load": assignments by expert and in all; "experts_per_token", "entropy" (nats) and "top_probability": sums over valid tokens;
      "dropped": of the assignments that were wanted; "coactivation": tokens by pair of experts, where tokens have several.
    """
    experts, tokens = probability_GSE.shape[-1], jnp.sum(valid_GS, dtype=jnp.float32)
    chosen_GSE = chosen_mask(expert_GSR, experts)
    load_E = jnp.sum(chosen_GSE, axis=(0, 1))
    assignments = jnp.sum(load_E)
    metrics = {
        "load": (load_E, assignments),
        "experts_per_token": (assignments, tokens),
        "entropy": (jnp.sum(entropy(probability_GSE) * valid_GS), tokens),
        "top_probability": (jnp.sum(jnp.max(probability_GSE, axis=-1) * valid_GS), tokens),
        "dropped": (dropped, assignments + dropped),
    }
    if expert_GSR.shape[2] > 1:
        metrics["coactivation"] = (jnp.einsum("gse,gsf->ef", chosen_GSE, chosen_GSE), tokens)
    return metrics
