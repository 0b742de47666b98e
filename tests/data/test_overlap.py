"""13-grams: counted by words, found across documents, independent of case and punctuation."""

import numpy as np

from sparse_lm.data import overlap

WORDS = [f"word{i}" for i in range(40)]


def test_counts_and_normalisation():
    text = " ".join(WORDS)
    assert len(overlap.gram_hashes(text)) == 40 - 13 + 1
    assert len(overlap.gram_hashes(" ".join(WORDS[:12]))) == 0
    assert np.array_equal(overlap.gram_hashes(text), overlap.gram_hashes(text.upper().replace(" ", ",\n ")))
    assert len(np.unique(overlap.gram_hashes(text))) == 28


def test_order_of_words_matters():
    assert overlap.gram_hashes(" ".join(WORDS[:13])) != overlap.gram_hashes(
        " ".join([WORDS[1], WORDS[0], *WORDS[2:13]])
    )


def test_hits_are_exactly_the_shared_grams():
    target = np.unique(overlap.gram_hashes(" ".join(WORDS)))
    shared = overlap.gram_hashes("new start " + " ".join(WORDS[5:20]) + " other end")
    found = overlap.hits(shared, target)
    expected = {int(h) for h in overlap.gram_hashes(" ".join(WORDS[5:20]))}
    assert {int(target[i]) for i in found} == expected and len(expected) == 3
    assert len(overlap.hits(np.zeros(0, np.uint64), target)) == len(overlap.hits(shared, target[:0])) == 0
    assert len(overlap.hits(np.array([2**64 - 1], np.uint64), target)) == 0
