"""The chunked cross-entropy against log_softmax, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparse_lm.model import loss

B, L, D, V = 3, 8, 5, 11


def draw():
    normal = np.random.default_rng(0).normal
    h, head = normal(size=(B, L, D)).astype(np.float32), normal(size=(D, V)).astype(np.float32)
    targets = np.random.default_rng(1).integers(0, V, (B, L)).astype(np.int32)
    mask = np.random.default_rng(2).integers(0, 2, (B, L)).astype(np.float32)
    return h, head, targets, mask


def plain(h, head, targets, mask, softcap, multiplier, z_coefficient):
    logits = h @ head * multiplier
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    z = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    return jnp.sum((entropy + z_coefficient * z) * mask), jnp.sum(entropy * mask)


@pytest.mark.parametrize("logits_bytes", [1 << 29, 4 * B * V * 2, 1])  # one chunk, chunks of two positions, of one
@pytest.mark.parametrize(
    ("softcap", "multiplier", "z"),
    [
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((None, 1.0, 0.0), (2.0, 0.5, 0.0), (None, 2.0, 0.1))
        ),
        (3.0, 0.7, 0.2),
    ],
)
def test_values_and_gradients_are_those_of_log_softmax(logits_bytes, softcap, multiplier, z, monkeypatch) -> None:
    monkeypatch.setattr(loss, "LOGITS_BYTES", logits_bytes)
    assert loss.chunks_of(B, L, V) == {1 << 29: 1, 4 * B * V * 2: 4, 1: 8}[logits_bytes]
    h, head, targets, mask = draw()
    # An upstream factor of 3 shows that the stored gradient is scaled.
    both = [
        tiny.jit(
            jax.value_and_grad(
                lambda h, head, f=f: 3.0 * f(h, head, targets, mask, softcap, multiplier, z)[0], argnums=(0, 1)
            )
        )
        for f in (loss.cross_entropy, plain)
    ]
    for a, b in zip(*(jax.tree.leaves(f(h, head)) for f in both)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    entropies = [
        tiny.jit(lambda h, head, f=f: f(h, head, targets, mask, softcap, multiplier, z)[1])(h, head)
        for f in (loss.cross_entropy, plain)
    ]
    np.testing.assert_allclose(*entropies, rtol=1e-6)
    losses = tiny.jit(lambda h, head: loss.token_losses(h, head, targets, softcap=softcap, multiplier=multiplier))(
        h, head
    )
    np.testing.assert_allclose(np.sum(losses * mask), entropies[1], rtol=1e-5)


def test_masked_positions_have_no_gradient() -> None:
    h, head, targets, mask = draw()
    grad = tiny.jit(jax.grad(lambda h: loss.cross_entropy(h, head, targets, mask, None, 1.0, 0.1)[0]))(h)
    assert (np.asarray(grad)[mask == 0] == 0).all() and (np.asarray(grad)[mask == 1] != 0).any()


def test_the_reported_entropy_carries_no_gradient() -> None:
    h, head, targets, mask = draw()
    grad = tiny.jit(jax.grad(lambda h: loss.cross_entropy(h, head, targets, mask, None, 1.0, 0.1)[1]))(h)
    assert (np.asarray(grad) == 0).all()


def test_the_gradient_of_a_bfloat16_head_is_accumulated_in_float32() -> None:
    h, head, targets, mask = draw()
    half = jnp.asarray(h, jnp.bfloat16)
    dh, dhead = tiny.jit(
        jax.grad(lambda h, w: loss.cross_entropy(h, w, targets, mask, None, 1.0, 0.0)[0], argnums=(0, 1))
    )(half, head)
    assert dh.dtype == jnp.bfloat16 and dhead.dtype == jnp.float32
    expected = tiny.jit(jax.grad(lambda w: plain(h, w, targets, mask, None, 1.0, 0.0)[0]))(head)
    np.testing.assert_allclose(dhead, expected, atol=0.02 * np.abs(expected).max())


def test_chunks_divide_the_length() -> None:
    # 7 positions: any number of chunks above one means seven
    assert loss.chunks_of(1 << 20, 7, 1 << 10) == 7
    assert loss.chunks_of(1, 12, 8) == 1
