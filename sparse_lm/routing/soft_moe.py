"""Soft MoE: experts compute slots that are mixtures of all tokens (Puigcerver et al. 2023, arXiv 2308.00951).

Not causal: every slot mixes every token of its routing group, later ones included, so a causal language model trained with it sees
the future. For encoders and comparisons.

Legend: B batch, L length, D model, E experts, P slots of an expert, N = E * P slots, G routing groups, S tokens of a group.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm.config import component
from sparse_lm.layers.feed_forward import Activation, Aux, FeedForward, TokenInfo, activate, no_aux
from sparse_lm.layers.parameter import declare
from sparse_lm.layers.projection import DenseProjection, Projection
from sparse_lm.routing.losses import entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftMoEFeedForward(FeedForward):
    """Experts over slots that are mixtures of tokens; fully differentiable and NOT CAUSAL."""

    causal: ClassVar[bool] = False
    """Every slot sees every token of its group."""

    experts: int = 8
    """Number of experts E."""
    slots: int = 16
    """Slots P of each expert in a routing group: rows that it computes for S tokens, whatever they are."""
    hidden: int = 512
    """Hidden size F of one expert."""
    activation: Activation = "swiglu"
    """Activation of the experts."""
    group_sequences: int = 1
    """Sequences that share slots."""
    projection: Projection = component("projection", DenseProjection())
    """What stores the matrices."""

    def check(self) -> None:
        """See Config.check."""
        for name in ("experts", "slots", "hidden", "group_sequences"):
            self.require(getattr(self, name) >= 1, name, "at least 1")

    def sequences_per_group(self) -> int:
        """See FeedForward.sequences_per_group."""
        return self.group_sequences

    def build(self, d_model: int) -> "SoftMoELayer":
        """See FeedForward.build."""
        return SoftMoELayer(self, d_model)

    def cost(self, d_model: int, experts_per_token: float | None = None) -> dict[str, tuple[int, int, float]]:
        """See FeedForward.cost. Rows per token depend on the group's length: without a measured number one is assumed."""
        into, into_flops = self.projection.cost(d_model, self.hidden)
        out, out_flops = self.projection.cost(self.hidden, d_model)
        gates = 2 if self.activation == "swiglu" else 1
        one, k = gates * into + out, 1.0 if experts_per_token is None else experts_per_token
        slots = self.experts * self.slots
        rows = d_model * slots + 1
        # logits, dispatch and combination: three products with all slots
        return {
            "experts": (self.experts * one, round(k * one), k * (gates * into_flops + out_flops)),
            "router": (rows, rows, 6.0 * d_model * slots),
        }


class SoftMoELayer(nnx.Module):
    """Soft mixture-of-experts layer."""

    def __init__(self, config: SoftMoEFeedForward, d_model: int):
        self.config = config
        into, out = ("embed", "ffn"), ("ffn", "embed")
        build = config.projection.build
        self.router = SlotMixer(d_model, config.experts * config.slots)
        self.gate = build(d_model, config.hidden, into, experts=config.experts)
        self.up = build(d_model, config.hidden, into, experts=config.experts) if config.activation == "swiglu" else None
        self.down = build(config.hidden, d_model, out, experts=config.experts)

    def __call__(self, x_BLD: jax.Array, info: TokenInfo) -> tuple[jax.Array, Aux]:
        config, (batch, _, d_model) = self.config, x_BLD.shape
        groups = max(1, batch // config.group_sequences)
        x_GSD = x_BLD.reshape(groups, -1, d_model)
        valid_GS = info.segments_BL.reshape(groups, -1) > 0
        dispatch_GSN, combine_GSN = self.router(x_GSD, valid_GS)
        slots_GND = jnp.einsum("gsn,gsd->gnd", dispatch_GSN.astype(x_BLD.dtype), x_GSD)
        # Rows sorted by expert: slot n belongs to expert n // P.
        rows_AD = jnp.moveaxis(slots_GND.reshape(groups, config.experts, -1, d_model), 1, 0).reshape(-1, d_model)
        sizes_E = jnp.full((config.experts,), groups * config.slots, jnp.int32)
        gate_AF = self.gate.grouped(rows_AD, sizes_E)
        up_AF = self.up.grouped(rows_AD, sizes_E) if self.up is not None else None
        y_AD = self.down.grouped(activate(gate_AF, up_AF, config.activation), sizes_E)
        y_GND = jnp.moveaxis(y_AD.reshape(config.experts, groups, config.slots, d_model), 0, 1).reshape(slots_GND.shape)
        y_GSD = jnp.einsum("gsn,gnd->gsd", combine_GSN.astype(x_BLD.dtype), y_GND)
        return y_GSD.reshape(x_BLD.shape), no_aux()._replace(metrics=self._metrics(combine_GSN, valid_GS))

    def _metrics(self, combine_GSN: jax.Array, valid_GS: jax.Array) -> dict[str, Any]:
        """The weight that tokens give to each expert, its entropy, and rows computed per token."""
        share_GSE = jnp.sum(combine_GSN.reshape(*combine_GSN.shape[:2], self.config.experts, -1), axis=-1)
        share_GSE = jax.lax.stop_gradient(share_GSE * valid_GS[..., None])
        tokens = jnp.sum(valid_GS, dtype=jnp.float32)
        groups = jnp.sum(jnp.any(valid_GS, axis=-1), dtype=jnp.float32)
        return {
            "load": (jnp.sum(share_GSE, axis=(0, 1)), tokens),
            "entropy": (jnp.sum(entropy(share_GSE)), tokens),
            "top_probability": (jnp.sum(jnp.max(share_GSE, axis=-1)), tokens),
            "experts_per_token": (groups * self.config.experts * self.config.slots, tokens),
        }


class SlotMixer(nnx.Module):
    """Weights between tokens and slots: a softmax over tokens makes the slots, one over slots the outputs."""

    def __init__(self, d_model: int, slots: int):
        self.weight = declare((d_model, slots), ("embed", "routes"))
        self.scale = declare((1,), ("routes",), "ones")

    def __call__(self, x_GSD: jax.Array, valid_GS: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (dispatch, combine), float32 [G, S, N]: of unit-norm tokens and slots, as section 2.3 of the paper; padding gets 0."""
        x32_GSD = x_GSD.astype(jnp.float32)
        x32_GSD = x32_GSD * jax.lax.rsqrt(jnp.sum(jnp.square(x32_GSD), axis=-1, keepdims=True) + 1e-12)
        weight = self.weight[...]
        weight = self.scale[...] * weight * jax.lax.rsqrt(jnp.sum(jnp.square(weight), axis=0, keepdims=True) + 1e-12)
        logits_GSN = jnp.einsum("gsd,dn->gsn", x32_GSD, weight, precision=jax.lax.Precision.HIGHEST)
        valid_GS1 = valid_GS[..., None]
        dispatch_GSN = jax.nn.softmax(jnp.where(valid_GS1, logits_GSN, -1e30), axis=1) * valid_GS1
        return dispatch_GSN, jax.nn.softmax(logits_GSN, axis=-1) * valid_GS1
