"""What the comparison of memories trains on and is measured with: batches, and held-out tokens sorted into kinds.

Generated documents make the split into recall and reasoning exact, because every token is known to be one or the other:

    facts          values in biographies: fixed by the world, to be had from training alone                     recall
    statistics     Markov text: the successors of two states, fixed by the world                                 recall
    association    values of keys that the document itself has paired before                                     reasoning
    hop_1, ...     ends of chains of look-ups in the document, by length                                         reasoning
    rest           drawn anew in every document, or a document's end: nobody can do better than the known optimum

Of real text only this is known: how often training showed the n-gram that a token follows. Its kinds are those numbers.

Documents begin at random positions. Rotary attention sees differences of positions only, so nothing changes but the control that mixes
positions into its addresses: names stand at the same place in every biography, and it would keep a row for each.

Legend: B batch, L length, K kinds, D domains.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sparse_lm.data import order
from sparse_lm.data.dataset import Dataset
from sparse_lm.data.packaged import Packaged
from sparse_lm.data.pipeline import Batch, DataConfig, stream_identity, train_stream, validation_batches
from sparse_lm.data.synthetic import Biographies, KHop, Markov, PlantedVocabulary, Recall
from sparse_lm.data.tokenizer import BPE
from sparse_lm.evaluate.memory import ngram_codes
from sparse_lm.memory.hashing import Hash
from sparse_lm.train.validation import MODEL_ARRAYS

EXPOSURES = 64
"""Biographies of each person in a run of any length, about: a longer run has a larger world."""
HOPS = 3
FURTHEST = 4096
"""Positions at which a document may begin."""
SEED = 0
"""Of the order of training."""
TRAINING, HELD_OUT = 0, 1
"""Keys of the draws of positions."""
SEEN = (0, 1, 4, 16, 64, 256)
"""Smallest count of each kind of real text."""
KIND_OF_ANSWER = {"biographies": "facts", "recall": "association"}
PARTS = {"recall": ("facts", "statistics"), "reasoning": ("association", *(f"hop_{k}" for k in range(1, HOPS + 1)))}
SEEN_KINDS = tuple(f"seen {low}+" if low else "never seen" for low in SEEN)
SEEN_PARTS = {"seen": SEEN_KINDS[1:], "never seen": SEEN_KINDS[:1]}


def synthetic(length: int, batch: int, tokens: int, directory: str) -> DataConfig:
    """Returns the mixture of the four generated sources for a run of so many tokens."""
    # A document of a biography, of fifteen words and its end, is a sixteenth of a thousandth of its quarter of the tokens.
    people = max(8, tokens // (4 * 16 * EXPOSURES))
    sources = (
        Biographies(people=people, values=32, validation_documents=4096),
        Markov(length=length - 1),
        Recall(keys=32, values=32),
        KHop(nodes=8, hops=HOPS, queries=15),
    )
    return DataConfig(
        sources=sources,
        tokenizer=PlantedVocabulary(),
        sequence_length=length,
        batch_size=batch,
        directory=directory,
    )


def packaged(length: int, batch: int, vocabulary: int, directory: str, documents: int | None = None) -> DataConfig:
    """Returns the packaged text, or so many documents of each of its domains."""
    return DataConfig(
        sources=(Packaged(documents_per_domain=documents),),
        tokenizer=BPE(vocab_size=vocabulary),
        sequence_length=length,
        batch_size=batch,
        directory=directory,
    )


def moved(batch: Batch, *key: int) -> Batch:
    """Returns the arrays that models take, each document at a random position, a function of the key."""
    segments_BL = batch["segments_BL"]
    start_BS = order.integers(FURTHEST, (len(segments_BL), int(segments_BL.max()) + 1), *key).astype(np.int32)
    positions_BL = batch["positions_BL"] + np.take_along_axis(start_BS, segments_BL, axis=1)
    return {**{name: batch[name] for name in MODEL_ARRAYS}, "positions_BL": positions_BL}


def training_batches(dataset: Dataset, data: DataConfig, steps: range) -> Iterator[Batch]:
    """Yields the batches of consecutive steps of a run; a batch is a function of its step alone."""
    before = {"stream": stream_identity(dataset, data, SEED), "windows": steps.start * data.batch_size}
    stream = train_stream(dataset, data, seed=SEED, state=before)
    for number, (batch, _) in zip(steps, stream, strict=False):
        yield moved(batch, TRAINING, number)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out tokens, each of one domain and one kind.

    Attributes:
      domains: D names.
      kinds: K names.
      parts: {name: its kinds}; what is in none is the rest.
      batches: (what models take, which of D * K cells each token is in: int64 [B, L], -1: none).
      tokens_DK: tokens of each cell.
      optimum_DK: sum of the best possible losses of each cell, nats; None where unknown.
    """

    domains: tuple[str, ...]
    kinds: tuple[str, ...]
    parts: dict[str, tuple[str, ...]]
    batches: tuple[tuple[Batch, np.ndarray], ...]
    tokens_DK: np.ndarray
    optimum_DK: np.ndarray | None

    def sums(self, losses: Sequence[np.ndarray]) -> np.ndarray:
        """Sums losses [P, B, L] of each batch, in nats, over the tokens of each cell: float64 [P, D, K]."""
        totals = [
            [np.bincount(cell_BL[cell_BL >= 0], row[cell_BL >= 0], self.tokens_DK.size) for row in loss_PBL]
            for (_, cell_BL), loss_PBL in zip(self.batches, losses, strict=True)
        ]
        return np.sum(totals, axis=0).reshape(-1, *self.tokens_DK.shape)


def _held_out(
    dataset: Dataset, kinds: tuple[str, ...], parts: dict[str, tuple[str, ...]], sorted_batches: Any, known: bool
) -> HeldOut:
    """Collects (domain number, batch, kind of each token, best possible loss of each) into a HeldOut."""
    shape = len(dataset.domains), len(kinds)
    tokens, optimum = np.zeros(shape, np.int64), np.zeros(shape)
    batches = []
    for number, (domain, batch, kind_BL, nats_BL) in enumerate(sorted_batches):
        valid_BL = batch["documents_BL"] >= 0
        cell_BL = np.where(valid_BL, domain * len(kinds) + kind_BL, -1)
        tokens += np.bincount(cell_BL[valid_BL], minlength=tokens.size).reshape(shape)
        optimum += np.bincount(cell_BL[valid_BL], nats_BL[valid_BL], tokens.size).reshape(shape)
        batches.append((moved(batch, HELD_OUT, number), cell_BL))
    return HeldOut(dataset.domains, kinds, parts, tuple(batches), tokens, optimum if known else None)


def by_truth(dataset: Dataset, data: DataConfig, max_tokens: int) -> HeldOut:
    """Sorts the held-out tokens of generated sources, at most so many of each domain, by what is known of them."""
    kinds = (*PARTS["recall"], *PARTS["reasoning"], "rest")

    def found() -> Iterator[tuple[int, Batch, np.ndarray, np.ndarray]]:
        for number, domain in enumerate(dataset.domains):
            truth = dataset.truth_rows(domain, data.sequence_length)
            for batch in validation_batches(dataset, data, domain, batch_size=data.batch_size, max_tokens=max_tokens):
                rows = list(itertools.islice(truth, data.batch_size))
                nats_BL, answers_BL = (np.zeros(batch["tokens_BL"].shape) for _ in range(2))
                for b, row in enumerate(rows[: len(nats_BL)]):
                    nats_BL[b], answers_BL[b] = row["optimal_nats_BL"], row["answers_BL"]
                kind_BL = np.full(nats_BL.shape, kinds.index("rest"))
                if domain == "markov":
                    # The target that is certain is the end of the document.
                    kind_BL[nats_BL > 0] = kinds.index("statistics")
                for hops in range(1, HOPS + 1):
                    kind_BL[answers_BL == hops] = kinds.index(KIND_OF_ANSWER.get(domain, f"hop_{hops}"))
                yield number, batch, kind_BL, nats_BL

    return _held_out(dataset, kinds, PARTS, found(), known=True)


def by_frequency(
    dataset: Dataset, data: DataConfig, max_tokens: int, hashing: Hash, longest: int, training: Sequence[Batch]
) -> HeldOut:
    """Sorts the held-out tokens of text by how often training showed the n-gram of the longest order that they follow."""
    shown = [ngram_codes(hashing, batch, longest)[batch["segments_BL"] > 0] for batch in training]
    code_N, count_N = np.unique(np.concatenate(shown), return_counts=True)

    def found() -> Iterator[tuple[int, Batch, np.ndarray, np.ndarray]]:
        for number, domain in enumerate(dataset.domains):
            for batch in validation_batches(dataset, data, domain, batch_size=data.batch_size, max_tokens=max_tokens):
                code_BL = ngram_codes(hashing, batch, longest)
                place_BL = np.minimum(np.searchsorted(code_N, code_BL), len(code_N) - 1)
                seen_BL = np.where(code_N[place_BL] == code_BL, count_N[place_BL], 0)
                kind_BL = np.searchsorted(SEEN, seen_BL, side="right") - 1
                yield number, batch, kind_BL, np.zeros(kind_BL.shape)

    return _held_out(dataset, SEEN_KINDS, SEEN_PARTS, found(), known=False)
