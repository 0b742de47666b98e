"""Parametrizations: initial scale and learning-rate scale of every leaf, and the multipliers of logits and attention.

Widths (D model, F ffn, ...) are read from shapes, roles from dims (tree_paths.role). `Standard` initialises by fan-in and
leaves learning rates alone. `MuP` keeps the best learning rate and the size of every change of activations when the width
grows; `SparseMuP` also when the density falls. Both are relative to a base width: there they equal Standard.

    leaf                    initial std                       Adam lr          Muon lr (spectral / adam_rms scale)
    embedding (vocab, D)    embedding_std                     1                (Adam)
    matrix (in, out)        gain / sqrt(density * in)         1 / (density m)  1 / m^(1/2)   (spectral: 1)
    router (D, routes)      gain / sqrt(in) / sqrt(m)         1 / m            (Adam)
    head (D, vocab)         head_gain / sqrt(base_width)      1                (Adam), logits times 1 / m
    vectors                 0: ones or zeros, by the module   1                (Adam)

with m = D / base_width; Adam's column is table 8 of Yang et al. 2022 (arXiv 2203.03466), density is table 1 of Dey et al.
2024 (arXiv 2405.15743). Muon follows the spectral condition of Yang et al. 2023 (arXiv 2310.17813): an update's spectral
norm must grow as sqrt(out / in), which the spectral update scale does by itself.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal, Protocol

from sparse_lm.config import Config, ConfigError
from sparse_lm.layers.parameter import Dims, map_leaves
from sparse_lm.layers.tree_paths import Tree, core_dims, flatten, matches, role

UpdateKind = Literal["adam", "muon_spectral", "muon_adam_rms", "adafactor"]
"""How large an update is by itself, which decides how it must be scaled. adam: entries of size 1. muon_spectral,
muon_adam_rms: orthogonal matrices times Muon's `update_scale`. adafactor: entries of the size of the weights."""

WIDTH_DIMS = ("embed", "ffn", "heads", "kv_heads")
"""Dims that grow with the width of the model; all others are finite."""


def fan_in(shape: tuple[int, ...]) -> int:
    """Returns the number of inputs of a weight [..., in, out]."""
    return shape[-2]


def writes_residual(dims: Dims) -> bool:
    """Says whether a matrix writes to the residual stream: its output is `embed`, its input another width."""
    core = core_dims(dims)
    return role(dims) == "matrix" and core[-1] == "embed" and core[-2] in ("ffn", "heads", "kv_heads")


def residual_writes(dims: Tree, shapes: Tree) -> int:
    """Returns how many times the residual stream is written to: 2 * layers in a plain transformer.

    The experts of a layer count once; shared experts beside routed ones count apart. Leaves of one module with equal dims store one
    matrix together and count once.
    """
    sizes = flatten(shapes)
    writes: dict[tuple[str, Dims], int] = {}
    for path, leaf_dims in flatten(dims).items():
        if writes_residual(leaf_dims):
            layers = _shape(sizes[path])[leaf_dims.index("layers")] if "layers" in leaf_dims else 1
            writes[path.rpartition(".")[0] or path, leaf_dims] = layers
    return sum(writes.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parametrization(Config):
    """Base of the parametrizations; itself the standard rules."""

    embedding_std: float = 0.02
    """Initial standard deviation of embeddings."""
    gain: float = 1.0
    """Initial standard deviation of matrices and router times sqrt(fan-in)."""
    head_gain: float = 1.0
    """Initial standard deviation of an untied head times sqrt(fan-in); 0: uniform predictions at first."""
    scale_residual: bool = True
    """Whether matrices that write to the residual stream are divided by the root of the number of writes (GPT-2)."""

    def check(self) -> None:
        self.require(self.embedding_std >= 0.0, "embedding_std", "a number >= 0")
        self.require(self.gain >= 0.0, "gain", "a number >= 0")
        self.require(self.head_gain >= 0.0, "head_gain", "a number >= 0")

    def init_scale(
        self, path: str, dims: Dims, shape: tuple[int, ...], residual_writes: int = 1, density: float = 1.0
    ) -> float:
        """Returns the standard deviation of the initial values of a leaf.

        Args:
          path: dotted path of the leaf.
          dims: its logical dims.
          shape: its shape, batch dims included.
          residual_writes: writes to the residual stream in the whole model (2 * layers).
          density: fraction of the matrix that exists; its fan-in is that fraction of the inputs.

        Returns:
          The standard deviation; 0 for vectors, whose modules start from ones (norms) or zeros (biases).
        """
        leaf_role = role(dims)
        if leaf_role == "vector":
            return 0.0
        if leaf_role == "embedding":
            return self.embedding_std
        if leaf_role == "head":
            return self.head_gain / math.sqrt(fan_in(shape))
        scale = self.gain / math.sqrt(fan_in(shape) * density)
        if self.scale_residual and writes_residual(dims):
            scale /= math.sqrt(residual_writes)
        return scale

    def learning_rate_scale(
        self, path: str, dims: Dims, shape: tuple[int, ...], optimizer_kind: UpdateKind, density: float = 1.0
    ) -> float:
        """Returns the multiplier of a leaf's learning rate under an update of this kind."""
        return 1.0

    def check_paths(self, paths: Iterable[str]) -> None:
        """Raises ConfigError when the config names a path that no leaf has."""

    def logits_multiplier(self, d_model: int) -> float:
        """Returns the factor of the logits before soft-cap and softmax."""
        return 1.0

    def attention_scale(self, head_dim: int) -> float:
        """Returns the factor of query-key products."""
        return 1.0 / math.sqrt(head_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standard(Parametrization):
    """Fan-in scaled initial values, one learning rate for all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MuP(Parametrization):
    """Maximal update parametrization (Yang et al. 2022, arXiv 2203.03466, table 8) for Adam, Muon and Adafactor.

    Tune at the base width, keep the hyper-parameters at every other. All widths (ffn, heads) must grow with D.
    """

    base_width: int = 256
    """Width D of the model whose hyper-parameters are to transfer."""
    base_head_dim: int = 64
    """Head dim at which attention is scaled as usual; elsewhere by 1 / head_dim."""

    def check(self) -> None:
        super().check()
        self.require(self.base_width >= 1, "base_width", "a width >= 1")
        self.require(self.base_head_dim >= 1, "base_head_dim", "a head dim >= 1")

    def width_multiplier(self, path: str, dims: Dims, shape: tuple[int, ...]) -> float:
        """Returns m = D / base_width, by which the fan-in of a matrix or router grew; 1 when its fan-in is finite.

        Raises:
          ValueError: for a matrix whose fan-in is a width but which has no `embed` dim to measure it by.
        """
        core = core_dims(dims)
        if core[-2] not in WIDTH_DIMS:
            return 1.0
        if "embed" not in core:
            raise ValueError(
                f"{path} with dims {dims}: its growth with the width is unknown; allowed: a matrix with an `embed` dim, "
                f"or with an input dim other than {', '.join(WIDTH_DIMS)}"
            )
        return shape[len(shape) - len(core) + core.index("embed")] / self.base_width

    def init_scale(
        self, path: str, dims: Dims, shape: tuple[int, ...], residual_writes: int = 1, density: float = 1.0
    ) -> float:
        scale = super().init_scale(path, dims, shape, residual_writes, density)
        if role(dims) == "head":
            return self.head_gain / math.sqrt(self.base_width)
        if role(dims) == "router":
            return scale / math.sqrt(self.width_multiplier(path, dims, shape))
        return scale

    def learning_rate_scale(
        self, path: str, dims: Dims, shape: tuple[int, ...], optimizer_kind: UpdateKind, density: float = 1.0
    ) -> float:
        if role(dims) not in ("matrix", "router") or optimizer_kind == "muon_spectral":
            return 1.0
        multiplier = self.width_multiplier(path, dims, shape)
        if optimizer_kind == "muon_adam_rms":
            return 1.0 / math.sqrt(multiplier)
        if optimizer_kind == "adafactor":
            # A relative update shrinks with its weights: as 1 / sqrt(m) in a matrix, as 1 / m in the router.
            return 1.0 if role(dims) == "router" else 1.0 / math.sqrt(multiplier)
        return 1.0 / multiplier

    def logits_multiplier(self, d_model: int) -> float:
        return self.base_width / d_model

    def attention_scale(self, head_dim: int) -> float:
        return math.sqrt(self.base_head_dim) / head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class PathDensity(Config):
    """Density of the weights named by a glob."""

    path: str
    """Glob over dotted paths, as in the groups of an optimizer."""
    density: float
    """Fraction of the weights kept, in (0, 1]."""

    def check(self) -> None:
        self.require(0.0 < self.density <= 1.0, "density", "a fraction above 0, at most 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseMuP(MuP):
    """Sparse maximal update parametrization (Dey et al. 2024, arXiv 2405.15743, table 1) for statically sparse matrices.

    A matrix of density p sees p * fan-in inputs: initial variance and Adam's learning rate are divided by p as by the width
    multiplier. Matrices stored as blocks bring their own density; of others it is named here. The paper derives this for random unstructured masks and Adam; other optimizers are refused where p < 1.
    """

    densities: tuple[PathDensity, ...] = ()
    """Density by path, the first match counts; others are dense."""

    def check_paths(self, paths: Iterable[str]) -> None:
        known = list(paths)
        for i, entry in enumerate(self.densities):
            if not any(matches(entry.path, path) for path in known):
                allowed = f"a glob that matches a path, such as {', '.join(known[:3])}"
                raise ConfigError(f"densities.{i}.path", entry.path, allowed)

    def density(self, path: str) -> float:
        """Returns the density of a leaf."""
        return next((entry.density for entry in self.densities if matches(entry.path, path)), 1.0)

    def init_scale(
        self, path: str, dims: Dims, shape: tuple[int, ...], residual_writes: int = 1, density: float = 1.0
    ) -> float:
        density = density if density < 1.0 or role(dims) != "matrix" else self.density(path)
        return super().init_scale(path, dims, shape, residual_writes, density)

    def learning_rate_scale(
        self, path: str, dims: Dims, shape: tuple[int, ...], optimizer_kind: UpdateKind, density: float = 1.0
    ) -> float:
        scale = super().learning_rate_scale(path, dims, shape, optimizer_kind)
        density = density if density < 1.0 else self.density(path)
        if role(dims) != "matrix" or density == 1.0:
            return scale
        if optimizer_kind != "adam":
            raise ValueError(f"{path}: sparse_mup at density {density} with {optimizer_kind} updates; allowed: Adam's")
        return scale / density


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(getattr(leaf, "shape", leaf))


def initial_scales(
    parametrization: Parametrization, dims: Tree, shapes: Tree, writes: int | None = None, densities: Tree | None = None
) -> Tree:
    """Returns the tree of standard deviations of initial values.

    Args:
      parametrization: the rules.
      dims: nested dict of tuples of dim names.
      shapes: same structure; arrays, ShapeDtypeStructs or tuples of sizes.
      writes: writes to the residual stream; none: counted from the dims.
      densities: same structure, fractions of the matrices that exist; none: all 1.

    Raises:
      ConfigError: when the parametrization names a path that no leaf has.
    """
    parametrization.check_paths(flatten(dims))
    count = max(residual_writes(dims, shapes), 1) if writes is None else writes

    def scale(path: str, leaf_dims: Dims, leaf: Any, density: float = 1.0) -> float:
        return parametrization.init_scale(path, leaf_dims, _shape(leaf), count, density)

    return map_leaves(scale, dims, shapes, *([densities] if densities is not None else []))


class HasUpdateKind(Protocol):
    """An optimizer, as far as it matters here."""

    def update_kind(self, dims: Dims) -> UpdateKind: ...


def learning_rate_scales(
    parametrization: Parametrization,
    optimizer: HasUpdateKind,
    dims: Tree,
    shapes: Tree,
    densities: Tree | None = None,
) -> Tree:
    """Returns the tree of learning-rate multipliers that `optimizer.build(dims, scales)` takes.

    Raises:
      ConfigError: when the parametrization names a path that no leaf has.
    """
    parametrization.check_paths(flatten(dims))

    def scale(path: str, leaf_dims: Dims, leaf: Any, density: float = 1.0) -> float:
        kind = optimizer.update_kind(leaf_dims)
        return parametrization.learning_rate_scale(path, leaf_dims, _shape(leaf), kind, density)

    return map_leaves(scale, dims, shapes, *([densities] if densities is not None else []))
