"""Cross-entropy over a large vocabulary without the logits of the whole batch.

The objective is linear in its upstream gradient, a scalar, so the gradient with respect to hidden states and head is computed in
the forward pass, chunk by chunk, and only scaled in the backward pass: no logits are kept and none are computed twice.

Legend: B batch, L length, C positions of a chunk, D model, V vocabulary.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from sparse_lm.parallel.mesh import current
from sparse_lm.parallel.rules import TokenSplit, spec_of, split_tokens

LOGITS_BYTES = 1 << 30
"""Float32 logits of one chunk stay below this many bytes where the length can be divided so."""


def chunks_of(batch: int, length: int, vocabulary: int) -> int:
    """Returns the smallest divisor of the length that keeps one chunk's logits under LOGITS_BYTES."""
    wanted = math.ceil(batch * length * vocabulary * 4 / LOGITS_BYTES)
    return next(n for n in range(1, length + 1) if length % n == 0 and (n >= wanted or n == length))


def _split(a_BL: jax.Array, chunks: int) -> jax.Array:
    batch, length = a_BL.shape[:2]
    return jnp.moveaxis(a_BL.reshape(batch, chunks, length // chunks, *a_BL.shape[2:]), 1, 0)


def _join(a_NBC: jax.Array) -> jax.Array:
    chunks, batch, size = a_NBC.shape[:3]
    return jnp.moveaxis(a_NBC, 0, 1).reshape(batch, chunks * size, *a_NBC.shape[3:])


@dataclasses.dataclass(frozen=True)
class _Head:
    """How logits are made.

    Attributes:
      softcap: cap c of c * tanh(logits / c), or None.
      multiplier: factor on the raw logits (muP).
      axis: mesh axis that splits the vocabulary, or None.
    """

    softcap: float | None
    multiplier: float
    axis: str | None = None

    def logits(self, h_BCD: jax.Array, head_DV: jax.Array) -> jax.Array:
        """Returns this device's logits, float32 [B, C, V]."""
        raw_BCV = jnp.einsum("bcd,dv->bcv", h_BCD, head_DV, preferred_element_type=jnp.float32) * self.multiplier
        return raw_BCV if self.softcap is None else self.softcap * jnp.tanh(raw_BCV / self.softcap)

    def total(self, x: jax.Array) -> jax.Array:
        """Sums over the parts of the vocabulary."""
        return x if self.axis is None else jax.lax.psum(x, self.axis)

    def own(self, targets_BC: jax.Array, size: int) -> jax.Array:
        """Returns the targets as indices into this device's part of the vocabulary."""
        return targets_BC if self.axis is None else targets_BC - jax.lax.axis_index(self.axis) * size

    def losses(self, logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (cross-entropy, log partition) of each position; see `own` for the targets."""
        if self.axis is None:
            partition_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
            target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
            return partition_BC - target_BC, partition_BC
        size = logits_BCV.shape[-1]
        most_BC = jax.lax.pmax(jnp.max(logits_BCV, axis=-1), self.axis)
        partition_BC = most_BC + jnp.log(self.total(jnp.sum(jnp.exp(logits_BCV - most_BC[..., None]), axis=-1)))
        index_BC1 = jnp.clip(targets_BC, 0, size - 1)[..., None]
        found_BC = jnp.take_along_axis(logits_BCV, index_BC1, axis=-1)[..., 0]
        mine_BC = (targets_BC >= 0) & (targets_BC < size)
        return partition_BC - self.total(jnp.where(mine_BC, found_BC, 0.0)), partition_BC


@dataclasses.dataclass(frozen=True)
class _Split:
    """How the loss is spread over a mesh: tokens as everywhere, the vocabulary over `tensor`, the head gathered once over fsdp."""

    mesh: AbstractMesh
    tokens: TokenSplit
    head: P

    def whole_head(self, head_DV: jax.Array) -> jax.Array:
        """Gathers the rows of the head."""
        axis = self.head[0]
        return head_DV if axis is None else jax.lax.all_gather(head_DV, axis, axis=0, tiled=True)

    def head_gradient(self, dhead_DV: jax.Array) -> jax.Array:
        """Sums the gradient over the tokens and leaves each device its rows."""
        axis = self.head[0]
        over = tuple(name for name in self.tokens.axes if name != axis)
        if axis in self.tokens.axes:
            dhead_DV = jax.lax.psum_scatter(dhead_DV, axis, scatter_dimension=0, tiled=True)
            # Otherwise XLA for TPU sums it whole on every chip, because the gradient's norm reads it too.
            dhead_DV = jax.lax.optimization_barrier(dhead_DV)
        elif axis is not None:
            size = dhead_DV.shape[0] // self.mesh.shape[axis]
            dhead_DV = jax.lax.dynamic_slice_in_dim(dhead_DV, jax.lax.axis_index(axis) * size, size)
        return jax.lax.psum(dhead_DV, over) if over else dhead_DV


def _split_of(h_BLD: jax.Array, head_DV: jax.Array) -> _Split | None:
    mesh = current()
    if mesh is None:
        return None
    return _Split(
        mesh, split_tokens(h_BLD.shape[0], h_BLD.shape[1], mesh), spec_of(("embed", "vocab"), head_DV.shape, mesh)
    )


def token_losses(
    h_BLD: jax.Array, head_DV: jax.Array, targets_BL: jax.Array, *, softcap: float | None, multiplier: float
) -> jax.Array:
    """Returns the cross-entropy of every position, float32 [B, L] nats; for evaluation."""
    split = _split_of(h_BLD, head_DV)
    head = _Head(softcap, multiplier, split.head[1] if split else None)

    def device(h_BLD: jax.Array, head_DV: jax.Array, targets_BL: jax.Array) -> jax.Array:
        chunks = chunks_of(targets_BL.shape[0], targets_BL.shape[1], head_DV.shape[1])
        head_DV = head_DV.astype(h_BLD.dtype)
        head_DV = split.whole_head(head_DV) if split else head_DV

        def chunk(arguments: tuple[jax.Array, jax.Array]) -> jax.Array:
            h_BCD, targets_BC = arguments
            return head.losses(head.logits(h_BCD, head_DV), head.own(targets_BC, head_DV.shape[1]))[0]

        return _join(jax.lax.map(chunk, (_split(h_BLD, chunks), _split(targets_BL, chunks))))

    if split is None:
        return device(h_BLD, head_DV, targets_BL)
    hidden, tokens = split.tokens.spec(None), split.tokens.spec()
    specs = (hidden, split.head, tokens)
    run = jax.shard_map(device, mesh=split.mesh, in_specs=specs, out_specs=tokens, check_vma=False)
    return run(h_BLD, head_DV, targets_BL)


def cross_entropy(
    h_BLD: jax.Array,
    head_DV: jax.Array,
    targets_BL: jax.Array,
    mask_BL: jax.Array,
    softcap: float | None,
    multiplier: float,
    z_coefficient: float,
) -> tuple[jax.Array, jax.Array]:
    """Sum of cross-entropy and z-loss over the masked positions.

    Args:
      h_BLD: final hidden states, in the compute dtype.
      head_DV: output head, float32; multiplied in h's dtype, its gradient accumulated in float32.
      targets_BL: int32 target ids.
      mask_BL: float32 weight of each position.
      softcap: cap c of c * tanh(logits / c), or None.
      multiplier: factor on the raw logits (muP).
      z_coefficient: weight of the squared log partition (Chowdhery et al. 2022, arXiv 2204.02311, section 5).

    Returns:
      (objective sum, cross-entropy sum), float32; only the first carries a gradient.
    """
    split = _split_of(h_BLD, head_DV)
    head = _Head(softcap, multiplier, split.head[1] if split else None)
    return _cross_entropy(h_BLD, head_DV, targets_BL, mask_BL, head, z_coefficient, split)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _cross_entropy(h_BLD, head_DV, targets_BL, mask_BL, head, z_coefficient, split):
    return _forward(h_BLD, head_DV, targets_BL, mask_BL, head, z_coefficient, split, with_gradient=False)[0]


def _forward(h_BLD, head_DV, targets_BL, mask_BL, head, z_coefficient, split, with_gradient=True):
    run = functools.partial(_device, head=head, z_coefficient=z_coefficient, split=split, with_gradient=with_gradient)
    if split is None:
        return run(h_BLD, head_DV, targets_BL, mask_BL)
    hidden, tokens = split.tokens.spec(None), split.tokens.spec()
    run = jax.shard_map(
        run,
        mesh=split.mesh,
        in_specs=(hidden, split.head, tokens, tokens),
        out_specs=((P(), P()), (hidden, split.head) if with_gradient else None),
        check_vma=False,
    )
    return run(h_BLD, head_DV, targets_BL, mask_BL)


def _device(h_BLD, head_DV, targets_BL, mask_BL, *, head, z_coefficient, split, with_gradient):
    """One device's tokens: ((objective, entropy), (dh, dhead) or None), summed over the mesh."""
    head_DV = head_DV.astype(h_BLD.dtype)
    head_DV = split.whole_head(head_DV) if split else head_DV
    size = head_DV.shape[1]
    chunks = chunks_of(targets_BL.shape[0], targets_BL.shape[1], size)

    def chunk(carry, arguments):
        objective, entropy, dhead_DV = carry
        h_BCD, targets_BC, mask_BC = arguments
        targets_BC = head.own(targets_BC, size)
        logits_BCV = head.logits(h_BCD, head_DV)
        loss_BC, partition_BC = head.losses(logits_BCV, targets_BC)
        objective += jnp.sum((loss_BC + z_coefficient * jnp.square(partition_BC)) * mask_BC)
        entropy += jnp.sum(loss_BC * mask_BC)
        if not with_gradient:
            return (objective, entropy, dhead_DV), None
        probability_BCV = jnp.exp(logits_BCV - partition_BC[..., None])
        is_target_BCV = targets_BC[..., None] == jnp.arange(size)
        d_BCV = probability_BCV * (1.0 + 2.0 * z_coefficient * partition_BC)[..., None] - is_target_BCV
        if head.softcap is not None:
            d_BCV = d_BCV * (1.0 - jnp.square(logits_BCV / head.softcap))
        d_BCV = (d_BCV * (mask_BC * head.multiplier)[..., None]).astype(h_BCD.dtype)
        dh_BCD = jnp.einsum("bcv,dv->bcd", d_BCV, head_DV)
        dhead_DV += jnp.einsum("bcd,bcv->dv", h_BCD, d_BCV, preferred_element_type=jnp.float32)
        return (objective, entropy, dhead_DV), dh_BCD

    zero = jnp.zeros((), jnp.float32)
    dhead_DV = jnp.zeros(head_DV.shape if with_gradient else (), jnp.float32)
    pieces = (_split(h_BLD, chunks), _split(targets_BL, chunks), _split(mask_BL, chunks))
    (objective, entropy, dhead_DV), dh = jax.lax.scan(chunk, (zero, zero, dhead_DV), pieces)
    sums = (objective, entropy)
    if split is not None and split.tokens.axes:
        sums = jax.lax.psum(sums, split.tokens.axes)
    if not with_gradient:
        return sums, None
    dh_BLD = head.total(_join(dh))
    return sums, (dh_BLD, split.head_gradient(dhead_DV) if split else dhead_DV)


def _backward(head, z_coefficient, split, residuals, cotangents):
    dh_BLD, dhead_DV = residuals
    scale = cotangents[0]
    return (dh_BLD * scale).astype(dh_BLD.dtype), dhead_DV * scale, None, None


_cross_entropy.defvjp(_forward, _backward)
