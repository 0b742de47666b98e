"""The router door: a thin module makes float32 logits, pure functions make the plan.

A router is three pure functions: `score` every expert, `choose` experts for each token (integers), `weigh` what was chosen. The rest is the same for all of them and is here: padding, capacity, the plan, losses, metrics, replay.

Legend: G routing groups, S tokens of a group, D model, E experts, R most experts of a token.
"""

import dataclasses
import functools
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from sparse_lm.config import Config
from sparse_lm.layers.parameter import ModelState, declare
from sparse_lm.routing import losses
from sparse_lm.routing.logits import router_logits
from sparse_lm.routing.measure import chosen_mask, measure
from sparse_lm.routing.plan import RoutingPlan, compacted, plan_of_choices


class RouterInputs(NamedTuple):
    """What a router may know of its tokens besides their logits.

    Attributes:
      tokens_GS: token ids.
      valid_GS: False for padding.
      segments_GS: document number of each token.
      key: random key of this layer, step and microbatch; None in evaluation, where routers are deterministic.
      sequences: static number of sequences in a group.
      replay_GSR: int32 experts of an earlier run to use instead of choosing, E where there is none; None: choose.
    """

    tokens_GS: jax.Array
    valid_GS: jax.Array
    segments_GS: jax.Array
    key: jax.Array | None
    sequences: int = 1
    replay_GSR: jax.Array | None = None


class Scores(NamedTuple):
    """What a router thinks of every expert for every token.

    Attributes:
      logits_GSE: float32 logits, after noise.
      score_GSE: what weights are made of.
      probability_GSE: a distribution over experts, for losses and metrics.
    """

    logits_GSE: jax.Array
    score_GSE: jax.Array
    probability_GSE: jax.Array


class Routing(NamedTuple):
    """A plan with what the router has to say about it.

    Attributes:
      plan: the routing plan.
      objective: {"tokens": sum, "groups": sum} of weighted auxiliary losses.
      metrics: {name: (sum, count)}.
      statistics: {name: sum over tokens}, what `Router.advance` turns into the next state.
      expert_GSR: int32, the experts of each token as executed, E where there is none: what a replay needs.
    """

    plan: RoutingPlan
    objective: dict[str, jax.Array]
    metrics: dict[str, Any]
    statistics: dict[str, jax.Array]
    expert_GSR: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router(Config):
    """Base of the router components."""

    columns: ClassVar[int] = 1
    """Columns of the router's weight for each expert; 0: the router has no weight and its logits are zeros."""

    balance_coefficient: float = 0.0
    """Weight of the balance loss; like every loss here, its sum over layers enters the objective."""
    balance_over: Literal["group", "sequence", "step"] = "group"
    """What the balance loss wants balanced: each routing group, each sequence, or the step as a whole (the global form)."""
    z_coefficient: float = 0.0
    """Weight of the router z-loss."""
    importance_coefficient: float = 0.0
    """Weight of the importance loss."""
    local_entropy_coefficient: float = 0.0
    """Weight of the entropy of each token's distribution, which falls as choices become sure."""
    global_entropy_coefficient: float = 0.0
    """Weight of minus the entropy of each group's mean distribution, which falls as all experts are used."""
    frozen: bool = False
    """Keep the router as it is: no gradient, no decay, no change of its state, no losses."""

    def check(self) -> None:
        """See Config.check."""
        for name in LOSSES:
            self.require(getattr(self, name) >= 0, name, "0 or above")
            if not self.columns:
                self.require(getattr(self, name) == 0, name, "0, because this router has no weight to train")

    def check_experts(self, experts: int) -> None:
        """Raises ConfigError if the router cannot serve this many experts."""

    @property
    def causal(self) -> bool:
        """Whether the route of a token in training depends on it and on tokens before it alone."""
        return True

    def experts_per_token(self, experts: int) -> float:
        """Returns the nominal mean number of experts of a token; the measured one is a metric."""
        raise NotImplementedError

    def initial_state(self, experts: int) -> dict[str, np.ndarray]:
        """Returns the router's model state, each array [E] or a scalar and of one value throughout; empty when it has none."""
        return {"fraction": np.full((experts,), 1.0 / experts, np.float32)} if self.balance_over == "step" else {}

    def observe(self, x_GSD: jax.Array, key: jax.Array | None) -> jax.Array:
        """Returns what the router sees of its tokens."""
        return x_GSD

    def score(self, logits_GSE: jax.Array, inputs: RouterInputs) -> Scores:
        """Scores every expert; softmax unless a router says otherwise."""
        probability_GSE = jax.nn.softmax(logits_GSE, axis=-1)
        return Scores(logits_GSE, probability_GSE, probability_GSE)

    def choose(self, scores: Scores, inputs: RouterInputs, state: dict[str, jax.Array]) -> jax.Array:
        """Returns the experts of each token, int32 [G, S, R], different ones; E marks an unused slot. No gradient passes."""
        raise NotImplementedError

    def weigh(self, score_GSE: jax.Array, expert_GSR: jax.Array) -> jax.Array:
        """Returns the weights of the chosen experts, float32 [G, S, R], 0 in unused slots."""
        return gathered(score_GSE, expert_GSR)

    def limit(self, expert_GSR: jax.Array, score_GSR: jax.Array, experts: int) -> jax.Array:
        """Returns which choices, made with these scores, are executed; the others are counted as dropped."""
        return jnp.ones(expert_GSR.shape, bool)

    def rows(self, tokens: int, experts: int) -> int | None:
        """Returns the rows of a group that the experts compute at most, where that is less than S * R."""
        return None

    def own_objective(
        self, scores: Scores, chosen_GSE: jax.Array, valid_GS: jax.Array, state: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Returns a loss that only this router has, already weighted: {"tokens": sum, "groups": sum}."""
        return {}

    def own_statistics(self, scores: Scores, inputs: RouterInputs) -> dict[str, jax.Array]:
        """Returns sums over tokens that only this router's `next_state` needs."""
        return {}

    def next_state(self, state: dict[str, jax.Array], statistics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the next state from the statistics of a whole step; leaves may have a leading layers dimension."""
        if "fraction" not in state:
            return {}
        wanted = statistics["wanted"]
        total = jnp.sum(wanted, axis=-1, keepdims=True)
        return {"fraction": jnp.where(total > 0, wanted / jnp.maximum(total, 1.0), state["fraction"])}

    def advance(self, state: dict[str, jax.Array], statistics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the next state. Called once a step, in training only.

        Args:
          state: the state.
          statistics: {"wanted": assignments by expert before any was dropped, "tokens": valid tokens, ...}, of the whole step.
        """
        return state if self.frozen else {**state, **self.next_state(state, statistics)}

    def plan(self, logits_GSE: jax.Array, inputs: RouterInputs, state: dict[str, jax.Array]) -> Routing:
        """Makes the plan from float32 logits (`columns` of them for each expert, at least one). Pure."""
        experts = logits_GSE.shape[-1] // max(self.columns, 1)
        valid_GS = inputs.valid_GS
        scores = self.score(logits_GSE, inputs)
        if inputs.replay_GSR is None:
            wanted_GSR = self.choose(jax.lax.stop_gradient(scores), inputs, state)
            wanted_GSR = checkpoint_name(wanted_GSR.astype(jnp.int32), "router_plan")
        else:
            wanted_GSR = inputs.replay_GSR
        wanted_GSR = jnp.where(valid_GS[..., None], wanted_GSR, experts)
        weight_GSR = self.weigh(scores.score_GSE, wanted_GSR)
        kept_GSR = wanted_GSR < experts
        if inputs.replay_GSR is None:
            score_GSR = gathered(jax.lax.stop_gradient(scores.score_GSE), wanted_GSR)
            kept_GSR = kept_GSR & self.limit(wanted_GSR, score_GSR, experts)
        plan = plan_of_choices(jnp.where(kept_GSR, wanted_GSR, experts), weight_GSR, experts)
        rows = self.rows(wanted_GSR.shape[1], experts)
        if rows is not None and rows < wanted_GSR.shape[1] * wanted_GSR.shape[2]:
            plan = compacted(plan, rows)
        dropped = jnp.sum(wanted_GSR < experts, dtype=jnp.float32) - jnp.sum(
            plan.expert_GA < experts, dtype=jnp.float32
        )
        plan = dataclasses.replace(plan, dropped=dropped)
        # What the plan executes, slot by slot: a replay of it drops nothing.
        executed_GSR = jnp.where(plan.slot_GSR < plan.token_GA.shape[1], wanted_GSR, experts)

        chosen_GSE = chosen_mask(wanted_GSR, experts)
        objective, loss_metrics = self._losses(scores, chosen_GSE, inputs, state)
        tokens = jnp.sum(valid_GS, dtype=jnp.float32)
        metrics = {**measure(scores.probability_GSE, executed_GSR, valid_GS, plan.dropped), **loss_metrics}
        for name, value in state.items():
            # Of a vector its range, of a number itself; weighted by tokens, so that it adds over microbatches.
            shown = jnp.max(value) - jnp.min(value) if value.ndim else value
            metrics[f"{name}_range" if value.ndim else name] = (shown * tokens, tokens)
        statistics = {"wanted": jnp.sum(chosen_GSE, axis=(0, 1)), "tokens": tokens}
        statistics.update(self.own_statistics(jax.lax.stop_gradient(scores), inputs))
        return Routing(plan, objective, jax.lax.stop_gradient(metrics), statistics, executed_GSR)

    def _losses(
        self, scores: Scores, chosen_GSE: jax.Array, inputs: RouterInputs, state: dict[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """Returns (weighted sums by unit, {name: (sum, count)} of the losses in use and of balance and z, which are always shown)."""
        probability_GSE, valid_GS = scores.probability_GSE, inputs.valid_GS
        zero = jnp.zeros((), jnp.float32)
        if not self.columns:
            return {"tokens": zero, "groups": zero}, {}
        units = {
            "tokens": jnp.sum(valid_GS, dtype=jnp.float32),
            "groups": jnp.sum(jnp.any(valid_GS, axis=-1), dtype=jnp.float32),
        }
        if self.balance_over == "step":
            balance = ("tokens", losses.step_balance_loss(probability_GSE, state["fraction"], valid_GS))
        elif self.balance_over == "sequence":
            balance = (
                "groups",
                losses.sequence_balance_loss(probability_GSE, chosen_GSE, valid_GS, inputs.sequences),
            )
        else:
            balance = ("groups", losses.balance_loss(probability_GSE, chosen_GSE, valid_GS))
        found = {"balance": balance, "z": ("tokens", losses.z_loss(scores.logits_GSE, valid_GS))}
        if self.importance_coefficient:
            found["importance"] = ("groups", losses.importance_loss(probability_GSE, valid_GS))
        if self.local_entropy_coefficient:
            found["local_entropy"] = ("tokens", losses.local_entropy_loss(probability_GSE, valid_GS))
        if self.global_entropy_coefficient:
            found["global_entropy"] = ("groups", losses.global_entropy_loss(probability_GSE, valid_GS))
        metrics = {f"{name}_loss": (value, units[unit]) for name, (unit, value) in found.items()}
        objective = {"tokens": zero, "groups": zero}
        if not self.frozen:
            for name, (unit, value) in found.items():
                objective[unit] = objective[unit] + getattr(self, f"{name}_coefficient") * value
            for unit, value in self.own_objective(scores, chosen_GSE, valid_GS, state).items():
                objective[unit] = objective[unit] + value
        return objective, metrics


LOSSES = tuple(field.name for field in dataclasses.fields(Router) if field.name.endswith("_coefficient"))


def gathered(score_GSE: jax.Array, expert_GSR: jax.Array) -> jax.Array:
    """Returns the scores of the chosen experts, 0 in unused slots."""
    experts = score_GSE.shape[-1]
    taken_GSR = jnp.take_along_axis(score_GSE, jnp.minimum(expert_GSR, experts - 1), axis=-1)
    return jnp.where(expert_GSR < experts, taken_GSR, 0.0)


class RouterLayer(nnx.Module):
    """Holds the router's weights and state."""

    def __init__(self, config: Router, d_model: int, experts: int):
        self.config, self.experts = config, experts
        shape = (d_model, config.columns * experts)
        self.weight = declare(shape, ("embed", "routes"), frozen=config.frozen) if config.columns else None
        for name, value in config.initial_state(experts).items():
            dims = ("routes",) if value.ndim else ()
            setattr(self, name, ModelState(jnp.asarray(value), dims=dims, initial=float(np.ravel(value)[0])))
        self.state_names = tuple(config.initial_state(experts))

    def __call__(self, x_GSD: jax.Array, inputs: RouterInputs) -> Routing:
        """Routes. For the backward pass it keeps its input, the logits and the choices; what is elementwise in them is computed again."""
        weight = None if self.weight is None else self.weight[...]
        state = {name: getattr(self, name)[...] for name in self.state_names}
        return _route(self.config, self.experts, x_GSD, weight, inputs, state)


def _route(
    config: Router,
    experts: int,
    x_GSD: jax.Array,
    weight_DE: jax.Array | None,
    inputs: RouterInputs,
    state: dict[str, jax.Array],
) -> Routing:
    policy = jax.checkpoint_policies.save_only_these_names("router_plan", "router_logits")

    @functools.partial(jax.checkpoint, policy=policy)
    def route(x_GSD: jax.Array, weight_DE: jax.Array | None) -> Routing:
        if weight_DE is None:
            logits_GSE = jnp.zeros((*x_GSD.shape[:2], experts), jnp.float32)
        else:
            weight_DE = jax.lax.stop_gradient(weight_DE) if config.frozen else weight_DE
            logits_GSE = router_logits(config.observe(x_GSD, inputs.key), weight_DE)
        return config.plan(checkpoint_name(logits_GSE, "router_logits"), inputs, state)

    return route(x_GSD, weight_DE)
