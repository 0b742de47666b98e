"""Attention from a description of who may look at whom, never from an [L, L] array.

Legend: B batch, Q queries, L keys, H query heads, J key heads, N head dim, D model.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from sparse_lm.config import Config, component
from sparse_lm.layers.norm import RMSNorm
from sparse_lm.layers.projection import DenseProjection, Projection
from sparse_lm.model.cudnn_attention import attend_cudnn, cudnn_reason
from sparse_lm.model.splash_attention import attend_splash, splash_reason
from sparse_lm.parallel.mesh import current
from sparse_lm.parallel.rules import spec_of, split_tokens

CHUNK = 1024
"""Queries scored at once by the plain path when there are more: bounds its memory at [B, H, CHUNK, L]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Which keys each query may see.

    Attributes:
      segments_BL: int32 document number of each key; only equal numbers see each other. None: one document.
      query_segments_BQ: the same for the queries; None: the same array as for the keys.
      query_offset: index of the first query among the keys (0 in training, the cache length in decoding).
      window: static; a query sees itself and the window - 1 keys before it. None: all before it.
      max_documents: static; most documents in one row that the packed fast path is built for.
    """

    segments_BL: jax.Array | None = None
    query_segments_BQ: jax.Array | None = None
    query_offset: jax.Array | int = 0
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    max_documents: int = dataclasses.field(default=8, metadata={"static": True})


def visible(spec: AttentionSpec, query_index_Q: jax.Array, query_segments_BQ: jax.Array | None, keys: int) -> jax.Array:
    """Renders a piece of the description: True where a query may see a key, [B or 1, Q, L]."""
    distance_QL = query_index_Q[:, None] - jnp.arange(keys)[None, :]
    mask = distance_QL >= 0
    if spec.window is not None:
        mask = mask & (distance_QL < spec.window)
    mask = mask[None]
    if spec.segments_BL is not None and query_segments_BQ is not None:
        mask = mask & (query_segments_BQ[:, :, None] == spec.segments_BL[:, None, :])
    return mask


def attend_plain(
    q_BQHN: jax.Array, k_BLJN: jax.Array, v_BLJN: jax.Array, spec: AttentionSpec, scale: float
) -> jax.Array:
    """Softmax attention in plain JAX, scores in float32; the oracle, and the path where no kernel serves.

    Args:
      q_BQHN: queries.
      k_BLJN: keys; each serves H / J query heads.
      v_BLJN: values.
      spec: who may look at whom.
      scale: factor on the scores.

    Returns:
      [B, Q, H, N] in q's dtype. A query that sees no key gives the mean of the values; such queries are padding.
    """
    batch, queries, heads, size = q_BQHN.shape
    keys, shared = k_BLJN.shape[1], k_BLJN.shape[2]
    segments_BQ = spec.query_segments_BQ if spec.query_segments_BQ is not None else spec.segments_BL

    def piece(q_BQHN: jax.Array, start: jax.Array | int, segments_BQ: jax.Array | None) -> jax.Array:
        q_BQJRN = q_BQHN.reshape(batch, -1, shared, heads // shared, size)
        scores = jnp.einsum("bqjrn,bljn->bjrql", q_BQJRN, k_BLJN, preferred_element_type=jnp.float32) * scale
        index_Q = spec.query_offset + start + jnp.arange(q_BQHN.shape[1])
        mask = visible(spec, index_Q, segments_BQ, keys)[:, None, None]
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1).astype(v_BLJN.dtype)
        return jnp.einsum("bjrql,bljn->bqjrn", weights, v_BLJN).reshape(q_BQHN.shape)

    if queries <= CHUNK or queries % CHUNK:
        return piece(q_BQHN, 0, segments_BQ)
    pieces = queries // CHUNK

    def split(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a.reshape(batch, pieces, CHUNK, *a.shape[2:]), 1, 0)

    starts = jnp.arange(pieces) * CHUNK
    if segments_BQ is None:
        out = jax.lax.map(jax.checkpoint(lambda a: piece(a[0], a[1], None)), (split(q_BQHN), starts))
    else:
        out = jax.lax.map(jax.checkpoint(lambda a: piece(*a)), (split(q_BQHN), starts, split(segments_BQ)))
    return jnp.moveaxis(out, 0, 1).reshape(q_BQHN.shape)


def attend_here(
    q_BQHN: jax.Array, k_BLJN: jax.Array, v_BLJN: jax.Array, spec: AttentionSpec, scale: float
) -> jax.Array:
    """Attention on one device by the best path of the platform that the program is lowered for; arguments as in `attend_plain`."""
    plain = functools.partial(attend_plain, spec=spec, scale=scale)
    fast = {}
    if cudnn_reason(q_BQHN, k_BLJN, spec) is None:
        fast["cuda"] = functools.partial(attend_cudnn, spec=spec, scale=scale)
    if splash_reason(q_BQHN, k_BLJN, spec) is None:
        fast["tpu"] = functools.partial(attend_splash, spec=spec, scale=scale)
    if not fast:
        return plain(q_BQHN, k_BLJN, v_BLJN)
    return jax.lax.platform_dependent(q_BQHN, k_BLJN, v_BLJN, default=plain, **fast)


def attend(
    q_BQHN: jax.Array, k_BLJN: jax.Array, v_BLJN: jax.Array, spec: AttentionSpec, scale: float, *, plain: bool = False
) -> jax.Array:
    """Attention of whole sequences on one device or, on a mesh, on all: rows and heads where they are, keys gathered over `context`.

    Args:
      q_BQHN, k_BLJN, v_BLJN, scale: as in `attend_plain`.
      spec: as in `attend_plain`; on a mesh the queries are the keys' positions.
      plain: use the path in plain JAX on every platform.
    """
    path, mesh = attend_plain if plain else attend_here, current()
    if mesh is None:
        return path(q_BQHN, k_BLJN, v_BLJN, spec, scale)
    tokens = split_tokens(q_BQHN.shape[0], q_BQHN.shape[1], mesh)
    heads, key_heads = q_BQHN.shape[2], k_BLJN.shape[2]
    split, key_split = (spec_of(("heads",), (size,), mesh)[0] for size in (heads, key_heads))
    assert spec.segments_BL is not None and spec.query_segments_BQ is None

    def device(q_BQHN: jax.Array, k_BLJN: jax.Array, v_BLJN: jax.Array, segments_BL: jax.Array) -> jax.Array:
        mine = dataclasses.replace(spec, segments_BL=segments_BL)
        axis = tokens.context
        if axis is not None:
            k_BLJN, v_BLJN, keys_BL = (
                jax.lax.all_gather(a, axis, axis=1, tiled=True) for a in (k_BLJN, v_BLJN, segments_BL)
            )
            first = jax.lax.axis_index(axis) * q_BQHN.shape[1]
            mine = dataclasses.replace(spec, segments_BL=keys_BL, query_segments_BQ=segments_BL, query_offset=first)
        if split is not None and key_split is None:
            # Every shard holds all key heads: take the one of each of its query heads.
            own = q_BQHN.shape[2]
            head_H = (jax.lax.axis_index(split) * own + jnp.arange(own)) * key_heads // heads
            k_BLJN, v_BLJN = (jnp.take(a, head_H, axis=2) for a in (k_BLJN, v_BLJN))
        return path(q_BQHN, k_BLJN, v_BLJN, mine, scale)

    queries, keys = tokens.spec(split, None), tokens.spec(key_split, None)
    run = jax.shard_map(
        device, mesh=mesh, in_specs=(queries, keys, keys, tokens.spec()), out_specs=queries, check_vma=False
    )
    return run(q_BQHN, k_BLJN, v_BLJN, spec.segments_BL)


def rotary_angles(positions_BL: jax.Array, size: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Returns (cosine, sine), float32 [B, L, N / 2] (Su et al. 2021, arXiv 2104.09864, equation 15)."""
    frequency = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angle = positions_BL[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BLHN: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the two halves of each head by the angles of its position; same dtype out."""
    cosine, sine = (a[:, :, None, :] for a in angles)
    first, second = jnp.split(x_BLHN.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1).astype(x_BLHN.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention(Config):
    """Causal self-attention with rotary positions and shared key heads."""

    heads: int = 4
    """Query heads H."""
    kv_heads: int = 0
    """Key and value heads, each serving heads / kv_heads query heads (Ainslie et al. 2023, arXiv 2305.13245); 0: as many as heads."""
    head_dim: int = 64
    """Size N of one head; even, for the rotation."""
    qk_norm: bool = True
    """RMS-normalise queries and keys per head (Henry et al. 2020, arXiv 2010.04245)."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    window: int | None = None
    """A token sees itself and the window - 1 tokens before it; None: all of its document before it."""
    max_documents: int = 8
    """Documents in one row that the packed GPU path is built for at first; a batch with more gets a program for four times as many."""
    backend: Literal["auto", "plain"] = "auto"
    """auto: the fastest path of the platform; plain: the path in plain JAX, which populations use because cuDNN's packed call has no vmap."""
    projection: Projection = component("projection", DenseProjection())
    """What stores the matrices."""

    @property
    def key_heads(self) -> int:
        """Key and value heads J."""
        return self.kv_heads or self.heads

    def check(self) -> None:
        """See Config.check."""
        self.require(self.heads >= 1, "heads", "at least 1")
        divides = self.kv_heads == 0 or (self.kv_heads > 0 and self.heads % self.kv_heads == 0)
        self.require(divides, "kv_heads", f"0 or a divisor of heads ({self.heads})")
        self.require(self.head_dim >= 2 and self.head_dim % 2 == 0, "head_dim", "an even number of at least 2")
        self.require(self.rope_theta > 1, "rope_theta", "above 1")
        self.require(self.window is None or self.window >= 1, "window", "None or at least 1")
        self.require(self.max_documents >= 1, "max_documents", "at least 1")

    def cost(self, d_model: int) -> tuple[int, float]:
        """Returns (parameters, forward operations per token without the scores)."""
        sizes = [(d_model, self.heads), (d_model, self.key_heads), (d_model, self.key_heads), (d_model, self.heads)]
        pairs = [self.projection.cost(a, b * self.head_dim) for a, b in sizes]
        norms = 2 * self.head_dim if self.qk_norm else 0
        return sum(p for p, _ in pairs) + norms, float(sum(f for _, f in pairs))


class Cache(NamedTuple):
    """Keys and values already computed.

    Attributes:
      k_BLJN: rotated keys; positions at and past `length` are unwritten.
      v_BLJN: values.
      segments_BL: int32 document of each key; queries see those of their own.
      length: int32 scalar, positions written.
    """

    k_BLJN: jax.Array
    v_BLJN: jax.Array
    segments_BL: jax.Array
    length: jax.Array


class AttentionLayer(nnx.Module):
    """Self-attention layer."""

    def __init__(self, config: Attention, d_model: int, scale: float, epsilon: float):
        self.config, self.scale = config, scale
        build, size = config.projection.build, config.head_dim
        queries, keys = config.heads * size, config.key_heads * size
        self.query = build(d_model, queries, ("embed", "heads"))
        self.key = build(d_model, keys, ("embed", "kv_heads"))
        self.value = build(d_model, keys, ("embed", "kv_heads"))
        self.out = build(queries, d_model, ("heads", "embed"))
        self.query_norm = RMSNorm(size, "head_dim", epsilon=epsilon) if config.qk_norm else None
        self.key_norm = RMSNorm(size, "head_dim", epsilon=epsilon) if config.qk_norm else None

    def __call__(
        self, x_BLD: jax.Array, angles: tuple[jax.Array, jax.Array], segments_BL: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """Returns (output [B, L, D], the cache with this call's keys and values written)."""
        config, (batch, length, _) = self.config, x_BLD.shape
        q_BLHN = self.query(x_BLD).reshape(batch, length, config.heads, -1)
        k_BLJN = self.key(x_BLD).reshape(batch, length, config.key_heads, -1)
        v_BLJN = checkpoint_name(self.value(x_BLD).reshape(batch, length, config.key_heads, -1), "value")
        if self.query_norm is not None and self.key_norm is not None:
            q_BLHN, k_BLJN = self.query_norm(q_BLHN), self.key_norm(k_BLJN)
        q_BLHN = checkpoint_name(rotate(q_BLHN, angles), "query")
        k_BLJN = checkpoint_name(rotate(k_BLJN, angles), "key")
        if cache is None:
            spec = AttentionSpec(segments_BL, window=config.window, max_documents=config.max_documents)
        else:
            offset = cache.length
            k_BLJN = jax.lax.dynamic_update_slice_in_dim(cache.k_BLJN, k_BLJN.astype(cache.k_BLJN.dtype), offset, 1)
            v_BLJN = jax.lax.dynamic_update_slice_in_dim(cache.v_BLJN, v_BLJN.astype(cache.v_BLJN.dtype), offset, 1)
            keys_BL = jax.lax.dynamic_update_slice_in_dim(cache.segments_BL, segments_BL, offset, 1)
            cache = Cache(k_BLJN, v_BLJN, keys_BL, offset + length)
            spec = AttentionSpec(keys_BL, segments_BL, query_offset=offset, window=config.window)
        out_BLHN = attend(q_BLHN, k_BLJN, v_BLJN, spec, self.scale, plain=config.backend == "plain")
        out_BLHN = checkpoint_name(out_BLHN, "attention")
        return self.out(out_BLHN.reshape(batch, length, -1)), cache
