"""Addresses: the published numbers, the same bits on host and device, and no n-gram across documents."""

import concurrent.futures

import engram_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparse_lm.data.tokenizer import ByteEncoder
from sparse_lm.memory import hashing
from sparse_lm.memory.compression import classes_of, compressed, normalised, uncompressed
from sparse_lm.memory.engram import Engram

ORDERS = (2, 3)
PUBLISHED = Engram(at=(1, 15), orders=ORDERS, heads=8, width=512, rows=129280 * 5, seed=0)
"""The demo configuration of the published code."""


def test_the_published_settings_give_the_published_rows() -> None:
    first, second = PUBLISHED.tables().values()
    assert (first.addressed, second.addressed) == (10_344_164, 10_348_242)
    assert first.primes[:3] == (646_403, 646_411, 646_421)
    assert [list(first.primes), list(second.primes)] == engram_reference.head_sizes(2, 3, 8, 129280 * 5)
    assert first.width == 64 and PUBLISHED.looked_up == 1024
    assert first.rows % 256 == 0 and first.rows - first.addressed < 256


def test_multipliers_are_those_of_the_published_code() -> None:
    # default_rng(0 + 10007 * 1), three draws below (2**63 - 1) // 129280 // 2 = 35672138140836 ; m = 2 r + 1.
    draws = np.random.default_rng(10007).integers(0, (2**63 - 1) // 129280 // 2, size=3, dtype=np.int64)
    found = hashing.multipliers(0, 1, 129280, 3)
    assert found.tolist() == (2 * draws + 1).tolist()
    # No product with a class can overflow.
    assert int(found.max()) * 129279 < 2**63


def test_primes() -> None:
    assert [n for n in range(60) if hashing.is_prime(n)] == [n for n in range(60) if engram_reference.is_prime(n)]
    assert hashing.is_prime(2**31 - 1) and not hashing.is_prime(2**31 - 3)
    # 3215031751 is the first number that fools the bases 2, 3, 5 and 7: above every table.
    assert not hashing.is_prime(25326001)
    flat = [p for own in hashing.distinct_primes(3, 2, 4, 100) for p in own]
    assert len(set(flat)) == len(flat) == 24 and min(flat) == 101


def a_hash(vocabulary: int, primes: tuple[int, ...] = (646_403, 646_411, 2**30 - 35, 17)) -> hashing.Hash:
    return hashing.make_hash(uncompressed(vocabulary, pad=3), 0, 1, ORDERS, primes)


def test_host_and_device_give_the_same_bits() -> None:
    """On a million ids, masked (negative) ones among them, through primes of 5 to 30 bits."""
    own, draw = a_hash(129280), np.random.default_rng(0)
    tokens = draw.integers(-4, 129280, (100, 10_000)).astype(np.int32)
    segments = np.sort(draw.integers(0, 2000, tokens.shape), axis=1).astype(np.int32)
    salt = draw.integers(0, 10_000, tokens.shape).astype(np.int32)
    products = np.abs(tokens.astype(np.float64) * float(hashing.multipliers(0, 1, 129280, 3).max()))
    assert (products > 2.0**32).mean() > 0.99
    device = tiny.jit(lambda own, t, s, z: hashing.addresses(own, ORDERS, t, s, salt_BL=z))
    for salted in (None, salt):
        host = hashing.addresses_on_host(own, ORDERS, tokens, segments, salt_BL=salted)
        assert (np.asarray(device(own, tokens, segments, salted)) == host).all()
        starts = np.cumsum(own.primes_H.astype(np.int64)) - own.primes_H
        assert (host >= starts).all() and (host < starts + own.primes_H).all()
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        again = hashing.addresses_on_host(own, ORDERS, tokens, segments, salt_BL=salt, threads=threads)
    assert (again == host).all()


def test_addresses_are_those_of_the_reference() -> None:
    draw = np.random.default_rng(1)
    primes = hashing.distinct_primes(1, 2, 2, 90)[0]
    own = hashing.make_hash(uncompressed(500, pad=3), 5, 2, ORDERS, primes)
    tokens = draw.integers(0, 500, (2, 40)).astype(np.int32)
    tokens[0, ::7] = -100
    segments = np.sort(draw.integers(1, 6, tokens.shape), axis=1).astype(np.int32)
    wide = hashing.multipliers(5, 2, 500, 3)
    expected = engram_reference.ngram_rows(tokens, segments, 3, wide, primes, 2, 3)
    assert (hashing.addresses_on_host(own, ORDERS, tokens, segments) == expected).all()
    found = tiny.jit(lambda o, t, s: hashing.addresses(o, ORDERS, t, s, bits=max(primes).bit_length()))
    assert (np.asarray(found(own, tokens, segments)) == expected).all()


def test_an_ngram_by_hand() -> None:
    """Two tokens, multipliers 3, 5 and 7, heads of 11 (order 2) and 13 (order 3) rows, padding 1."""
    own = hashing.Hash(
        np.arange(20, dtype=np.int32), np.int32(1), np.array([[3, 0], [5, 0], [7, 0]], np.uint32), np.array([11, 13])
    )
    tokens, segments = np.array([[4, 9]], np.int32), np.ones((1, 2), np.int32)
    # position 0: bigram 4*3 ^ 1*5 = 12 ^ 5 = 9 -> 9 mod 11 = 9; trigram 9 ^ 1*7 = 14 -> 14 mod 13 = 1, after 11 rows: 12
    # position 1: bigram 9*3 ^ 4*5 = 27 ^ 20 = 15 -> 15 mod 11 = 4; trigram 15 ^ 1*7 = 8 -> 8, after 11 rows: 19
    assert hashing.addresses_on_host(own, ORDERS, tokens, segments).tolist() == [[[9, 12], [4, 19]]]


def test_ngrams_stay_in_their_document_and_pieces_join() -> None:
    own, draw = a_hash(300), np.random.default_rng(2)
    tokens = draw.integers(0, 300, (1, 12)).astype(np.int32)
    segments = np.array([[1] * 5 + [2] * 7], np.int32)
    whole = hashing.addresses_on_host(own, ORDERS, tokens, segments)
    one = np.ones((1, 12), np.int32)
    for part in (slice(0, 5), slice(5, 12)):
        alone = hashing.addresses_on_host(own, ORDERS, tokens[:, part], one[:, part])
        assert (whole[:, part] == alone).all()
    # The second piece of a row, told what came before it, is the row's; a trigram needs two positions.
    later = hashing.addresses_on_host(own, ORDERS, tokens[:, 7:], segments[:, 7:], (tokens[:, 5:7], segments[:, 5:7]))
    assert (later == whole[:, 7:]).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" The", "the"),
        ("Ｔｈｅ", "the"),  # full-width letters
        ("café", "cafe"),
        (" \n\t", " "),
        ("a \r\n b", "a b"),
        ("ŉ", "ʼn"),  # compatibility decomposition
    ],
)
def test_normalised_text(text: str, expected: str) -> None:
    assert normalised(text) == expected


def test_classes_by_hand() -> None:
    texts = ["", "The", " the", " ", "\n", "\ufffd", "\ufffd", "É", "e", "\u0301"]
    names = ["<end>", "The", "Ġthe", "Ġ", "Ċ", "é", "ê", "E", "e", "x"]
    # <end> 0; The and the 1; blank 2; broken bytes 3 and 4 by name; É and e 5; an accent alone keeps its text: 6
    assert classes_of(texts, names).tolist() == [0, 1, 1, 2, 2, 3, 4, 5, 5, 6]


def test_classes_of_bytes() -> None:
    classes, count, pad = compressed(ByteEncoder("hash"), 264)
    assert len(classes) == 264 and classes.max() + 1 == count
    assert classes[ord("A")] == classes[ord("a")] and classes[ord(" ")] == classes[ord("\n")]
    assert pad == classes[256] and (classes[257:] == pad).all()
    assert len(set(classes[128:256].tolist())) == 128  # bytes that are no character stay apart
    # 257 ids: 26 capitals, tab, newline and carriage return are classes of others.
    assert count == 257 - 26 - 3


def test_hashes_are_arrays_that_jax_takes() -> None:
    found = jax.tree.map(jnp.asarray, a_hash(8))
    assert found.multipliers_N2.dtype == jnp.uint32 and found.primes_H.dtype == jnp.int32
