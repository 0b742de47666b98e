"""The router door: a thin module makes float32 logits, a pure function makes the plan.

Legend: G routing groups, S tokens of a group, D model, E experts.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm.config import Config
from sparse_lm.layers.parameter import declare
from sparse_lm.routing.plan import RoutingPlan


class ModelState(nnx.Variable):
    """A value that training changes without a gradient, such as a router's bias."""


class RouterInputs(NamedTuple):
    """What a router may know of its tokens besides their logits."""

    tokens_GS: jax.Array
    valid_GS: jax.Array
    segments_GS: jax.Array
    key: jax.Array | None


class Routing(NamedTuple):
    """A plan with what the router has to say about it.

    Attributes:
      plan: the routing plan.
      objective: {"tokens": sum, "groups": sum} of weighted auxiliary losses.
      metrics: {name: (sum, count)}.
    """

    plan: RoutingPlan
    objective: dict[str, jax.Array]
    metrics: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router(Config):
    """Base of the router components."""

    def check_experts(self, experts: int) -> None:
        """Raises ConfigError if the router cannot serve this many experts."""

    def experts_per_token(self, experts: int) -> float:
        """Returns the (mean) number of experts a token is sent to."""
        raise NotImplementedError

    def initial_state(self, experts: int) -> dict[str, jax.Array]:
        """Returns the router's model state; empty when it has none."""
        return {}

    def plan(self, logits_GSE: jax.Array, inputs: RouterInputs, state: dict[str, jax.Array]) -> Routing:
        """Makes the plan from float32 logits. Pure."""
        raise NotImplementedError

    def advance(self, state: dict[str, jax.Array], counts_E: jax.Array) -> dict[str, jax.Array]:
        """Returns the next model state from the assignments of the whole step, float32 [..., E]. Called once a step, in training only."""
        return state


class RouterLayer(nnx.Module):
    """Holds the router's weights and state."""

    def __init__(self, config: Router, d_model: int, experts: int):
        self.config = config
        self.weight = declare((d_model, experts), ("embed", "routes"))
        for name, value in config.initial_state(experts).items():
            setattr(self, name, ModelState(value, dims=("routes",)))
        self.state_names = tuple(config.initial_state(experts))

    def __call__(self, x_GSD: jax.Array, inputs: RouterInputs) -> Routing:
        logits_GSE = jnp.einsum(
            "gsd,de->gse", x_GSD.astype(jnp.float32), self.weight[...], precision=jax.lax.Precision.HIGHEST
        )
        return self.config.plan(logits_GSE, inputs, {name: getattr(self, name)[...] for name in self.state_names})
