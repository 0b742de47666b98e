"""The Engram layer against float64 numpy; causal, blind to other documents; the same in decoding, scanning and pieces."""

import dataclasses
import functools

import engram_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from sparse_lm.layers.feed_forward import TokenInfo
from sparse_lm.memory.engram import Engram, EngramLayer
from sparse_lm.memory.ngram_embedding import NgramEmbedding
from sparse_lm.memory.variants import Bigram, Shuffled, Uncompressed, Ungated, Unigram
from sparse_lm.model.transformer import empty_cache
from sparse_lm.train.state import with_tables

SMALL = {"heads": 2, "width": 8, "rows": 100}
ENGRAM = Engram(at=(1,), deviation=1.0, **SMALL)
BATCH, LENGTH, D = 2, 20, 8


def randomised(tree, seed: int):
    leaves, structure = jax.tree.flatten(tree)
    draw = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [jnp.asarray(draw.normal(size=a.shape) * 0.7, jnp.float32) for a in leaves])


@pytest.mark.parametrize(("branches", "form"), [(1, "sigmoid"), (4, "signed_root")])
def test_the_layer_is_the_reference(branches: int, form: str) -> None:
    config = Engram(**SMALL, gate=form, bias=True)
    layer = EngramLayer(config, D, 1e-5, branches=branches)
    graph, state = nnx.split(layer)
    state = randomised(state, 1)
    draw = np.random.default_rng(0)
    hidden = draw.normal(size=(BATCH, LENGTH, branches, D)).astype(np.float32)
    rows = draw.normal(size=(BATCH, LENGTH, 4, 4)).astype(np.float32)
    segments = np.array([[1] * 7 + [2] * 13, [1] * 18 + [0] * 2], np.int32)

    @tiny.jit
    def apply(state, hidden, rows, segments):
        return nnx.merge(graph, state).branched(hidden, rows, segments)[0]

    found = apply(state, hidden, rows.reshape(BATCH, LENGTH, -1), segments)
    pure = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(state))
    weights = {
        **{name: pure[name] for name in ("value_bias", "key_bias", "key_norm", "hidden_norm", "taps_norm", "taps")},
        "value": pure["value"]["weight"],
        "key": np.stack([pure["key"][str(m)]["weight"] for m in range(branches)]),
    }
    expected = engram_reference.engram(hidden, rows, segments, weights, 3, 1e-5, form == "signed_root")
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


@functools.cache
def model(memory, seed: int = 3, **changes):
    """(definition, parameters, inference state) with taps that are not zero."""
    definition, params, state = tiny.materialized(tiny.model(memory=memory, layers=2, **changes), seed)
    for layer in params["memory"].values():
        if "taps" in layer:
            layer["taps"] = jnp.linspace(-1.0, 1.0, layer["taps"].size).reshape(layer["taps"].shape)
    return definition, params, with_tables(state, tiny.jit(definition.initial_tables)(jax.random.key(9)))


@functools.cache
def losses_of(memory, **changes):
    definition, params, state = model(memory, **changes)
    return tiny.jit(lambda batch: definition.token_losses(params, state, batch)[0])


VARIANTS = {
    "engram": ENGRAM,
    "shared": dataclasses.replace(ENGRAM, at=(0, 1), shared=True),
    "no taps": dataclasses.replace(ENGRAM, taps=0),
    "ungated": Ungated(deviation=1.0, **SMALL),
    "uncompressed": Uncompressed(deviation=1.0, **SMALL),
    "bigram": Bigram(deviation=1.0, **SMALL),
    "unigram": Unigram(deviation=1.0, **SMALL),
    "shuffled": Shuffled(deviation=1.0, **SMALL),
    "averaged": NgramEmbedding(deviation=1.0, **SMALL),
    "bfloat16": dataclasses.replace(ENGRAM, dtype="bfloat16"),
}


@pytest.mark.parametrize(
    "name",
    ["engram", *(pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS if n != "engram")],
)
def test_packed_documents_are_separate_documents(name: str) -> None:
    run = losses_of(VARIANTS[name])
    packed = tiny.batch((9, 7), seed=4)
    whole = run(packed)
    for part in (slice(0, 9), slice(9, 16)):
        size = part.stop - part.start
        alone = {key: np.pad(a[:, part], ((0, 0), (0, 16 - size))) for key, a in packed.items()}
        alone["segments_BL"] = np.pad(np.ones((1, size), np.int32), ((0, 0), (0, 16 - size)))
        np.testing.assert_allclose(whole[:, part], run(alone)[:, :size], rtol=2e-5, atol=2e-5)


def test_no_position_sees_a_later_one() -> None:
    """By gradient for what is looked up, by change for the tokens that address it."""
    definition, params, state = model(ENGRAM)
    batch = tiny.full_batch(1, seed=6)
    info = TokenInfo(*(jnp.asarray(batch[k]) for k in ("tokens_BL", "positions_BL", "segments_BL")), None)
    fetch = tiny.jit(lambda info: definition.fetch(state["tables"], info))
    rows, address = fetch(info)

    def hidden(rows):
        return definition.hidden(params, state, info, rows=rows)[0][0]

    probe = jnp.asarray(np.random.default_rng(0).normal(size=(16,)), jnp.float32)
    influence = tiny.jit(jax.jacrev(lambda rows: hidden(rows) @ probe))(rows)["1"][:, 0]
    size = np.abs(np.asarray(influence)).max(-1)
    assert (np.triu(size, 1) == 0).all() and (np.diag(size) > 0).all()
    assert size[12, 3] > 0  # by attention, far beyond the ten positions of the layer itself
    changed = dict(batch, tokens_BL=batch["tokens_BL"].copy())
    changed["tokens_BL"][0, 8] = (changed["tokens_BL"][0, 8] + 1) % tiny.VOCABULARY
    other = info._replace(tokens_BL=jnp.asarray(changed["tokens_BL"]))
    moved = (np.asarray(fetch(other)[1]["1"]) != np.asarray(address["1"])).any(-1)[0]
    assert np.flatnonzero(moved).tolist() == [8, 9, 10]
    before, after = losses_of(ENGRAM)(batch), losses_of(ENGRAM)(changed)
    assert (before[0, :8] == after[0, :8]).all() and (before[0, 8:] != after[0, 8:]).all()


@pytest.mark.parametrize(
    "name", ["engram", *(pytest.param(n, marks=pytest.mark.slow) for n in ("shared", "shuffled", "averaged"))]
)
def test_decoding_is_the_forward_pass(name: str) -> None:
    """A padded first pass over 5 tokens in a bucket of 8, then one token at a time."""
    definition, params, state = model(VARIANTS[name])
    tokens = jnp.asarray(tiny.full_batch(2, seed=8)["tokens_BL"])
    places = jnp.broadcast_to(jnp.arange(16), tokens.shape)
    logits = tiny.jit(lambda info, cache: definition.logits(params, state, info, cache))
    whole = logits(TokenInfo(tokens, places, jnp.ones_like(tokens), None), None)[0]
    cache = empty_cache(definition.config, 2, 16)
    valid = (places[:, :8] < 5).astype(jnp.int32)
    first, cache = logits(TokenInfo(tokens[:, :8], places[:, :8], valid, None), cache)
    np.testing.assert_allclose(first[:, :5], whole[:, :5], rtol=2e-5, atol=2e-5)
    cache = {k: c if k == "memory" else c._replace(length=jnp.full_like(c.length, 5)) for k, c in cache.items()}
    for t in range(5, 16):
        info = TokenInfo(tokens[:, t : t + 1], places[:, t : t + 1], jnp.ones((2, 1), jnp.int32), None)
        step, cache = logits(info, cache)
        np.testing.assert_allclose(step[:, 0], whole[:, t], rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_a_row_of_zeros_adds_nothing() -> None:
    """What an n-gram never seen in training reads."""
    definition, params, state = model(dataclasses.replace(ENGRAM, deviation=0.0))
    batch = tiny.full_batch(1)
    plain, plain_params, plain_state = tiny.materialized(tiny.model(layers=2), 3)
    bare = {name: part for name, part in params.items() if name != "memory"}
    tiny.assert_same(bare, plain_params)  # a memory changes no other initial value
    losses = tiny.jit(lambda: plain.token_losses(plain_params, plain_state, batch)[0])()
    np.testing.assert_allclose(losses_of(dataclasses.replace(ENGRAM, deviation=0.0))(batch), losses, rtol=1e-6)


@pytest.mark.slow
def test_scanned_blocks_are_the_unrolled_ones() -> None:
    memory = dataclasses.replace(ENGRAM, at=(1,))
    scanned = tiny.model(memory=memory, layers=4, execution="scanned")
    assert [name for name, _ in scanned.runs()] == ["0", "1_to_3"]
    batch = tiny.batch((9, 7), seed=4)
    results = []
    for config in (
        scanned,
        dataclasses.replace(scanned, execution="unrolled"),
        dataclasses.replace(scanned, remat="block"),
    ):
        definition, params, state = tiny.materialized(config, 3)
        state = with_tables(state, definition.initial_tables(jax.random.key(9)))
        results.append(tiny.jit(lambda d=definition, p=params, s=state: d.token_losses(p, s, batch)[0])())
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)
    np.testing.assert_allclose(results[0], results[2], rtol=1e-5)
