"""Token choice: every token takes its K best experts (Shazeer et al. 2017, arXiv 1701.06538), dropless.

Legend: G routing groups, S tokens of a group, E experts, K experts of a token.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sparse_lm.config import ConfigError
from sparse_lm.routing import losses
from sparse_lm.routing.plan import counts, token_choice_plan
from sparse_lm.routing.router import Router, RouterInputs, Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKRouter(Router):
    """Top-k token choice with balance and z losses, optionally balanced by a bias instead of a loss."""

    k: int = 2
    """Experts per token."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores."""
    renormalize: bool = True
    """Divide the weights of a token's experts by their sum."""
    scale: float = 1.0
    """Factor on the weights after renormalisation (DeepSeek-V3 uses 2.5)."""
    balance_coefficient: float = 0.01
    """Weight of the Switch balance loss; a sum over layers enters the objective."""
    z_coefficient: float = 1e-3
    """Weight of the router z-loss; a sum over layers enters the objective."""
    bias_rate: float = 0.0
    """Step of the selection bias that balances load without a loss (Wang et al. 2024, arXiv 2408.15664, algorithm 1); 0: no bias."""

    def check(self) -> None:
        """See Config.check."""
        self.require(self.k >= 1, "k", "at least 1")
        self.require(self.scale > 0, "scale", "above 0")
        for name in ("balance_coefficient", "z_coefficient", "bias_rate"):
            self.require(getattr(self, name) >= 0, name, "0 or above")

    def check_experts(self, experts: int) -> None:
        """See Router.check_experts."""
        if self.k > experts:
            raise ConfigError("router.k", self.k, f"at most the number of experts, {experts}")

    def experts_per_token(self, experts: int) -> float:
        """See Router.experts_per_token."""
        return float(self.k)

    def initial_state(self, experts: int) -> dict[str, jax.Array]:
        """See Router.initial_state."""
        return {"bias": jnp.zeros((experts,), jnp.float32)} if self.bias_rate else {}

    def plan(self, logits_GSE: jax.Array, inputs: RouterInputs, state: dict[str, jax.Array]) -> Routing:
        """See Router.plan. Experts are chosen by score plus bias and weighted by score alone; ties go to the lower expert."""
        experts = logits_GSE.shape[-1]
        softmax = self.scores == "softmax"
        score_GSE = jax.nn.softmax(logits_GSE, axis=-1) if softmax else jax.nn.sigmoid(logits_GSE)
        choice_GSE = jax.lax.stop_gradient(score_GSE + state["bias"] if "bias" in state else score_GSE)
        expert_GSK = checkpoint_name(jax.lax.top_k(choice_GSE, self.k)[1], "router_plan")
        weight_GSK = jnp.take_along_axis(score_GSE, expert_GSK, axis=-1)
        if self.renormalize:
            weight_GSK = weight_GSK / (jnp.sum(weight_GSK, axis=-1, keepdims=True) + 1e-20)
        plan = token_choice_plan(expert_GSK, weight_GSK * self.scale, inputs.valid_GS, experts)

        probability_GSE = score_GSE if softmax else score_GSE / jnp.sum(score_GSE, axis=-1, keepdims=True)
        balance = losses.balance_loss(probability_GSE, plan, inputs.valid_GS)
        z = losses.z_loss(logits_GSE, inputs.valid_GS)
        tokens = jnp.sum(inputs.valid_GS, dtype=jnp.float32)
        groups = jnp.sum(jnp.any(inputs.valid_GS, axis=-1), dtype=jnp.float32)
        entropy_GS = -jnp.sum(probability_GSE * jnp.log(probability_GSE + 1e-20), axis=-1)
        counts_E = counts(plan)
        assignments = jnp.sum(counts_E)
        metrics = {
            "load": (counts_E, assignments),
            "balance_loss": (balance, groups),
            "z_loss": (z, tokens),
            "entropy": (jnp.sum(entropy_GS * inputs.valid_GS), tokens),
            "top_probability": (jnp.sum(jnp.max(probability_GSE, axis=-1) * inputs.valid_GS), tokens),
            "dropped": (plan.dropped, assignments + plan.dropped),
        }
        objective = {"tokens": self.z_coefficient * z, "groups": self.balance_coefficient * balance}
        return Routing(plan, objective, jax.lax.stop_gradient(metrics))

    def advance(self, state: dict[str, jax.Array], counts_E: jax.Array) -> dict[str, jax.Array]:
        """b_i += rate * sign(mean load - load_i)."""
        if "bias" not in state:
            return state
        mean = jnp.mean(counts_E, axis=-1, keepdims=True)
        return {"bias": state["bias"] + self.bias_rate * jnp.sign(mean - counts_E)}
