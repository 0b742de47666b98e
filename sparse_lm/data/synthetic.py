"""Four planted sources: facts to store, look-ups to chain, pairs to recall, statistics to estimate; and their vocabulary.

They separate what mechanisms are good at: biographies measure memory (bits stored per parameter, Allen-Zhu and Li 2024,
arXiv 2404.05405), k-hop look-up measures depth of reasoning, recall measures attention (Arora et al. 2023, arXiv 2312.04927), and
Markov text measures n-gram statistics of known entropy.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from sparse_lm.data import order, storage
from sparse_lm.data.planted import PlantedSource, Sample
from sparse_lm.data.tokenizer import END_OF_TEXT, Encoder, Tokenizer


def _random_orders(count: int, size: int, *key: int) -> np.ndarray:
    """Returns `count` independent permutations of range(size), shape [count, size]."""
    return np.argsort(order.draws((count, size), *key), axis=1, kind="stable").astype(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Biographies(PlantedSource):
    """People with facts: `first middle last  attribute value  attribute value ...`, attributes in random order.

    The value of each (person, attribute) is uniform and fixed by the seed, so a model that has stored every fact predicts values
    with no loss. Bits stored = people * attributes * (log2(values) - mean loss in bits at the values).
    """

    people: int = 10_000
    """People in the world, P."""
    attributes: int = 6
    """Facts about each person, A."""
    values: int = 64
    """Possible values of each attribute, V."""

    def check(self) -> None:
        super().check()
        self.require(1 <= self.people <= 10_000_000, "people", "1 to 10000000")
        self.require(1 <= self.attributes <= 100, "attributes", "1 to 100")
        self.require(2 <= self.values <= 10_000, "values", "2 to 10000")

    @property
    def default_domain(self) -> str:
        return "biographies"

    @property
    def document_length(self) -> int:
        return 3 + 2 * self.attributes

    @property
    def _names(self) -> int:
        """How many first (and middle, and last) names are needed to name everyone."""
        return next(
            n for n in range(round(self.people ** (1 / 3)) - 1, self.people + 2) if n > 0 and n**3 >= self.people
        )

    def symbols(self) -> tuple[str, ...]:
        names = [f"{kind}{i}" for kind in ("first", "middle", "last") for i in range(self._names)]
        attributes = [f"attribute{a}" for a in range(self.attributes)]
        values = [f"value{a}.{v}" for a in range(self.attributes) for v in range(self.values)]
        return (*names, *attributes, *values)

    def sample(self, count: int, *key: int) -> Sample:
        names_P3, nats_P3, facts_PA = _population(self.seed, self.people, self.attributes, self.values, self._names)
        person_D = order.integers(self.people, count, *key, 0)
        attribute_DA = _random_orders(count, self.attributes, *key, 1)
        value_DA = facts_PA[person_D[:, None], attribute_DA]
        first_value = 3 * self._names + self.attributes
        symbols = np.empty((count, self.document_length), np.int32)
        symbols[:, :3] = names_P3[person_D] + self._names * np.arange(3)
        symbols[:, 3::2] = 3 * self._names + attribute_DA
        symbols[:, 4::2] = first_value + attribute_DA * self.values + value_DA
        nats = np.zeros(symbols.shape, np.float32)
        nats[:, :3] = nats_P3[person_D]
        nats[:, 3::2] = np.log(self.attributes - np.arange(self.attributes))
        answers = np.zeros(symbols.shape, np.int8)
        answers[:, 4::2] = 1
        return Sample(symbols, nats, answers)

    def truth(self) -> dict[str, float]:
        bits = math.log2(self.values)
        nats = math.log(self.people) + math.lgamma(self.attributes + 1)
        return {
            "nats_per_document": nats,
            "nats_per_document_without_facts": nats + self.attributes * math.log(self.values),
            "facts": self.people * self.attributes,
            "bits_per_fact": bits,
            "bits": self.people * self.attributes * bits,
        }


@functools.lru_cache(4)
def _population(
    seed: int, people: int, attributes: int, values: int, names: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the world of Biographies: name indices [P, 3], their optimal nats [P, 3], and facts [P, A]."""
    code_P = order.permutation(names**3, seed, 10)[:people]
    names_P3 = np.stack([code_P // names**2, code_P // names % names, code_P % names], 1).astype(np.int32)
    with_first = np.bincount(code_P // names**2)[code_P // names**2]
    with_middle = np.bincount(code_P // names)[code_P // names]
    nats_P3 = np.log(np.stack([people / with_first, with_first / with_middle, with_middle], 1)).astype(np.float32)
    facts_PA = order.integers(values, (people, attributes), seed, 11).astype(np.int32)
    return names_P3, nats_P3, facts_PA


@dataclasses.dataclass(frozen=True, kw_only=True)
class KHop(PlantedSource):
    """Chained look-up: a random cycle as pairs `x f(x)` in random order, then queries `hop_k x f(f(...x))` of depth 1 to `hops`.

    Everything but the answers is random; an answer at depth k needs k look-ups in the document.
    """

    nodes: int = 16
    """Nodes of the cycle, n."""
    hops: int = 4
    """Largest depth of a query; depths are uniform from 1."""
    queries: int = 10
    """Queries per document."""

    def check(self) -> None:
        super().check()
        self.require(3 <= self.nodes <= 10_000, "nodes", "3 to 10000")
        self.require(
            1 <= self.hops < min(self.nodes, 128), "hops", f"1 to {min(self.nodes, 128) - 1} (fewer than nodes)"
        )
        self.require(self.queries >= 1, "queries", "at least 1")

    @property
    def default_domain(self) -> str:
        return "k_hop"

    @property
    def document_length(self) -> int:
        return 2 * self.nodes + 3 * self.queries

    def symbols(self) -> tuple[str, ...]:
        return (*[f"node{i}" for i in range(self.nodes)], *[f"hop{k}" for k in range(1, self.hops + 1)])

    def sample(self, count: int, *key: int) -> Sample:
        n, q = self.nodes, self.queries
        cycle_Dn = _random_orders(count, n, *key, 0)
        place_Dn = np.argsort(cycle_Dn, axis=1)
        listed_Dn = _random_orders(count, n, *key, 1)
        rows = np.arange(count)[:, None]
        depth_Dq = 1 + order.integers(self.hops, (count, q), *key, 2)
        start_Dq = order.integers(n, (count, q), *key, 3)
        symbols = np.empty((count, self.document_length), np.int32)
        symbols[:, 0 : 2 * n : 2] = listed_Dn
        symbols[:, 1 : 2 * n : 2] = cycle_Dn[rows, (place_Dn[rows, listed_Dn] + 1) % n]
        symbols[:, 2 * n :: 3] = n + depth_Dq - 1
        symbols[:, 2 * n + 1 :: 3] = start_Dq
        symbols[:, 2 * n + 2 :: 3] = cycle_Dn[rows, (place_Dn[rows, start_Dq] + depth_Dq) % n]
        left = n - np.arange(n)
        nats = np.zeros(symbols.shape, np.float32)
        # The next node listed is any of those left. Its successor starts one of the other paths laid so far.
        nats[:, 0 : 2 * n : 2] = np.log(left)
        nats[:, 1 : 2 * n : 2] = np.log(np.maximum(left - 1, 1))
        nats[:, 2 * n :: 3] = math.log(self.hops)
        nats[:, 2 * n + 1 :: 3] = math.log(n)
        answers = np.zeros(symbols.shape, np.int8)
        answers[:, 2 * n + 2 :: 3] = depth_Dq
        return Sample(symbols, nats, answers)

    def truth(self) -> dict[str, float]:
        pairs = math.lgamma(self.nodes + 1) + math.lgamma(self.nodes)
        return {
            "nats_per_document": pairs + self.queries * (math.log(self.hops) + math.log(self.nodes)),
            "nats_per_answer_by_chance": math.log(self.nodes),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(PlantedSource):
    """Associative recall: pairs `key value` with distinct keys, then every key again in random order, each with its value."""

    keys: int = 64
    """Keys in the vocabulary, K."""
    values: int = 64
    """Values in the vocabulary, V."""
    pairs: int = 15
    """Pairs per document, all of which are asked for."""

    def check(self) -> None:
        super().check()
        self.require(2 <= self.keys <= 100_000, "keys", "2 to 100000")
        self.require(2 <= self.values <= 100_000, "values", "2 to 100000")
        self.require(1 <= self.pairs <= self.keys, "pairs", f"1 to {self.keys} (keys)")

    @property
    def default_domain(self) -> str:
        return "recall"

    @property
    def document_length(self) -> int:
        return 4 * self.pairs

    def symbols(self) -> tuple[str, ...]:
        return (*[f"key{i}" for i in range(self.keys)], *[f"value{i}" for i in range(self.values)])

    def sample(self, count: int, *key: int) -> Sample:
        n = self.pairs
        keys_Dn = _random_orders(count, self.keys, *key, 0)[:, :n]
        values_Dn = order.integers(self.values, (count, n), *key, 1)
        asked_Dn = _random_orders(count, n, *key, 2)
        rows = np.arange(count)[:, None]
        symbols = np.empty((count, self.document_length), np.int32)
        symbols[:, 0 : 2 * n : 2], symbols[:, 1 : 2 * n : 2] = keys_Dn, self.keys + values_Dn
        symbols[:, 2 * n :: 2], symbols[:, 2 * n + 1 :: 2] = (
            keys_Dn[rows, asked_Dn],
            self.keys + values_Dn[rows, asked_Dn],
        )
        nats = np.zeros(symbols.shape, np.float32)
        nats[:, 0 : 2 * n : 2] = np.log(self.keys - np.arange(n))
        nats[:, 1 : 2 * n : 2] = math.log(self.values)
        nats[:, 2 * n :: 2] = np.log(n - np.arange(n))
        answers = np.zeros(symbols.shape, np.int8)
        answers[:, 2 * n + 1 :: 2] = 1
        return Sample(symbols, nats, answers)

    def truth(self) -> dict[str, float]:
        chosen = math.lgamma(self.keys + 1) - math.lgamma(self.keys - self.pairs + 1)
        asked = math.lgamma(self.pairs + 1)
        return {
            "nats_per_document": chosen + self.pairs * math.log(self.values) + asked,
            "nats_per_answer_by_chance": math.log(self.values),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Markov(PlantedSource):
    """Text of known entropy: each context of `order` states has `branches` successors with the same geometric probabilities.

    Every context has the same entropy, so the entropy rate is exact for any order; which successors a context has is a hash, so the
    world has no table and as many as states**order contexts to learn.
    """

    states: int = 64
    """Symbols, a power of two."""
    order: int = 2
    """Length of the context that decides the next symbol's distribution."""
    branches: int = 4
    """Possible successors of a context."""
    decay: float = 0.5
    """Probability of each successor relative to the one before it, 0 to 1; 1: all equal."""
    length: int = 127
    """Symbols per document."""

    def check(self) -> None:
        super().check()
        power = self.states >= 2 and self.states & (self.states - 1) == 0
        self.require(power and self.states <= 1 << 16, "states", "a power of two, 2 to 65536")
        self.require(
            1 <= self.order <= 8 and self.states**self.order < 1 << 62, "order", "1 to 8, states**order below 2**62"
        )
        self.require(1 <= self.branches <= self.states, "branches", f"1 to {self.states} (states)")
        self.require(0 < self.decay <= 1, "decay", "above 0, at most 1")
        self.require(self.length >= 1, "length", "at least 1")

    @property
    def default_domain(self) -> str:
        return "markov"

    @property
    def document_length(self) -> int:
        return self.length

    def symbols(self) -> tuple[str, ...]:
        return tuple(f"state{i}" for i in range(self.states))

    def probabilities(self) -> np.ndarray:
        """Returns the probability of each branch, float64 [branches], rounded to multiples of 2^-32 as drawn."""
        return np.diff(np.concatenate([[0], self._thresholds()])) / 2.0**32

    def _thresholds(self) -> np.ndarray:
        weights = self.decay ** np.arange(self.branches, dtype=np.float64)
        upper = np.round(np.cumsum(weights) / weights.sum() * 2.0**32)
        upper[-1] = 2.0**32
        return upper

    def sample(self, count: int, *key: int) -> Sample:
        uniform_DN = (order.draws((count, self.length), *key, 0) >> np.uint64(32)).astype(np.float64)
        branch_DN = np.searchsorted(self._thresholds(), uniform_DN, "right")
        world, mask = order.fold(self.seed, 20), np.uint64(self.states - 1)
        width, keep = np.uint64(self.states), np.uint64(self.states**self.order - 1)
        context_D = np.zeros(count, np.uint64)
        symbols = np.empty((count, self.length), np.int32)
        branches = branch_DN.astype(np.uint64)
        for n in range(self.length):
            hashed = order.scramble(context_D ^ world)
            # An odd stride visits all states of a power of two once: the branches are distinct.
            stride = (hashed >> np.uint64(32)) | np.uint64(1)
            with np.errstate(over="ignore"):
                state_D = (hashed + branches[:, n] * stride) & mask
                context_D = (context_D * width + state_D) & keep
            symbols[:, n] = state_D
        nats = -np.log(self.probabilities())[branch_DN].astype(np.float32)
        return Sample(symbols, nats, np.zeros(symbols.shape, np.int8))

    def truth(self) -> dict[str, float]:
        p = self.probabilities()
        entropy = float(-(p * np.log(p)).sum())
        return {
            "nats_per_document": self.length * entropy,
            "nats_per_symbol": entropy,
            "contexts": self.states**self.order,
        }


class PlantedEncoder(Encoder):
    """One id per word; words are separated by spaces."""

    def __init__(self, path: pathlib.Path):
        self._words: list[str] = json.loads(path.read_text())["symbols"]
        self._ids = {word: i for i, word in enumerate(self._words)}
        self.vocab_size, self.end_of_text, self.hash = len(self._words), 0, storage.sha256(path)
        # A word counts with the space that separates it from the next.
        self.token_bytes_V = np.array([0, *(len(word.encode()) + 1 for word in self._words[1:])], np.int32)

    def ids_of(self, symbols: Sequence[str]) -> np.ndarray:
        return np.array([self._ids[symbol] for symbol in symbols], np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        unknown = {word for text in texts for word in text.split() if word not in self._ids}
        if unknown:
            raise ValueError(f"words outside the planted vocabulary: {', '.join(sorted(unknown)[:5])}")
        return [np.array([self._ids[word] for word in text.split()], np.int64) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self._words[int(i)] for i in ids if int(i) != self.end_of_text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlantedVocabulary(Tokenizer):
    """One token per symbol of the planted sources, and end_of_text; for planted sources only."""

    @property
    def trained(self) -> bool:
        return True

    def build(self, path: pathlib.Path, texts: Iterable[str], symbols: Sequence[str]) -> None:
        words = [END_OF_TEXT, *dict.fromkeys(symbols)]
        storage.write_atomically(path, json.dumps({"tokenizer": "planted", "symbols": words}).encode())

    def load(self, path: pathlib.Path) -> Encoder:
        return PlantedEncoder(path)
