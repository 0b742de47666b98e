"""A mask is a plan: which weights of a matrix exist. It renders to a dense mask, has a density, a cost and a picture.

Stored as bool, or bit-packed along the last dim: eight weights a byte.
"""

import dataclasses

import jax
import jax.numpy as jnp

CELLS = 16
"""Most rows and columns of a picture."""


def packed(mask: jax.Array) -> jax.Array:
    """Returns the bits of a mask, uint8 [..., ceil(O / 8)]; weight 8 i + j is bit j of byte i."""
    missing = -mask.shape[-1] % 8
    padded = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, missing)])
    bits = padded.reshape(*mask.shape[:-1], -1, 8).astype(jnp.uint8)
    return jnp.sum(bits << jnp.arange(8, dtype=jnp.uint8), axis=-1, dtype=jnp.uint8)


def unpacked(bits: jax.Array, width: int) -> jax.Array:
    """The inverse of `packed` for a last dim of `width`."""
    found = (bits[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
    return found.reshape(*bits.shape[:-1], -1)[..., :width].astype(bool)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskPlan:
    """Which weights of a matrix (or a stack of matrices) exist.

    Attributes:
      stored: bool [..., I, O], or its bits.
      width: static O.
    """

    stored: jax.Array
    width: int = dataclasses.field(metadata={"static": True})


def plan_of(mask: jax.Array, *, bits: bool = False) -> MaskPlan:
    """Returns the plan of a bool mask [..., I, O]."""
    return MaskPlan(packed(mask) if bits else mask, mask.shape[-1])


def dense_mask(plan: MaskPlan) -> jax.Array:
    """Renders the plan as bool [..., I, O]: dense computation under this mask is what every executor must equal."""
    return plan.stored if plan.stored.dtype == bool else unpacked(plan.stored, plan.width)


def density(plan: MaskPlan) -> jax.Array:
    """Returns the fraction of weights that exist in each matrix, float32."""
    mask = dense_mask(plan)
    return jnp.sum(mask, axis=(-2, -1), dtype=jnp.int32) / (mask.shape[-2] * mask.shape[-1])


def cost(plan: MaskPlan) -> jax.Array:
    """Returns the forward operations a row of each matrix if those of absent weights are not done: 2 a weight, float32."""
    return 2.0 * jnp.sum(dense_mask(plan), axis=(-2, -1), dtype=jnp.int32)


def picture(plan: MaskPlan) -> jax.Array:
    """Returns the density of up to CELLS x CELLS cells of each matrix, float32 [..., rows, columns]."""
    mask = dense_mask(plan).astype(jnp.float32)
    rows, columns = _cells(mask.shape[-2]), _cells(mask.shape[-1])
    return jnp.einsum("ri,...io,oc->...rc", rows, mask, columns.T)


def _cells(size: int) -> jax.Array:
    """Returns the averages over equal stretches of a dim as a matrix [cells, size]."""
    cells = min(CELLS, size)
    member = (jnp.arange(size) * cells // size)[None] == jnp.arange(cells)[:, None]
    return member / jnp.sum(member, axis=1, keepdims=True)
