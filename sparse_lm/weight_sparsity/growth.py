"""Algorithms that exchange weights: some active ones are dropped, as many others grow from zero.

    algorithm   drops                                grows
    set         smallest magnitudes                  at random
    rigl        smallest magnitudes                  largest gradients of this batch
    chts        magnitudes, by soft sampling         topological link scores, by soft sampling
    srigl       smallest magnitudes of a matrix      largest gradients, as many for every neuron; ablates neurons

A weight that has just been dropped may grow again in the same exchange; then it keeps its value and moments. All others grow with
value and moments zero.

Legend: I inputs, O outputs.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from sparse_lm.config import ConfigError
from sparse_lm.weight_sparsity.algorithms import Algorithm, Flat, Leaf, Masks, Now, Start, as_weights, keep_units
from sparse_lm.weight_sparsity.selection import NEVER, keep_top, share_of
from sparse_lm.weight_sparsity.structures import Block, ConstantFanIn, Neuron


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange(Algorithm):
    """Base of the algorithms that drop and grow inside each group; begins with a random mask."""

    grows: ClassVar[bool] = True

    def kept_scores(self, leaf: Leaf, now: Now) -> jax.Array:
        """Returns the scores by which active weights survive."""
        return jnp.abs(now.params[leaf.path])

    def grown_scores(self, leaf: Leaf, now: Now, survivors: jax.Array) -> jax.Array:
        """Returns the scores by which others grow, given the mask of the survivors."""
        raise NotImplementedError

    def choose(self, leaves: dict[str, Leaf], now: Now) -> Masks:
        """Drops a share of each group's active units and grows up to the requested number."""
        units = {path: leaf.layout.units(now.masks["mask"][path]) for path, leaf in leaves.items()}
        wanted, stay = now.requested({}), {}
        for path, leaf in leaves.items():
            at_most = jnp.minimum(leaf.layout.count(units[path]), wanted[path])
            stay[path] = at_most - share_of(at_most, now.drop_fraction)
        kept_keys = {
            path: jnp.where(units[path], leaf.layout.keys(self.kept_scores(leaf, now)), NEVER)
            for path, leaf in leaves.items()
        }
        survivors = keep_units(leaves, kept_keys, stay)
        masks = as_weights(leaves, survivors)
        grown_keys = {
            path: jnp.where(survivors[path], NEVER, leaf.layout.keys(self.grown_scores(leaf, now, masks[path])))
            for path, leaf in leaves.items()
        }
        grown = keep_units(leaves, grown_keys, {path: wanted[path] - stay[path] for path in leaves})
        return {"mask": as_weights(leaves, {path: survivors[path] | grown[path] for path in leaves})}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SET(Exchange):
    """Sparse evolutionary training: random growth (Mocanu et al. 2018, arXiv 1707.04780)."""

    def grown_scores(self, leaf: Leaf, now: Now, survivors: jax.Array) -> jax.Array:
        """See Exchange.grown_scores."""
        return leaf.random(now.key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RigL(Exchange):
    """Growth by the gradient of the batch; the exchange takes the place of the step (Evci et al. 2020, arXiv 1911.11134, algorithm 1)."""

    replaces_step: ClassVar[bool] = True

    def grown_scores(self, leaf: Leaf, now: Now, survivors: jax.Array) -> jax.Array:
        """See Exchange.grown_scores."""
        return jnp.abs(now.grads[leaf.path])


@dataclasses.dataclass(frozen=True, kw_only=True)
class CHTs(Exchange):
    """Cannistraci-Hebb training with soft sampling: topology says where to grow (Zhang et al. 2025, arXiv 2501.19107).

    Weights survive by sampling without replacement with probability proportional to |w|^t, t rising from 1; new links are sampled
    in proportion to a score over paths of length three: CH2-L3n (`link_scores`) or CH3-L3p (`path_scores`). Sampling without
    replacement is a choice of the largest log probability + Gumbel noise. The first links are a bipartite receptive field: an output
    reads inputs near its own place, with a randomness that can be anything up to uniform.
    """

    links: Literal["node", "path"] = "node"
    """Score of new links: by node in a few matrix products, or by path, which takes I I O O operations and is for small matrices."""
    randomness: float = 1.0
    """Of the first links: 1 draws them uniformly; towards 0 each output reads its nearest inputs."""

    removal: Literal["magnitude", "relative"] = "magnitude"
    """By |w|, or by |w| relative to the sums of |w| over its row and over its column."""
    sharpening: float = 2.0
    """How much t has risen when nothing is exchanged any more."""

    def check(self) -> None:
        """See Config.check."""
        self.require(self.sharpening >= 0.0, "sharpening", "0 or above")
        self.require(0.0 < self.randomness <= 1.0, "randomness", "above 0, at most 1")

    def initial(self, leaves: dict[str, Leaf], start: Start) -> Flat:
        """See Algorithm.initial."""
        return {path: receptive_field(leaf.random(start.key), self.randomness) for path, leaf in leaves.items()}

    def check_beside(self, masked: Any) -> None:
        """See Algorithm.check_beside."""
        super().check_beside(masked)
        if isinstance(masked.structure, (Block, Neuron)):
            raise ConfigError(
                "structure", type(masked.structure).__name__, "one of single weights: links are scored one by one"
            )

    def kept_scores(self, leaf: Leaf, now: Now) -> jax.Array:
        """See Exchange.kept_scores."""
        size = jnp.abs(now.params[leaf.path])
        if self.removal == "relative":
            rows, columns = jnp.sum(size, axis=-1, keepdims=True), jnp.sum(size, axis=-2, keepdims=True)
            size = size / jnp.maximum(rows, 1e-30) + size / jnp.maximum(columns, 1e-30)
        return sampled((1.0 + self.sharpening * now.passed) * _log(size), leaf.random(jax.random.fold_in(now.key, 0)))

    def grown_scores(self, leaf: Leaf, now: Now, survivors: jax.Array) -> jax.Array:
        """See Exchange.grown_scores."""
        scores = link_scores if self.links == "node" else path_scores
        return sampled(_log(scores(survivors)), leaf.random(jax.random.fold_in(now.key, 1)))


def _log(x: jax.Array) -> jax.Array:
    """Logarithm that is finite at 0: what cannot be sampled comes after all else, in random order."""
    return jnp.log(jnp.maximum(x, 1e-30))


def sampled(log_weight: jax.Array, uniform: jax.Array) -> jax.Array:
    """Returns scores whose k largest are a sample of k without replacement, in proportion to exp(log_weight) (Gumbel top-k)."""
    tiny = jnp.finfo(jnp.float32).tiny
    return log_weight - jnp.log(-jnp.log(jnp.maximum(uniform, tiny)))


def link_scores(mask: jax.Array) -> jax.Array:
    """CH2-L3n of every possible link of a bipartite network, float32 [..., I, O].

    A link (i, j) is likely if i shares many outputs with inputs i' that reach j, and these have few outputs that i lacks:

        sum over i' with c(i, i') > 0 of  mask(i', j) (c(i, i') + 1) / max(1, degree(i') - c(i, i'))

    with c the number of common neighbours, plus the same with inputs and outputs exchanged.
    """
    x_IO = mask.astype(jnp.float32)

    def one_side(x_IO: jax.Array) -> jax.Array:
        exact = jax.lax.Precision.HIGHEST
        common_II = jnp.einsum("...io,...ko->...ik", x_IO, x_IO, precision=exact)
        degree_I = jnp.sum(x_IO, axis=-1)[..., None, :]
        near_II = jnp.where(common_II > 0, (common_II + 1.0) / jnp.maximum(degree_I - common_II, 1.0), 0.0)
        return jnp.einsum("...ik,...ko->...io", near_II, x_IO, precision=exact)

    return one_side(x_IO) + jnp.swapaxes(one_side(jnp.swapaxes(x_IO, -2, -1)), -2, -1)


def path_scores(mask: jax.Array) -> jax.Array:
    """CH3-L3p of every link that a bipartite network lacks, float32 [..., I, O]; other entries mean nothing.

    A link (i, j) is likely if many paths i - j' - i' - j lead there whose inner nodes have few links out of the community of all such
    paths. That community holds every neighbour that j' shares with j and every one that i' shares with i, so the links that leave it,
    plus one, number degree(j') - c(j', j) and degree(i') - c(i', i), with c as in `link_scores`:

        sum over paths of  1 / sqrt((degree(j') - c(j', j)) (degree(i') - c(i', i)))
    """
    if mask.ndim > 2:
        return jax.vmap(path_scores)(mask)
    x_IO = mask.astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST

    def weight(x: jax.Array) -> jax.Array:
        """One over the root of the links of the first node that leave its community with the second."""
        leaving = jnp.sum(x, axis=1)[:, None] - jnp.matmul(x, x.T, precision=exact)
        return jax.lax.rsqrt(jnp.maximum(leaving, 1.0))

    of_inputs_II, of_outputs_OO = weight(x_IO), weight(x_IO.T)

    def one_input(arguments: tuple[jax.Array, jax.Array]) -> jax.Array:
        own_O, weight_I = arguments
        paths_IO = jnp.matmul(x_IO * own_O, of_outputs_OO, precision=exact)
        return jnp.sum(weight_I[:, None] * x_IO * paths_IO, axis=0)

    return jax.lax.map(one_input, (x_IO, of_inputs_II.T))


def receptive_field(uniform: jax.Array, randomness: float) -> jax.Array:
    """Returns scores whose largest are links of a bipartite receptive field, float32 [..., I, O].

    Inputs and outputs stand evenly on one circle. Links are drawn without replacement with probability proportional to
    (1 + d)^-((1 - r) / r), d their distance in steps of the denser side and r the randomness.

    Args:
      uniform: independent numbers from 0 to 1, [..., I, O].
      randomness: r, above 0 and at most 1.
    """
    inputs, outputs = uniform.shape[-2:]
    apart_IO = jnp.abs(jnp.arange(inputs)[:, None] / inputs - jnp.arange(outputs) / outputs)
    distance_IO = max(inputs, outputs) * jnp.minimum(apart_IO, 1.0 - apart_IO)
    return sampled(-(1.0 - randomness) / randomness * jnp.log1p(distance_IO), uniform)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SRigL(Algorithm):
    """RigL with equal fan-in and without neurons that have too few weights worth keeping (Lasby et al. 2024, arXiv 2305.02299).

    A weight is salient if it is active and would survive, or inactive and among the largest gradients, both by matrix. Outputs with
    too few salient weights are ablated, and the others share what is freed. The fan-in is a whole number, so that up to one
    weight an output stays unused.
    """

    grows: ClassVar[bool] = True
    replaces_step: ClassVar[bool] = True

    salient: float = 0.3
    """Outputs with fewer salient weights than this share of the requested fan-in are ablated."""
    least: float = 0.1
    """Share of the outputs that is never ablated."""

    def check(self) -> None:
        """See Config.check."""
        self.require(0.0 <= self.salient <= 1.0, "salient", "a share from 0 to 1")
        self.require(0.0 < self.least <= 1.0, "least", "a share above 0, at most 1")

    def check_beside(self, masked: Any) -> None:
        """See Algorithm.check_beside."""
        super().check_beside(masked)
        if not isinstance(masked.structure, ConstantFanIn):
            raise ConfigError("structure", type(masked.structure).__name__, "constant_fan_in with the algorithm srigl")

    def choose(self, leaves: dict[str, Leaf], now: Now) -> Masks:
        """See Algorithm.choose."""
        whole, column = dict.fromkeys(leaves, (-2, -1)), dict.fromkeys(leaves, (-2,))
        fan_in = now.requested({})
        active = {path: now.masks["mask"][path] for path in leaves}
        size = {path: magnitude_bits(now.params[path]) for path in leaves}
        slope = {path: magnitude_bits(now.grads[path]) for path in leaves}
        total, stay, leave = {}, {}, {}
        for path, mask in active.items():
            total[path] = fan_in[path] * mask.shape[-1]
            there = jnp.minimum(_count(mask, (-2, -1)), total[path])
            leave[path] = share_of(there, now.drop_fraction)
            stay[path] = there - leave[path]
        survive = keep_top({p: jnp.where(active[p], size[p] + 1, NEVER) for p in leaves}, stay, whole)
        grow = keep_top({p: jnp.where(active[p], NEVER, slope[p] + 1) for p in leaves}, leave, whole)
        worth = {path: _count(survive[path] | grow[path], (-2,)) for path in leaves}
        alive_count, alive_keys = {}, {}
        for path in leaves:
            enough = worth[path] >= jnp.maximum(1.0, self.salient * fan_in[path])
            least = max(1, round(self.least * worth[path].shape[-1]))
            alive_count[path] = jnp.maximum(_count(enough, (-1,)), least)
            alive_keys[path] = worth[path].astype(jnp.uint32) + 1
        alive = keep_top(alive_keys, alive_count, dict.fromkeys(leaves, (-1,)))
        keys, count = {}, {}
        for path in leaves:
            # Survivors before all others, each in the order of their magnitude.
            keys[path] = jnp.where(survive[path], size[path] | jnp.uint32(1 << 31), slope[path])
            share = jnp.minimum(total[path] // alive_count[path], active[path].shape[-2])
            count[path] = jnp.where(alive[path], share, 0)
        return {"mask": keep_top(keys, count, column)}


def magnitude_bits(x: jax.Array) -> jax.Array:
    """Returns the bits of |x|, uint32 below 2^31, in the order of the magnitudes."""
    return jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.uint32)


def _count(mask: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sum(mask, axis=axes, keepdims=True, dtype=jnp.int32)
