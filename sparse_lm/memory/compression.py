"""Tokenizer compression: tokens that read the same are one class, so that "The", " the" and "THE" share their n-grams.

After Cheng et al. 2026 (Engram, arXiv 2601.07372), section 2: a surjection from token ids to classes by the normalised text of each
token. Any tokenizer has it; the classes are saved with the run.

Legend: V token ids.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

_SPACES = re.compile(r"[ \t\r\n]+")
UNDECODABLE = "\ufffd"
"""What decoders put in place of bytes that are no character by themselves."""


class Tokens(Protocol):
    """A tokenizer, as far as it matters here."""

    vocab_size: int
    end_of_text: int

    def decode(self, ids: Iterable[int]) -> str: ...

    def token_names(self) -> list[str]: ...


class TokenClasses(NamedTuple):
    """What the hash sees instead of token ids.

    Attributes:
      classes_V: int32 class of every token id.
      number: of classes.
      pad: class that stands for what lies before a document.
    """

    classes_V: np.ndarray
    number: int
    pad: int


def normalised(text: str) -> str:
    """Returns a token's text without accents, case, and differences of white space; white space alone becomes one space."""
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    text = "".join(c for c in text if unicodedata.category(c) != "Mn").lower()
    text = _SPACES.sub(" ", text)
    return text if text == " " else text.strip()


def classes_of(texts: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Numbers the classes of tokens in the order in which they are first seen.

    Args:
      texts: decoded text of every token alone.
      names: the tokenizer's own name of every token, which stands for text that does not decode or is empty.

    Returns:
      int32 [V].
    """
    numbers: dict[str, int] = {}
    out = np.empty(len(texts), np.int32)
    for i, (text, name) in enumerate(zip(texts, names, strict=True)):
        key = name if not text or UNDECODABLE in text else normalised(text) or text
        out[i] = numbers.setdefault(key, len(numbers))
    return out


def compressed(encoder: Tokens, vocab_size: int) -> TokenClasses:
    """Returns the classes of a tokenizer, padded to the model's vocabulary with ids that never occur.

    What lies before a document is taken for end_of_text, with which documents begin.
    """
    names = encoder.token_names()
    found = classes_of([encoder.decode([i]) for i in range(encoder.vocab_size)], names)
    rest = np.full(vocab_size - len(found), found[encoder.end_of_text], np.int32)
    return TokenClasses(np.append(found, rest), int(found.max()) + 1, int(found[encoder.end_of_text]))


def uncompressed(vocab_size: int, pad: int = 0) -> TokenClasses:
    """Returns every token id as a class of its own."""
    return TokenClasses(np.arange(vocab_size, dtype=np.int32), vocab_size, pad)
