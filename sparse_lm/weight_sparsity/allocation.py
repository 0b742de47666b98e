"""Allocations: how a density of the whole is shared out among matrices.

Legend: I inputs, O outputs of a matrix.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from sparse_lm.config import Config, ConfigError
from sparse_lm.layers.parametrization import PathDensity
from sparse_lm.layers.tree_paths import matches

Shapes = Mapping[str, tuple[int, ...]]
"""Unrolled path -> (experts..., I, O): a matrix, or the bank of matrices of a layer's experts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation(Config):
    """Base of the allocations."""

    def densities(self, shapes: Shapes, density: float) -> dict[str, float]:
        """Returns the density of every leaf by unrolled path, so that the whole has `density`.

        Raises:
          ConfigError: when that cannot be.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(Allocation):
    """Every matrix has the density of the whole."""

    def densities(self, shapes: Shapes, density: float) -> dict[str, float]:
        """See Allocation.densities."""
        return dict.fromkeys(shapes, density)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ER(Allocation):
    """Erdos-Renyi: density proportional to (I + O) / (I O) of each matrix, at most 1 (Mocanu et al. 2018, arXiv 1707.04780)."""

    def share(self, shape: tuple[int, ...]) -> float:
        """Returns the density of a leaf of this shape up to a common factor."""
        return sum(shape[-2:]) / math.prod(shape[-2:])

    def densities(self, shapes: Shapes, density: float) -> dict[str, float]:
        """See Allocation.densities.

        The common factor solves sum of weights x density = density of the whole; matrices that would exceed 1 are made dense
        and the factor is solved again for the others, until none exceeds it.
        """
        total = density * sum(math.prod(shape) for shape in shapes.values())
        dense: set[str] = set()
        while True:
            rest = [path for path in shapes if path not in dense]
            left = total - sum(math.prod(shapes[path]) for path in dense)
            factor = left / sum(math.prod(shapes[path]) * self.share(shapes[path]) for path in rest) if rest else 0.0
            over = {path for path in rest if factor * self.share(shapes[path]) > 1.0}
            if not over:
                return {p: 1.0 if p in dense else factor * self.share(shapes[p]) for p in shapes}
            dense |= over


@dataclasses.dataclass(frozen=True, kw_only=True)
class ERK(ER):
    """Erdos-Renyi kernel: density proportional to sum(dims) / prod(dims) of each leaf (Evci et al. 2020, arXiv 1911.11134, section 3).

    The bank of a layer's experts is one kernel of three dims. Without experts this is `er`.
    """

    def share(self, shape: tuple[int, ...]) -> float:
        """See ER.share."""
        return sum(shape) / math.prod(shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByHand(Allocation):
    """Density by path; what no entry names has the density of the whole."""

    densities_by_path: tuple[PathDensity, ...] = ()
    """The first entry that matches a path counts."""

    def densities(self, shapes: Shapes, density: float) -> dict[str, float]:
        """See Allocation.densities."""
        for i, entry in enumerate(self.densities_by_path):
            if not any(matches(entry.path, path) for path in shapes):
                allowed = f"a glob that matches a sparse matrix, such as {', '.join(list(shapes)[:3])}"
                raise ConfigError(f"densities_by_path.{i}.path", entry.path, allowed)

        def of(path: str) -> float:
            return next((entry.density for entry in self.densities_by_path if matches(entry.path, path)), density)

        return {path: of(path) for path in shapes}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Global(Allocation):
    """One threshold for the scores of all matrices: densities follow from the scores at every choice of the masks.

    Without a normalisation the matrices with small weights vanish: the loss of global magnitude pruning of language models was
    far above that of any other (Lee et al. 2023, arXiv 2304.14082, table of T5).
    """

    normalize: bool = True
    """Divide the scores of each matrix by their mean magnitude."""

    def densities(self, shapes: Shapes, density: float) -> dict[str, float]:
        """See Allocation.densities; nominal, until scores are known."""
        return dict.fromkeys(shapes, density)


def kept(units: int, density: float) -> int:
    """Returns the units that a group of this many keeps: the nearest whole number, halves up, at least 1."""
    return max(1, min(units, math.floor(units * density + 0.5)))


def per_layer(values: list[int] | list[float]) -> np.ndarray:
    """Returns one number if all layers of a stacked leaf have the same one, else all of them."""
    return np.asarray(values[0] if len(set(values)) == 1 else values)
