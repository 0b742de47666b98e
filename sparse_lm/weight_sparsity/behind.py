"""Algorithms that keep training the weights behind the mask: the model computes with weights x mask.

    algorithm    chooses by             the optimizer sees
    ste          |w|                    the whole gradient, as if there were no mask (straight-through estimator)
    sr_ste       |w|                    that, plus a decay of the weights behind the mask
    top_k_ast    |w|                    the gradient on a larger set, plus a penalty
    movement     -sum of grad x weight  the gradient under the mask

and `abs_top_k`, which sets what it does not choose to zero after every step but keeps dense gradients and moments.
They need the memory of dense training. Evaluation and export use weights x mask.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.config import ConfigError
from sparse_lm.weight_sparsity.algorithms import (
    Flat,
    Leaf,
    Magnitude,
    Masks,
    Now,
    Start,
    as_weights,
    keep_best,
    keep_units,
    magnitudes,
)
from sparse_lm.weight_sparsity.selection import NEVER, keep_top
from sparse_lm.weight_sparsity.structures import Block, Neuron, Unstructured


@dataclasses.dataclass(frozen=True, kw_only=True)
class STE(Magnitude):
    """Magnitude masks with straight-through gradients: a masked weight goes on training and may come back."""

    behind: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    def gradient(
        self, grad: jax.Array, weight: jax.Array, masks: dict[str, jax.Array], density: jax.Array
    ) -> jax.Array:
        """See Algorithm.gradient."""
        return grad

    def stored(
        self, old: jax.Array, new: jax.Array, before: dict[str, jax.Array], after: dict[str, jax.Array]
    ) -> jax.Array:
        """See Algorithm.stored."""
        return new

    def survives(self, before: dict[str, jax.Array], after: dict[str, jax.Array]) -> jax.Array | None:
        """See Algorithm.survives."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SRSTE(STE):
    """Straight-through gradients with sparse-refined decay (Zhou et al. 2021, arXiv 2102.04010, eq. 9)."""

    decay: float = 2e-4
    """Factor of the masked weights that is added to their gradient."""

    def check(self) -> None:
        """See Config.check."""
        self.require(self.decay >= 0.0, "decay", "0 or above")

    def gradient(
        self, grad: jax.Array, weight: jax.Array, masks: dict[str, jax.Array], density: jax.Array
    ) -> jax.Array:
        """See Algorithm.gradient."""
        return grad + self.decay * jnp.where(masks["mask"], 0.0, weight)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKAST(STE):
    """Forward on the top share A, backward on a larger set B (Jayakumar et al. 2020, arXiv 2106.03517).

    The penalty is |w|^2 / 2 on A and |w|^2 / (2 D) on B without A, with D the density of A. Weights outside B are not touched, by
    decay and moments neither.
    """

    extra: float = 0.1
    """Density of B above that of A."""
    penalty: float = 1e-4
    """Coefficient of the penalty."""

    def check(self) -> None:
        """See Config.check."""
        self.require(0.0 <= self.extra < 1.0, "extra", "a fraction from 0 to below 1")
        self.require(self.penalty >= 0.0, "penalty", "0 or above")

    def more_masks(self, leaves: dict[str, Leaf], params: Flat, mask: Flat) -> Masks:
        """The backward set: as many more of the largest weights of each group."""
        keys, counts = {}, {}
        for path, leaf in leaves.items():
            layout = leaf.layout
            more = round(self.extra * layout.group_units)
            keys[path] = layout.keys(jnp.abs(params[path]))
            counts[path] = jnp.minimum(layout.count(layout.units(mask[path])) + more, layout.group_units)
        return {"backward": as_weights(leaves, keep_units(leaves, keys, counts))}

    def choose(self, leaves: dict[str, Leaf], now: Now) -> Masks:
        """See Algorithm.choose."""
        masks = super().choose(leaves, now)
        return {**masks, **self.more_masks(leaves, now.params, masks["mask"])}

    def gradient(
        self, grad: jax.Array, weight: jax.Array, masks: dict[str, jax.Array], density: jax.Array
    ) -> jax.Array:
        """See Algorithm.gradient."""
        pull = self.penalty * jnp.where(masks["mask"], weight, weight / density)
        return jnp.where(masks["backward"], grad + pull, 0.0)

    def stored(
        self, old: jax.Array, new: jax.Array, before: dict[str, jax.Array], after: dict[str, jax.Array]
    ) -> jax.Array:
        """See Algorithm.stored."""
        return jnp.where(before["backward"], new, old)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Movement(STE):
    """Weights that move away from zero stay (Sanh et al. 2020, arXiv 2005.07683, section 3).

    Scores are minus the sum of gradient x weight over all steps, the gradient by the effective weight; their learning rate does not
    change their order.
    """

    def slots(self, params: Flat) -> dict[str, Flat]:
        """See Algorithm.slots."""
        return {"scores": {path: jnp.zeros(leaf.shape, jnp.float32) for path, leaf in params.items()}}

    def accumulate(self, slots: dict[str, Flat], params: Flat, grads: Flat) -> dict[str, Flat]:
        """See Algorithm.accumulate."""
        return {"scores": {path: score - grads[path] * params[path] for path, score in slots["scores"].items()}}

    def check_beside(self, masked: Any) -> None:
        """See Algorithm.check_beside."""
        super().check_beside(masked)
        if isinstance(masked.structure, (Block, Neuron)):
            allowed = "one of single weights: scores have a sign, which a sum over a block would lose"
            raise ConfigError("structure", type(masked.structure).__name__, allowed)

    def scores(self, leaves: dict[str, Leaf], now: Now) -> Flat:
        """See Algorithm.scores."""
        return now.slots["scores"]

    def gradient(
        self, grad: jax.Array, weight: jax.Array, masks: dict[str, jax.Array], density: jax.Array
    ) -> jax.Array:
        """See Algorithm.gradient."""
        return jnp.where(masks["mask"], grad, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbsTopK(Magnitude):
    """After every step all but the largest weights are zero; gradients and moments stay dense (Gao et al. 2025, arXiv 2511.13653).

    As in the paper with the schedule `linear` (every 1, end 0.5), AdamW with epsilon 0.1, and `roles` with embedding and head.
    """

    steady: ClassVar[bool] = True

    least_fan_in: int = 4
    """Weights of every output that stay whatever their size; they count in the density, and more than it if there are too many."""
    clip_rms: float | None = 1.0
    """Root mean square of the whole gradient above which it is scaled down; None: never."""
    raise_rate: bool = True
    """Whether the learning rate is divided by the root of the density."""

    def check(self) -> None:
        """See Config.check."""
        self.require(self.least_fan_in >= 0, "least_fan_in", "0 or above")
        self.require(self.clip_rms is None or self.clip_rms > 0, "clip_rms", "None or above 0")

    def check_beside(self, masked: Any) -> None:
        """See Algorithm.check_beside."""
        super().check_beside(masked)
        if self.least_fan_in and not isinstance(masked.structure, Unstructured):
            raise ConfigError("algorithm.least_fan_in", self.least_fan_in, "0, unless structure is unstructured")

    def choose(self, leaves: dict[str, Leaf], now: Now) -> Masks:
        """See Algorithm.choose."""
        return {"mask": self.with_least(leaves, now.params, now.requested(magnitudes(leaves, now.params)))}

    def first(self, leaves: dict[str, Leaf], start: Start) -> Flat:
        """See Algorithm.first."""
        counts = start.requested(magnitudes(leaves, start.params), start.progress)
        return self.with_least(leaves, start.params, counts)

    def with_least(self, leaves: dict[str, Leaf], params: Flat, counts: Flat) -> Flat:
        """Returns the masks of the largest weights, among them the `least_fan_in` largest of every output."""
        scores = magnitudes(leaves, params)
        if not self.least_fan_in:
            return keep_best(leaves, scores, lambda _: counts)
        keys = {path: leaf.layout.keys(scores[path]) for path, leaf in leaves.items()}
        least = {path: jnp.int32(min(self.least_fan_in, array.shape[-2])) for path, array in keys.items()}
        sure = keep_top(keys, least, dict.fromkeys(keys, (-2,)))
        counts = {path: jnp.maximum(count, leaves[path].layout.count(sure[path])) for path, count in counts.items()}
        keys = {path: jnp.where(sure[path], ~NEVER, array) for path, array in keys.items()}
        return as_weights(leaves, keep_units(leaves, keys, counts))

    def gradient(
        self, grad: jax.Array, weight: jax.Array, masks: dict[str, jax.Array], density: jax.Array
    ) -> jax.Array:
        """See Algorithm.gradient."""
        return grad

    def scale(self, grads: Any) -> Any:
        """See Algorithm.scale."""
        if self.clip_rms is None:
            return grads
        leaves = jax.tree.leaves(grads)
        squares = sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves)
        root = jnp.sqrt(squares / sum(leaf.size for leaf in leaves))
        return jax.tree.map(lambda leaf: leaf * jnp.minimum(1.0, self.clip_rms / jnp.maximum(root, 1e-30)), grads)

    def rate(self, density: jax.Array) -> jax.Array | float:
        """See Algorithm.rate."""
        return jax.lax.rsqrt(density) if self.raise_rate else 1.0

    def stored(
        self, old: jax.Array, new: jax.Array, before: dict[str, jax.Array], after: dict[str, jax.Array]
    ) -> jax.Array:
        """See Algorithm.stored."""
        return jnp.where(after["mask"], new, 0.0)

    def proposed(self, old: jax.Array, new: jax.Array, before: dict[str, jax.Array]) -> jax.Array:
        """See Algorithm.proposed."""
        return new

    def survives(self, before: dict[str, jax.Array], after: dict[str, jax.Array]) -> jax.Array | None:
        """See Algorithm.survives."""
        return None
