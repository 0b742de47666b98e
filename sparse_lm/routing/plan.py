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


def plan_of_choices(expert_GSR: jax.Array, weight_GSR: jax.Array, experts: int) -> RoutingPlan:
    """Builds the plan in which each token has the experts of its row; E marks an unused slot of a row, which stays dead.

    Args:
      expert_GSR: int32 experts, different ones in a row.
      weight_GSR: float32 weights; those of unused slots do not matter.
      experts: E.
    """
    groups, tokens, most = expert_GSR.shape
    live_GSR = expert_GSR < experts
    slots_A = jnp.arange(tokens * most, dtype=jnp.int32)
    return RoutingPlan(
        token_GA=jnp.broadcast_to(slots_A // most, (groups, tokens * most)),
        expert_GA=expert_GSR.reshape(groups, -1).astype(jnp.int32),
        weight_GA=jnp.where(live_GSR, weight_GSR, 0.0).reshape(groups, -1),
        slot_GSR=jnp.where(live_GSR, slots_A.reshape(tokens, most), tokens * most),
        dropped=jnp.zeros((), jnp.float32),
        experts=experts,
    )


def compacted(plan: RoutingPlan, rows: int) -> RoutingPlan:
    """Keeps the first `rows` live assignments of each group, in their order, and drops (and counts) the others.

    Routers whose tokens differ in their number of experts would otherwise carry a dead slot for every expert that a token does
    not have. In a plan of `plan_of_choices` the order is that of the tokens, so a token's fate depends on earlier ones alone.
    """
    groups, total = plan.expert_GA.shape
    live_GA = plan.expert_GA < plan.experts
    rank_GA = jnp.cumsum(live_GA, axis=-1, dtype=jnp.int32) - 1
    place_GA = jnp.where(live_GA & (rank_GA < rows), rank_GA, rows)
    group_G1 = jnp.arange(groups)[:, None]
    source_GN = jnp.full((groups, rows), total, jnp.int32)
    numbers_GA = jnp.broadcast_to(jnp.arange(total, dtype=jnp.int32), (groups, total))
    source_GN = source_GN.at[group_G1, place_GA].set(numbers_GA, mode="drop")

    def taken(a_GA: jax.Array, empty: float) -> jax.Array:
        return a_GA.at[group_G1, source_GN].get(mode="fill", fill_value=empty)

    slot_GSR = place_GA.at[group_G1[..., None], plan.slot_GSR].get(mode="fill", fill_value=rows)
    return RoutingPlan(
        token_GA=taken(plan.token_GA, 0),
        expert_GA=taken(plan.expert_GA, plan.experts),
        weight_GA=taken(plan.weight_GA, 0.0),
        slot_GSR=slot_GSR,
        dropped=plan.dropped + jnp.sum(live_GA & (rank_GA >= rows), dtype=jnp.float32),
        experts=plan.experts,
    )


def ranks_in_order(expert_GA: jax.Array, experts: int) -> jax.Array:
    """Returns how many assignments before each one go to the same expert, int32 [G, A]."""

    def one(expert_A: jax.Array) -> jax.Array:
        order_A = jnp.argsort(expert_A, stable=True)
        sorted_A = expert_A[order_A]
        first_E = jnp.searchsorted(sorted_A, jnp.arange(experts + 1))
        rank_A = jnp.arange(expert_A.size, dtype=jnp.int32) - first_E[sorted_A].astype(jnp.int32)
        return jnp.zeros_like(rank_A).at[order_A].set(rank_A, unique_indices=True)

    return jax.vmap(one)(expert_GA)


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
