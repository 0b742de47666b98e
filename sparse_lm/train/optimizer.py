"""Optimizers: from gradients to the direction of the next step, by groups read off the dims and paths of the leaves.

`Optimizer.build(dims)` returns a pure (init, update) pair. `update(grads, state, params)` returns, for every leaf,

    multiplier * (direction(grads) + weight_decay * params)          (decoupled decay: Loshchilov and Hutter 2019, arXiv 1711.05101)

without the global learning rate: the trainer applies `params - learning_rate * updates`, the learning rate traced. States are
plain nested dicts that end in the paths of the parameters (see `state_dims`); everything can be jitted, vmapped over the
members of a population, and a stacked step equals the unrolled one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparse_lm.config import Config, ConfigError, component
from sparse_lm.layers.parameter import Dims, map_leaves
from sparse_lm.layers.parametrization import UpdateKind
from sparse_lm.layers.tree_paths import Role, Tree, core_dims, flatten, matches, role
from sparse_lm.train.schedule import Cosine, Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group(Config):
    """Leaves that are treated apart, named by a glob over their paths; the first group that matches a leaf counts."""

    path: str
    """Glob over dotted paths, e.g. `*.router.*`; also tried without layer numbers, `*` crosses dots."""
    learning_rate: float = 1.0
    """Multiplier of the learning rate."""
    weight_decay: float | None = None
    """Weight decay of these leaves; none: as without the group."""

    def check(self) -> None:
        self.require(bool(self.path), "path", "a glob over paths")
        self.require(self.learning_rate >= 0.0, "learning_rate", "a multiplier >= 0")
        self.require(self.weight_decay is None or self.weight_decay >= 0.0, "weight_decay", "none, or a number >= 0")


class LeafPlan(NamedTuple):
    """What happens to one leaf: one row of the table that a run prints."""

    role: Role
    kind: UpdateKind
    multiplier: float
    weight_decay: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer(Config):
    """Base of the optimizers: the peak learning rate, its schedule, decay and groups."""

    elementwise: ClassVar[bool] = False
    """Whether each weight's step depends on that weight alone: packed sparse weights need it."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Schedule = component("schedule", Cosine())
    """Multiplier of the peak learning rate over the run."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices, head and router; norms, biases and embeddings have none."""
    scale_decay: bool = True
    """Whether a leaf's learning-rate multiplier also scales its decay (under muP: decay falls as 1/width, found nearly
    optimal in arXiv 2512.05620); off: the decay of a step does not depend on width."""
    groups: tuple[Group, ...] = ()
    """Exceptions by path, the first match counts."""

    def check(self) -> None:
        self.require(self.learning_rate > 0.0, "learning_rate", "a number > 0")
        self.require(self.weight_decay >= 0.0, "weight_decay", "a number >= 0")

    def direction(self, dims: Tree) -> optax.GradientTransformation:
        """Returns the (init, update) pair without decay and multipliers."""
        raise NotImplementedError

    def update_kind(self, dims: Dims) -> UpdateKind:
        """Returns the kind of update that a leaf of these dims gets."""
        raise NotImplementedError

    def own_multiplier(self, dims: Dims) -> float:
        """Returns the optimizer's own learning-rate multiplier for a leaf of these dims."""
        return 1.0

    def schedule_at(self, step: Any, total_steps: int) -> Any:
        """Returns the schedule's multiplier; the learning rate of a step is this times `learning_rate`."""
        return self.schedule.at(step, total_steps)

    def leaf_plans(self, dims: Tree, learning_rate_scales: Tree | None = None) -> dict[str, LeafPlan]:
        """Returns {path: LeafPlan}: the decisions about every leaf.

        Raises:
          ConfigError: for a group that matches no leaf.
        """
        scales = flatten(learning_rate_scales) if learning_rate_scales is not None else {}
        plans: dict[str, LeafPlan] = {}
        for path, leaf_dims in flatten(dims).items():
            leaf_role = role(leaf_dims)
            decay = 0.0 if leaf_role in ("vector", "embedding") else self.weight_decay
            multiplier = self.own_multiplier(leaf_dims) * float(scales.get(path, 1.0))
            for group in self.groups:
                if matches(group.path, path):
                    multiplier *= group.learning_rate
                    decay = decay if group.weight_decay is None else group.weight_decay
                    break
            plans[path] = LeafPlan(leaf_role, self.update_kind(leaf_dims), multiplier, decay)
        for i, group in enumerate(self.groups):
            if not any(matches(group.path, path) for path in plans):
                allowed = f"a glob that matches a path, such as {', '.join(list(plans)[:3])}"
                raise ConfigError(f"groups.{i}.path", group.path, allowed)
        return plans

    def build(self, dims: Tree, learning_rate_scales: Tree | None = None) -> optax.GradientTransformation:
        """Returns the pure (init, update) pair for parameters of these dims.

        Args:
          dims: nested dict of the structure of the parameters, leaves tuples of dim names.
          learning_rate_scales: same structure, leaves floats (see `parametrization.learning_rate_scales`); none: all 1.

        Returns:
          `init(params) -> state` and `update(grads, state, params) -> (updates, state)`, updates to be multiplied by the
          learning rate and subtracted.
        """
        plans = self.leaf_plans(dims, learning_rate_scales)
        inner = self.direction(dims)

        def update(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
            directions, state = inner.update(grads, state, params)

            def finish(path: str, direction: jax.Array, weight: jax.Array) -> jax.Array:
                plan = plans[path]
                if not plan.weight_decay:
                    return _times(direction, plan.multiplier)
                if self.scale_decay:
                    return _times(direction + plan.weight_decay * weight, plan.multiplier)
                return _times(direction, plan.multiplier) + plan.weight_decay * weight

            return map_leaves(finish, directions, params), state

        return optax.GradientTransformation(inner.init, update)


def _times(x: jax.Array, multiplier: float) -> jax.Array:
    return x if multiplier == 1.0 else multiplier * x


def adam_direction(
    beta1: float, beta2: float, epsilon: float, first_moment_dtype: str = "float32"
) -> optax.GradientTransformation:
    """Adam's direction (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1) by optax, its state {count, mu, nu} a plain dict."""
    inner = optax.scale_by_adam(b1=beta1, b2=beta2, eps=epsilon, mu_dtype=jnp.dtype(first_moment_dtype))

    def init(params: Tree) -> Tree:
        return inner.init(params)._asdict()

    def update(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        directions, new_state = inner.update(grads, optax.ScaleByAdamState(**state), params)
        return directions, new_state._asdict()

    return optax.GradientTransformation(init, update)


def check_adam(config: Any) -> None:
    """Raises ConfigError when beta1, beta2 or epsilon of a config are impossible."""
    config.require(0.0 <= config.beta1 < 1.0, "beta1", "a number from 0 to below 1")
    config.require(0.0 <= config.beta2 < 1.0, "beta2", "a number from 0 to below 1")
    config.require(config.epsilon > 0.0, "epsilon", "a number > 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

    elementwise: ClassVar[bool] = True

    beta1: float = 0.9
    """Decay of the average of gradients."""
    beta2: float = 0.95
    """Decay of the average of squared gradients."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the average of gradients; bfloat16 saves 2 bytes a parameter."""

    def check(self) -> None:
        super().check()
        check_adam(self)

    def direction(self, dims: Tree) -> optax.GradientTransformation:
        return adam_direction(self.beta1, self.beta2, self.epsilon, self.first_moment_dtype)

    def update_kind(self, dims: Dims) -> UpdateKind:
        return "adam"


def state_dims(state: Tree, dims: Tree) -> Tree:
    """Returns the logical dims of every array of an optimizer state, for shardings and for stacking.

    An array whose path in the state ends with a parameter's path carries that parameter's dims; under `row` the last one
    is missing, under `column` the one before it (Adafactor's factors). Counters have no dims.

    Args:
      state: from `init`, arrays or shapes.
      dims: of the parameters.
    """
    by_path = flatten(dims)

    def of(path: str, _: Any) -> Dims:
        parts = path.split(".")
        for start in range(1, len(parts)):
            leaf_dims = by_path.get(".".join(parts[start:]))
            if leaf_dims is not None:
                if parts[start - 1] == "row":
                    return leaf_dims[:-1]
                return leaf_dims[:-2] + leaf_dims[-1:] if parts[start - 1] == "column" else leaf_dims
        return ()

    return map_leaves(of, state)


def core_axes(dims: Dims) -> tuple[int, ...]:
    """Returns the axes, counted from the end, of one parameter without its batch dims."""
    return tuple(range(-len(core_dims(dims)), 0))


def global_norm_by_group(grads: Mapping[Any, Any], depth: int = 1) -> dict[str, jax.Array]:
    """Returns {first `depth` parts of the path: fp32 norm of all leaves below}; names the culprits of a NaN."""
    squares: dict[str, jax.Array] = {}
    for path, leaf in flatten(grads).items():
        group = ".".join(path.split(".")[:depth])
        squares[group] = squares.get(group, jnp.float32(0.0)) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    return {group: jnp.sqrt(square) for group, square in squares.items()}


def ema_update(ema: Any, params: Any, decay: float | jax.Array, step: Any) -> Any:
    """Returns the exponential moving average of the parameters after this step.

    decay_t = min(decay, (1 + step) / (10 + step)): early averages forget the initial values (the rule of TensorFlow's
    ExponentialMovingAverage with num_updates). Start from a copy of the initial parameters; step counts from 0.
    """
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda average, new: average + (1.0 - rate) * (new - average), ema, params)
