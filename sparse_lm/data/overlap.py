"""How much of the validation text occurs in the training text: word-level 13-grams, hashed.

An n-gram is n consecutive words (runs of word characters, case folded) of one document, as in the overlap analysis of
Brown et al. 2020 (arXiv 2005.14165, appendix C). Hashes have 64 bits, so chance collisions do not matter at these sizes.
"""

import functools
import hashlib
import re

import numpy as np

N = 13
_WORD = re.compile(r"\w+")
_MULTIPLIER = 0x9E3779B97F4A7C15


@functools.lru_cache(maxsize=1 << 20)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def gram_hashes(text: str, n: int = N) -> np.ndarray:
    """Returns the uint64 hash of every n-gram of a text, in order (empty when it has fewer than n words)."""
    words = np.array([_word_hash(word) for word in _WORD.findall(text.casefold())], np.uint64)
    count = len(words) - n + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    hashes = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for i in range(n):
            hashes = hashes * np.uint64(_MULTIPLIER) + words[i : i + count]
    return hashes


def hits(hashes: np.ndarray, sorted_targets: np.ndarray) -> np.ndarray:
    """Returns the indices of the sorted targets that occur among the hashes."""
    if not len(sorted_targets) or not len(hashes):
        return np.zeros(0, np.int64)
    at = np.searchsorted(sorted_targets, hashes)
    at[at == len(sorted_targets)] = 0
    return np.unique(at[sorted_targets[at] == hashes])
