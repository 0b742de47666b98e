"""Routers whose tokens differ in their number of experts: expert choice, expert threshold, ReMoE.

Legend: G routing groups, S tokens of a group, E experts, C tokens of an expert, R most experts of a token, N edges of a histogram.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.config import ConfigError
from sparse_lm.routing.losses import means
from sparse_lm.routing.router import Router, RouterInputs, Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariableRouter(Router):
    """Base: K experts a token on average, from none to `most_experts`."""

    k: float = 2.0
    """Mean experts per token; with one expert (a routed block) the fraction of the tokens that it takes."""
    most_experts: int | None = None
    """Most experts of a token, those of its best scores; None: all. Time and memory of the combination grow with it."""
    rows_per_token: float | None = None
    """Rows that the experts compute at most, per token of a group; choices beyond, of the last tokens, are dropped and counted.
    None: room for `most_experts` of every token."""

    def check(self) -> None:
        """See Config.check."""
        super().check()
        self.require(self.k > 0, "k", "above 0")
        self.require(self.most_experts is None or self.most_experts >= 1, "most_experts", "None or at least 1")
        self.require(self.rows_per_token is None or self.rows_per_token > 0, "rows_per_token", "None or above 0")

    def check_experts(self, experts: int) -> None:
        """See Router.check_experts."""
        if self.k > experts:
            raise ConfigError("router.k", self.k, f"at most the number of experts, {experts}")
        if self.most_experts is not None and not self.k <= self.most_experts <= experts:
            raise ConfigError("router.most_experts", self.most_experts, f"None, or k ({self.k:g}) to {experts}")

    def experts_per_token(self, experts: int) -> float:
        """See Router.experts_per_token."""
        return self.k

    def rows(self, tokens: int, experts: int) -> int | None:
        """See Router.rows."""
        return None if self.rows_per_token is None else math.ceil(self.rows_per_token * tokens)

    def best(self, wanted_GSE: jax.Array, score_GSE: jax.Array) -> jax.Array:
        """Returns the wanted experts of each token, at most `most_experts` of the best scores, E in unused slots."""
        experts = wanted_GSE.shape[-1]
        if self.most_experts is None or self.most_experts >= experts:
            return jnp.where(wanted_GSE, jnp.arange(experts, dtype=jnp.int32), experts)
        value_GSR, expert_GSR = jax.lax.top_k(jnp.where(wanted_GSE, score_GSE, -jnp.inf), self.most_experts)
        return jnp.where(jnp.isfinite(value_GSR), expert_GSR, experts)


def sigmoid_scores(logits_GSE: jax.Array) -> Scores:
    """Returns independent scores of the experts."""
    score_GSE = jax.nn.sigmoid(logits_GSE)
    return Scores(logits_GSE, score_GSE, score_GSE / jnp.sum(score_GSE, axis=-1, keepdims=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertChoiceRouter(VariableRouter):
    """Every expert takes its best tokens of each routing group (Zhou et al. 2022, arXiv 2202.09368): balanced by construction.

    Not causal: whether an expert takes a token depends on later tokens of the group, so the training loss of a causal language model
    sees the future, and a model generates otherwise than it was trained. For encoders and comparisons; `expert_threshold` is the
    causal form.
    """

    scores: Literal["softmax", "sigmoid"] = "softmax"
    """Softmax over experts, as in the paper, or independent scores, which a single expert needs."""

    @property
    def causal(self) -> bool:
        """See Router.causal."""
        return False

    def rows(self, tokens: int, experts: int) -> int:
        """See Router.rows: the experts are full, unless `rows_per_token` says less."""
        full = experts * min(tokens, math.ceil(self.k * tokens / experts))
        limit = super().rows(tokens, experts)
        return full if limit is None else min(full, limit)

    def check_experts(self, experts: int) -> None:
        """See Router.check_experts."""
        super().check_experts(experts)
        if experts == 1 and self.scores == "softmax":
            raise ConfigError("router.scores", self.scores, "sigmoid: the softmax of one expert is always 1")

    def score(self, logits_GSE: jax.Array, inputs: RouterInputs) -> Scores:
        """See Router.score."""
        return super().score(logits_GSE, inputs) if self.scores == "softmax" else sigmoid_scores(logits_GSE)

    def choose(self, scores: Scores, inputs: RouterInputs, state: dict[str, jax.Array]) -> jax.Array:
        """Each expert takes ceil(K * valid tokens / E) tokens of each group, ties by the lower token."""
        _, tokens, experts = scores.score_GSE.shape
        most = min(tokens, math.ceil(self.k * tokens / experts))
        valid_G = jnp.sum(inputs.valid_GS, axis=-1, dtype=jnp.float32)
        room_G = jnp.ceil(self.k * valid_G / experts)
        by_GES = jnp.swapaxes(jnp.where(inputs.valid_GS[..., None], scores.score_GSE, -jnp.inf), 1, 2)
        value_GEC, token_GEC = jax.lax.top_k(by_GES, most)
        taken_GEC = jnp.isfinite(value_GEC) & (jnp.arange(most) < room_G[:, None, None])
        group_G11, expert_E1 = jnp.arange(by_GES.shape[0])[:, None, None], jnp.arange(experts)[:, None]
        wanted_GSE = jnp.zeros(scores.score_GSE.shape, bool).at[group_G11, token_GEC, expert_E1].set(taken_GEC)
        return self.best(wanted_GSE, scores.score_GSE)


EDGES = tuple(math.sinh(4.8 * i / 64) for i in range(-64, 65))
"""Logits at which tokens above are counted: close together around 0 (0.075 apart), up to 61 away from it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertThresholdRouter(VariableRouter):
    """A token goes to every expert for which its logit passes the expert's threshold (Expert Threshold, 2026, arXiv 2603.11535).

    Each threshold follows the K / E quantile of the expert's logits over whole steps, so loads are even without a loss, and a token's
    route depends on the token alone: the causal form of expert choice. The quantile of a step is read from counts of tokens above
    fixed edges, which add over microbatches and shards, where quantiles do not.
    """

    decay: float = 0.99
    """Decay of the moving average of the quantile; the first updates average over fewer steps."""

    def check(self) -> None:
        """See Config.check."""
        super().check()
        self.require(0 <= self.decay < 1, "decay", "0 to below 1")

    def initial_state(self, experts: int) -> dict[str, np.ndarray]:
        """See Router.initial_state. At threshold 0 the first step sends tokens to half of the experts."""
        state = {"threshold": np.zeros((experts,), np.float32), "updates": np.zeros((), np.float32)}
        return {**super().initial_state(experts), **state}

    def score(self, logits_GSE: jax.Array, inputs: RouterInputs) -> Scores:
        """See Router.score."""
        return sigmoid_scores(logits_GSE)

    def choose(self, scores: Scores, inputs: RouterInputs, state: dict[str, jax.Array]) -> jax.Array:
        """See Router.choose."""
        return self.best(scores.logits_GSE > state["threshold"], scores.score_GSE)

    def own_statistics(self, scores: Scores, inputs: RouterInputs) -> dict[str, jax.Array]:
        """Counts the valid tokens above each edge, [E, N]."""
        above_GSEN = scores.logits_GSE[..., None] > jnp.asarray(EDGES, jnp.float32)
        above_GSEN = above_GSEN & inputs.valid_GS[..., None, None]
        return {"above": jnp.sum(above_GSEN, axis=(0, 1), dtype=jnp.float32)}

    def next_state(self, state: dict[str, jax.Array], statistics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Moves each threshold towards the quantile of this step."""
        new = super().next_state(state, statistics)
        above, tokens = statistics["above"], statistics["tokens"][..., None]
        experts = above.shape[-2]
        quantile = quantile_of_counts(above, self.k / experts * tokens)
        rate = jnp.maximum(1.0 - self.decay, 1.0 / (state["updates"] + 1.0))[..., None]
        moved = state["threshold"] + rate * (quantile - state["threshold"])
        new["threshold"] = jnp.where(tokens > 0, moved, state["threshold"])
        new["updates"] = state["updates"] + (statistics["tokens"] > 0)
        return new


def quantile_of_counts(above: jax.Array, wanted: jax.Array) -> jax.Array:
    """Returns the logit above which `wanted` tokens lie, linear between edges.

    Args:
      above: tokens above each edge, [..., E, N], falling along N.
      wanted: tokens wanted, broadcastable to [..., E].

    Returns:
      [..., E], at most the outermost edges.
    """
    edges = jnp.asarray(EDGES, jnp.float32)
    wanted = jnp.broadcast_to(wanted, above.shape[:-1])[..., None]
    right = jnp.clip(jnp.sum(above > wanted, axis=-1, keepdims=True), 1, len(EDGES) - 1)
    high, low = (jnp.take_along_axis(above, i, axis=-1) for i in (right - 1, right))
    share = jnp.clip((high - wanted) / jnp.maximum(high - low, 1.0), 0.0, 1.0)
    return (edges[right - 1] + share * (edges[right] - edges[right - 1]))[..., 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReMoERouter(VariableRouter):
    """ReLU routing with adaptive L1 regularisation (ReMoE, Wang et al. 2024, arXiv 2412.14711): routing without a discrete choice.

    A token goes to every expert with a positive logit, weighted by it. The L1 coefficient grows by a factor while tokens have more
    than K experts and shrinks while they have fewer; it starts so small that the first steps are nearly dense. The coefficient is
    each layer's own (the paper has one for all), as is everything a router learns here.
    """

    first_coefficient: float = 1e-8
    """L1 coefficient of the first step."""
    factor: float = 1.2
    """By what the coefficient is multiplied or divided in a step."""

    def check(self) -> None:
        """See Config.check."""
        super().check()
        self.require(self.first_coefficient > 0, "first_coefficient", "above 0")
        self.require(self.factor > 1, "factor", "above 1")

    def initial_state(self, experts: int) -> dict[str, np.ndarray]:
        """See Router.initial_state."""
        return {**super().initial_state(experts), "l1": np.asarray(self.first_coefficient, np.float32)}

    def score(self, logits_GSE: jax.Array, inputs: RouterInputs) -> Scores:
        """See Router.score."""
        score_GSE = jax.nn.relu(logits_GSE)
        return Scores(logits_GSE, score_GSE, score_GSE / (jnp.sum(score_GSE, axis=-1, keepdims=True) + 1e-9))

    def choose(self, scores: Scores, inputs: RouterInputs, state: dict[str, jax.Array]) -> jax.Array:
        """See Router.choose."""
        return self.best(scores.score_GSE > 0, scores.score_GSE)

    def own_objective(
        self, scores: Scores, chosen_GSE: jax.Array, valid_GS: jax.Array, state: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """The L1 norm, experts with more tokens weighing more (equation 9 of the paper, fractions by routing group)."""
        experts = chosen_GSE.shape[-1]
        fraction_GE = experts / self.k * means(chosen_GSE, valid_GS)
        norm = jnp.sum(fraction_GE * means(scores.score_GSE, valid_GS))
        return {"groups": state["l1"] * norm}

    def next_state(self, state: dict[str, jax.Array], statistics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """See the class."""
        new = super().next_state(state, statistics)
        tokens = statistics["tokens"]
        excess = jnp.sum(statistics["wanted"], axis=-1) - self.k * tokens
        new["l1"] = state["l1"] * jnp.power(self.factor, jnp.sign(excess))
        return new
