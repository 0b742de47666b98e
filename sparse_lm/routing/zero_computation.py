"""Experts that compute nothing or nearly so: a token that chooses them leaves an expert's work undone.

Legend: G routing groups, S tokens of a group, B batch, L length, D model, E experts that compute, Z that do not, N constant ones, R
most experts of a token.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm.config import Config
from sparse_lm.layers.parameter import declare
from sparse_lm.routing.plan import RoutingPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroComputation(Config):
    """Zero-computation experts (MoE++, Jin et al. 2024, arXiv 2410.07348, section 3.1; identity ones alone as in LongCat-Flash)."""

    identity: int = 0
    """Experts that return their input."""
    zero: int = 0
    """Experts that return zero."""
    constant: int = 0
    """Experts that return a mixture of their input and a learnt vector."""

    def check(self) -> None:
        """See Config.check."""
        for name in ("identity", "zero", "constant"):
            self.require(getattr(self, name) >= 0, name, "0 or above")

    @property
    def experts(self) -> int:
        """How many there are, Z. The router knows them in the order identity, zero, constant, after the experts that compute."""
        return self.identity + self.zero + self.constant

    def parameters(self, d_model: int) -> int:
        """Returns the parameters of the constant experts: two columns that mix and a vector each."""
        return 3 * d_model * self.constant


def without_zero_computation(plan: RoutingPlan, experts: int) -> tuple[RoutingPlan, jax.Array]:
    """Splits a plan: what the first `experts` experts compute, and the weights of the others, [G, S, Z]."""
    total = plan.token_GA.shape[1]
    group_G11 = jnp.arange(plan.slot_GSR.shape[0])[:, None, None]
    expert_GSR = plan.expert_GA.at[group_G11, plan.slot_GSR].get(mode="fill", fill_value=plan.experts)
    weight_GSR = plan.weight_GA.at[group_G11, plan.slot_GSR].get(mode="fill", fill_value=0.0)
    is_GSRZ = expert_GSR[..., None] == jnp.arange(experts, plan.experts)
    computes_GA, computes_GSR = plan.expert_GA < experts, expert_GSR < experts
    kept = dataclasses.replace(
        plan,
        expert_GA=jnp.where(computes_GA, plan.expert_GA, experts),
        weight_GA=jnp.where(computes_GA, plan.weight_GA, 0.0),
        slot_GSR=jnp.where(computes_GSR, plan.slot_GSR, total),
        experts=experts,
    )
    return kept, jnp.sum(weight_GSR[..., None] * is_GSRZ, axis=2)


class ZeroComputationLayer(nnx.Module):
    """What the zero-computation experts add."""

    def __init__(self, config: ZeroComputation, d_model: int):
        self.config = config
        self.mixture = declare((d_model, 2 * config.constant), ("embed", "routes")) if config.constant else None
        self.constant = declare((config.constant, d_model), ("routes", "embed"), "zeros") if config.constant else None

    def __call__(self, x_BLD: jax.Array, weight_BLZ: jax.Array) -> jax.Array:
        """Returns the weighted sum of their outputs, [B, L, D] in x's dtype."""
        config = self.config
        x32_BLD = x_BLD.astype(jnp.float32)
        y_BLD = x32_BLD * jnp.sum(weight_BLZ[..., : config.identity], axis=-1, keepdims=True)
        if self.mixture is not None and self.constant is not None:
            logits_BLN2 = (x32_BLD @ self.mixture[...]).reshape(*x_BLD.shape[:2], config.constant, 2)
            share_BLN2 = (
                jax.nn.softmax(logits_BLN2, axis=-1) * weight_BLZ[..., config.experts - config.constant :, None]
            )
            y_BLD = y_BLD + x32_BLD * jnp.sum(share_BLN2[..., 0], axis=-1, keepdims=True)
            y_BLD = y_BLD + share_BLN2[..., 1] @ self.constant[...]
        return y_BLD.astype(x_BLD.dtype)
