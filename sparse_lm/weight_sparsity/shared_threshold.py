"""One threshold for several matrices: how many weights of each are among the largest of all.

Legend: M matrices of all leaves in order.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from sparse_lm.weight_sparsity.allocation import kept
from sparse_lm.weight_sparsity.selection import keys_of, kth_largest, share_of


def mean_magnitude(scores: jax.Array) -> jax.Array:
    """Returns the mean magnitude of each matrix, float32 [..., 1, 1], the same bits under every sharding.

    Magnitudes are rounded to multiples of a power of two, relative to the largest, and added as integers: first the columns of a
    row, then, shifted so that they fit, the rows.
    """
    magnitude = jnp.abs(scores.astype(jnp.float32))
    rows, columns = (math.ceil(math.log2(size)) for size in scores.shape[-2:])
    _, exponent = jnp.frexp(jnp.max(magnitude, axis=(-2, -1), keepdims=True))
    scaled = jnp.round(jnp.ldexp(magnitude, 31 - columns - exponent)).astype(jnp.uint32)
    total = jnp.sum(jnp.sum(scaled, axis=-1, keepdims=True) >> rows, axis=-2, keepdims=True)
    size = scores.shape[-2] * scores.shape[-1]
    return jnp.ldexp(total.astype(jnp.float32), rows - 31 + columns + exponent) / size


def counts_by_one_threshold(
    scores: dict[str, jax.Array], density: float, progress: jax.Array, *, normalize: bool
) -> dict[str, jax.Array]:
    """Returns how many weights each matrix keeps, so that all together keep exactly as many as the density asks for.

    Args:
      scores: {path: float32 [..., I, O]}.
      density: of all weights in the end.
      progress: share of the sparsity that is reached, float32.
      normalize: divide the scores of each matrix by their mean magnitude.

    Returns:
      {path: int32 [..., 1, 1]}. Of keys equal to the threshold those of the first matrices are kept.
    """
    if normalize:
        means = {path: mean_magnitude(array) for path, array in scores.items()}
        scores = {path: array / jnp.where(means[path] > 0, means[path], 1.0) for path, array in scores.items()}
    keys = {path: keys_of(array) for path, array in scores.items()}
    total = sum(math.prod(array.shape) for array in keys.values())
    count = total - share_of(jnp.int32(total - kept(total, density)), progress)

    def above(bound: jax.Array) -> jax.Array:
        counts = [jnp.sum(array >= bound, axis=(-2, -1), dtype=jnp.int32) for array in keys.values()]
        return jnp.concatenate([matrix.reshape(-1) for matrix in counts])

    def at_least(bound: jax.Array) -> jax.Array:
        return jnp.sum(above(bound))

    bound, _ = kth_largest(at_least, jnp.int32(total), count)
    there_M = above(bound)
    ties_M = there_M - jnp.where(bound == jnp.uint32(0xFFFFFFFF), 0, above(bound + 1))
    sure_M = there_M - ties_M
    before_M = jnp.cumsum(ties_M) - ties_M
    found_M = sure_M + jnp.clip(count - jnp.sum(sure_M) - before_M, 0, ties_M)
    out: dict[str, Any] = {}
    start = 0
    for path, array in keys.items():
        matrices = math.prod(array.shape[:-2])
        out[path] = found_M[start : start + matrices].reshape(*array.shape[:-2], 1, 1)
        start += matrices
    return out
