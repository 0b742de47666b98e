"""Algorithms: by what weights are chosen, and what becomes of those that are not. Base, and those that only remove weights.

An algorithm keeps masked weights at zero (`behind = False`: the stored weights are the model) or trains them behind the mask
(`behind = True`: the model computes with weights x mask). Its methods take one leaf, or flat {path: array} dictionaries; sharding,
stacked layers and experts are no business of theirs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from sparse_lm.config import Config, ConfigError
from sparse_lm.weight_sparsity.schedules import ConstantSparsity, Periodic
from sparse_lm.weight_sparsity.selection import keep_top
from sparse_lm.weight_sparsity.structures import Layout

Flat = dict[str, jax.Array]
Masks = dict[str, Flat]
"""{name of a mask: {path: bool}}; "mask" is what the model computes with."""
Requested = Callable[[Flat, jax.Array], Flat]
"""({path: scores}, share of the sparsity that is reached) -> {path: units to keep in each group}."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What is fixed about one sparse leaf.

    Attributes:
      path: dotted path.
      layout: its units and groups.
      names: one number a layer of a stacked leaf, or one; from the unrolled path, so that stacked layers draw as unrolled ones.
    """

    path: str
    layout: Layout
    names: int | tuple[int, ...]

    def random(self, key: jax.Array) -> jax.Array:
        """Returns independent uniform numbers of the leaf's shape, the same bits under every sharding."""

        def one(name: jax.Array) -> jax.Array:
            shape = self.layout.shape[1:] if isinstance(self.names, tuple) else self.layout.shape
            return jax.random.uniform(jax.random.fold_in(key, name), shape, jnp.float32)

        names = jnp.asarray(self.names, jnp.uint32)
        return jax.vmap(one)(names) if names.ndim else one(names)


class Start(NamedTuple):
    """What the choice of the first masks may look at.

    Attributes:
      params: all parameters of step 0.
      key: random key.
      requested: see `Requested`.
      progress: share of the sparsity that the run begins with.
      density: of the whole in the end.
      definition: the abstract model.
    """

    params: Flat
    key: jax.Array
    requested: Requested
    progress: jax.Array
    density: float
    definition: Any


class Now(NamedTuple):
    """What a choice of masks may look at.

    Attributes:
      key: random key of the step.
      params: weights after the optimizer's step (see `Algorithm.proposed`).
      grads: gradient by the effective weights, dense, of the whole batch of this step.
      masks: in force until now.
      slots: what the algorithm keeps of its own, {name: {path: array}}.
      drop_fraction: float32, share of the active weights to exchange.
      passed: float32, share of the schedule that has passed.
      requested: {path: scores} -> {path: units to keep in each group}.
      gradient: {path: weights} -> gradient of the batch at them.
    """

    key: jax.Array
    params: Flat
    grads: Flat
    masks: Masks
    slots: dict[str, Flat]
    drop_fraction: jax.Array
    passed: jax.Array
    requested: Callable[[Flat], Flat]
    gradient: Callable[[Flat], Flat]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm(Config):
    """Base of the algorithms; itself a mask that is drawn once at random."""

    behind: ClassVar[bool] = False
    """Whether weights behind the mask are kept and trained."""
    steady: ClassVar[bool] = False
    """Whether masks are chosen all through the run, not only when the schedule changes."""
    grows: ClassVar[bool] = False
    """Whether weights are exchanged: moments of new ones must be reset, which needs an elementwise optimizer."""
    replaces_step: ClassVar[bool] = False
    """Whether a change of masks takes the place of the optimizer's step (RigL, algorithm 1)."""
    needs_gradient: ClassVar[bool] = False
    """Whether every choice needs a gradient, so that the run must begin dense."""

    def check_beside(self, masked: Any) -> None:
        """Raises ConfigError if the algorithm cannot work with the other choices of a `Masked` config."""
        if self.needs_gradient and isinstance(masked.schedule, (ConstantSparsity, Periodic)):
            allowed = f"one_shot, cubic or linear: {type(self).__name__} chooses by a gradient, which there is none of before the first step"
            raise ConfigError("schedule", type(masked.schedule).__name__, allowed)

    def prepare(self, leaves: dict[str, Leaf], definition: Any) -> None:
        """Raises ConfigError if the algorithm cannot prune these leaves."""

    def slots(self, params: Flat) -> dict[str, Flat]:
        """Returns the initial value of what the algorithm keeps of its own: {name: {path: array of the leaf's shape}}."""
        return {}

    def initial(self, leaves: dict[str, Leaf], start: Start) -> Flat:
        """Returns the scores of the mask of step 0."""
        return {path: leaf.random(start.key) for path, leaf in leaves.items()}

    def first(self, leaves: dict[str, Leaf], start: Start) -> Flat:
        """Returns the mask of step 0."""
        return keep_best(leaves, self.initial(leaves, start), lambda scores: start.requested(scores, start.progress))

    def choose(self, leaves: dict[str, Leaf], now: Now) -> Masks:
        """Returns the next masks."""
        return {"mask": keep_best(leaves, self.scores(leaves, now), now.requested)}

    def scores(self, leaves: dict[str, Leaf], now: Now) -> Flat:
        """Returns the scores by which `choose` keeps weights."""
        raise NotImplementedError

    def more_masks(self, leaves: dict[str, Leaf], params: Flat, mask: Flat) -> Masks:
        """Returns the masks besides "mask", from it and the weights."""
        return {}

    def gradient(
        self, grad: jax.Array, weight: jax.Array, masks: dict[str, jax.Array], density: jax.Array
    ) -> jax.Array:
        """Returns what the optimizer sees of one leaf's gradient by the effective weights; `density` is that asked for of the whole."""
        return jnp.where(masks["mask"], grad, 0.0)

    def scale(self, grads: Any) -> Any:
        """Returns the gradient of the whole model, before it is clipped by its norm."""
        return grads

    def rate(self, density: jax.Array) -> jax.Array | float:
        """Returns the factor of the learning rate at the density that is asked for."""
        return 1.0

    def stored(
        self, old: jax.Array, new: jax.Array, before: dict[str, jax.Array], after: dict[str, jax.Array]
    ) -> jax.Array:
        """Returns one leaf's weights after the step, from those before and after the optimizer and the masks before and after."""
        return jnp.where(before["mask"] & after["mask"], new, 0.0)

    def proposed(self, old: jax.Array, new: jax.Array, before: dict[str, jax.Array]) -> jax.Array:
        """Returns the weights that a choice looks at: those that would be stored if masks stayed as they are."""
        return self.stored(old, new, before, before)

    def survives(self, before: dict[str, jax.Array], after: dict[str, jax.Array]) -> jax.Array | None:
        """Returns where the optimizer's moments stay; they are zero elsewhere. None: everywhere."""
        return before["mask"] & after["mask"]

    def accumulate(self, slots: dict[str, Flat], params: Flat, grads: Flat) -> dict[str, Flat]:
        """Returns the algorithm's own arrays after every step; gradients are zero in a step that is not sound."""
        return slots


def keep_best(leaves: dict[str, Leaf], scores: Flat, requested: Callable[[Flat], Flat]) -> Flat:
    """Returns the masks of the units with the largest scores."""
    keys = {path: leaf.layout.keys(scores[path]) for path, leaf in leaves.items()}
    return as_weights(leaves, keep_units(leaves, keys, requested(scores)))


def keep_units(leaves: dict[str, Leaf], keys: Flat, counts: Flat) -> Flat:
    """Returns the units with the largest keys, as many in each group as counted; see `selection.keep_top`."""
    return keep_top(keys, counts, {path: leaf.layout.axes for path, leaf in leaves.items()})


def as_weights(leaves: dict[str, Leaf], units: Flat) -> Flat:
    """Returns the masks of weights of masks of units."""
    return {path: leaf.layout.weights(units[path]) for path, leaf in leaves.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static(Algorithm):
    """A random mask; a schedule removes weights at random."""

    def scores(self, leaves: dict[str, Leaf], now: Now) -> Flat:
        """See Algorithm.scores."""
        return {
            path: jnp.where(now.masks["mask"][path], 1.0 + leaf.random(now.key), 0.0) for path, leaf in leaves.items()
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Magnitude(Algorithm):
    """The largest weights stay (gradual magnitude pruning; Zhu and Gupta 2017, arXiv 1710.01878).

    Removed weights are zero and stay zero: only a schedule that lowers the sparsity again gives them back.
    With the schedule `one_shot` on a trained model (`start_from`) this is pruning after training.
    """

    def initial(self, leaves: dict[str, Leaf], start: Start) -> Flat:
        """See Algorithm.initial."""
        return magnitudes(leaves, start.params)

    def scores(self, leaves: dict[str, Leaf], now: Now) -> Flat:
        """See Algorithm.scores."""
        return magnitudes(leaves, now.params)


def magnitudes(leaves: dict[str, Leaf], params: Flat) -> Flat:
    """Returns the magnitude of every weight of the sparse leaves."""
    return {path: jnp.abs(params[path]) for path in leaves}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lottery(Magnitude):
    """A lottery ticket: the largest trained weights, set back to early values (Frankle and Carbin 2019, arXiv 1803.03635).

    `start_from.run` names the trained run, `start_from.rewind` the step to which weights go back (Frankle et al. 2020, arXiv 1912.05671).
    A run that was itself a ticket is pruned further: its zeros stay zero. The paper's threshold is global (the allocation `global`,
    normalize off). Controls: rewind -1 for fresh values under the same mask; `static` for a random mask.
    """

    def check_beside(self, masked: Any) -> None:
        """See Algorithm.check_beside."""
        super().check_beside(masked)
        if not isinstance(masked.schedule, ConstantSparsity):
            raise ConfigError(
                "schedule", type(masked.schedule).__name__, "constant: the mask of a ticket does not change"
            )
