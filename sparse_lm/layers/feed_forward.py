"""The feed-forward door and its dense component.

Legend: B batch, L length, D model, F ffn.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from sparse_lm.config import Config, component
from sparse_lm.layers.projection import DenseProjection, Projection

Activation = Literal["swiglu", "gelu", "relu_squared"]


class TokenInfo(NamedTuple):
    """What a block knows of its tokens besides their vectors.

    Attributes:
      tokens_BL: token ids.
      positions_BL: positions in their documents.
      segments_BL: document numbers, 0 for padding.
      key: random key of the block, step and microbatch; None in evaluation.
      replay: {router of the block: int32 experts [B, L, R]} to use instead of choosing; None: choose.
    """

    tokens_BL: jax.Array
    positions_BL: jax.Array
    segments_BL: jax.Array
    key: jax.Array | None
    replay: dict[str, jax.Array] | None = None


class Aux(NamedTuple):
    """What a layer reports besides its output; all but choices and gates adds over layers, shards and microbatches.

    Attributes:
      objective: {"tokens": sum, "groups": sum}: weighted auxiliary losses, summed over tokens and over routing groups.
      metrics: {name: (sum, count)}.
      statistics: {path: counts} that `advance` turns into the next model state.
      choices: {router of the block: int32 experts of each token [B, L, R]}, which `TokenInfo.replay` takes.
      gates: {name: float32 [B, L]} of a memory layer: how far each position lets in what was looked up.
    """

    objective: dict[str, jax.Array]
    metrics: dict[str, Any]
    statistics: dict[str, Any]
    choices: dict[str, Any]
    gates: dict[str, Any]


def no_aux() -> Aux:
    """The report of a layer that has nothing to report."""
    zero = jnp.zeros((), jnp.float32)
    return Aux({"tokens": zero, "groups": zero}, {}, {}, {}, {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedForward(Config):
    """Base of the feed-forward components."""

    def build(self, d_model: int) -> "nnx.Module":
        """Builds a module with `__call__(x_BLD, info: TokenInfo) -> (y_BLD, Aux)`."""
        raise NotImplementedError

    def cost(self, d_model: int, experts_per_token: float | None = None) -> dict[str, tuple[int, int, float]]:
        """Returns {component: (parameters, active parameters, forward operations per token)}.

        Args:
          d_model: D.
          experts_per_token: measured mean; None: the nominal one.
        """
        raise NotImplementedError

    @property
    def routes(self) -> int:
        """Experts that a router chooses among; 0 where there is none."""
        return 0

    def sequences_per_group(self) -> int:
        """Sequences that must stay together in a microbatch and on a shard."""
        return 1

    def advance(self, state: dict[str, Any], statistics: dict[str, Any]) -> dict[str, Any]:
        """Returns the layer's next model state from the statistics of the whole step."""
        return state


def activate(gate: jax.Array, up: jax.Array | None, activation: Activation) -> jax.Array:
    """SwiGLU (Shazeer 2020, arXiv 2002.05202), GELU, or squared ReLU (So et al. 2021, arXiv 2109.08668)."""
    if activation == "swiglu":
        return jax.nn.silu(gate) * up
    if activation == "gelu":
        return jax.nn.gelu(gate, approximate=True)
    return jnp.square(jax.nn.relu(gate))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseFeedForward(FeedForward):
    """Two or three matrices applied to every token."""

    hidden: int = 1024
    """Size of the hidden dimension F."""
    activation: Activation = "swiglu"
    """swiglu has a gate and an up matrix; gelu and relu_squared have one."""
    projection: Projection = component("projection", DenseProjection())
    """What stores the matrices."""

    def check(self) -> None:
        """See Config.check."""
        self.require(self.hidden >= 1, "hidden", "at least 1")

    def build(self, d_model: int) -> "DenseFeedForwardLayer":
        """See FeedForward.build."""
        return DenseFeedForwardLayer(self, d_model)

    def cost(self, d_model: int, experts_per_token: float | None = None) -> dict[str, tuple[int, int, float]]:
        """See FeedForward.cost."""
        into, into_flops = self.projection.cost(d_model, self.hidden)
        out, out_flops = self.projection.cost(self.hidden, d_model)
        gates = 2 if self.activation == "swiglu" else 1
        parameters = gates * into + out
        return {"feed_forward": (parameters, parameters, float(gates * into_flops + out_flops))}


class DenseFeedForwardLayer(nnx.Module):
    """Dense feed-forward layer."""

    def __init__(self, config: DenseFeedForward, d_model: int):
        self.config = config
        into, out = ("embed", "ffn"), ("ffn", "embed")
        self.gate = config.projection.build(d_model, config.hidden, into)
        self.up = config.projection.build(d_model, config.hidden, into) if config.activation == "swiglu" else None
        self.down = config.projection.build(config.hidden, d_model, out)

    def __call__(self, x_BLD: jax.Array, info: TokenInfo) -> tuple[jax.Array, Aux]:
        gate_BLF = checkpoint_name(self.gate(x_BLD), "gate")
        up_BLF = checkpoint_name(self.up(x_BLD), "up") if self.up is not None else None
        return self.down(activate(gate_BLF, up_BLF, self.config.activation)), no_aux()
