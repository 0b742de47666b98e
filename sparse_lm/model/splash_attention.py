"""Attention on TPU by JAX's splash kernel: blocks that the causal mask or the window excludes are skipped, no mask array exists.

Legend: B batch, L length, H query heads, J key heads, N head dim.
"""

from typing import Any

import jax
import jax.numpy as jnp

INTERPRET = False  # tests set it: run the kernel in Pallas's interpreter
LANES = 128
BLOCK = 512


def splash_reason(q_BQHN: jax.Array, k_BLJN: jax.Array, spec: Any) -> str | None:
    """Returns why the kernel cannot serve this call, or None. Asked before tracing the fast path."""
    if q_BQHN.shape[1] != k_BLJN.shape[1] or spec.query_segments_BQ is not None:
        return "queries and keys are not the same positions (a cache, or a sequence split over context)"
    if q_BQHN.shape[1] % LANES:
        return f"a length that is not a multiple of {LANES}"
    if q_BQHN.shape[-1] % 64:
        return "a head dim that is not a multiple of 64"
    return None


def attend_splash(q_BLHN: jax.Array, k_BLJN: jax.Array, v_BLJN: jax.Array, spec: Any, scale: float) -> jax.Array:
    """Causal attention within documents; arguments as in `attention.attend_plain`."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = q_BLHN.shape[1:3]
    shape = (length, length)
    mask = masks.CausalMask(shape) if spec.window is None else masks.LocalMask(shape, (spec.window - 1, 0), 0)
    block = next(size for size in (BLOCK, 256, LANES) if length % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = splash.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=INTERPRET,
    )
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in ((q_BLHN * scale).astype(q_BLHN.dtype), k_BLJN, v_BLJN))
    if spec.segments_BL is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        segments = splash.SegmentIds(spec.segments_BL, spec.segments_BL)
        out = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids))(q, k, v, segments)
    return jnp.swapaxes(out, 1, 2)
