"""The mixture-of-experts feed-forward: router, plan, dispatch, experts, optional shared expert and experts that compute nothing.

Legend: B batch, L length, D model, F ffn, E experts, A assignments, G routing groups, S tokens of a group, R most experts of a token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.grouped_matmul import grouped_feed_forward
from sparse_lm.config import component
from sparse_lm.layers.feed_forward import Activation, Aux, DenseFeedForward, FeedForward, TokenInfo, activate
from sparse_lm.layers.projection import DenseMatrix, DenseProjection, Projection
from sparse_lm.parallel.mesh import current
from sparse_lm.routing.dispatch import Order, Tokens, dispatch_local
from sparse_lm.routing.expert_parallel import Experts, dispatch_on_mesh
from sparse_lm.routing.router import Router, RouterInputs, RouterLayer
from sparse_lm.routing.top_k import TopKRouter
from sparse_lm.routing.zero_computation import ZeroComputation, ZeroComputationLayer, without_zero_computation


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEFeedForward(FeedForward):
    """Routed experts, dropless, with an optional shared expert every token passes through."""

    experts: int = 8
    """Number of routed experts E."""
    hidden: int = 512
    """Hidden size F of one expert."""
    shared_hidden: int = 0
    """Hidden size of the shared expert (Dai et al. 2024, arXiv 2401.06066); 0: none."""
    activation: Activation = "swiglu"
    """Activation of the experts."""
    zero_computation: ZeroComputation = ZeroComputation()
    """Experts beside these that cost nothing."""
    group_sequences: int = 1
    """Sequences in one routing group; balance losses are means over groups, and groups are never split by a shard."""
    receive_factor: float = 0.0
    """Rows a device can receive from the others of its expert axis, in multiples of what even load sends it; the rest is dropped and counted as overflow. 0: as many as can ever come."""
    router: Router = component("router", TopKRouter())
    """Who sends tokens to experts."""
    projection: Projection = component("projection", DenseProjection())
    """What stores the matrices."""

    def check(self) -> None:
        """See Config.check."""
        self.require(self.experts >= 1, "experts", "at least 1")
        self.require(self.hidden >= 1, "hidden", "at least 1")
        self.require(self.shared_hidden >= 0, "shared_hidden", "0 (none) or above")
        self.require(self.group_sequences >= 1, "group_sequences", "at least 1")
        enough = self.receive_factor == 0 or self.receive_factor >= 1
        self.require(enough, "receive_factor", "0 (as many as can come) or at least 1")
        self.router.check_experts(self.routes)

    @property
    def routes(self) -> int:
        """Experts that the router knows: those that compute, then those that do not."""
        return self.experts + self.zero_computation.experts

    def sequences_per_group(self) -> int:
        """See FeedForward.sequences_per_group."""
        return self.group_sequences

    def advance(self, state: dict[str, Any], statistics: dict[str, Any]) -> dict[str, Any]:
        """See FeedForward.advance."""
        if "router" not in state:
            return state
        return {**state, "router": self.router.advance(state["router"], statistics["router"])}

    def shared(self) -> DenseFeedForward:
        """The shared expert as a dense feed-forward."""
        return DenseFeedForward(hidden=self.shared_hidden, activation=self.activation, projection=self.projection)

    def build(self, d_model: int) -> "MoELayer":
        """See FeedForward.build."""
        return MoELayer(self, d_model)

    def cost(self, d_model: int, experts_per_token: float | None = None) -> dict[str, tuple[int, int, float]]:
        """See FeedForward.cost. Where some experts compute nothing, even loads are assumed unless the mean is measured."""
        into, into_flops = self.projection.cost(d_model, self.hidden)
        out, out_flops = self.projection.cost(self.hidden, d_model)
        gates = 2 if self.activation == "swiglu" else 1
        one, k = gates * into + out, experts_per_token
        if k is None:
            k = self.router.experts_per_token(self.routes) * self.experts / self.routes
        router, extra = d_model * self.router.columns * self.routes, self.zero_computation.parameters(d_model)
        rows = {
            "experts": (self.experts * one, round(k * one), k * (gates * into_flops + out_flops)),
            "router": (router + extra, router + extra, 2.0 * router),
        }
        if self.shared_hidden:
            rows["shared_expert"] = self.shared().cost(d_model)["feed_forward"]
        return rows


class RoutedExperts(nnx.Module):
    """The experts' matrices, applied to rows that are sorted by expert, or to tokens where one operation does all of it."""

    def __init__(self, gate: nnx.Module, up: nnx.Module | None, down: nnx.Module, activation: Activation, hidden: int):
        self.gate, self.up, self.down, self.activation, self.hidden = gate, up, down, activation, hidden

    def __call__(self, x_AD: jax.Array, group_sizes_E: jax.Array, weight_A: jax.Array | None = None) -> jax.Array:
        """Applies each expert to its rows; with the float32 weight of each row, times it."""
        gate_AF = checkpoint_name(self.gate.grouped(x_AD, group_sizes_E), "gate")
        up_AF = checkpoint_name(self.up.grouped(x_AD, group_sizes_E), "up") if self.up is not None else None
        hidden_AF = activate(gate_AF, up_AF, self.activation)
        if weight_A is not None:
            # Before the linear down product: the gradient of the weight then needs the hidden units, not that product.
            hidden_AF = (hidden_AF * weight_A[:, None]).astype(x_AD.dtype)
        return self.down.grouped(hidden_AF, group_sizes_E)

    @property
    def on_tokens(self) -> Tokens | None:
        """From tokens to the weighted sums of their experts' outputs in one operation; None unless these are dense SwiGLU experts."""
        plain = all(type(matrix) is DenseMatrix for matrix in (self.gate, self.up, self.down))
        return self._fused if plain and self.activation == "swiglu" else None

    def _fused(self, x_TD: jax.Array, order: Order) -> jax.Array:
        assert self.up is not None, "SwiGLU"
        gate, up, down = (matrix.weight[...].astype(x_TD.dtype) for matrix in (self.gate, self.up, self.down))
        return grouped_feed_forward(x_TD, gate, up, down, order.sizes_E, order.token_A, order.row_TR, order.weight_TR)

    def as_function(self, dtype: Any) -> Experts:
        """Returns the experts as a function of their weights, which are cast to the compute dtype."""
        graph, state = nnx.split(self)
        weights: dict[str, Any] = {}
        dims: dict[str, Any] = {}
        for path, variable in nnx.to_flat_state(state):
            value = variable.get_raw_value()
            # Patterns are integers; what is asked of gradients stays float32, and is a scalar where nothing is.
            value = value.astype(dtype) if isinstance(variable, nnx.Param) else value
            for tree, leaf in ((weights, value), (dims, tuple(variable.get_metadata("dims"))[: value.ndim])):
                for part in path[:-1]:
                    tree = tree.setdefault(part, {})
                tree[path[-1]] = leaf

        def on_rows(weights: Any, *rows: Any) -> jax.Array:
            return nnx.merge(graph, weights)(*rows)

        def on_tokens(weights: Any, x_TD: jax.Array, order: Order) -> jax.Array:
            return nnx.merge(graph, weights).on_tokens(x_TD, order)

        return Experts(on_rows, weights, dims, self.hidden, on_tokens if self.on_tokens is not None else None)


class MoELayer(nnx.Module):
    """Mixture-of-experts layer."""

    def __init__(self, config: MoEFeedForward, d_model: int):
        self.config = config
        into, out = ("embed", "ffn"), ("ffn", "embed")
        build = config.projection.build
        self.router = RouterLayer(config.router, d_model, config.routes)
        extra = config.zero_computation
        self.zero_computation = ZeroComputationLayer(extra, d_model) if extra.experts else None
        self.gate = build(d_model, config.hidden, into, experts=config.experts)
        self.up = build(d_model, config.hidden, into, experts=config.experts) if config.activation == "swiglu" else None
        self.down = build(config.hidden, d_model, out, experts=config.experts)
        self.shared = config.shared().build(d_model) if config.shared_hidden else None

    @property
    def experts(self) -> "RoutedExperts":
        """The experts without their router."""
        return RoutedExperts(self.gate, self.up, self.down, self.config.activation, self.config.hidden)

    def __call__(self, x_BLD: jax.Array, info: TokenInfo) -> tuple[jax.Array, Aux]:
        batch, length, d_model = x_BLD.shape
        groups = max(1, batch // self.config.group_sequences)

        def grouped(a: jax.Array) -> jax.Array:
            return a.reshape(groups, -1, *a.shape[2:])

        inputs = RouterInputs(
            grouped(info.tokens_BL),
            grouped(info.segments_BL) > 0,
            grouped(info.segments_BL),
            info.key,
            batch // groups,
            None if info.replay is None else grouped(info.replay["feed_forward"]),
        )
        routing = self.router(grouped(x_BLD), inputs)
        plan, metrics, mesh = routing.plan, routing.metrics, current()
        if self.zero_computation is not None:
            plan, weight_GSZ = without_zero_computation(plan, self.config.experts)
            load_E, tokens = metrics["load"][0], metrics["experts_per_token"][1]
            metrics = {**metrics, "experts_per_token": (jnp.sum(load_E[: self.config.experts]), tokens)}
        if mesh is None:
            experts = self.experts
            y_TD = dispatch_local(x_BLD.reshape(-1, d_model), plan, experts, experts.on_tokens)
            y_BLD = y_TD.reshape(x_BLD.shape)
        else:
            y_BLD, lost = dispatch_on_mesh(
                mesh, x_BLD, plan, self.experts.as_function(x_BLD.dtype), self.config.receive_factor
            )
            if mesh.shape["expert"] > 1:
                metrics = {**metrics, "overflow": (lost, metrics["load"][1])}
        # Need nothing of the exchange, so XLA may compute them while rows travel.
        if self.zero_computation is not None:
            y_BLD = y_BLD + self.zero_computation(x_BLD, weight_GSZ.reshape(batch, length, -1))
        if self.shared is not None:
            y_BLD = y_BLD + self.shared(x_BLD, info)[0]
        statistics = {"router": routing.statistics} if self.router.state_names else {}
        choices = {"feed_forward": routing.expert_GSR.reshape(batch, length, -1)}
        return y_BLD, Aux(routing.objective, metrics, statistics, choices, {})
