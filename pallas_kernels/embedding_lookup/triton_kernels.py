"""Triton kernels of the lookup: a program copies TAKEN rows; an address outside the table reads nothing and writes zeros."""

import triton
import triton.language as tl


@triton.jit
def lookup(
    table, address, out, A: tl.constexpr, R: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr, TAKEN: tl.constexpr
):
    """out[a] = table[address[a]] for rows of D numbers."""
    at = tl.program_id(0) * TAKEN + tl.arange(0, TAKEN)
    row = tl.load(address + at, mask=at < A, other=R)
    inside = (row >= 0) & (row < R)
    lane = tl.arange(0, LANES)[None, :]
    x = tl.load(table + row.to(tl.int64)[:, None] * D + lane, mask=inside[:, None] & (lane < D), other=0.0)
    tl.store(out + at.to(tl.int64)[:, None] * D + lane, x, mask=(at < A)[:, None] & (lane < D))


@triton.jit
def _float32(number, CONVERTS: tl.constexpr):
    """The float8_e4m3 in the lowest byte of each word."""
    if CONVERTS:
        return number.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    # Its bits are those of a float16 that is 2**8 smaller; subnormal numbers included.
    half = (((number & 0x80) << 8) | ((number & 0x7F) << 7)).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.where((number & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def _bfloat16_pair(word, scale, CONVERTS: tl.constexpr):
    """The two lowest bytes of each word times the scale, as two bfloat16 in a word; products are exact, so float32 is cut off."""
    low = (_float32(word, CONVERTS) * scale).to(tl.uint32, bitcast=True)
    high = (_float32(word >> 8, CONVERTS) * scale).to(tl.uint32, bitcast=True)
    return (low >> 16) | (high & 0xFFFF0000)


@triton.jit
def float8_lookup(
    table,
    address,
    out,
    A: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    WORDS: tl.constexpr,
    LANES: tl.constexpr,
    TAKEN: tl.constexpr,
    CONVERTS: tl.constexpr,
):
    """out[a] = the numbers of table[address[a]], rows packed as in float8_rows.py; bfloat16.

    Rows begin at any word, so reads are of one word. A thread takes two neighbours, which share address and scale, and writes their eight
    numbers as 16 bytes: everything stays in the thread that read it, and no shared memory is needed.
    """
    here = tl.arange(0, TAKEN * LANES // 2)
    at, lane = tl.program_id(0) * TAKEN + here // (LANES // 2), here % (LANES // 2) * 2
    row = tl.load(address + at, mask=at < A, other=R)
    inside = (row >= 0) & (row < R) & (lane < D // 4)
    first = table + row.to(tl.int64) * WORDS
    scale_word = tl.load(first + D // 4 + lane // 32, mask=inside, other=0)
    exponent = (scale_word >> (lane // 8 % 4 * 8).to(tl.uint32)) & 0xFF
    scale = (exponent << 23).to(tl.float32, bitcast=True)[:, None]
    pair = tl.arange(0, 2)[None, :]
    exists = lane[:, None] + pair < D // 4
    word = tl.load((first + lane)[:, None] + pair, mask=inside[:, None] & exists, other=0)
    low, high = _bfloat16_pair(word, scale, CONVERTS), _bfloat16_pair(word >> 16, scale, CONVERTS)
    four = low.to(tl.uint64) | (high.to(tl.uint64) << 32)
    target = out.to(tl.pointer_type(tl.uint64)) + (at.to(tl.int64) * (D // 4) + lane)[:, None] + pair
    tl.store(target, four, mask=(at < A)[:, None] & exists)
