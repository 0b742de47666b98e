"""The projection door: every weight matrix of the model is one of these, whatever stores it.

A projection maps the last dimension of its input. With an expert batch dimension it maps rows sorted by expert. Nothing else in
the model knows whether the matrix is dense or sparse.

Legend: A rows sorted by expert, E experts, I inputs, O outputs.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.grouped_matmul import grouped_matmul
from sparse_lm.config import Config
from sparse_lm.layers.parameter import declare


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection(Config):
    """Base of the projection components."""

    packed: ClassVar[bool] = False
    """Whether it stores only blocks that exist: optimizers must then be elementwise."""

    @property
    def learns_order(self) -> bool:
        """Whether the order of its inputs is learned, which is the work of weight_sparsity = packed."""
        return False

    def build(self, inputs: int, outputs: int, dims: tuple[str, str], *, experts: int = 0) -> "nnx.Module":
        """Builds the module.

        Args:
          inputs: size of the contracted dimension.
          outputs: size of the produced dimension.
          dims: logical names of the two.
          experts: number of matrices; 0 for a single one without the batch dimension.

        Returns:
          A module with `__call__(x_..I) -> y_..O` and, for experts, `grouped(x_AI, group_sizes_E) -> y_AO`.
        """
        raise NotImplementedError

    def cost(self, inputs: int, outputs: int) -> tuple[int, int]:
        """Returns (parameters, forward floating-point operations per row) of one matrix."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseProjection(Projection):
    """A dense matrix."""

    def build(self, inputs: int, outputs: int, dims: tuple[str, str], *, experts: int = 0) -> "DenseMatrix":
        """See Projection.build."""
        return DenseMatrix(inputs, outputs, dims, experts)

    def cost(self, inputs: int, outputs: int) -> tuple[int, int]:
        """See Projection.cost."""
        return inputs * outputs, 2 * inputs * outputs


@jax.custom_vjp
def product(x: jax.Array, w_IO: jax.Array) -> jax.Array:
    """Returns x @ w for x of any number of dimensions.

    Differs from `x @ w` only in how the weight gradient is asked for: as x^T dy. JAX's own rule asks for (dy^T x)^T, for which
    XLA's CPU backend first stores dy transposed; that made the gradients of a whole feed-forward twice as slow.
    """
    return x @ w_IO


def _product_forward(x, w_IO):
    return x @ w_IO, (x, w_IO)


def _product_backward(residuals, dy):
    x, w_IO = residuals
    rows = tuple(range(x.ndim - 1))
    return dy @ w_IO.T, jnp.tensordot(x, dy, (rows, rows))


product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def _observed_product(x: jax.Array, w_IO: jax.Array) -> jax.Array:
    return x @ w_IO


def _observed_backward(residuals, dy):
    x, w_IO = residuals
    squares_I = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(x.ndim - 1)))
    return dy @ w_IO.T, jnp.broadcast_to(squares_I[:, None], w_IO.shape).astype(w_IO.dtype)


_observed_product.defvjp(_product_forward, _observed_backward)

_OBSERVING = contextvars.ContextVar("observing", default=False)


@contextlib.contextmanager
def observing_inputs() -> Iterator[None]:
    """What is traced inside has, in the place of the gradient of a weight [I, O], the sums of squares of its inputs, O times.

    They come from where the gradients come from, so that scans, rematerialisation, microbatches and meshes need nothing of their own.
    Matrices of experts are not observed.
    """
    token = _OBSERVING.set(True)
    try:
        yield
    finally:
        _OBSERVING.reset(token)


class DenseMatrix(nnx.Module):
    """A dense weight matrix [I, O], or [E, I, O] for experts; computes in the input's dtype."""

    def __init__(self, inputs: int, outputs: int, dims: tuple[str, str], experts: int):
        batch_shape, batch_dims = ((experts,), ("experts",)) if experts else ((), ())
        self.weight = declare((*batch_shape, inputs, outputs), (*batch_dims, *dims))

    def __call__(self, x: jax.Array) -> jax.Array:
        multiply = _observed_product if _OBSERVING.get() else product
        return multiply(x, self.weight[...].astype(x.dtype))

    def grouped(self, x_AI: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
        """Multiplies each expert's rows by its matrix; rows past the sum of sizes give zeros."""
        return grouped_matmul(x_AI, self.weight[...].astype(x_AI.dtype), group_sizes_E)
