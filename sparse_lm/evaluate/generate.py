"""Text from a model: one pass over the prompts, then one token at a time against a cache of keys and values.

Two compiled programs serve every call with the same batch and cache size: `prefill`, over prompts padded to a power of two, and
`decode`, a loop over a piece of the answer (a piece at a time, so that text can be shown as it comes). Prompts of different lengths
share a batch: the first pass reads as many tokens as the shortest has, and the loop takes the rest of a longer prompt in place of
sampled tokens.

Legend: B batch, L prompt length, C cache length, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.data.tokenizer import Encoder
from sparse_lm.layers.feed_forward import TokenInfo
from sparse_lm.model.attention import Cache
from sparse_lm.model.definition import Definition
from sparse_lm.model.transformer import empty_cache

PIECE = 16
"""Tokens decoded between two looks from the host."""

BUCKET = 64
"""Cache lengths are multiples of this, so that few programs are compiled."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only the k most likely tokens; None: all.
      top_p: only the most likely tokens that together have at least this probability (Holtzman et al. 2020,
        arXiv 1904.09751); None: all. Applied after top_k.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature = {self.temperature}; allowed: 0 (most likely token) or above")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k}; allowed: at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}; allowed: above 0, at most 1")


def restrict(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns the logits at a temperature above 0, minus infinity where `top_k` and `top_p` leave a token out."""
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_BV = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
        probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # A token stays while those before it have not reached the mass; the first always stays.
        stays_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV < sampling.top_p
        least_B1 = jnp.min(jnp.where(stays_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV


def next_tokens(logits_BV: jax.Array, sampling: Sampling, key: jax.Array, position: jax.Array) -> jax.Array:
    """Draws one token a row, int32 [B]. Row r at a position depends on (key, r, position) alone, not on the batch's size."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    key = jax.random.fold_in(key, position)
    key_B = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(logits_BV.shape[0]))
    return jax.vmap(jax.random.categorical)(key_B, restrict(logits_BV, sampling)).astype(jnp.int32)


class Decoding(NamedTuple):
    """What the decoding loop carries.

    Attributes:
      tokens_BC: prompts, then what was generated; end_of_text elsewhere.
      logits_BV: float32, of the token at `position`.
      cache: keys and values of the positions before it.
      position: int32 scalar, tokens written in every row.
      done_B: rows that have generated end_of_text.
    """

    tokens_BC: jax.Array
    logits_BV: jax.Array
    cache: Any
    position: jax.Array
    done_B: jax.Array


def prefill(
    definition: Definition, params: Any, model_state: Any, tokens_BC: jax.Array, bucket: int, shortest: jax.Array
) -> Decoding:
    """Reads the first `shortest` tokens of every row in one pass.

    Args:
      definition: the model.
      params: parameters.
      model_state: model state.
      tokens_BC: prompts; anything past their ends.
      bucket: static, positions computed; at least `shortest`. Those past it are padding: the cache is told that they were never
        written, and later tokens overwrite them.
      shortest: int32 scalar, tokens that every row has.
    """
    batch, length = tokens_BC.shape
    positions_L = jnp.arange(bucket)
    valid_BL = jnp.broadcast_to((positions_L < shortest).astype(jnp.int32), (batch, bucket))
    info = TokenInfo(tokens_BC[:, :bucket], jnp.broadcast_to(positions_L, (batch, bucket)), valid_BL, None)
    logits_BLV, cache = definition.logits(params, model_state, info, empty_cache(definition.config, batch, length))
    cache = {
        name: c._replace(length=jnp.full_like(c.length, shortest)) if isinstance(c, Cache) else c
        for name, c in cache.items()
    }
    last_BV = jax.lax.dynamic_index_in_dim(logits_BLV, shortest - 1, axis=1, keepdims=False)
    return Decoding(tokens_BC, last_BV, cache, jnp.asarray(shortest, jnp.int32), jnp.zeros((batch,), bool))


def decode(
    definition: Definition,
    sampling: Sampling,
    end_of_text: int,
    params: Any,
    model_state: Any,
    decoding: Decoding,
    prompt_lengths_B: jax.Array,
    stop: jax.Array,
    key: jax.Array,
) -> Decoding:
    """Writes tokens until every row is done or `stop` tokens are written.

    Args:
      definition: the model.
      sampling: how tokens are drawn.
      end_of_text: the token that ends a row.
      params: parameters.
      model_state: model state.
      decoding: where to go on.
      prompt_lengths_B: tokens of each prompt; those are kept.
      stop: int32 scalar, at most the cache's length.
      key: of the draws.
    """
    batch = decoding.tokens_BC.shape[0]

    def unfinished(d: Decoding) -> jax.Array:
        return (d.position < stop) & ~jnp.all(d.done_B)

    def one(d: Decoding) -> Decoding:
        given_B = jax.lax.dynamic_index_in_dim(d.tokens_BC, d.position, axis=1, keepdims=False)
        in_prompt_B = d.position < prompt_lengths_B
        drawn_B = jnp.where(d.done_B, end_of_text, next_tokens(d.logits_BV, sampling, key, d.position))
        token_B = jnp.where(in_prompt_B, given_B, drawn_B)
        done_B = d.done_B | (~in_prompt_B & (token_B == end_of_text))
        tokens_BC = jax.lax.dynamic_update_index_in_dim(d.tokens_BC, token_B, d.position, 1)
        positions_B1 = jnp.full((batch, 1), d.position, jnp.int32)
        info = TokenInfo(token_B[:, None], positions_B1, jnp.ones((batch, 1), jnp.int32), None)
        logits_B1V, cache = definition.logits(params, model_state, info, d.cache)
        return Decoding(tokens_BC, logits_B1V[:, 0], cache, d.position + 1, done_B)

    return jax.lax.while_loop(unfinished, one, decoding)


def power_of_two(length: int) -> int:
    """Returns the smallest power of two of at least 8 that is not below a length."""
    return max(8, 1 << (length - 1).bit_length())


class Generator:
    """Generates from one model; programs are compiled on first use of a batch size, a cache size and a way of sampling.

    Args:
      definition: the model.
      params: its parameters.
      model_state: its model state.
      end_of_text: the token that ends a text.
    """

    def __init__(self, definition: Definition, params: Any, model_state: Any, end_of_text: int):
        self.definition, self.end_of_text = definition, end_of_text
        self._values = (params, model_state)
        self._prefill = jax.jit(functools.partial(prefill, definition), static_argnums=3)
        self._decode: dict[Sampling, Callable[..., Decoding]] = {}

    def stream(
        self, prompts: Sequence[np.ndarray], tokens: int, sampling: Sampling, *, seed: int = 0
    ) -> Iterator[list[np.ndarray]]:
        """Yields, after each piece of the answer, the tokens of every row so far: its prompt and what was generated.

        Args:
          prompts: token ids of each row, end_of_text first (each training document begins with it); at least one each.
          tokens: most tokens to generate for each row.
          sampling: how they are drawn.
          seed: of the draws.

        Raises:
          ValueError: for an empty prompt, a token outside the vocabulary, or no tokens to generate.
        """
        lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
        vocabulary = self.definition.config.vocab_size
        if not len(prompts) or lengths_B.min() < 1:
            raise ValueError("a prompt has no token; allowed: at least end_of_text")
        if max(int(np.max(p)) for p in prompts) >= vocabulary or min(int(np.min(p)) for p in prompts) < 0:
            raise ValueError(f"a prompt has a token outside the model's vocabulary of {vocabulary}")
        if tokens < 1:
            raise ValueError(f"tokens = {tokens}; allowed: at least 1")
        if sampling not in self._decode:
            program = functools.partial(decode, self.definition, sampling, self.end_of_text)
            self._decode[sampling] = jax.jit(program, donate_argnums=2)
        shortest, limit = int(lengths_B.min()), int(lengths_B.max()) + tokens
        bucket = power_of_two(shortest)
        size = -(-max(limit, bucket) // BUCKET) * BUCKET
        tokens_BC = np.full((len(prompts), size), self.end_of_text, np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BC[row, : len(prompt)] = prompt
        state = self._prefill(*self._values, jnp.asarray(tokens_BC), bucket, jnp.int32(shortest))
        key = jax.random.key(seed)
        while True:
            stop = min(limit, int(state.position) + PIECE)
            state = self._decode[sampling](*self._values, state, jnp.asarray(lengths_B), jnp.int32(stop), key)
            written, done = int(state.position), bool(jnp.all(state.done_B))
            rows = np.asarray(state.tokens_BC)[:, :written]
            yield [self._ended(row, length, tokens) for row, length in zip(rows, lengths_B.tolist())]
            if done or written >= limit:
                return

    def _ended(self, row: np.ndarray, prompt_length: int, tokens: int) -> np.ndarray:
        """Cuts a row at its end_of_text or after its own number of tokens."""
        answer = row[prompt_length : prompt_length + tokens]
        ends = np.flatnonzero(answer == self.end_of_text)
        return row[: prompt_length + (int(ends[0]) if len(ends) else len(answer))]

    def generate(
        self, prompts: Sequence[np.ndarray], tokens: int, sampling: Sampling, *, seed: int = 0
    ) -> list[np.ndarray]:
        """Returns the tokens of every row, prompt included; see `stream`."""
        *_, rows = self.stream(prompts, tokens, sampling, seed=seed)
        return rows


def encode_prompt(encoder: Encoder, text: str) -> np.ndarray:
    """Returns the ids of a prompt as a document's beginning: end_of_text, then the text."""
    return np.append(np.int64(encoder.end_of_text), encoder.encode(text)).astype(np.int32)


def stable_text(encoder: Encoder, ids: np.ndarray) -> str:
    """Decodes ids of which more may follow: a character whose bytes are not complete is held back."""
    return encoder.decode(ids).rstrip("\ufffd")
