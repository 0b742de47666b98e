"""One transformer block: attention, then feed-forward, each normalised before and added after; a router may stand around it.

Legend: B batch, L length, C tokens of a row that pass, D model.
"""

import jax
from flax import nnx

from sparse_lm.layers.feed_forward import Aux, FeedForward, TokenInfo
from sparse_lm.layers.norm import RMSNorm
from sparse_lm.model import depth
from sparse_lm.model.attention import Attention, AttentionLayer, Cache
from sparse_lm.parallel.rules import as_tokens
from sparse_lm.routing.router import Router, RouterInputs, RouterLayer
from sparse_lm.weight_sparsity.sparse_activations import recording

Angles = tuple[jax.Array, jax.Array]


class Block(nnx.Module):
    """A pre-norm block."""

    def __init__(
        self,
        attention: Attention,
        feed_forward: FeedForward,
        d_model: int,
        scale: float,
        epsilon: float,
        router: Router | None = None,
    ):
        self.depth = RouterLayer(router, d_model, 1) if router is not None else None
        self.attention_norm = RMSNorm(d_model, epsilon=epsilon)
        self.attention = AttentionLayer(attention, d_model, scale, epsilon)
        self.feed_forward_norm = RMSNorm(d_model, epsilon=epsilon)
        self.feed_forward = feed_forward.build(d_model)

    def __call__(
        self, x_BLD: jax.Array, info: TokenInfo, angles: Angles, cache: Cache | None
    ) -> tuple[jax.Array, Aux, Cache | None]:
        """Returns (output, what feed-forward and router report, the cache with this call's keys and values)."""
        if self.depth is None:
            return self.through(x_BLD, info, angles, cache)
        replay = None if info.replay is None else info.replay["depth"]
        inputs = RouterInputs(info.tokens_BL, info.segments_BL > 0, info.segments_BL, info.key, 1, replay)
        routing = self.depth(x_BLD, inputs)
        if cache is None:
            token_BC = depth.passing(routing.plan)
            x_BCD, here = depth.gather_tokens(x_BLD, token_BC), depth.gather_info(info, token_BC)
            angles = (depth.gather_tokens(angles[0], token_BC), depth.gather_tokens(angles[1], token_BC))
            y_BCD, aux, _ = self.through(x_BCD, here, angles, None)
            y_BLD = depth.add_back(x_BLD, y_BCD - x_BCD, routing.plan)
        else:
            # A cache has a place for every token: those that skip are written where nothing sees them.
            y_BLD, aux, cache = self.masked(x_BLD, info, angles, cache, routing.plan)
        objective = jax.tree.map(lambda a, b: a + b, aux.objective, routing.objective)
        statistics = {**aux.statistics, **({"depth": routing.statistics} if self.depth.state_names else {})}
        choices = {**aux.choices, "depth": routing.expert_GSR}
        return y_BLD, Aux(objective, {**aux.metrics, **depth.depth_metrics(routing)}, statistics, choices, {}), cache

    def masked(
        self, x_BLD: jax.Array, info: TokenInfo, angles: Angles, cache: Cache | None, plan: depth.RoutingPlan
    ) -> tuple[jax.Array, Aux, Cache | None]:
        """The routed block with all tokens computed and the skipped ones masked: the reference, and the form with a cache."""
        y_BLD, aux, cache = self.through(x_BLD, depth.masked_info(info, plan), angles, cache)
        return depth.add_masked(x_BLD, y_BLD - x_BLD, plan), aux, cache

    def through(
        self, x_BLD: jax.Array, info: TokenInfo, angles: Angles, cache: Cache | None
    ) -> tuple[jax.Array, Aux, Cache | None]:
        """Passes every token."""
        with recording(self) as counts:
            attended_BLD, cache = self.attention(self.attention_norm(x_BLD), angles, info.segments_BL, cache)
            x_BLD = as_tokens(x_BLD + attended_BLD)
            y_BLD, aux = self.feed_forward(self.feed_forward_norm(x_BLD), info)
        aux = aux._replace(metrics={**aux.metrics, **counts})
        if aux.statistics:
            aux = aux._replace(statistics={"feed_forward": aux.statistics})
        return as_tokens(x_BLD + y_BLD), aux, cache
