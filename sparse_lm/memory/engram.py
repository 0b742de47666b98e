"""Engram: rows of hashed n-grams, gated by the context, smoothed by a short convolution, added before a block's attention.

Cheng et al. 2026, "Conditional Memory via Scalable Lookup" (arXiv 2601.07372), section 2:

    key = W_K e    value = W_V e    gate = sigmoid(f(RMSNorm(h) . RMSNorm(key) / sqrt(D)))    v = gate * value
    output = SiLU(conv(RMSNorm(v))) + v

e are the rows of a token side by side. The convolution is depthwise, causal and dilated by the longest order, and sees its own
document only; it starts from zeros. With M residual branches (hyper-connections) table and W_V are shared, the rest is a branch's own.

Legend: B batch, L length, M branches, D model, X width of what is looked up, W remembered positions, K taps.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm.config import component
from sparse_lm.layers.norm import rms_norm
from sparse_lm.layers.parameter import declare
from sparse_lm.layers.projection import DenseProjection, Projection
from sparse_lm.memory.ngram import NgramMemory

GateForm = Literal["sigmoid", "signed_root", "none"]


def gate(hidden_BLMD: jax.Array, key_BLMD: jax.Array, form: GateForm) -> jax.Array:
    """Returns how much of each value passes, float32 [B, L, M], from normalised hidden states and keys.

    sigmoid is the paper's equation; signed_root takes sign(s) * sqrt(max(|s|, 1e-6)) of the score first, as the published code does.
    """
    scores = jnp.einsum("blmd,blmd->blm", hidden_BLMD, key_BLMD, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(hidden_BLMD.shape[-1])
    if form == "signed_root":
        scores = jnp.sign(scores) * jnp.sqrt(jnp.maximum(jnp.abs(scores), 1e-6))
    return jax.nn.sigmoid(scores)


def causal_convolution(
    x_BLC: jax.Array,
    weight_KC: jax.Array,
    dilation: int,
    segments_BL: jax.Array,
    history: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    """Returns sum_i weight[K-1-i] * x[t - i * dilation] over the positions of the same document, [B, L, C].

    Args:
      x_BLC: input.
      weight_KC: taps of each channel; the last one is the present.
      dilation: distance of two taps.
      segments_BL: document numbers.
      history: (x [B, W, C], segments [B, W]) of the positions before these; None: there are none.
    """
    batch, length, channels = x_BLC.shape
    taps = weight_KC.shape[0]
    reach = (taps - 1) * dilation
    if history is None:
        history = (jnp.zeros((batch, reach, channels), x_BLC.dtype), jnp.full((batch, reach), -1, segments_BL.dtype))
    x = jnp.concatenate([history[0].astype(x_BLC.dtype), x_BLC], axis=1)
    segments = jnp.concatenate([history[1], segments_BL], axis=1)
    end = x.shape[1]
    out_BLC = x_BLC * weight_KC[taps - 1]
    for i in range(1, taps):
        part = slice(end - length - i * dilation, end - i * dilation)
        same_BL1 = (segments[:, part] == segments_BL)[..., None]
        out_BLC = out_BLC + jnp.where(same_BL1, x[:, part], 0) * weight_KC[taps - 1 - i]
    return out_BLC


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engram(NgramMemory):
    """Rows of hashed n-grams, gated by the context (arXiv 2601.07372)."""

    gate: GateForm = "sigmoid"
    """How the score becomes a gate: the paper's equation, the published code's signed root, or no gate."""
    taps: int = 4
    """Taps of the short convolution, which lie as many positions apart as the longest order; 0: no convolution."""
    bias: bool = False
    """Biases of key and value, as in the published code; without them an n-gram never seen adds nothing."""
    projection: Projection = component("projection", DenseProjection())
    """What stores the matrices."""

    def check(self) -> None:
        """See Config.check."""
        super().check()
        self.require(0 <= self.taps <= 16, "taps", "0 to 16")

    @property
    def reach(self) -> int:
        """Positions that the convolution looks back."""
        return max(0, self.taps - 1) * self.orders[-1]

    @property
    def history_length(self) -> int:
        """See Memory.history_length."""
        return max(super().history_length, self.reach)

    def history_width(self, d_model: int) -> int:
        """See Memory.history_width."""
        return d_model if self.taps else 0

    def build(self, block: int, d_model: int, epsilon: float) -> "EngramLayer":
        """See Memory.build."""
        return EngramLayer(self, d_model, epsilon)

    def cost(self, block: int, d_model: int) -> tuple[int, float]:
        """See Memory.cost."""
        matrix, flops = self.projection.cost(self.looked_up, d_model)
        gated = self.gate != "none"
        matrices = 1 + gated
        vectors = self.bias * matrices + 2 * gated + (self.taps + 1 if self.taps else 0)
        scores = 2.0 * d_model if gated else 0.0
        return matrices * matrix + vectors * d_model, matrices * flops + scores + 2.0 * self.taps * d_model


class EngramLayer(nnx.Module):
    """One memory layer; with branches the hidden states are [B, L, M, D] and so is what it returns."""

    def __init__(self, config: Engram, d_model: int, epsilon: float, branches: int = 1):
        self.config, self.branches, self.epsilon = config, branches, epsilon
        wide, dims = config.looked_up, ("memory", "embed")
        self.value = config.projection.build(wide, d_model, dims)
        self.value_bias = declare((d_model,), ("embed",), "zeros") if config.bias else None
        if config.gate != "none":
            keys = {str(m): config.projection.build(wide, d_model, dims) for m in range(branches)}
            self.key = nnx.Dict(keys)
            self.key_bias = declare((branches, d_model), ("branch", "embed"), "zeros") if config.bias else None
            self.key_norm = declare((branches, d_model), ("branch", "embed"), "ones")
            self.hidden_norm = declare((branches, d_model), ("branch", "embed"), "ones")
        if config.taps:
            self.taps_norm = declare((branches, d_model), ("branch", "embed"), "ones")
            self.taps = declare((config.taps, branches, d_model), ("tap", "branch", "embed"), "zeros")

    def __call__(
        self,
        x_BLD: jax.Array,
        rows_BLX: jax.Array,
        segments_BL: jax.Array,
        history: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, Any], jax.Array]:
        """See Memory.build."""
        delta, metrics, values = self.branched(x_BLD[:, :, None], rows_BLX, segments_BL, history)
        return delta[:, :, 0], metrics, values

    def branched(
        self,
        x_BLMD: jax.Array,
        rows_BLX: jax.Array,
        segments_BL: jax.Array,
        history: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, Any], jax.Array]:
        """The layer for hidden states with branches; the values returned are [B, L, M * D]."""
        config, dtype, shape = self.config, x_BLMD.dtype, x_BLMD.shape
        rows_BLX = rows_BLX.astype(dtype)
        v_BLD = self.value(rows_BLX)
        if self.value_bias is not None:
            v_BLD = v_BLD + self.value_bias[...].astype(dtype)
        v_BLMD, metrics = v_BLD[:, :, None], {}
        if config.gate != "none":
            keys_BLMD = jnp.stack([self.key[str(m)](rows_BLX) for m in range(self.branches)], axis=2)
            if self.key_bias is not None:
                keys_BLMD = keys_BLMD + self.key_bias[...].astype(dtype)
            hidden_BLMD = rms_norm(x_BLMD, self.hidden_norm[...], self.epsilon)
            gate_BLM = gate(hidden_BLMD, rms_norm(keys_BLMD, self.key_norm[...], self.epsilon), config.gate)
            v_BLMD = (gate_BLM[..., None] * v_BLMD).astype(dtype)
            metrics["gate"] = jnp.mean(gate_BLM, axis=-1)
        v_BLMD = jnp.broadcast_to(v_BLMD, shape)
        if not config.taps:
            return v_BLMD, metrics, jnp.zeros((*shape[:2], 0), dtype)
        normed_BLC = rms_norm(v_BLMD, self.taps_norm[...], self.epsilon).reshape(*shape[:2], -1)
        taps_KC = self.taps[...].reshape(config.taps, -1).astype(dtype)
        smooth_BLC = causal_convolution(normed_BLC, taps_KC, config.orders[-1], segments_BL, history)
        return v_BLMD + jax.nn.silu(smooth_BLC).reshape(shape), metrics, normed_BLC
