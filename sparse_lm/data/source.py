"""What a corpus is made of: documents with a key, a domain and a licence note, from sources with mixture weights."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from sparse_lm.config import Config

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


class Document(NamedTuple):
    """One document of a corpus."""

    key: str
    """Unique in its source: where the text was found."""
    text: str
    domain: str
    """The kind of text, kept through packing so that losses and expert loads can be told apart by domain."""
    license: str
    """A note on the licence, as found."""


class MissingSource(FileNotFoundError):
    """The input of a source is not on this machine (finished token shards may still be)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source(Config):
    """Base of every source config."""

    weight: float = 1.0
    """Share of the training stream that comes from this source, relative to the other sources' weights."""

    def check(self) -> None:
        self.require(self.weight > 0 and math.isfinite(self.weight), "weight", "a positive finite number")

    def identity(self) -> dict[str, Any]:
        """Returns the config's own fields that decide the content (all but the weight), JSON-ready."""
        fields = dataclasses.asdict(self)
        del fields["weight"]
        return {"source": type(self).__name__, **fields}

    def fingerprint(self) -> dict[str, Any]:
        """Returns what names the prepared data: `identity` and the versions or content hashes of the input.

        Raises:
          MissingSource: if the input is not on this machine.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSource(Source):
    """Base of sources whose documents are text that is written to a corpus directory first."""

    def documents(self, note: Callable[[str], Any]) -> dict[Split, Iterator[Document]]:
        """Returns the documents of each split in a fixed order; train must be exhausted before validation is read.

        Args:
          note: called with lines worth printing (what was found, how it was split), also while documents are read.
        """
        raise NotImplementedError
