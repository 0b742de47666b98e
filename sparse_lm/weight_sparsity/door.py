"""The door between weight sparsity and the training step: what the step calls, and what it calls when weights are dense.

A `WeightSparsity` config builds a `Sparsifier`: pure functions that the step calls in every step at the same places, whatever
they do. Their state is one nested dict, `TrainState.sparsity`.

    params, model_state, sparsity = init(params, model_state, key)
    weights   = forward_params(params, sparsity, step)            what the model computes with; the step differentiates by it
    grads     = optimizer_grads(grads, params, sparsity, step)    what the optimizer sees
    change    = update(moment)                                    after the optimizer: masks, topology, parameters, moments
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax

from sparse_lm.config import Config, ConfigError

if TYPE_CHECKING:  # rooms above this one
    from sparse_lm.model.definition import Definition
    from sparse_lm.train.initialize import StartFrom
    from sparse_lm.train.optimizer import Optimizer

Tree = dict[str, Any]


class Moment(NamedTuple):
    """One step of training as `Sparsifier.update` sees it.

    Attributes:
      step: int32, steps finished before this one; the same for all members of a population, so that conditions on it stay conditions.
      finite: bool, whether the step is sound; a step that is not changes no mask.
      key: random key of the step.
      before: parameters before the optimizer's update.
      params: parameters after it, or as they were if the step is replaced.
      opt_state: optimizer state after it, or as it was if the step is replaced.
      model_state: model state after its advance.
      sparsity: the sparsifier's state before the step.
      grads: gradient by the effective weights, of the whole batch, neither masked nor clipped.
      gradient: effective weights -> gradient of this step's batch at them, for criteria that need a pass of their own.
      ema: moving average of the parameters before the step, or {}.
      changes: static; False in the program for steps that change nothing, see `Sparsifier.apart`.
    """

    step: jax.Array
    finite: jax.Array
    key: jax.Array
    before: Tree
    params: Tree
    opt_state: Tree
    model_state: Tree
    sparsity: Tree
    grads: Tree
    gradient: Callable[[Tree], Tree]
    ema: Tree = {}
    changes: bool = True


class Change(NamedTuple):
    """What `Sparsifier.update` returns: the parts of the next state."""

    params: Tree
    opt_state: Tree
    model_state: Tree
    sparsity: Tree
    ema: Tree


class Sparsifier:
    """Base of the sparsifiers; itself dense training, which changes nothing."""

    accounted: bool = False
    """Whether the model's account already leaves out the weights that do not exist."""
    forward_reads: tuple[str, ...] = ()
    """Parts of the state that `forward_params` reads; none: the parameters are what the model computes with."""

    def init(self, params: Tree, model_state: Tree, key: jax.Array) -> tuple[Tree, Tree, Tree]:
        """Returns (parameters, model state, sparsity state) of step 0. Pure."""
        return params, model_state, {}

    def state_dims(self, state: Tree) -> Tree:
        """Returns the logical dims of every leaf of an (abstract) sparsity state of one member."""
        return {}

    def forward_params(self, params: Tree, sparsity: Tree, step: jax.Array | int) -> Tree:
        """Returns the effective weights, which may have leaves that the parameters lack (probes)."""
        return params

    def optimizer_grads(self, grads: Tree, params: Tree, sparsity: Tree, step: jax.Array) -> Tree:
        """Returns the gradient that the optimizer sees, from the gradient by the effective weights."""
        return grads

    def rate_multiplier(self, step: jax.Array) -> jax.Array | float:
        """Returns the factor of this step's learning rate."""
        return 1.0

    def replaces(self, step: jax.Array) -> jax.Array | bool:
        """Says whether this step changes masks instead of taking the optimizer's step."""
        return False

    def apart(self, step: int) -> bool:
        """Says, on the host, whether this step runs in a program of its own.

        A condition inside one program makes the host wait for the device in every step; a sparsifier that changes things in some steps
        only, at a high price, may keep that out of the program of the others.
        """
        return False

    def update(self, moment: Moment) -> Change:
        """Returns parameters, optimizer state, model state and sparsity state after the step."""
        return Change(moment.params, moment.opt_state, moment.model_state, moment.sparsity, moment.ema)

    def only_existing(self, tree: Tree, sparsity: Tree) -> Tree:
        """Returns a tree like the parameters (an average, earlier values) without the weights that they do not have."""
        return tree

    def numbers(self, sparsity: Tree) -> Tree:
        """Returns what a step reports: {path of a matrix: {name: array}}, from the state after it (see `telemetry.sparsity_row`)."""
        return {}

    def pictures(self, sparsity: Tree) -> Tree:
        """Returns {path of a matrix: float32 density of cells [(layers,) rows, columns]}, for the report."""
        return {}

    def notes(self) -> list[str]:
        """Returns what a run says of it at its start, in lines."""
        return []

    def description(self) -> dict[str, Any]:
        """Returns the content of sparsity.json: what is sparse, how much, and what is left dense and why; {} for dense training."""
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSparsity(Config):
    """Base of the kinds of weight sparsity."""

    learns_orders: ClassVar[bool] = False
    """Whether it learns the order of inputs where a projection asks for it."""

    def check_start(self, start: "StartFrom") -> None:
        """Raises ConfigError if a run cannot start from there."""
        if start.rewind is not None:
            raise ConfigError(
                "start_from.rewind", start.rewind, "None, unless weight_sparsity is masked with the algorithm lottery"
            )

    def build(self, definition: "Definition", optimizer: "Optimizer", steps: int, microbatches: int) -> Sparsifier:
        """Builds the sparsifier of a model.

        Args:
          definition: the abstract model.
          optimizer: the run's optimizer.
          steps: of the whole run.
          microbatches: pieces of a batch; norms of gradients do not add over them.

        Raises:
          ConfigError: for a combination that cannot work.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoSparsity(WeightSparsity):
    """All weights are there all the time."""

    def build(self, definition: "Definition", optimizer: "Optimizer", steps: int, microbatches: int) -> Sparsifier:
        """See WeightSparsity.build."""
        return Sparsifier()


def same_for_all(step: jax.Array, members: str | None) -> jax.Array:
    """Returns the step number without the members dimension of a population, whose members are at the same step.

    Under vmap a condition on a batched number becomes a selection, and both sides would be computed in every step.

    Args:
      step: int32 step number of one member.
      members: name of the vmapped axis, or None.
    """
    return step if members is None else jax.lax.pmax(step, members)
