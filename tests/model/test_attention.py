"""Attention against a softmax written out in float64; rotations and document offsets by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparse_lm.model import attention, splash_attention
from sparse_lm.model.attention import AttentionSpec, attend, rotary_angles, rotate
from sparse_lm.model.cudnn_attention import cudnn_reason, document_offsets

SEGMENTS = tiny.batch((5, 7), (12,), (3, 2, 4), length=12)["segments_BL"]
"""Three rows of 12 tokens; the last has 3 tokens of padding."""


def attend_plain(*arguments):
    """Compiled anew each time: CHUNK is read while tracing."""
    return tiny.jit(lambda q, k, v, spec, scale: attention.attend_plain(q, k, v, spec, scale))(*arguments)


def naive(q, k, v, scale, segments_Q=None, segments_L=None, window=None, offset=0):
    """Softmax attention by three loops, float64; queries that see nothing give nan."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.full(q.shape, np.nan)
    shared = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            keys = [j for j in range(k.shape[1]) if j <= i + offset and (window is None or i + offset - j < window)]
            if segments_L is not None:
                keys = [j for j in keys if segments_L[b, j] == segments_Q[b, i]]
            for h in range(q.shape[2]) if keys else ():
                scores = k[b, keys, h // shared] @ q[b, i, h] * scale
                weights = np.exp(scores - scores.max())
                out[b, i, h] = weights @ v[b, keys, h // shared] / weights.sum()
    return out


def draw(queries: int, keys: int, heads: int = 4, key_heads: int = 2, size: int = 6):
    normal = np.random.default_rng(0).normal
    shapes = [(3, queries, heads, size), (3, keys, key_heads, size), (3, keys, key_heads, size)]
    return [normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize(("key_heads", "window"), [(1, None), (2, 1), (2, 4), (4, 4)])
@pytest.mark.parametrize("packed", [False, True])
def test_plain_attention_is_softmax_attention(key_heads: int, window: int | None, packed: bool) -> None:
    q, k, v = draw(12, 12, key_heads=key_heads)
    segments = SEGMENTS if packed else None
    out = attend_plain(q, k, v, AttentionSpec(segments, window=window), 0.3)
    expected = naive(q, k, v, 0.3, segments, segments, window)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_without_a_kernel_that_serves_the_plain_path_is_taken() -> None:
    q, k, v = draw(12, 12)  # float32, which cuDNN does not serve
    spec = AttentionSpec(SEGMENTS, window=4)
    out = tiny.jit(lambda q, k, v: attend(q, k, v, spec, 0.3))(q, k, v)
    np.testing.assert_array_equal(out, attend_plain(q, k, v, spec, 0.3))


@pytest.mark.parametrize("packed", [False, True])
def test_queries_in_chunks_give_the_same_values_and_gradients(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(12, 12)
    spec = AttentionSpec(SEGMENTS if packed else None, window=7)
    cotangent = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    def run():
        total = lambda q, k, v: jnp.sum(attention.attend_plain(q, k, v, spec, 0.3) * cotangent)  # noqa: E731
        return tiny.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)

    whole = run()
    monkeypatch.setattr(attention, "CHUNK", 4)
    for a, b in zip(jax.tree.leaves(run()), jax.tree.leaves(whole)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    chunked = attend_plain(q, k, v, spec, 0.3)
    expected = naive(q, k, v, 0.3, spec.segments_BL, spec.segments_BL, 7)
    np.testing.assert_allclose(chunked, expected, rtol=1e-5, atol=1e-5)


def test_a_length_that_chunks_do_not_divide_is_scored_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(12, 12)
    whole = attend_plain(q, k, v, AttentionSpec(), 0.3)
    monkeypatch.setattr(attention, "CHUNK", 5)
    np.testing.assert_array_equal(attend_plain(q, k, v, AttentionSpec(), 0.3), whole)


def test_queries_after_a_cache_see_the_keys_before_them() -> None:
    q, k, v = draw(2, 12)
    spec = AttentionSpec(query_offset=jnp.int32(7), window=5)
    np.testing.assert_allclose(
        attend_plain(q, k, v, spec, 0.3), naive(q, k, v, 0.3, window=5, offset=7), rtol=1e-5, atol=1e-5
    )


def test_queries_may_have_their_own_segments() -> None:
    q, k, v = draw(3, 12)
    queries = np.array([[2, 2, 2], [1, 1, 1], [3, 3, 3]], np.int32)
    spec = AttentionSpec(SEGMENTS, query_segments_BQ=queries, query_offset=9)
    expected = naive(q, k, v, 0.3, queries, SEGMENTS, offset=9)
    np.testing.assert_allclose(attend_plain(q, k, v, spec, 0.3), expected, rtol=1e-5, atol=1e-5)


def test_rotation_by_hand() -> None:
    # size 4, theta 100: frequencies 1 and 100 ** -0.5 = 0.1; position 2: angles 2 and 0.2
    cosine, sine = rotary_angles(jnp.array([[0, 2]]), 4, 100.0)
    np.testing.assert_allclose(cosine[0], [[1, 1], [math.cos(2), math.cos(0.2)]], rtol=1e-6)
    np.testing.assert_allclose(sine[0], [[0, 0], [math.sin(2), math.sin(0.2)]], rtol=1e-6)
    x = jnp.array([1.0, 2.0, 3.0, 4.0])
    out = rotate(jnp.broadcast_to(x, (1, 2, 1, 4)), (cosine, sine))[0, :, 0]
    np.testing.assert_allclose(out[0], x)  # position 0 turns nothing
    # pairs are (1, 3) and (2, 4): first * cos - second * sin, second * cos + first * sin
    c, s, d, e = math.cos(2), math.sin(2), math.cos(0.2), math.sin(0.2)
    np.testing.assert_allclose(out[1], [c - 3 * s, 2 * d - 4 * e, 3 * c + s, 4 * d + 2 * e], rtol=1e-5)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    q, k = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)

    def product(i: int, j: int) -> float:
        angles = [rotary_angles(jnp.array([[position]]), 8, 10_000.0) for position in (i, j)]
        rotated = [rotate(jnp.asarray(x)[None, None, None], a)[0, 0, 0] for x, a in zip((q, k), angles)]
        return float(rotated[0] @ rotated[1])

    assert product(7, 3) == pytest.approx(product(104, 100), rel=1e-4)
    assert product(7, 3) != pytest.approx(product(7, 4), rel=1e-2)


def test_document_offsets_by_hand() -> None:
    # rows: documents of 3, 2 and 4 tokens with 1 of padding; one document; padding alone
    segments = np.array([[1, 1, 1, 2, 2, 3, 3, 3, 3, 0], [1] * 10, [0] * 10], np.int32)
    lengths, starts = document_offsets(segments, 4)
    assert lengths.tolist() == [[3, 2, 4, -1], [10, -1, -1, -1], [-1, -1, -1, -1]]
    assert starts.tolist() == [[0, 3, 5, -1, -1], [0, -1, -1, -1, -1], [-1] * 5]


def test_documents_past_the_most_are_left_out_of_the_offsets() -> None:
    lengths, starts = document_offsets(np.array([[1, 2, 2, 3, 3, 3]], np.int32), 2)
    assert lengths.tolist() == [[1, 2]] and starts.tolist() == [[0, 1, -1]]


def test_why_cudnn_cannot_serve_is_said() -> None:
    def reason(dtype=jnp.bfloat16, length=16, keys=16, size=64) -> str | None:
        shapes = [jax.ShapeDtypeStruct((2, rows, 4, size), dtype) for rows in (length, keys)]
        return cudnn_reason(*shapes, AttentionSpec())

    assert "float32" in reason(dtype=jnp.float32)
    assert "cache" in reason(length=1)
    assert "multiple of 8" in reason(size=20)
    if not any(device.platform == "gpu" for device in jax.devices()):
        assert "no GPU" in reason()


@pytest.mark.parametrize("window", [None, pytest.param(40, marks=pytest.mark.slow)])
def test_the_tpu_kernel_is_plain_attention(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Pallas's interpreter, packed documents and padding, gradients included."""
    monkeypatch.setattr(splash_attention, "INTERPRET", True)
    normal = np.random.default_rng(0).normal
    q, k, v = (normal(size=(1, 128, heads, 64)).astype(np.float32) for heads in (2, 1, 1))
    spec = AttentionSpec(tiny.batch((60, 50), length=128)["segments_BL"], window=window)
    cotangent = normal(size=q.shape).astype(np.float32) * (spec.segments_BL > 0)[..., None, None]
    assert splash_attention.splash_reason(q, k, spec) is None

    def run(path):
        total = lambda q, k, v: jnp.sum(path(q, k, v, spec, 0.3) * cotangent)  # noqa: E731
        return tiny.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)

    for a, b in zip(*(jax.tree.leaves(run(path)) for path in (splash_attention.attend_splash, attention.attend_plain))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_why_the_tpu_kernel_cannot_serve_is_said() -> None:
    shapes = [jax.ShapeDtypeStruct((2, rows, 4, 64), jnp.bfloat16) for rows in (100, 128, 64)]
    spec = AttentionSpec()
    assert "multiple of 128" in splash_attention.splash_reason(shapes[0], shapes[0], spec)
    assert "cache" in splash_attention.splash_reason(shapes[2], shapes[1], spec)
    narrow = jax.ShapeDtypeStruct((2, 128, 4, 8), jnp.bfloat16)
    assert "head dim" in splash_attention.splash_reason(narrow, narrow, spec)
