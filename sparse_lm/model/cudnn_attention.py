"""Packed-document attention through cuDNN by offsets: work falls with the documents' lengths, no mask array exists.

Legend: B batch, L length, H query heads, J key heads, N head dim, M most documents of a row.
"""

from typing import Any

import jax
import jax.numpy as jnp


def cudnn_reason(q_BQHN: jax.Array, k_BLJN: jax.Array, spec: Any) -> str | None:
    """Returns why cuDNN cannot serve this call, or None. Asked before tracing the fast path."""
    if q_BQHN.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {q_BQHN.dtype}: cuDNN attention computes in bfloat16 or float16"
    if q_BQHN.shape[1] != k_BLJN.shape[1] or spec.query_segments_BQ is not None:
        return "decoding against a cache"
    if q_BQHN.shape[1] % 2 or q_BQHN.shape[-1] % 8 or q_BQHN.shape[-1] > 256:
        return "odd length, or a head dim that is not a multiple of 8 up to 256"
    gpus = [device for device in jax.devices() if device.platform == "gpu"]
    if not gpus:
        return "no GPU on this host"
    if float(getattr(gpus[0], "compute_capability", "0")) < 9.0:
        return "packed documents need compute capability 9.0 or higher"
    return None


def document_offsets(segments_BL: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Returns (lengths [B, M], starts [B, M + 1]) of the documents of each row; -1 where a row has fewer than M.

    Args:
      segments_BL: int32, 1.. in order of appearance; 0 marks padding at the end of the row.
      most: M; documents past it would be left out, so callers choose it with `documents_bucket`.
    """
    numbers_M = jnp.arange(1, most + 1)
    lengths_BM = jnp.sum(segments_BL[:, None, :] == numbers_M[None, :, None], axis=-1, dtype=jnp.int32)
    starts_BM = jnp.cumsum(lengths_BM, axis=-1, dtype=jnp.int32) - lengths_BM
    present_BM = lengths_BM > 0
    absent_B1 = jnp.full((segments_BL.shape[0], 1), -1, jnp.int32)
    starts = jnp.concatenate([jnp.where(present_BM, starts_BM, -1), absent_B1], axis=-1)
    return jnp.where(present_BM, lengths_BM, -1), starts


def documents_bucket(most: int, found: int) -> int:
    """Returns the M that a batch with `found` documents in a row needs: `most`, or four times it as often as needed.

    Time grows with M, so programs are built for few sizes; where no GPU is, any M serves and `most` is returned.
    """
    if jax.default_backend() != "gpu":
        return most
    while most < found:
        most *= 4
    return most


def attend_cudnn(q_BLHN: jax.Array, k_BLJN: jax.Array, v_BLJN: jax.Array, spec: Any, scale: float) -> jax.Array:
    """Causal attention within documents; arguments as in `attention.attend_plain`."""
    # JAX offers packed offsets only in this module; jax.nn.dot_product_attention does not pass them on.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    if spec.segments_BL is None:
        return dot_product_attention(
            q_BLHN, k_BLJN, v_BLJN, scale=scale, mask_type=MaskType.CAUSAL, sliding_window_length=spec.window
        )
    lengths, offsets = document_offsets(spec.segments_BL, spec.max_documents)
    return dot_product_attention(
        q_BLHN,
        k_BLJN,
        v_BLJN,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=scale,
        mask_type=MaskType.PADDING_CAUSAL,
        sliding_window_length=spec.window,
    )
