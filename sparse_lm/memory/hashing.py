"""Addresses of n-grams: multiplicative-XOR hashes in 64-bit arithmetic, the same bits in numpy and, in two 32-bit limbs, in JAX.

The n-gram that ends at position t has the mix  XOR_{k < n} class(x_{t-k}) * m_k  (mod 2**64, signed), and head j of its order reads
row  mix mod p_j, floored, of its own range of rows. Multipliers are odd, uniform, and so small that a product with a class does not
overflow; primes are distinct over heads, orders and layers (Cheng et al. 2026, arXiv 2601.07372, section 2, and its published code).
An n-gram that would reach before its document sees padding there.

Legend: B batch, L length, P earlier positions, V token ids, N longest order, H heads of all orders.
"""

import concurrent.futures
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.memory.compression import TokenClasses

SEED_STRIDE = 10007
"""Factor of the layer in the seed of its multipliers."""
SALT = 0x9E3779B97F4A7C15
"""Odd multiplier of a salt: 2**64 over the golden ratio, whose multiples spread evenly (Knuth, volume 3, section 6.4)."""
CHUNK = 1 << 14
"""Positions hashed at once on the host: few enough to stay in a core's cache, enough that numpy's calls do not count."""


def is_prime(n: int) -> bool:
    """Says whether n < 3.2e9 is prime (Miller and Rabin with the bases that suffice there)."""
    if n < 2 or any(n % p == 0 for p in (2, 3, 5, 7)):
        return n in (2, 3, 5, 7)
    odd = n - 1
    twos = (odd & -odd).bit_length() - 1
    odd >>= twos
    for base in (2, 3, 5, 7):
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


@functools.cache
def distinct_primes(tables: int, orders: int, heads: int, rows: int) -> tuple[tuple[int, ...], ...]:
    """Returns, for every table, the numbers of rows of its heads, order after order.

    Each order begins its search at `rows` and takes the next primes that no head of any table has yet.
    """
    used: set[int] = set()
    out: list[tuple[int, ...]] = []
    for _ in range(tables):
        mine: list[int] = []
        for _ in range(orders):
            candidate = rows - 1
            for _ in range(heads):
                candidate = next(n for n in range(candidate + 1, 2**32) if n not in used and is_prime(n))
                used.add(candidate)
                mine.append(candidate)
        out.append(tuple(mine))
    return tuple(out)


def multipliers(seed: int, layer: int, classes: int, longest: int) -> np.ndarray:
    """Returns the odd int64 multipliers m_0 .. m_{N-1} of a layer."""
    bound = max(1, np.iinfo(np.int64).max // classes // 2)
    draws = np.random.default_rng(seed + SEED_STRIDE * layer).integers(0, bound, size=longest, dtype=np.int64)
    return 2 * draws + 1


class Hash(NamedTuple):
    """What turns classes into the rows of one table; arrays of numpy or JAX, saved with the run.

    Attributes:
      classes_V: int32, class of every token id.
      pad: int32 scalar, class that stands for what lies before a document.
      multipliers_N2: uint32, low and high half of each multiplier.
      primes_H: int32, rows of each head.
    """

    classes_V: Any
    pad: Any
    multipliers_N2: Any
    primes_H: Any


def make_hash(classes: TokenClasses, seed: int, layer: int, orders: tuple[int, ...], primes: tuple[int, ...]) -> Hash:
    """Derives the hash of one table; the same numbers whenever the arguments are the same."""
    wide = multipliers(seed, layer, classes.number, max(orders)).view(np.uint64)
    return Hash(classes.classes_V, np.int32(classes.pad), _halves(wide), np.array(primes, np.int32))


def _halves(wide_N: np.ndarray) -> np.ndarray:
    """Returns the low and high 32 bits of uint64 numbers, uint32 [N, 2]."""
    return np.stack([wide_N & np.uint64(0xFFFFFFFF), wide_N >> np.uint64(32)], axis=-1).astype(np.uint32)


def suffixes(
    hashing: Hash, tokens_BL: Any, segments_BL: Any, longest: int, before: tuple[Any, Any] | None
) -> list[Any]:
    """Returns, for k < N, the class k positions before each position: padding where that is another document.

    Args:
      hashing: classes and padding.
      tokens_BL: token ids; negative ones have no class and stand for themselves.
      segments_BL: document numbers.
      longest: N.
      before: (tokens [B, P], segments [B, P]) of the positions before these, P >= N - 1; None: there are none.
    """
    xp = np if isinstance(tokens_BL, np.ndarray) else jnp
    batch, length = tokens_BL.shape
    if before is None:
        before = (xp.zeros((batch, longest - 1), tokens_BL.dtype), xp.full((batch, longest - 1), -1, segments_BL.dtype))
    tokens = xp.concatenate([before[0], tokens_BL], axis=1)
    segments = xp.concatenate([before[1], segments_BL], axis=1)
    classes = xp.where(tokens < 0, tokens, xp.take(hashing.classes_V, tokens, mode="clip"))
    end = tokens.shape[1]

    def back(a: Any, k: int) -> Any:
        return a[:, end - length - k : end - k]

    earlier = [xp.where(back(segments, k) == segments_BL, back(classes, k), hashing.pad) for k in range(1, longest)]
    return [back(classes, 0), *earlier]


def addresses(
    hashing: Hash,
    orders: tuple[int, ...],
    tokens_BL: jax.Array,
    segments_BL: jax.Array,
    before: tuple[jax.Array, jax.Array] | None = None,
    salt_BL: jax.Array | None = None,
    *,
    bits: int = 31,
) -> jax.Array:
    """Computes the rows of every position, in JAX.

    Args:
      hashing: of the table.
      orders: lengths n of the n-grams, ascending.
      tokens_BL: int32 token ids.
      segments_BL: int32 document numbers.
      before: see `suffixes`.
      salt_BL: int32, mixed into every n-gram; None: nothing.
      bits: static; every prime is below 2**bits, at most 31. Fewer bits take fewer divisions.

    Returns:
      int32 [B, L, H], rows of the flattened table.
    """
    tokens_BL, segments_BL = jnp.asarray(tokens_BL), jnp.asarray(segments_BL)
    classes = suffixes(hashing, tokens_BL, segments_BL, max(orders), before)
    products = [_product(c, hashing.multipliers_N2[k]) for k, c in enumerate(classes)]
    low, high = products[0]
    if salt_BL is not None:
        salt_low, salt_high = _product(salt_BL, jnp.array(_halves(np.array([SALT], np.uint64))[0]))
        low, high = low ^ salt_low, high ^ salt_high
    mixes: dict[int, tuple[jax.Array, jax.Array]] = {1: (low, high)}
    for n in range(2, max(orders) + 1):
        low, high = low ^ products[n - 1][0], high ^ products[n - 1][1]
        mixes[n] = (low, high)
    heads = hashing.primes_H.shape[0] // len(orders)
    starts_H = jnp.cumsum(hashing.primes_H) - hashing.primes_H
    found = []
    for i, n in enumerate(orders):
        own = slice(i * heads, (i + 1) * heads)
        low, high = mixes[n]
        found.append(_floored_modulo(low[..., None], high[..., None], hashing.primes_H[own], bits) + starts_H[own])
    return jnp.concatenate(found, axis=-1)


def _product(class_BL: jax.Array, multiplier_2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (low, high) of the 64-bit two's-complement product of an int32 and a 64-bit multiplier."""
    a_low, a_high = class_BL.astype(jnp.uint32), (class_BL >> 31).astype(jnp.uint32)
    b_low, b_high = multiplier_2[0], multiplier_2[1]
    half = jnp.uint32(0xFFFF)
    a0, a1, b0, b1 = a_low & half, a_low >> 16, b_low & half, b_low >> 16
    middle = (a0 * b0 >> 16) + (a0 * b1 & half) + (a1 * b0 & half)
    low = (a0 * b0 & half) | (middle << 16)
    carried = a1 * b1 + (a0 * b1 >> 16) + (a1 * b0 >> 16) + (middle >> 16)
    return low, carried + a_low * b_high + a_high * b_low


def _floored_modulo(low: jax.Array, high: jax.Array, primes: jax.Array, bits: int) -> jax.Array:
    """Returns the signed 64-bit number (low, high) modulo primes below 2**bits, never negative: long division by pieces."""
    piece = 32 - bits
    p = primes.astype(jnp.uint32)
    rest, left = high % p, 32
    while left:
        take = min(piece, left)
        left -= take
        rest = ((rest << take) | ((low >> left) & jnp.uint32((1 << take) - 1))) % p
    # A negative number is its 64 bits minus 2**64, which is brought below p in the same way.
    wrap, left = jnp.ones_like(p) % p, 64
    while left:
        take = min(piece, left)
        left -= take
        wrap = (wrap << take) % p
    return jnp.where(high >> 31, (rest + p - wrap) % p, rest).astype(jnp.int32)


def addresses_on_host(
    hashing: Hash,
    orders: tuple[int, ...],
    tokens_BL: np.ndarray,
    segments_BL: np.ndarray,
    before: tuple[np.ndarray, np.ndarray] | None = None,
    salt_BL: np.ndarray | None = None,
    *,
    threads: concurrent.futures.ThreadPoolExecutor | None = None,
) -> np.ndarray:
    """Computes the rows of every position, in numpy; the same numbers as `addresses`.

    Args:
      hashing: of the table, numpy arrays.
      orders: lengths n of the n-grams, ascending.
      tokens_BL: int32 token ids.
      segments_BL: int32 document numbers.
      before: see `suffixes`.
      salt_BL: see `addresses`.
      threads: share the work; numpy computes without holding the interpreter.

    Returns:
      int32 [B, L, H]; in memory each head is contiguous.
    """
    classes = [c.reshape(-1) for c in suffixes(hashing, tokens_BL, segments_BL, max(orders), before)]
    size, heads = tokens_BL.size, len(hashing.primes_H) // len(orders)
    low, high = hashing.multipliers_N2.astype(np.uint64).T
    primes_H = hashing.primes_H.astype(np.int64)
    starts_H = np.cumsum(primes_H) - primes_H
    # Arrays without dimensions: numpy takes longer for its scalars than for a thousand numbers.
    multipliers = [np.array(m) for m in (low | high << np.uint64(32)).view(np.int64)]
    primes, low_primes = ([np.array(p, dtype) for p in primes_H] for dtype in (np.int64, np.uint32))
    starts = [np.array(start, np.uint32) for start in starts_H]
    out_HT = np.empty((len(primes_H), size), np.uint32)

    def work(start: int) -> None:
        part = slice(start, min(start + CHUNK, size))
        mix = classes[0][part] * multipliers[0]
        if salt_BL is not None:
            mix ^= salt_BL.reshape(-1)[part] * np.array(SALT, np.uint64).view(np.int64)
        known, low, quotient = 1, np.empty(mix.shape, np.uint32), np.empty_like(mix)
        rest = np.empty_like(low)
        for i, n in enumerate(orders):
            for k in range(known, n):
                np.multiply(classes[k][part], multipliers[k], out=quotient)
                mix ^= quotient
            known = n
            # Of a remainder the low 32 bits suffice, and those of  mix - quotient * prime  need only the low 32 bits of each. Floor
            # division by one number is vectorised in numpy; its remainder is not.
            np.copyto(low, mix, casting="unsafe")
            for h in range(i * heads, (i + 1) * heads):
                np.floor_divide(mix, primes[h], out=quotient)
                np.copyto(rest, quotient, casting="unsafe")
                np.multiply(rest, low_primes[h], out=rest)
                np.subtract(low, rest, out=rest)
                np.add(rest, starts[h], out=out_HT[h, part])

    pieces = range(0, size, CHUNK)
    with np.errstate(over="ignore"):
        list(map(work, pieces) if threads is None else threads.map(work, pieces))
    return np.moveaxis(out_HT.view(np.int32).reshape(-1, *tokens_BL.shape), 0, -1)
