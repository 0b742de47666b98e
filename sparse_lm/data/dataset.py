"""A prepared dataset: the parts that its sources became, behind one tokenizer."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from sparse_lm.data import packing, storage
from sparse_lm.data.planted import UNLIMITED, PlantedPart
from sparse_lm.data.shards import TokenShards
from sparse_lm.data.source import SPLITS, Split
from sparse_lm.data.tokenizer import Encoder


class Part(Protocol):
    """What one source became."""

    hash: str
    train_tokens: int

    def training_windows(self, length: int, end_of_text: int, key: tuple[int, ...]) -> Any:
        """Returns an endless random-access sequence of rows of length L, keyed by integers."""

    def validation_rows(
        self, domain: str, length: int, end_of_text: int, numbers_from: int, overlap: int
    ) -> Iterator[packing.Row]:
        """Yields the validation windows of a domain, documents numbered from `numbers_from`; see packing.validation_rows."""

    def documents(self, domain: str, split: Split) -> Iterator[np.ndarray]:
        """Yields the token ids of the documents of a domain, end_of_text left out."""

    def count(self, domain: str, split: Split) -> int:
        """Returns the number of documents of a domain in a split."""

    def describe(self) -> dict[str, Any]:
        """Returns JSON-ready facts; key `domains` maps domain -> split -> documents, bytes, tokens."""


class StoredPart:
    """A text source as token shards."""

    def __init__(self, directory: pathlib.Path, domains: tuple[str, ...]):
        """Args: the folder of token shards, and the domains of the whole dataset (which number them)."""
        self.directory = directory
        self.manifest = json.loads((directory / "manifest.json").read_text())
        self.hash: str = self.manifest["content_sha256"]
        self._domains = domains
        self.shards = {split: TokenShards(directory, self.manifest, split, domains) for split in SPLITS}
        self.train_tokens = int(self.shards["train"].lengths_d.sum())

    def training_windows(self, length: int, end_of_text: int, key: tuple[int, ...]) -> packing.StoredWindows:
        return packing.StoredWindows(self.shards["train"], length, end_of_text, key)

    def _of(self, domain: str, split: Split) -> np.ndarray:
        return np.flatnonzero(self.shards[split].domains_d == self._domains.index(domain))

    def validation_rows(
        self, domain: str, length: int, end_of_text: int, numbers_from: int, overlap: int
    ) -> Iterator[packing.Row]:
        documents = self._of(domain, "validation")
        return packing.validation_rows(self.shards["validation"], documents, length, end_of_text, numbers_from, overlap)

    def documents(self, domain: str, split: Split) -> Iterator[np.ndarray]:
        shards = self.shards[split]
        return (shards.read(document, 1) for document in self._of(domain, split).tolist())

    def count(self, domain: str, split: Split) -> int:
        return len(self._of(domain, split))

    def describe(self) -> dict[str, Any]:
        overlap = {}
        for domain, counts in self.manifest["overlap_13gram"].items():
            share = counts["found"] / counts["total"] if counts["total"] else 0.0
            overlap[domain] = {**counts, "share": share}
        return {
            "directory": str(self.directory),
            "content_sha256": self.hash,
            "source": self.manifest["identity"],
            "domains": self.manifest["domains"],
            "overlap_13gram": overlap,
            "bytes_exact": self.manifest["bytes_exact"],
        }


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Documents behind one tokenizer, ready to stream.

    Attributes:
      tokenizer: encoder; `vocab_size`, `end_of_text`, `token_bytes_V`, `encode`, `decode`.
      parts: one per source of the config, in order.
      domains: names that domains_BL counts from 0.
    """

    tokenizer: Encoder
    parts: tuple[Part, ...]
    domains: tuple[str, ...]

    @property
    def hash(self) -> str:
        """Hash of the tokenizer and all token ids, domains' order included."""
        return storage.content_key([self.tokenizer.hash, [part.hash for part in self.parts], self.domains])

    @property
    def train_tokens(self) -> int:
        """Unique stored training tokens; UNLIMITED when a source is generated and never repeats."""
        return min(UNLIMITED, sum(part.train_tokens for part in self.parts))

    def validation_rows(self, domain: str, length: int, overlap: int = 0) -> Iterator[packing.Row]:
        """Yields the validation windows of a domain, source after source; see packing.validation_rows for `overlap`.

        Raises:
          ValueError: for an unknown domain.
        """
        self._known(domain)
        numbers_from = 0
        for part in self.parts:
            yield from part.validation_rows(domain, length, self.tokenizer.end_of_text, numbers_from, overlap)
            numbers_from += part.count(domain, "validation")

    def truth_rows(self, domain: str, length: int) -> Iterator[packing.Row]:
        """Yields optimal_nats_BL and answers_BL of the windows of `validation_rows`, for planted domains.

        Raises:
          ValueError: for a domain with text sources, or under a tokenizer other than `planted`.
        """
        self._known(domain)
        for part in self.parts:
            if isinstance(part, PlantedPart):
                yield from part.truth_rows(domain, length)
            elif part.count(domain, "validation"):
                raise ValueError(f"domain {domain!r} is text: its optimal loss is unknown")

    def text(self, domain: str, split: Split) -> list[str]:
        """Returns the documents of a domain and split as text, decoded from the token shards."""
        self._known(domain)
        return [self.tokenizer.decode(ids) for part in self.parts for ids in part.documents(domain, split)]

    def validation_text(self, domain: str) -> list[str]:
        """Returns the validation documents of a domain as text, in the order of documents_BL."""
        return self.text(domain, "validation")

    def training_text(self, domain: str) -> list[str]:
        """Returns the training documents of a domain as text."""
        return self.text(domain, "train")

    def describe(self) -> dict[str, Any]:
        """Returns JSON-ready facts: documents, bytes and tokens per domain and split, 13-gram overlap, hashes."""
        domains: dict[str, dict[str, dict[str, int]]] = {}
        parts = [part.describe() for part in self.parts]
        for part in parts:
            for domain, splits in part["domains"].items():
                for split, counts in splits.items():
                    into = domains.setdefault(domain, {}).setdefault(split, dict.fromkeys(counts, 0))
                    for name, value in counts.items():
                        into[name] += value
        return {
            "hash": self.hash,
            "tokenizer_sha256": self.tokenizer.hash,
            "vocab_size": self.tokenizer.vocab_size,
            "train_tokens": self.train_tokens,
            "domains": domains,
            "parts": parts,
        }

    def _known(self, domain: str) -> None:
        if domain not in self.domains:
            raise ValueError(f"domain = {domain!r}; allowed: {', '.join(self.domains)}")
