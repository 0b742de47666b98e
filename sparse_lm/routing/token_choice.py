"""Members of the token-choice family: what each adds to `TopKRouter` is one function.

Legend: G routing groups, S tokens of a group, D model, E experts, K experts of a token, N groups of experts.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from sparse_lm.config import ConfigError
from sparse_lm.routing.router import RouterInputs, Scores, gathered
from sparse_lm.routing.top_k import TopKRouter, biased


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwitchRouter(TopKRouter):
    """One expert a token, weighted by its probability, with jitter on what the router sees (Fedus et al. 2021, arXiv 2101.03961)."""

    k: int = 1
    """Experts per token."""
    renormalize: bool = False
    """Divide the weights of a token's experts by their sum; with one expert that would cut the router off from its gradient."""
    jitter: float = 0.01
    """In training the router sees its inputs times uniform numbers from 1 - jitter to 1 + jitter; 0: as they are."""

    def check(self) -> None:
        """See Config.check."""
        super().check()
        self.require(0 <= self.jitter < 1, "jitter", "0 to below 1")

    def observe(self, x_GSD: jax.Array, key: jax.Array | None) -> jax.Array:
        """See Router.observe."""
        if key is None or not self.jitter:
            return x_GSD
        return x_GSD.astype(jnp.float32) * jax.random.uniform(
            key, x_GSD.shape, minval=1 - self.jitter, maxval=1 + self.jitter
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyTopKRouter(TopKRouter):
    """Top-k of logits with learnt normal noise, balanced by the importance loss (Shazeer et al. 2017, arXiv 1701.06538, equations 3 to 5)."""

    columns: ClassVar[int] = 2

    balance_coefficient: float = 0.0
    """Weight of the balance loss."""
    importance_coefficient: float = 0.1
    """Weight of the importance loss."""

    def score(self, logits_GSE: jax.Array, inputs: RouterInputs) -> Scores:
        """Adds noise whose deviation is the softplus of the second half of the logits; none in evaluation."""
        clean_GSE, deviation_GSE = jnp.split(logits_GSE, 2, axis=-1)
        if inputs.key is None:
            return super().score(clean_GSE, inputs)
        noise_GSE = jax.random.normal(inputs.key, clean_GSE.shape)
        return super().score(clean_GSE + noise_GSE * jax.nn.softplus(deviation_GSE), inputs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GShardRouter(TopKRouter):
    """Top-2 whose second choice is sampled (Lepikhin et al. 2020, arXiv 2006.16668, algorithm 1).

    The first choice is always taken, a later one with probability min(1, K * its renormalised weight): choices of little weight are
    mostly saved. Weights are those of all K choices, sampled or not. In evaluation all K are taken.
    """

    def check(self) -> None:
        """See Config.check."""
        super().check()
        self.require(self.k >= 2, "k", "at least 2: the choices after the first are sampled")
        self.require(self.renormalize, "renormalize", "True: choices are sampled by their renormalised weight")

    def choose(self, scores: Scores, inputs: RouterInputs, state: dict[str, jax.Array]) -> jax.Array:
        """See Router.choose."""
        expert_GSK = super().choose(scores, inputs, state)
        if inputs.key is None:
            return expert_GSK
        weight_GSK = gathered(scores.score_GSE, expert_GSK)
        share_GSK = weight_GSK / (jnp.sum(weight_GSK, axis=-1, keepdims=True) + 1e-20)
        sampled_GSK = jax.random.uniform(inputs.key, share_GSK.shape) < self.k * share_GSK
        taken_GSK = sampled_GSK | (jnp.arange(self.k) == 0)
        return jnp.where(taken_GSK, expert_GSK, scores.score_GSE.shape[-1])

    def weigh(self, score_GSE: jax.Array, expert_GSR: jax.Array) -> jax.Array:
        """See Router.weigh."""
        best_GSK = jax.lax.top_k(score_GSE, self.k)[0]
        return gathered(score_GSE, expert_GSR) / (jnp.sum(best_GSK, axis=-1, keepdims=True) + 1e-20) * self.scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchPriorityRouter(TopKRouter):
    """Top-k under a capacity that is filled with the surest tokens first (Riquelme et al. 2021, arXiv 2106.05974, algorithm 2).

    Not causal: a later token that is surer takes an earlier one's place.
    """

    capacity_factor: float | None = 1.0
    """Most tokens of an expert in a group, as a multiple of the even share; what is beyond is dropped and counted."""
    capacity_order: Literal["position", "choice", "score"] = "score"
    """Who comes first: the tokens' best scores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiasBalancedRouter(TopKRouter):
    """Sigmoid top-k balanced by a selection bias and no loss (Wang et al. 2024, arXiv 2408.15664)."""

    scores: Literal["softmax", "sigmoid"] = "sigmoid"
    """How logits become scores."""
    balance_coefficient: float = 0.0
    """Weight of the balance loss."""
    bias_rate: float = 1e-3
    """Step of the selection bias."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupLimitedRouter(TopKRouter):
    """Top-k among the experts of a few groups, which stand for devices (DeepSeek-V3, arXiv 2412.19437, section 2.1.2; V2: 2405.04434).

    The defaults are V3's: sigmoid scores, renormalised and scaled, a selection bias and a small loss by sequence. V2 is
    scores = softmax, group_score = best, bias_rate = 0, scale = 1.
    """

    scores: Literal["softmax", "sigmoid"] = "sigmoid"
    """How logits become scores."""
    scale: float = 2.5
    """Factor on the weights after renormalisation."""
    balance_coefficient: float = 1e-4
    """Weight of the balance loss."""
    balance_over: Literal["group", "sequence", "step"] = "sequence"
    """What the balance loss wants balanced."""
    bias_rate: float = 1e-3
    """Step of the selection bias."""
    expert_groups: int = 2
    """Groups N of E / N experts that follow each other."""
    groups_kept: int = 1
    """Groups that a token may choose its experts from."""
    group_score: Literal["best", "best_two"] = "best_two"
    """What groups are chosen by: the best score in them (V2) or the sum of the best two (V3)."""

    def check(self) -> None:
        """See Config.check."""
        super().check()
        self.require(self.expert_groups >= 1, "expert_groups", "at least 1")
        self.require(
            1 <= self.groups_kept <= self.expert_groups, "groups_kept", f"1 to expert_groups ({self.expert_groups})"
        )

    def check_experts(self, experts: int) -> None:
        """See Router.check_experts."""
        if experts % self.expert_groups:
            raise ConfigError(
                "router.expert_groups", self.expert_groups, f"a divisor of the number of experts, {experts}"
            )
        within = experts // self.expert_groups
        if self.group_score == "best_two" and within < 2:
            raise ConfigError("router.group_score", self.group_score, "best, because a group has one expert only")
        if self.k > self.groups_kept * within:
            allowed = f"at most the experts of the groups kept, {self.groups_kept * within}"
            raise ConfigError("router.k", self.k, allowed)

    def choose(self, scores: Scores, inputs: RouterInputs, state: dict[str, jax.Array]) -> jax.Array:
        """See Router.choose."""
        by_GSE = biased(scores.score_GSE, state)
        by_GSNM = by_GSE.reshape(*by_GSE.shape[:2], self.expert_groups, -1)
        best_GSN = jnp.sum(jax.lax.top_k(by_GSNM, 1 if self.group_score == "best" else 2)[0], axis=-1)
        group_GSJ = jax.lax.top_k(best_GSN, self.groups_kept)[1]
        kept_GSN = jnp.any(group_GSJ[..., None] == jnp.arange(self.expert_groups), axis=-2)
        among_GSE = jnp.where(kept_GSN[..., None], by_GSNM, -jnp.inf).reshape(by_GSE.shape)
        return jax.lax.top_k(among_GSE, self.k)[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SinkhornRouter(TopKRouter):
    """Balanced assignment by Sinkhorn's iteration in training, greedy in evaluation, weighted by a sigmoid.

    The relaxed form of BASE's linear assignment (Lewis et al. 2021, arXiv 2103.16716), as S-BASE of Clark et al. 2022 (arXiv
    2202.01169, appendix B). Not causal in training: what a token gets depends on every token of its routing group.
    """

    k: int = 1
    """Experts per token."""
    scores: Literal["softmax", "sigmoid"] = "sigmoid"
    """How logits become scores."""
    renormalize: bool = False
    """Divide the weights of a token's experts by their sum."""
    balance_coefficient: float = 0.0
    """Weight of the balance loss."""
    iterations: int = 8
    """Rounds of the iteration."""

    def check(self) -> None:
        """See Config.check."""
        super().check()
        self.require(self.iterations >= 1, "iterations", "at least 1")

    @property
    def causal(self) -> bool:
        """See Router.causal."""
        return False

    def choose(self, scores: Scores, inputs: RouterInputs, state: dict[str, jax.Array]) -> jax.Array:
        """See Router.choose."""
        offset_G1E = (
            sinkhorn_offsets(scores.logits_GSE, inputs.valid_GS, self.iterations) if inputs.key is not None else 0.0
        )
        return jax.lax.top_k(scores.logits_GSE + offset_G1E, self.k)[1]


def sinkhorn_offsets(logits_GSE: jax.Array, valid_GS: jax.Array, iterations: int) -> jax.Array:
    """Returns what Sinkhorn's iteration adds to each expert's logits, [G, 1, E], so that valid tokens spread evenly.

    The transport plan is exp(logits + row offset + column offset) with one token in each row and T / E of them in each column. The
    row offset moves all experts of a token alike, so the column offset alone decides the choice.
    """
    experts = logits_GSE.shape[-1]
    tokens_G11 = jnp.maximum(jnp.sum(valid_GS, axis=-1, dtype=jnp.float32), 1.0)[:, None, None]
    column_G1E = jnp.zeros((logits_GSE.shape[0], 1, experts), jnp.float32)
    for _ in range(iterations):
        row_GS1 = -jax.nn.logsumexp(logits_GSE + column_G1E, axis=-1, keepdims=True)
        mass_G1E = jax.nn.logsumexp(logits_GSE + row_GS1, axis=1, keepdims=True, where=valid_GS[..., None])
        column_G1E = jnp.where(jnp.isfinite(mass_G1E), jnp.log(tokens_G11 / experts) - mass_G1E, 0.0)
    return column_G1E


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformRouter(TopKRouter):
    """Forced balance for benchmarks: experts in turn whatever the scores say; weights and cost are those of top-k."""

    balance_coefficient: float = 0.0
    """Weight of the balance loss."""
    z_coefficient: float = 0.0
    """Weight of the router z-loss."""

    def choose(self, scores: Scores, inputs: RouterInputs, state: dict[str, jax.Array]) -> jax.Array:
        """See Router.choose."""
        groups, tokens, experts = scores.score_GSE.shape
        numbers = jnp.arange(groups * tokens * self.k, dtype=jnp.int32).reshape(groups, tokens, self.k)
        return numbers % experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomRouter(TopKRouter):
    """Random experts for benchmarks and as the baseline a router must beat; in evaluation the same ones every time."""

    balance_coefficient: float = 0.0
    """Weight of the balance loss."""
    z_coefficient: float = 0.0
    """Weight of the router z-loss."""

    def choose(self, scores: Scores, inputs: RouterInputs, state: dict[str, jax.Array]) -> jax.Array:
        """See Router.choose."""
        key = jax.random.key(0) if inputs.key is None else inputs.key
        return jax.lax.top_k(jax.random.uniform(key, scores.score_GSE.shape), self.k)[1]
