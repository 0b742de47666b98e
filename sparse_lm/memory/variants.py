"""Engram with one thing taken away or changed: the ablations and the two controls that every claim about a memory needs."""

import dataclasses
from typing import Literal

from sparse_lm.memory.engram import Engram, GateForm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ungated(Engram):
    """Every value passes whole."""

    gate: GateForm = "none"
    """No gate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uncompressed(Engram):
    """N-grams of token ids."""

    compression: Literal["text", "none"] = "none"
    """Every token id is its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bigram(Engram):
    """Pairs of tokens only."""

    orders: tuple[int, ...] = (2,)
    """Pairs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unigram(Engram):
    """Control: rows of single tokens, which know nothing of the context; as wide as two orders."""

    orders: tuple[int, ...] = (1,)
    """The token alone."""
    width: int = 1024
    """As wide as two orders of 512."""
    heads: int = 16
    """As many rows as two orders of 8 heads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shuffled(Engram):
    """Control: the position is mixed into the hash, so that no row belongs to an n-gram."""

    addressing: Literal["ngram", "shuffled"] = "shuffled"
    """With the position in the hash."""
