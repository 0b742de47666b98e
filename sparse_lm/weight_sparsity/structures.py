"""Structures: which weights of a matrix stand or fall together, and among which of them the choice is made.

A matrix [..., I, O] (leading dims: layers, experts; each its own matrix) is seen as a grid of *units*, blocks of equal size, and the
grid as *groups* that keep the same number of units each:

    unstructured     unit: a weight              group: the matrix
    block            unit: a block               group: the matrix
    neuron           unit: all weights of a neuron, channel or head      group: the matrix
    constant_fan_in  unit: a weight              group: a column, the inputs of one output
    n_m              unit: a weight              group: m inputs in a row of one output

Legend: I inputs, O outputs, R rows and C columns of units.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.config import Config, ConfigError
from sparse_lm.layers.parameter import Dims
from sparse_lm.layers.tree_paths import core_dims
from sparse_lm.weight_sparsity.selection import keys_of


@dataclasses.dataclass(frozen=True)
class Layout:
    """The units and groups of one leaf.

    Attributes:
      shape: of the leaf, batch dims included.
      block: (inputs, outputs) of a unit.
      group: "matrix", "column", or the number of units in a run of a column.
    """

    shape: tuple[int, ...]
    block: tuple[int, int] = (1, 1)
    group: str | int = "matrix"

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the batch dims."""
        return self.shape[:-2]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of units in a matrix."""
        return self.shape[-2] // self.block[0], self.shape[-1] // self.block[1]

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """Shape of arrays with one entry a unit, groups apart: [..., R, C], or [..., R / run, run, C]."""
        rows, columns = self.grid
        middle = (rows // self.group, self.group) if isinstance(self.group, int) else (rows,)
        return (*self.batch, *middle, columns)

    @property
    def axes(self) -> tuple[int, ...]:
        """Dims of `unit_shape` that a group spans."""
        last = len(self.unit_shape)
        return (last - 2, last - 1) if self.group == "matrix" else (last - 2,)

    @property
    def group_units(self) -> int:
        """Units in a group."""
        return math.prod(self.unit_shape[axis] for axis in self.axes)

    @property
    def matrix_groups(self) -> int:
        """Groups in a matrix."""
        return math.prod(self.grid) // self.group_units

    @property
    def unit_weights(self) -> int:
        """Weights in a unit."""
        return math.prod(self.block)

    def keys(self, scores: jax.Array) -> jax.Array:
        """Returns the uint32 key of every unit, in the order of the mean magnitude of its scores (their signed value if it is one weight).

        A mean over floats would depend on the order of its additions, and that on the sharding. So magnitudes are rounded to
        multiples of a power of two, 2^-31 of the matrix's largest times the weights of a unit, and added as integers.
        """
        if self.unit_weights == 1:
            return keys_of(scores).reshape(self.unit_shape)
        magnitude = jnp.abs(scores.astype(jnp.float32))
        largest = jnp.max(magnitude, axis=(-2, -1), keepdims=True)
        _, exponent = jnp.frexp(largest)
        bits = 31 - math.ceil(math.log2(self.unit_weights))
        scaled = jnp.round(jnp.ldexp(magnitude, bits - exponent)).astype(jnp.uint32)
        rows, columns = self.grid
        blocks = scaled.reshape(*self.batch, rows, self.block[0], columns, self.block[1])
        return 1 + jnp.sum(blocks, axis=(-3, -1), dtype=jnp.uint32).reshape(self.unit_shape)

    def units(self, mask: jax.Array) -> jax.Array:
        """Returns the units of a mask of weights that is constant over each unit."""
        inputs, outputs = self.block
        return mask[..., ::inputs, ::outputs].reshape(self.unit_shape)

    def weights(self, units: jax.Array) -> jax.Array:
        """Returns the mask of weights of a mask of units."""
        rows, columns = self.grid
        inputs, outputs = self.block
        mask = units.reshape(*self.batch, rows, 1, columns, 1)
        return jnp.broadcast_to(mask, (*self.batch, rows, inputs, columns, outputs)).reshape(self.shape)

    def count(self, units: jax.Array) -> jax.Array:
        """Returns how many units of each group are true, int32, group dims kept with size 1."""
        return jnp.sum(units, axis=self.axes, keepdims=True, dtype=jnp.int32)

    def per_layer(self, values: np.ndarray) -> jax.Array:
        """Returns one number a leaf, or one a layer of a stacked leaf, in a shape that broadcasts against counts of groups."""
        values = np.asarray(values)
        return jnp.asarray(values.reshape(*values.shape, *[1] * (len(self.unit_shape) - values.ndim)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structure(Config):
    """Base of the structures; itself single weights, chosen freely in each matrix."""

    def layout(self, path: str, dims: Dims, shape: tuple[int, ...]) -> Layout:
        """Returns the units and groups of a leaf.

        Raises:
          ConfigError: when the structure does not divide the matrix.
        """
        return Layout(shape)

    def divided(self, path: str, shape: tuple[int, ...], block: tuple[int, int], field: str) -> None:
        """Raises ConfigError unless blocks divide a matrix."""
        if shape[-2] % block[0] or shape[-1] % block[1]:
            allowed = f"sizes that divide every matrix; {path} is {shape[-2]} x {shape[-1]}"
            raise ConfigError(field, getattr(self, field), allowed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unstructured(Structure):
    """Single weights, chosen freely in each matrix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block(Structure):
    """Blocks of equal size."""

    inputs: int = 64
    """Inputs of a block."""
    outputs: int = 64
    """Outputs of a block."""

    def check(self) -> None:
        """See Config.check."""
        self.require(self.inputs >= 1, "inputs", "at least 1")
        self.require(self.outputs >= 1, "outputs", "at least 1")

    def layout(self, path: str, dims: Dims, shape: tuple[int, ...]) -> Layout:
        """See Structure.layout."""
        self.divided(path, shape, (self.inputs, 1), "inputs")
        self.divided(path, shape, (1, self.outputs), "outputs")
        return Layout(shape, (self.inputs, self.outputs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantFanIn(Structure):
    """Single weights, as many for every output of a matrix."""

    def layout(self, path: str, dims: Dims, shape: tuple[int, ...]) -> Layout:
        """See Structure.layout."""
        return Layout(shape, group="column")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NM(Structure):
    """N of every m weights in a row along the inputs; N is the density times m (0.5 of 4 is 2:4)."""

    m: int = 4
    """Length of a run."""

    def check(self) -> None:
        """See Config.check."""
        self.require(self.m >= 2, "m", "at least 2")

    def layout(self, path: str, dims: Dims, shape: tuple[int, ...]) -> Layout:
        """See Structure.layout."""
        self.divided(path, shape, (self.m, 1), "m")
        return Layout(shape, group=self.m)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neuron(Structure):
    """All weights of a hidden neuron, a channel or a head in a matrix: a column where it is written, a row where it is read.

    Dims say which: (embed, ffn) has a column for each neuron, (ffn, embed) a row. Each matrix chooses by itself.
    """

    head: int = 1
    """Channels of queries, keys and values that stand or fall together; the head dim for whole heads."""

    def check(self) -> None:
        """See Config.check."""
        self.require(self.head >= 1, "head", "at least 1")

    def layout(self, path: str, dims: Dims, shape: tuple[int, ...]) -> Layout:
        """See Structure.layout."""
        read, written = core_dims(dims)
        hidden = ("ffn", "heads", "kv_heads")
        across = read if read in hidden and written not in hidden else written
        size = self.head if across in ("heads", "kv_heads") else 1
        block = (size, shape[-1]) if across is read else (shape[-2], size)
        self.divided(path, shape, block, "head")
        return Layout(shape, block)
