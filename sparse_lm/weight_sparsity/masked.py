"""Masked weight sparsity: structure x allocation x schedule x algorithm over dense matrices. Costs dense compute, and says so."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from sparse_lm.config import ConfigError, component
from sparse_lm.weight_sparsity.algorithms import Algorithm, Lottery, Static
from sparse_lm.weight_sparsity.allocation import Allocation, Global, Uniform
from sparse_lm.weight_sparsity.door import WeightSparsity
from sparse_lm.weight_sparsity.schedules import ConstantSparsity, SparsitySchedule
from sparse_lm.weight_sparsity.sparsifier import MaskedSparsifier
from sparse_lm.weight_sparsity.structures import Structure, Unstructured

if TYPE_CHECKING:  # rooms above this one
    from sparse_lm.model.definition import Definition
    from sparse_lm.train.initialize import StartFrom
    from sparse_lm.train.optimizer import Optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masked(WeightSparsity):
    """Dense matrices under masks."""

    density: float = 0.1
    """Fraction of the weights of all sparse matrices that exist in the end."""
    structure: Structure = component("sparse_structure", Unstructured())
    """Which weights stand or fall together, and among which the choice is made."""
    allocation: Allocation = component("sparse_allocation", Uniform())
    """How the density is shared out among matrices."""
    schedule: SparsitySchedule = component("sparse_schedule", ConstantSparsity())
    """When masks are chosen, and how sparse they are then."""
    algorithm: Algorithm = component("sparse_algorithm", Static())
    """By what weights are chosen, and what becomes of the others."""
    roles: tuple[Literal["matrix", "embedding", "head", "router"], ...] = ("matrix",)
    """Parameters that are sparse, by their dims; norms and biases never are."""
    exclude: tuple[str, ...] = ()
    """Globs over paths of parameters that stay dense."""
    storage: Literal["bool", "bits"] = "bool"
    """A byte a weight, or an eighth of it."""

    def check(self) -> None:
        """See Config.check."""
        self.require(0.0 < self.density <= 1.0, "density", "a fraction above 0, at most 1")
        self.require(bool(self.roles), "roles", "at least one of matrix, embedding, head, router")
        self.algorithm.check_beside(self)
        if isinstance(self.allocation, Global) and type(self.structure) is not Unstructured:
            raise ConfigError(
                "allocation", self.allocation, "uniform, er, erk or by_hand, unless structure is unstructured"
            )
        if isinstance(self.allocation, Global) and self.algorithm.grows:
            allowed = "uniform, er, erk or by_hand with an algorithm that exchanges weights inside each matrix"
            raise ConfigError("allocation", self.allocation, allowed)

    def check_start(self, start: "StartFrom") -> None:
        """See WeightSparsity.check_start."""
        if not isinstance(self.algorithm, Lottery):
            super().check_start(start)
        elif start.rewind is None:
            raise ConfigError("start_from.rewind", None, "a step of start_from.run, or -1, with the algorithm lottery")

    def build(
        self, definition: "Definition", optimizer: "Optimizer", steps: int, microbatches: int
    ) -> MaskedSparsifier:
        """See WeightSparsity.build."""
        if self.algorithm.grows and not optimizer.elementwise:
            allowed = "an elementwise one such as adamw: moments of new weights must be reset, which a matrix's shared moments forbid"
            raise ConfigError("algorithm", f"{type(self.algorithm).__name__} with {type(optimizer).__name__}", allowed)
        return MaskedSparsifier(self, definition, optimizer, steps)
