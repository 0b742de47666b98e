"""A routing plan is data: which token goes to which expert with which weight, and it renders to a dense mask.

Legend: G routing groups, S tokens of a group, E experts, A assignments of a group, R most assignments of one token.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingPlan:
    """Assignments of tokens to experts, per routing group.

    Attributes:
      token_GA: int32, token of each assignment, an index into S.
      expert_GA: int32, its expert; E marks a dead slot (padding or dropped), which computes nothing.
      weight_GA: float32, its weight in the combined output; 0 in dead slots.
      slot_GSR: int32, the inverse: the assignments of each token, A where a token has fewer than R.
      dropped: float32 scalar, assignments that were wanted and dropped.
      experts: static number of experts E.
    """

    token_GA: jax.Array
    expert_GA: jax.Array
    weight_GA: jax.Array
    slot_GSR: jax.Array
    dropped: jax.Array
    experts: int = dataclasses.field(metadata={"static": True})


def token_choice_plan(expert_GSK: jax.Array, weight_GSK: jax.Array, valid_GS: jax.Array, experts: int) -> RoutingPlan:
    """Builds the plan of a router in which every valid token has exactly K experts."""
    groups, tokens, k = expert_GSK.shape
    valid_GSK = jnp.broadcast_to(valid_GS[..., None], expert_GSK.shape)
    slots_A = jnp.arange(tokens * k, dtype=jnp.int32)
    return RoutingPlan(
        token_GA=jnp.broadcast_to(slots_A // k, (groups, tokens * k)),
        expert_GA=jnp.where(valid_GSK, expert_GSK, experts).reshape(groups, -1).astype(jnp.int32),
        weight_GA=jnp.where(valid_GSK, weight_GSK, 0.0).reshape(groups, -1),
        slot_GSR=jnp.broadcast_to(slots_A.reshape(tokens, k), (groups, tokens, k)),
        dropped=jnp.zeros((), jnp.float32),
        experts=experts,
    )


def dense_mask(plan: RoutingPlan) -> jax.Array:
    """Renders the plan as weights [G, S, E]: dense computation under this mask is what every executor must equal."""
    groups, tokens = plan.slot_GSR.shape[:2]
    group_G1 = jnp.arange(groups)[:, None]
    mask = jnp.zeros((groups, tokens, plan.experts), jnp.float32)
    return mask.at[group_G1, plan.token_GA, plan.expert_GA].add(plan.weight_GA, mode="drop")


def counts(plan: RoutingPlan) -> jax.Array:
    """Returns the live assignments of each expert over all groups, float32 [E]."""
    live_GAE = plan.expert_GA[..., None] == jnp.arange(plan.experts)
    return jnp.sum(live_GAE, axis=(0, 1), dtype=jnp.float32)


def density(plan: RoutingPlan) -> jax.Array:
    """Returns the fraction of token-expert pairs that the plan computes."""
    groups, tokens = plan.slot_GSR.shape[:2]
    return jnp.sum(counts(plan)) / (groups * tokens * plan.experts)


def cost(plan: RoutingPlan, operations_per_row: float) -> jax.Array:
    """Returns the forward floating-point operations of the experts under this plan."""
    return jnp.sum(counts(plan)) * operations_per_row


def picture(plan: RoutingPlan) -> np.ndarray:
    """Returns the mask of the first group as an image [E, S] of weights, for the report."""
    return np.asarray(dense_mask(plan)[0]).T
