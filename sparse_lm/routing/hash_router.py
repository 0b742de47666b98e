"""Experts by a fixed hash of the token id: nothing is learnt and nothing can collapse.

Legend: G routing groups, S tokens of a group, E experts, K experts of a token.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.config import ConfigError
from sparse_lm.routing.router import Router, RouterInputs, Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class HashRouter(Router):
    """K experts for each token id, each weighted 1 / K (hash layers, Roller et al. 2021, arXiv 2106.04426, random hash)."""

    columns: ClassVar[int] = 0

    k: int = 1
    """Experts per token."""
    seed: int = 0
    """Which hash."""

    def check(self) -> None:
        """See Config.check."""
        super().check()
        self.require(self.k >= 1, "k", "at least 1")
        self.require(0 <= self.seed < 2**31, "seed", "0 to 2**31 - 1")
        self.require(not self.frozen, "frozen", "False: a hash has nothing to freeze")
        self.require(self.balance_over == "group", "balance_over", "group: a hash has no balance loss")

    def check_experts(self, experts: int) -> None:
        """See Router.check_experts."""
        if self.k > experts:
            raise ConfigError("router.k", self.k, f"at most the number of experts, {experts}")

    def experts_per_token(self, experts: int) -> float:
        """See Router.experts_per_token."""
        return float(self.k)

    def choose(self, scores: Scores, inputs: RouterInputs, state: dict[str, jax.Array]) -> jax.Array:
        """Ranks the experts by a hash of (token id, expert), so that the K experts of a token differ."""
        experts = scores.score_GSE.shape[-1]
        ids_GS1 = inputs.tokens_GS[..., None].astype(jnp.uint32)
        mixed_GSE = mix(
            ids_GS1 * jnp.uint32(experts) + jnp.arange(experts, dtype=jnp.uint32) + mix(jnp.uint32(self.seed))
        )
        return jax.lax.top_k((mixed_GSE >> 1).astype(jnp.int32), self.k)[1]

    def weigh(self, score_GSE: jax.Array, expert_GSR: jax.Array) -> jax.Array:
        """See Router.weigh."""
        return jnp.full(expert_GSR.shape, 1.0 / self.k, jnp.float32)


def mix(x: jax.Array) -> jax.Array:
    """Mixes the bits of uint32 numbers one-to-one: multiplications by odd numbers and shifted exclusive ors."""
    x = x + jnp.uint32(0x9E3779B9)
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0x735A2D97)
    return x ^ (x >> 15)
