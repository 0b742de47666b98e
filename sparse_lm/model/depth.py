"""Routed blocks: a router with one expert around a whole block, so that a token passes through some blocks and skips others.

Legend: B batch, L length, C tokens of a row that pass, D model.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sparse_lm.config import Config, component
from sparse_lm.layers.feed_forward import TokenInfo
from sparse_lm.routing.plan import RoutingPlan
from sparse_lm.routing.router import Router, Routing
from sparse_lm.routing.variable import ExpertChoiceRouter, ExpertThresholdRouter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Depth(Config):
    """Base of the depth components: which blocks are routed."""

    def router_of(self, layer: int) -> Router | None:
        """Returns the router around a block; None: every token passes."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullDepth(Depth):
    """Every token passes through every block."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedDepth(Depth):
    """Base: one block of `every` is routed."""

    router: Router = component("router", ExpertChoiceRouter(k=0.125, scores="sigmoid"))
    """Who passes; one expert, the block, whose output is added times the router's weight."""
    every: int = 2
    """The last of so many blocks is routed."""

    def check(self) -> None:
        """See Config.check."""
        self.require(self.every >= 1, "every", "at least 1")
        self.router.check_experts(1)

    def router_of(self, layer: int) -> Router | None:
        """See Depth.router_of."""
        return self.router if layer % self.every == self.every - 1 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureOfDepths(RoutedDepth):
    """A routed block takes its best tokens of each row (Raposo et al. 2024, arXiv 2404.02258): NOT CAUSAL, as expert choice."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveDepth(RoutedDepth):
    """A token passes where its score is above a threshold that keeps the mean depth: causal, and its depth is its own."""

    router: Router = component("router", ExpertThresholdRouter(k=0.5, rows_per_token=0.75))
    """Who passes; `rows_per_token` bounds what a row may use at once."""


def passing(plan: RoutingPlan) -> jax.Array:
    """Returns the tokens that pass, in their order, [B, C]; L marks a place that nobody takes."""
    return jnp.where(plan.expert_GA < 1, plan.token_GA, plan.slot_GSR.shape[1])


def gather_tokens(x_BLX: jax.Array, token_BC: jax.Array) -> jax.Array:
    """Returns the rows of the tokens that pass, zeros elsewhere. No two places take the same row, so its gradient is exact."""
    return jnp.asarray(x_BLX).at[jnp.arange(x_BLX.shape[0])[:, None], token_BC].get(mode="fill", fill_value=0)


def gather_info(info: TokenInfo, token_BC: jax.Array) -> TokenInfo:
    """Returns what is known of the tokens that pass; the others are padding behind them."""
    rows = {name: gather_tokens(getattr(info, name), token_BC) for name in ("tokens_BL", "positions_BL", "segments_BL")}
    return info._replace(**rows)


def add_back(x_BLD: jax.Array, change_BCD: jax.Array, plan: RoutingPlan) -> jax.Array:
    """Returns x plus the weighted changes of the tokens that passed."""
    row_B1, slot_BL = jnp.arange(x_BLD.shape[0])[:, None], plan.slot_GSR[..., 0]
    weight_BL = plan.weight_GA.at[row_B1, slot_BL].get(mode="fill", fill_value=0)
    moved_BLD = change_BCD.at[row_B1, slot_BL].get(mode="fill", fill_value=0)
    return x_BLD + (moved_BLD.astype(jnp.float32) * weight_BL[..., None]).astype(x_BLD.dtype)


def masked_info(info: TokenInfo, plan: RoutingPlan) -> TokenInfo:
    """Returns the same tokens with those that skip in a document of their own that nothing sees: the dense form of a routed block."""
    passes_BL = plan.slot_GSR[..., 0] < plan.token_GA.shape[1]
    return info._replace(segments_BL=jnp.where(passes_BL, info.segments_BL, -1))


def add_masked(x_BLD: jax.Array, change_BLD: jax.Array, plan: RoutingPlan) -> jax.Array:
    """Returns x plus the weighted changes, where all tokens went through."""
    row_B1 = jnp.arange(x_BLD.shape[0])[:, None]
    weight_BL = plan.weight_GA.at[row_B1, plan.slot_GSR[..., 0]].get(mode="fill", fill_value=0)
    return x_BLD + (change_BLD.astype(jnp.float32) * weight_BL[..., None]).astype(x_BLD.dtype)


def depth_metrics(routing: Routing) -> dict[str, Any]:
    """Returns the metrics of a router around a block, under names of their own."""
    metrics = {f"depth_{name}": value for name, value in routing.metrics.items() if name not in ("load", "entropy")}
    metrics["depth_fraction"] = metrics.pop("depth_experts_per_token")
    return metrics
