"""Token choice: every token takes its K best experts (Shazeer et al. 2017, arXiv 1701.06538).

Legend: G routing groups, S tokens of a group, E experts, K experts of a token, A assignments of a group, R choices of a token.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.config import ConfigError
from sparse_lm.routing.plan import ranks_in_order
from sparse_lm.routing.router import Router, RouterInputs, Scores, gathered


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKRouter(Router):
    """Top-k token choice with balance and z losses, optionally balanced by a bias instead of a loss; dropless unless told otherwise."""

    k: int = 2
    """Experts per token."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores."""
    renormalize: bool = True
    """Divide the weights of a token's experts by their sum."""
    scale: float = 1.0
    """Factor on the weights after renormalisation (DeepSeek-V3 uses 2.5)."""
    balance_coefficient: float = 0.01
    """Weight of the balance loss; like every loss here, its sum over layers enters the objective."""
    z_coefficient: float = 1e-3
    """Weight of the router z-loss."""
    bias_rate: float = 0.0
    """Step of the selection bias that balances load without a loss (Wang et al. 2024, arXiv 2408.15664, algorithm 1); 0: no bias."""
    capacity_factor: float | None = None
    """Most tokens of an expert in a group, as a multiple of the even share; what is beyond is dropped and counted. None: no limit."""
    capacity_order: Literal["position", "choice", "score"] = "position"
    """Who comes first where there is a capacity: earlier tokens with all their choices; every token's first choice, then the
    second ones (GShard, Switch); the same in the order of the tokens' best scores (batch-priority routing, Riquelme et al. 2021,
    arXiv 2106.05974, algorithm 2). Only `position` keeps a router with several choices causal."""

    def check(self) -> None:
        """See Config.check."""
        super().check()
        self.require(self.k >= 1, "k", "at least 1")
        self.require(self.scale > 0, "scale", "above 0")
        self.require(self.bias_rate >= 0, "bias_rate", "0 or above")
        self.require(self.capacity_factor is None or self.capacity_factor > 0, "capacity_factor", "None or above 0")
        limited = self.capacity_factor is not None or self.capacity_order == "position"
        self.require(limited, "capacity_order", "position, as long as no capacity_factor is given")

    def check_experts(self, experts: int) -> None:
        """See Router.check_experts."""
        if self.k > experts:
            raise ConfigError("router.k", self.k, f"at most the number of experts, {experts}")

    @property
    def causal(self) -> bool:
        """See Router.causal: a capacity filled in another order than the tokens' lets later tokens displace earlier ones."""
        by_choice = self.capacity_order == "choice" and self.k > 1
        return self.capacity_factor is None or not (by_choice or self.capacity_order == "score")

    def experts_per_token(self, experts: int) -> float:
        """See Router.experts_per_token."""
        return float(self.k)

    def initial_state(self, experts: int) -> dict[str, np.ndarray]:
        """See Router.initial_state."""
        bias = {"bias": np.zeros((experts,), np.float32)} if self.bias_rate else {}
        return {**super().initial_state(experts), **bias}

    def score(self, logits_GSE: jax.Array, inputs: RouterInputs) -> Scores:
        """See Router.score. Sigmoid scores are divided by their sum where losses and metrics need a distribution."""
        if self.scores == "softmax":
            return super().score(logits_GSE, inputs)
        score_GSE = jax.nn.sigmoid(logits_GSE)
        return Scores(logits_GSE, score_GSE, score_GSE / jnp.sum(score_GSE, axis=-1, keepdims=True))

    def choose(self, scores: Scores, inputs: RouterInputs, state: dict[str, jax.Array]) -> jax.Array:
        """Returns the K experts with the largest score plus bias; ties go to the lower expert."""
        return jax.lax.top_k(biased(scores.score_GSE, state), self.k)[1]

    def weigh(self, score_GSE: jax.Array, expert_GSR: jax.Array) -> jax.Array:
        """Returns the scores of the chosen experts (the bias chooses and does not weigh), renormalised and scaled."""
        weight_GSR = gathered(score_GSE, expert_GSR)
        if self.renormalize:
            weight_GSR = weight_GSR / (jnp.sum(weight_GSR, axis=-1, keepdims=True) + 1e-20)
        return weight_GSR * self.scale

    def limit(self, expert_GSR: jax.Array, score_GSR: jax.Array, experts: int) -> jax.Array:
        """See Router.limit."""
        if self.capacity_factor is None:
            return super().limit(expert_GSR, score_GSR, experts)
        capacity = math.ceil(self.capacity_factor * expert_GSR.shape[1] * self.k / experts)
        return within_capacity(expert_GSR, score_GSR, experts, capacity, self.capacity_order)

    def next_state(self, state: dict[str, jax.Array], statistics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Also b_i += rate * sign(mean load - load_i)."""
        new = super().next_state(state, statistics)
        if "bias" in state:
            wanted = statistics["wanted"]
            new["bias"] = state["bias"] + self.bias_rate * jnp.sign(jnp.mean(wanted, axis=-1, keepdims=True) - wanted)
        return new


def biased(score_GSE: jax.Array, state: dict[str, jax.Array]) -> jax.Array:
    """Returns what experts are chosen by: the score plus the selection bias, if there is one."""
    return jax.lax.stop_gradient(score_GSE + state["bias"] if "bias" in state else score_GSE)


def within_capacity(
    expert_GSR: jax.Array,
    score_GSR: jax.Array,
    experts: int,
    capacity: int,
    order: Literal["position", "choice", "score"],
) -> jax.Array:
    """Returns which choices find room when every expert takes `capacity` of each group; see `TopKRouter.capacity_order`."""
    groups, tokens, most = expert_GSR.shape
    if order == "position":
        return (ranks_in_order(expert_GSR.reshape(groups, -1), experts) < capacity).reshape(expert_GSR.shape)
    group_G1 = jnp.arange(groups)[:, None]
    by_G_S = jnp.broadcast_to(jnp.arange(tokens), (groups, tokens))
    if order == "score":
        by_G_S = jnp.argsort(-jnp.max(score_GSR, axis=-1), axis=-1, stable=True)
    ordered_GRS = jnp.swapaxes(expert_GSR[group_G1, by_G_S], 1, 2)
    room_GRS = (ranks_in_order(ordered_GRS.reshape(groups, -1), experts) < capacity).reshape(groups, most, tokens)
    return jnp.zeros(expert_GSR.shape, bool).at[group_G1, by_G_S].set(jnp.swapaxes(room_GRS, 1, 2))
