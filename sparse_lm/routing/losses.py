"""Auxiliary losses of routers, as sums over routing groups or tokens that add over groups, microbatches and shards.

Legend: G routing groups, S tokens of a group, E experts, N sequences of a group.
"""

import jax
import jax.numpy as jnp


def means(values_GSE: jax.Array, valid_GS: jax.Array) -> jax.Array:
    """Returns the mean over the valid tokens of each group, [G, E]; 0 in a group without any."""
    tokens_G1 = jnp.maximum(jnp.sum(valid_GS, axis=-1, keepdims=True), 1)
    return jnp.sum(values_GSE * valid_GS[..., None], axis=1) / tokens_G1


def balance_by_group(probability_GSE: jax.Array, chosen_GSE: jax.Array, valid_GS: jax.Array) -> jax.Array:
    """Switch balance loss E * sum_i f_i P_i of each group, [G] (Fedus et al. 2021, arXiv 2101.03961, equation 4).

    f_i is the fraction of the group's assignments that want expert i (before a capacity drops any) and P_i its mean probability
    over valid tokens, so a uniform router scores exactly 1 whatever the number of experts per token. No valid tokens score 0.

    Args:
      probability_GSE: float32 router probabilities.
      chosen_GSE: 1 where a valid token wants an expert, else 0.
      valid_GS: True for tokens that are not padding.
    """
    counts_GE = jnp.sum(chosen_GSE, axis=1)
    fraction_GE = counts_GE / jnp.maximum(jnp.sum(counts_GE, axis=-1, keepdims=True), 1.0)
    return probability_GSE.shape[-1] * jnp.sum(fraction_GE * means(probability_GSE, valid_GS), axis=-1)


def balance_loss(probability_GSE: jax.Array, chosen_GSE: jax.Array, valid_GS: jax.Array) -> jax.Array:
    """Sum over groups of `balance_by_group`."""
    return jnp.sum(balance_by_group(probability_GSE, chosen_GSE, valid_GS))


def sequence_balance_loss(
    probability_GSE: jax.Array, chosen_GSE: jax.Array, valid_GS: jax.Array, sequences: int
) -> jax.Array:
    """The balance loss of each sequence (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20), averaged over a group's sequences.

    Fractions are of the experts actually chosen. Returns the sum over groups, as `balance_loss`, to which it is equal when a group
    is one sequence.
    """
    groups, tokens, experts = probability_GSE.shape

    def split(a: jax.Array) -> jax.Array:
        return a.reshape(groups * sequences, tokens // sequences, *a.shape[2:])

    valid_GN = jnp.any(split(valid_GS), axis=-1).reshape(groups, sequences)
    loss_GN = balance_by_group(split(probability_GSE), split(chosen_GSE), split(valid_GS)).reshape(groups, sequences)
    return jnp.sum(jnp.sum(loss_GN, axis=-1) / jnp.maximum(jnp.sum(valid_GN, axis=-1), 1))


def step_balance_loss(probability_GSE: jax.Array, fraction_E: jax.Array, valid_GS: jax.Array) -> jax.Array:
    """The balance loss over all tokens of a step (the global form of Qiu et al. 2025, arXiv 2501.11873), summed over tokens.

    Args:
      probability_GSE: float32 router probabilities.
      fraction_E: fraction of assignments by expert over the whole step before this one. With those of the step itself the
        loss would not be a sum over microbatches; a fraction carries no gradient either way.
      valid_GS: True for tokens that are not padding.
    """
    return probability_GSE.shape[-1] * jnp.sum(probability_GSE * fraction_E * valid_GS[..., None])


def z_loss(logits_GSE: jax.Array, valid_GS: jax.Array) -> jax.Array:
    """Squared log-partition of the router logits, summed over valid tokens (Zoph et al. 2022, arXiv 2202.08906, equation 5)."""
    return jnp.sum(jnp.square(jax.nn.logsumexp(logits_GSE, axis=-1)) * valid_GS)


def importance_loss(probability_GSE: jax.Array, valid_GS: jax.Array) -> jax.Array:
    """Squared coefficient of variation of the experts' total probability, summed over groups.

    Shazeer et al. 2017 (arXiv 1701.06538, equation 7), on the whole distribution as Riquelme et al. 2021 (arXiv 2106.05974,
    appendix A): uniform scores 0, all on one expert E - 1, a group of padding 0.
    """
    mean_GE = means(probability_GSE, valid_GS)
    variance_G = jnp.var(mean_GE, axis=-1)
    # The floor's square, which the gradient divides by, must not underflow in float32.
    return jnp.sum(variance_G / jnp.maximum(jnp.square(jnp.mean(mean_GE, axis=-1)), 1e-12))


def entropy(probability: jax.Array) -> jax.Array:
    """Entropy over the last dimension, in nats."""
    return -jnp.sum(probability * jnp.log(probability + 1e-20), axis=-1)


def local_entropy_loss(probability_GSE: jax.Array, valid_GS: jax.Array) -> jax.Array:
    """Entropy of each token's distribution, summed over valid tokens: sure choices (Mustafa et al. 2022, arXiv 2206.02770)."""
    return jnp.sum(entropy(probability_GSE) * valid_GS)


def global_entropy_loss(probability_GSE: jax.Array, valid_GS: jax.Array) -> jax.Array:
    """Minus the entropy of each group's mean distribution, summed over groups: use of all experts (arXiv 2206.02770)."""
    return -jnp.sum(entropy(means(probability_GSE, valid_GS)))
