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
def float8_lookup(
    table, address, out, A: tl.constexpr, R: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr, TAKEN: tl.constexpr
):
    """out[a] = the numbers of table[address[a]], rows packed as in float8_rows.py; bfloat16."""
    at = tl.program_id(0) * TAKEN + tl.arange(0, TAKEN)
    row = tl.load(address + at, mask=at < A, other=R)
    inside = (row >= 0) & (row < R)
    lane = tl.arange(0, LANES)[None, :]
    words = D // 4 + (D + 127) // 128
    first = row.to(tl.int64)[:, None] * words
    mask = inside[:, None] & (lane < D)
    # A lane reads the word that holds its number, four lanes the same one: they are one request to memory.
    word = tl.load(table + first + lane // 4, mask=mask, other=0)
    number = (word >> (8 * (lane % 4)).to(tl.uint32)) & 0xFF
    group = lane // 32
    scale_word = tl.load(table + first + D // 4 + group // 4, mask=mask, other=0)
    exponent = (scale_word >> (8 * (group % 4)).to(tl.uint32)) & 0xFF
    # The bits of a float8_e4m3 are those of a float16 that is 2**8 smaller; subnormal numbers included.
    half = (((number & 0x80) << 8) | ((number & 0x7F) << 7)).to(tl.uint16).to(tl.float16, bitcast=True)
    value = tl.where((number & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    tl.store(
        out + at.to(tl.int64)[:, None] * D + lane, (value * scale).to(tl.bfloat16), mask=(at < A)[:, None] & (lane < D)
    )
