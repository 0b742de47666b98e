"""One transformer block: attention, then feed-forward, each normalised before and added after.

Legend: B batch, L length, D model.
"""

import jax
from flax import nnx

from sparse_lm.layers.feed_forward import Aux, FeedForward, TokenInfo
from sparse_lm.layers.norm import RMSNorm
from sparse_lm.model.attention import Attention, AttentionLayer, Cache
from sparse_lm.parallel.rules import as_tokens


class Block(nnx.Module):
    """A pre-norm block."""

    def __init__(self, attention: Attention, feed_forward: FeedForward, d_model: int, scale: float, epsilon: float):
        self.attention_norm = RMSNorm(d_model, epsilon=epsilon)
        self.attention = AttentionLayer(attention, d_model, scale, epsilon)
        self.feed_forward_norm = RMSNorm(d_model, epsilon=epsilon)
        self.feed_forward = feed_forward.build(d_model)

    def __call__(
        self, x_BLD: jax.Array, info: TokenInfo, angles: tuple[jax.Array, jax.Array], cache: Cache | None
    ) -> tuple[jax.Array, Aux, Cache | None]:
        """Returns (output, what the feed-forward reports, the cache with this call's keys and values)."""
        attended_BLD, cache = self.attention(self.attention_norm(x_BLD), angles, info.segments_BL, cache)
        x_BLD = as_tokens(x_BLD + attended_BLD)
        y_BLD, aux = self.feed_forward(self.feed_forward_norm(x_BLD), info)
        return as_tokens(x_BLD + y_BLD), aux, cache
