"""N-gram embeddings averaged with the token's own at the input, without a gate (LongCat-Flash-Lite, arXiv 2601.21204).

    x <- sqrt(D) * (x + sum_h W_h e_h) / (H + 1)

over the H rows e_h of a token. The factor keeps attention from drowning the embedding, as that paper found necessary.

Legend: B batch, L length, D model, H heads of all orders, X width of what is looked up.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm.config import component
from sparse_lm.layers.projection import DenseProjection, Projection
from sparse_lm.memory.ngram import NgramMemory


@dataclasses.dataclass(frozen=True, kw_only=True)
class NgramEmbedding(NgramMemory):
    """Rows of hashed n-grams averaged with the token embedding (arXiv 2601.21204)."""

    at: tuple[int, ...] = (0,)
    """The input only: before block 0."""
    projection: Projection = component("projection", DenseProjection())
    """What stores the matrices."""

    def check(self) -> None:
        """See Config.check."""
        super().check()
        self.require(self.at == (0,), "at", "(0,): n-grams are averaged with the token embedding")

    def build(self, block: int, d_model: int, epsilon: float) -> "NgramEmbeddingLayer":
        """See Memory.build."""
        return NgramEmbeddingLayer(self, d_model)

    def cost(self, block: int, d_model: int) -> tuple[int, float]:
        """See Memory.cost."""
        parameters, flops = self.projection.cost(self.looked_up, d_model)
        return parameters, float(flops)


class NgramEmbeddingLayer(nnx.Module):
    """The layer at the input."""

    def __init__(self, config: NgramEmbedding, d_model: int):
        self.terms = len(config.orders) * config.heads + 1
        self.value = config.projection.build(config.looked_up, d_model, ("memory", "embed"))

    def __call__(
        self,
        x_BLD: jax.Array,
        rows_BLX: jax.Array,
        segments_BL: jax.Array,
        history: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, Any], jax.Array]:
        """See Memory.build."""
        total_BLD = x_BLD + self.value(rows_BLX.astype(x_BLD.dtype))
        mean_BLD = total_BLD * (math.sqrt(x_BLD.shape[-1]) / self.terms)
        return mean_BLD - x_BLD, {}, jnp.zeros((*x_BLD.shape[:2], 0), x_BLD.dtype)
