"""Decoding against a cache equals the full forward pass; sampling keeps to its limits; texts end where they should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.data.tokenizer import Bytes
from sparse_lm.evaluate.generate import Generator, Sampling, next_tokens, power_of_two, prefill, restrict, stable_text
from sparse_lm.layers.feed_forward import DenseFeedForward, TokenInfo
from sparse_lm.model.attention import Attention
from sparse_lm.model.definition import Definition, define
from sparse_lm.model.transformer import Model
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.routing.top_k import TopKRouter

VOCABULARY, END = 61, 60
LONGEST = 32
DENSE = DenseFeedForward(hidden=32)
ROUTED = MoEFeedForward(experts=4, hidden=16, shared_hidden=8, router=TopKRouter(k=2, bias_rate=0.01))
GREEDY = Sampling(temperature=0)


pytestmark = pytest.mark.usefixtures("fast_compiles")


def small(feed_forward, **changes) -> Model:
    attention = Attention(heads=4, kv_heads=2, head_dim=8, window=changes.pop("window", None))
    changes = {"vocab_size": VOCABULARY, "d_model": 16, "layers": 2, **changes}
    return Model(attention=attention, pattern=(feed_forward,), **changes)


@functools.cache
def values(model: Model) -> tuple[Definition, dict, dict]:
    definition = define(model)
    params = jax.jit(definition.initial_params)(jax.random.key(3))
    # Larger weights than a fresh model's: its next tokens must not all be near ties.
    params = jax.tree.map(lambda a: a * 4.0 if a.ndim > 1 else a, params)
    state = jax.tree.map(lambda a: a + 0.1 * jnp.arange(a.shape[-1]), definition.initial_state())
    return definition, params, state


@functools.cache
def generator_of(model: Model, end_of_text: int = END) -> Generator:
    return Generator(*values(model), end_of_text=end_of_text)


@functools.cache
def full_pass(model: Model):
    definition, params, state = values(model)

    def logits(tokens_BL):
        info = TokenInfo(tokens_BL, jnp.arange(LONGEST)[None], jnp.ones_like(tokens_BL), None)
        return definition.logits(params, state, info)[0]

    return jax.jit(logits)


def full_logits(model: Model, tokens_L: np.ndarray) -> np.ndarray:
    """Logits of a text by one pass over all of it; padding behind it cannot be seen."""
    padded = np.pad(tokens_L, (0, LONGEST - len(tokens_L))).astype(np.int32)
    return np.asarray(full_pass(model)(padded[None])[0])[: len(tokens_L)]


def prompts(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.append(END, rng.integers(0, END, length - 1)).astype(np.int32) for length in lengths]


MODELS = {
    "dense": small(DENSE, window=5),
    "dense scanned": small(DENSE, execution="scanned", logit_softcap=5.0),
    "routed": small(ROUTED, layers=1),
    "routed scanned": small(ROUTED, execution="scanned"),
}


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("dense", "dense scanned", "routed")), "routed scanned"],
)
def test_greedy_equals_the_argmax_of_the_full_forward_pass_at_every_step(name):
    """Three prompts of different lengths in one batch: the shortest decides how much is read at once."""
    model = MODELS[name]
    starts = prompts(11, 3, 6)
    rows = generator_of(model).generate(starts, 20, GREEDY)
    for start, row in zip(starts, rows, strict=True):
        assert (row[: len(start)] == start).all()
        answer = row[len(start) :]
        expected = np.argmax(full_logits(model, row), axis=-1)[len(start) - 1 :]
        assert answer.tolist() == expected[: len(answer)].tolist()
        assert len(answer) == 20 or expected[len(answer)] == END


def test_logits_after_the_first_pass_and_after_each_step_are_those_of_the_full_pass():
    model = MODELS["dense scanned"]
    definition, params, state = values(model)
    (row,) = prompts(16)
    read = jax.jit(functools.partial(prefill, definition), static_argnums=3)
    # Five tokens are read; the eleven behind them in the padded pass must leave no trace.
    decoding = read(params, state, jnp.asarray(row)[None], 16, jnp.int32(5))
    wanted = full_logits(model, row)
    np.testing.assert_allclose(decoding.logits_BV[0], wanted[4], rtol=1e-4, atol=1e-3)
    logits, cache = decoding.logits_BV, decoding.cache
    one = jax.jit(definition.logits)
    for position in range(5, 16):
        info = TokenInfo(
            jnp.asarray(row[position])[None, None], jnp.full((1, 1), position), jnp.ones((1, 1), jnp.int32), None
        )
        logits, cache = one(params, state, info, cache)
        np.testing.assert_allclose(logits[0, 0], wanted[position], rtol=1e-4, atol=1e-3)


def test_one_compile_serves_prompts_and_lengths_of_one_size_class():
    generator = generator_of(MODELS["dense"])
    generator.generate(prompts(5, 3, 4), 20, GREEDY)
    compiled = generator._prefill._cache_size(), generator._decode[GREEDY]._cache_size()
    for lengths, tokens in (((8, 8, 7), 31), ((2, 2, 2), 1)):
        generator.generate(prompts(*lengths), tokens, GREEDY)
    assert (generator._prefill._cache_size(), generator._decode[GREEDY]._cache_size()) == compiled


def test_a_text_stops_at_end_of_text_and_others_go_on():
    model = MODELS["dense"]
    (start,) = prompts(4)
    other = prompts(4, 9)[1]
    free, longer = generator_of(model, -1).generate([start, other], 12, GREEDY)
    # Ends the first text early: the last of its tokens that has not occurred before it, unless the other text has it too.
    answer = free[len(start) :].tolist()
    ending = next(token for token in answer[1:] if token != answer[0] and token not in longer[:11])
    rows = generator_of(model, ending).generate([start, other], 12, GREEDY)
    assert rows[0].tolist() == free[: len(start) + answer.index(ending)].tolist()
    assert len(rows[1]) > len(other)


def test_pieces_grow_and_the_last_is_the_answer():
    generator = generator_of(MODELS["dense"], -1)
    pieces = [rows[0] for rows in generator.stream(prompts(3), 40, Sampling(), seed=1)]
    assert [len(piece) for piece in pieces] == [19, 35, 43]
    assert all((later[: len(piece)] == piece).all() for piece, later in zip(pieces, pieces[1:]))


def test_the_seed_decides_and_rows_do_not_depend_on_the_rest_of_the_batch():
    generator = generator_of(MODELS["dense"], -1)
    (start,) = prompts(5)
    one = generator.generate([start], 15, Sampling(), seed=4)[0]
    two = generator.generate([start, start], 15, Sampling(), seed=4)
    assert two[0].tolist() == one.tolist() != two[1].tolist()
    assert generator.generate([start], 15, Sampling(), seed=5)[0].tolist() != one.tolist()


LOGITS = jnp.log(jnp.array([[0.05, 0.4, 0.15, 0.3, 0.1]]))


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), [0, 1, 2, 3, 4]),
        (Sampling(top_k=2), [1, 3]),
        (Sampling(top_k=9), [0, 1, 2, 3, 4]),
        (Sampling(top_p=0.39), [1]),
        (Sampling(top_p=0.41), [1, 3]),
        (Sampling(top_p=0.86), [1, 2, 3, 4]),
        (Sampling(top_p=1.0), [0, 1, 2, 3, 4]),
        (Sampling(top_k=3, top_p=0.8), [1, 3]),  # of 0.85 in all, 0.4 and 0.3 are 82%
        (Sampling(temperature=0.5, top_p=0.85), [1, 3]),  # squared: 0.16 and 0.09 of 0.285 are 88%
    ],
)
def test_sampling_keeps_to_the_likely_tokens(sampling, kept):
    assert np.flatnonzero(np.isfinite(restrict(LOGITS, sampling)[0])).tolist() == kept


def test_draws_follow_the_probabilities():
    logits_BV = jnp.tile(LOGITS, (4000, 1))
    drawn = next_tokens(logits_BV, Sampling(top_k=3), jax.random.key(0), jnp.int32(7))
    share = np.bincount(drawn, minlength=5) / 4000
    np.testing.assert_allclose(share, np.array([0, 0.4, 0.15, 0.3, 0]) / 0.85, atol=0.03)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}])
def test_impossible_sampling_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_prompts_that_cannot_be_read_are_refused():
    generator = generator_of(MODELS["dense"])
    for bad, tokens in (([], 3), ([np.zeros(0, np.int32)], 3), ([np.array([VOCABULARY])], 3), ([np.array([1])], 0)):
        with pytest.raises(ValueError):
            generator.generate(bad, tokens, GREEDY)


def test_sizes():
    assert [power_of_two(n) for n in (1, 8, 9, 16, 1000)] == [8, 8, 16, 16, 1024]


def test_characters_wait_until_their_bytes_are_complete(tmp_path):
    Bytes().build(tmp_path / "bytes.json", [], [])
    encoder = Bytes().load(tmp_path / "bytes.json")
    ids = encoder.encode("né")
    assert stable_text(encoder, ids[:-1]) == "n"
    assert stable_text(encoder, ids) == "né"
