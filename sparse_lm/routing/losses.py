"""Auxiliary losses of routers, as sums that add over groups, microbatches and shards.

Legend: G routing groups, S tokens of a group, E experts.
"""

import jax
import jax.numpy as jnp

from sparse_lm.routing.plan import RoutingPlan


def balance_loss(probability_GSE: jax.Array, plan: RoutingPlan, valid_GS: jax.Array) -> jax.Array:
    """Switch balance loss E * sum_i f_i P_i of each group, summed over groups (Fedus et al. 2021, arXiv 2101.03961, equation 4).

    f_i is the fraction of the group's live assignments at expert i and P_i its mean probability over valid tokens, so a uniform
    router scores exactly 1 whatever the number of experts per token. A group without valid tokens scores 0.

    Args:
      probability_GSE: float32 router probabilities.
      plan: the plan made from them.
      valid_GS: True for tokens that are not padding.

    Returns:
      Sum over groups; divide by the number of groups with valid tokens for the mean.
    """
    live_GAE = plan.expert_GA[..., None] == jnp.arange(plan.experts)
    counts_GE = jnp.sum(live_GAE, axis=1, dtype=jnp.float32)
    fraction_GE = counts_GE / jnp.maximum(jnp.sum(counts_GE, axis=-1, keepdims=True), 1.0)
    tokens_G1 = jnp.maximum(jnp.sum(valid_GS, axis=-1, keepdims=True), 1)
    mean_GE = jnp.sum(probability_GSE * valid_GS[..., None], axis=1) / tokens_G1
    return plan.experts * jnp.sum(fraction_GE * mean_GE)


def z_loss(logits_GSE: jax.Array, valid_GS: jax.Array) -> jax.Array:
    """Squared log-partition of the router logits, summed over valid tokens (Zoph et al. 2022, arXiv 2202.08906, equation 5)."""
    return jnp.sum(jnp.square(jax.nn.logsumexp(logits_GSE, axis=-1)) * valid_GS)
