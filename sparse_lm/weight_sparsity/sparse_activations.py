"""Dense matrices between sparse vectors: AbsTopK activations of weight-sparse transformers (Gao et al. 2025, arXiv 2511.13653).

Of every vector only the entries of largest magnitude stay. The places are inputs and outputs of the blocks' matrices, so a projection
knows them all by its dims:

    query, key, value    what they read (the normalised residual), what they give
    gate, up             what they read
    out                  what it gives
    down                 what it reads (the hidden activation), what it gives

Entries that do not stay are zeros and get no gradient. Dense operations are still done: this is for looking at what a model computes.

The density that is achieved may be below what was asked for (a squared ReLU leaves fewer than `keep` entries), so it is counted: inside
`recording` every matrix notes how many entries of its vectors are not zero, `Block` reports the counts, `activations_row` renders them.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparse_lm.layers.parameter import RUN_KEY
from sparse_lm.layers.projection import DenseMatrix, DenseProjection

RESIDUAL, HIDDEN = "embed", "ffn"
METRIC = "activations/"
"""Begins the names of the metrics: activations/attention.query/reads."""

Counts = dict[str, tuple[jax.Array, jax.Array]]
_RECORD: contextvars.ContextVar[dict[int, Counts] | None] = contextvars.ContextVar("record", default=None)


@contextlib.contextmanager
def recording(module: nnx.Module) -> Iterator[Counts]:
    """Counts entries of the vectors of a module's matrices while it is traced inside.

    Args:
      module: parent of the matrices.

    Yields:
      A dict, filled at the end: {"activations/PATH/reads" or "/gives": (entries that are not zero, entries)}, float32, over all
      vectors of the batch, padding included. Experts' matrices are not counted: they may run inside a program for one device.
    """
    record: dict[int, Counts] = {}
    found: Counts = {}
    token = _RECORD.set(record)
    try:
        yield found
    finally:
        _RECORD.reset(token)
    if record:
        for path, part in nnx.iter_modules(module):
            for side, counts in record.get(id(part), {}).items():
                found[f"{METRIC}{'.'.join(map(str, path))}/{side}"] = counts


def _count(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(x != 0, dtype=jnp.float32), jnp.asarray(x.size, jnp.float32)


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
        x = self._read(x)
        y = self._given(super().__call__(x))
        if (record := _RECORD.get()) is not None:
            sides = {"reads": (self.reads, x), "gives": (self.gives, y)}
            record[id(self)] = {side: _count(vectors) for side, (sparse, vectors) in sides.items() if sparse}
        return y

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


def split_metrics(blocks: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (metrics of blocks without those of sparse activations, those alone), both {run of blocks: {name: (sum, count)}}."""
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for run, metrics in blocks.items():
        for name, pair in metrics.items():
            parts[name.startswith(METRIC)].setdefault(run, {})[name] = pair
    return parts


def activations_row(blocks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Renders what a step counted as entries of a metrics row.

    Args:
      blocks: {run of blocks: {name: (entries that are not zero, entries)}}, arrays [(members,) (layers,)].

    Returns:
      {"activations/density": share of the entries of all sparse vectors that are not zero, "activations/attention.query/reads": the
      same by kind of vector, one number a layer}; by member in a population. {} where no vectors are sparse.
    """
    if not blocks:
        return {}
    layers: dict[str, list[np.ndarray]] = {}
    there = total = np.zeros(())
    for run, metrics in sorted(blocks.items(), key=lambda item: int(item[0].partition("_")[0])):
        for name, pair in metrics.items():
            count, size = (np.asarray(a, np.float64) for a in pair)
            if not RUN_KEY.match(run):
                count, size = count[..., None], size[..., None]
            layers.setdefault(name, []).append(count / size)
            there, total = there + count.sum(-1), total + size.sum(-1)
    row = {f"{METRIC}density": (there / total).tolist()}
    return row | {name: np.concatenate(found, axis=-1).tolist() for name, found in sorted(layers.items())}
