"""Dense matrices between sparse vectors: AbsTopK activations of weight-sparse transformers (Gao et al. 2025, arXiv 2511.13653).

Of every vector only the entries of largest magnitude stay. The places are inputs and outputs of the blocks' matrices, so a projection
knows them all by its dims:

    query, key, value    what they read (the normalised residual), what they give
    gate, up             what they read
    out                  what it gives
    down                 what it reads (the hidden activation), what it gives

Entries that do not stay are zeros and get no gradient. Dense operations are still done: this is for looking at what a model computes.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sparse_lm.layers.projection import DenseMatrix, DenseProjection

RESIDUAL, HIDDEN = "embed", "ffn"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseActivationsProjection(DenseProjection):
    """A dense matrix that reads and gives sparse vectors."""

    keep: float = 0.25
    """Share of the entries of a vector that stay, rounded to the nearest number of at least 1."""

    def check(self) -> None:
        """See Config.check."""
        self.require(0.0 < self.keep <= 1.0, "keep", "a share above 0, at most 1")

    def build(self, inputs: int, outputs: int, dims: tuple[str, str], *, experts: int = 0) -> "SparseActivationsMatrix":
        """See Projection.build."""
        return SparseActivationsMatrix(self.keep, inputs, outputs, dims, experts)


class SparseActivationsMatrix(DenseMatrix):
    """A dense matrix [I, O], or [E, I, O] for experts, between sparse vectors; its parameters are those of `DenseMatrix`."""

    def __init__(self, keep: float, inputs: int, outputs: int, dims: tuple[str, str], experts: int):
        super().__init__(inputs, outputs, dims, experts)
        self.keep = keep
        self.reads, self.gives = dims[0] in (RESIDUAL, HIDDEN), dims[1] != HIDDEN

    def _read(self, x: jax.Array) -> jax.Array:
        return abs_top_k(x, self.keep) if self.reads else x

    def _given(self, y: jax.Array) -> jax.Array:
        return abs_top_k(y, self.keep) if self.gives else y

    def __call__(self, x: jax.Array) -> jax.Array:
        return self._given(super().__call__(self._read(x)))

    def grouped(self, x_AI: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
        """See DenseMatrix.grouped."""
        return self._given(super().grouped(self._read(x_AI), group_sizes_E))


def abs_top_k(x: jax.Array, keep: float) -> jax.Array:
    """Returns x with zeros but for the round(keep N), at least 1, entries of largest magnitude of each vector [..., N].

    Among equal ones the first stay.
    """
    count = max(1, round(keep * x.shape[-1]))
    _, index = jax.lax.top_k(jnp.abs(x), count)
    stays = jnp.put_along_axis(jnp.zeros(x.shape, bool), index, True, axis=-1, inplace=False)
    return jnp.where(stays, x, jnp.zeros((), x.dtype))
