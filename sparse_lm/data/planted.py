"""Generated sources with planted truth: endless documents whose best possible prediction is known symbol by symbol.

A planted source is a world (rules, tables or facts keyed by its seed) and a sampler of documents from it. Every symbol comes with
the loss, in nats, of a predictor that knows the world and has read the document so far: the known optimum. Validation documents
come from the same world with draws of their own. Documents are whole in every window, so no answer is cut from its question.

Shapes: D documents, N symbols per document (fixed per source), L window length.
"""

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparse_lm.data import packing, storage
from sparse_lm.data.source import Source, Split
from sparse_lm.data.tokenizer import Encoder

UNLIMITED = 1 << 62
"""Training tokens of a source that never repeats."""

_STREAM = {"train": 0, "validation": 1}
_BLOCK = 64


class Sample(NamedTuple):
    """Documents drawn from a planted source."""

    symbols_DN: np.ndarray
    """int32, indices into the source's `symbols()`."""
    nats_DN: np.ndarray
    """float32, the optimal loss at each symbol, given the symbols before it in its document."""
    answers_DN: np.ndarray
    """int8, 0 for ordinary symbols; for symbols that knowledge or reasoning determines, the number of look-ups needed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlantedSource(Source):
    """Base of generated sources."""

    seed: int = 0
    """Keys the world (its facts, tables, rules) and the draws."""
    validation_documents: int = 1024
    """Documents of the validation split; their draws are never used in training."""
    domain: str = ""
    """Domain of the documents; empty: the source's own name."""

    def check(self) -> None:
        super().check()
        self.require(self.seed >= 0, "seed", "0 or more")
        self.require(self.validation_documents >= 1, "validation_documents", "at least 1")

    @property
    def domain_name(self) -> str:
        """The domain of the documents."""
        return self.domain or self.default_domain

    @property
    def default_domain(self) -> str:
        """The domain when none is given."""
        raise NotImplementedError

    @property
    def document_length(self) -> int:
        """Symbols per document, N (one more token is stored: end_of_text)."""
        raise NotImplementedError

    def symbols(self) -> tuple[str, ...]:
        """Returns the words documents are made of."""
        raise NotImplementedError

    def sample(self, count: int, *key: int) -> Sample:
        """Returns `count` documents, a pure function of (config, count, key)."""
        raise NotImplementedError

    def truth(self) -> dict[str, float]:
        """Returns known quantities of the source, `nats_per_document` (the expected optimal loss) among them."""
        raise NotImplementedError

    def optimum(self) -> dict[str, float]:
        """Returns `truth` with `nats_per_token`: per predicted token under one token per symbol, end_of_text included."""
        truth = self.truth()
        return {**truth, "nats_per_token": truth["nats_per_document"] / (self.document_length + 1)}

    def fingerprint(self) -> dict[str, Any]:
        """Returns the identity: a generated source has no input."""
        return {**self.identity(), "version": 1}

    def draw(self, split: Split, count: int, *key: int) -> Sample:
        """Returns documents of a split; the splits' draws are disjoint."""
        return self.sample(count, self.seed, _STREAM[split], *key)

    def texts(self, sample: Sample) -> list[str]:
        """Returns the documents as words separated by spaces."""
        words = self.symbols()
        return [" ".join([words[symbol] for symbol in row]) for row in sample.symbols_DN.tolist()]


class PlantedPart:
    """A planted source behind a tokenizer: token for symbol under the planted vocabulary, encoded text under any other."""

    def __init__(self, source: PlantedSource, encoder: Encoder, domain: int):
        """Args: the source, the dataset's encoder, and the number of the source's domain in the dataset."""
        self.source = source
        self.hash = storage.content_key(source.fingerprint())
        self.train_tokens = UNLIMITED
        self._encoder, self._domain = encoder, domain
        self._id_of_symbol = encoder.ids_of(source.symbols())

    def encode(self, sample: Sample) -> Sequence[np.ndarray]:
        """Returns the stored ids [end_of_text, ...] of each document."""
        if self._id_of_symbol is not None:
            ids = self._id_of_symbol[sample.symbols_DN]
            return np.pad(ids, ((0, 0), (1, 0)), constant_values=self._encoder.end_of_text)
        encoded = self._encoder.encode_batch(self.source.texts(sample))
        return [np.append(np.int64(self._encoder.end_of_text), ids) for ids in encoded]

    def documents_per_window(self, length: int) -> int:
        """Returns how many documents are drawn for a window (text of varying length: enough to fill it almost always)."""
        shortest = self.source.document_length + 1
        if self._id_of_symbol is None:
            shortest = min(len(document) for document in self.encode(self.source.draw("train", 64, 0)))
        if shortest > length:
            raise ValueError(
                f"sequence_length = {length} is too short for {type(self.source).__name__}: its documents have {shortest} tokens; "
                "allowed: at least that"
            )
        return length // shortest

    def row(self, documents: Sequence[np.ndarray], length: int) -> packing.Row:
        """Packs as many whole documents as fit, in order; the rest of the window is padding."""
        pieces: list[np.ndarray] = []
        free = length
        for document in documents:
            if len(document) > free:
                break
            pieces.append(document)
            free -= len(document)
        if not pieces:
            raise ValueError(
                f"sequence_length = {length} is too short for {type(self.source).__name__} under this tokenizer: a document has "
                f"{len(documents[0])} tokens; allowed: at least that"
            )
        end_of_text = self._encoder.end_of_text
        return packing.row_from_pieces(pieces, [self._domain] * len(pieces), end_of_text, length, end_of_text)

    def training_windows(self, length: int, end_of_text: int, key: tuple[int, ...]) -> "PlantedWindows":
        return PlantedWindows(self, length, key)

    def _validation(self) -> Sample:
        return self.source.draw("validation", self.source.validation_documents)

    def _groups(self, length: int) -> Iterator[tuple[int, int, Sequence[np.ndarray]]]:
        """Yields (first, last, documents) of each validation window."""
        documents = self.encode(self._validation())
        first = 0
        while first < len(documents):
            last, free = first, length
            while last < len(documents) and len(documents[last]) <= free:
                free -= len(documents[last])
                last += 1
            yield first, max(last, first + 1), documents[first : max(last, first + 1)]
            first = max(last, first + 1)

    def validation_rows(
        self, domain: str, length: int, end_of_text: int, numbers_from: int, overlap: int
    ) -> Iterator[packing.Row]:
        """Yields windows of whole documents; no document is cut, so `overlap` has nothing to add."""
        if domain != self.source.domain_name:
            return
        for first, last, documents in self._groups(length):
            row = self.row(documents, length)
            numbers = np.append(np.arange(first, last) + numbers_from, -1).astype(np.int32)
            row["documents_BL"] = numbers[row["segments_BL"] - 1]
            yield row

    def truth_rows(self, domain: str, length: int) -> Iterator[packing.Row]:
        """Yields, for each validation window, optimal_nats_BL (float32) and answers_BL (int8) of its targets.

        Raises:
          ValueError: under a tokenizer other than the planted vocabulary.
        """
        if domain != self.source.domain_name:
            return
        if self._id_of_symbol is None:
            raise ValueError("the optimal loss of each token is known only under the tokenizer `planted`")
        sample = self._validation()
        stored = self.source.document_length + 1
        for first, last, _ in self._groups(length):
            nats, answers = np.zeros((last - first, stored), np.float32), np.zeros((last - first, stored), np.int8)
            # The target at a document's last token is end_of_text, which is certain.
            nats[:, :-1], answers[:, :-1] = sample.nats_DN[first:last], sample.answers_DN[first:last]
            row = {"optimal_nats_BL": np.zeros(length, np.float32), "answers_BL": np.zeros(length, np.int8)}
            row["optimal_nats_BL"][: nats.size], row["answers_BL"][: nats.size] = nats.ravel(), answers.ravel()
            yield row

    def documents(self, domain: str, split: Split) -> Iterator[np.ndarray]:
        if domain != self.source.domain_name:
            return iter(())
        sample = self._validation() if split == "validation" else self.source.draw("train", 1024, 0)
        return (document[1:] for document in self.encode(sample))

    def count(self, domain: str, split: Split) -> int:
        return self.source.validation_documents if (domain, split) == (self.source.domain_name, "validation") else 0

    def describe(self) -> dict[str, Any]:
        documents = list(self.documents(self.source.domain_name, "validation"))
        held_out = {
            "documents": len(documents),
            "bytes": int(sum(self._encoder.token_bytes_V[document].sum() for document in documents)),
            "tokens": int(sum(len(document) + 1 for document in documents)),
        }
        return {
            "source": self.source.fingerprint(),
            "unlimited": True,
            "optimum": self.source.optimum(),
            "domains": {self.source.domain_name: {"train": dict.fromkeys(held_out, 0), "validation": held_out}},
        }


class PlantedWindows:
    """Endless windows of whole documents; window i is a function of (source, key, i)."""

    def __init__(self, part: PlantedPart, length: int, key: tuple[int, ...]):
        """Args: the part, window length L, and the integers that key the draws."""
        self._part, self._length, self._key = part, length, key
        self._count = part.documents_per_window(length)
        self._blocks: dict[int, Sequence[np.ndarray]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return packing.ENDLESS

    def __repr__(self) -> str:
        return f"PlantedWindows({self._part.source!r}, length={self._length}, key={self._key})"

    def _block(self, number: int) -> Sequence[np.ndarray]:
        """Returns the documents of 64 consecutive windows, drawn together because that is far faster."""
        with self._lock:
            if number not in self._blocks:
                while len(self._blocks) >= 4:
                    del self._blocks[next(iter(self._blocks))]
                sample = self._part.source.draw("train", _BLOCK * self._count, *self._key, number)
                self._blocks[number] = self._part.encode(sample)
            return self._blocks[number]

    def __getitem__(self, index: int) -> packing.Row:
        number, within = divmod(int(index), _BLOCK)
        documents = self._block(number)[within * self._count : (within + 1) * self._count]
        return self._part.row(documents, self._length)
