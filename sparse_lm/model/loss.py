"""Cross-entropy over a large vocabulary without the logits of the whole batch.

The objective is linear in its upstream gradient, a scalar, so the gradient with respect to hidden states and head is computed in
the forward pass, chunk by chunk, and only scaled in the backward pass: no logits are kept and none are computed twice.

Legend: B batch, L length, C positions of a chunk, D model, V vocabulary.
"""

import functools
import math

import jax
import jax.numpy as jnp

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


def _capped(raw_BCV: jax.Array, softcap: float | None) -> jax.Array:
    return raw_BCV if softcap is None else softcap * jnp.tanh(raw_BCV / softcap)


def _logits(h_BCD: jax.Array, head_DV: jax.Array, multiplier: float) -> jax.Array:
    head_DV = head_DV.astype(h_BCD.dtype)
    return jnp.einsum("bcd,dv->bcv", h_BCD, head_DV, preferred_element_type=jnp.float32) * multiplier


def _token_losses(logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (cross-entropy, log partition) of each position."""
    partition_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    return partition_BC - target_BC, partition_BC


def token_losses(
    h_BLD: jax.Array, head_DV: jax.Array, targets_BL: jax.Array, *, softcap: float | None, multiplier: float
) -> jax.Array:
    """Returns the cross-entropy of every position, float32 [B, L] nats; for evaluation."""
    chunks = chunks_of(targets_BL.shape[0], targets_BL.shape[1], head_DV.shape[1])

    def chunk(arguments: tuple[jax.Array, jax.Array]) -> jax.Array:
        h_BCD, targets_BC = arguments
        return _token_losses(_capped(_logits(h_BCD, head_DV, multiplier), softcap), targets_BC)[0]

    return _join(jax.lax.map(chunk, (_split(h_BLD, chunks), _split(targets_BL, chunks))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
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
    return _forward(h_BLD, head_DV, targets_BL, mask_BL, softcap, multiplier, z_coefficient, with_gradient=False)[0]


def _forward(h_BLD, head_DV, targets_BL, mask_BL, softcap, multiplier, z_coefficient, with_gradient=True):
    chunks = chunks_of(targets_BL.shape[0], targets_BL.shape[1], head_DV.shape[1])

    def chunk(carry, arguments):
        objective, entropy, dhead_DV = carry
        h_BCD, targets_BC, mask_BC = arguments
        logits_BCV = _capped(_logits(h_BCD, head_DV, multiplier), softcap)
        loss_BC, partition_BC = _token_losses(logits_BCV, targets_BC)
        objective += jnp.sum((loss_BC + z_coefficient * jnp.square(partition_BC)) * mask_BC)
        entropy += jnp.sum(loss_BC * mask_BC)
        if not with_gradient:
            return (objective, entropy, dhead_DV), None
        probability_BCV = jnp.exp(logits_BCV - partition_BC[..., None])
        is_target_BCV = targets_BC[..., None] == jnp.arange(head_DV.shape[1])
        d_BCV = probability_BCV * (1.0 + 2.0 * z_coefficient * partition_BC)[..., None] - is_target_BCV
        if softcap is not None:
            d_BCV = d_BCV * (1.0 - jnp.square(logits_BCV / softcap))
        d_BCV = (d_BCV * (mask_BC * multiplier)[..., None]).astype(h_BCD.dtype)
        dh_BCD = jnp.einsum("bcv,dv->bcd", d_BCV, head_DV.astype(h_BCD.dtype))
        dhead_DV += jnp.einsum("bcd,bcv->dv", h_BCD, d_BCV, preferred_element_type=jnp.float32)
        return (objective, entropy, dhead_DV), dh_BCD

    zero = jnp.zeros((), jnp.float32)
    dhead_DV = jnp.zeros(head_DV.shape if with_gradient else (), jnp.float32)
    pieces = (_split(h_BLD, chunks), _split(targets_BL, chunks), _split(mask_BL, chunks))
    (objective, entropy, dhead_DV), dh = jax.lax.scan(chunk, (zero, zero, dhead_DV), pieces)
    residuals = (_join(dh), dhead_DV) if with_gradient else None
    return (objective, entropy), residuals


def _backward(softcap, multiplier, z_coefficient, residuals, cotangents):
    dh_BLD, dhead_DV = residuals
    scale = cotangents[0]
    return (dh_BLD * scale).astype(dh_BLD.dtype), dhead_DV * scale, None, None


cross_entropy.defvjp(_forward, _backward)
