"""The three block-sparse products in Triton, for GPUs without the Hopper kernels and as a second opinion beside them.

One program computes one tile of the output: a row tile of one block column, or one stored block of the weight
gradient. Programs of one block column are neighbours so that its blocks stay in the L2 cache.

Legend: E experts, M rows, J stored blocks, C block columns of the output.
"""

import triton
import triton.language as tl


@triton.jit
def block_product(
    x,  # [E, M, K]
    w,  # [E, J, block_in, block_out] as stored
    schedule,  # int32 [E, 3, C]: column, first and one-past-last position, heaviest column first
    inner,  # int32 [E, J], block row of x at each position
    slot,  # int32 [E, J], stored block at each position; read only if transposed
    y,  # [E, M, C * out]
    M: tl.constexpr,
    K: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = x @ W, or dx = dy @ W^T where TRANSPOSED: INNER and OUT are the contracted and the written side of a block."""
    e = tl.program_id(1).to(tl.int64)
    row_tiles = tl.cdiv(M, ROWS)
    # Slabs of WIDTH row tiles: a slab of x stays in the L2 cache while all columns pass.
    slab_items = WIDTH * C
    slab = tl.program_id(0) // slab_items
    left = tl.minimum(row_tiles - slab * WIDTH, WIDTH)
    row_tile = slab * WIDTH + (tl.program_id(0) % slab_items) % left
    place = (tl.program_id(0) % slab_items) // left
    column = tl.load(schedule + e * 3 * C + place)
    first = tl.load(schedule + e * 3 * C + C + place)
    last = tl.load(schedule + e * 3 * C + 2 * C + place)

    row = row_tile * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    out = tl.arange(0, OUT)
    x_rows = x + e * M * K + row[:, None].to(tl.int64) * K
    w += e * J * INNER * OUT
    inner += e * J
    slot += e * J
    per_block: tl.constexpr = INNER // DEPTH
    total = tl.zeros((ROWS, OUT), tl.float32)
    for step in range(first * per_block, last * per_block):
        position = step // per_block
        k = (step % per_block) * DEPTH + depth
        a = tl.load(x_rows + (tl.load(inner + position) * INNER + k)[None, :], mask=row[:, None] < M, other=0.0)
        if TRANSPOSED:
            block = w + tl.load(slot + position).to(tl.int64) * INNER * OUT
            b = tl.load(block + out[None, :] * INNER + k[:, None])
        else:
            block = w + position.to(tl.int64) * INNER * OUT
            b = tl.load(block + k[:, None] * OUT + out[None, :])
        total = tl.dot(a, b, total, input_precision=PRECISION)
    columns = C * OUT
    place_y = y + e * M * columns + row[:, None].to(tl.int64) * columns + (column * OUT + out)[None, :]
    tl.store(place_y, total.to(y.dtype.element_ty), mask=row[:, None] < M)


@triton.jit
def block_sampled_product(
    x,  # [E, M, K]
    dy,  # [E, M, N]
    row_index,  # int32 [E, J]
    column_index,  # int32 [E, J], in the order of the stored blocks
    dw,  # [E, J, block_in, block_out]
    M: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    J: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The stored blocks of x^T dy, each contracted over all rows by one program in a fixed order."""
    e = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0)
    block_row = tl.load(row_index + e * J + j)
    block_column = tl.load(column_index + e * J + j)
    k = block_row * IN + tl.arange(0, IN)
    n = block_column * OUT + tl.arange(0, OUT)
    total = tl.zeros((IN, OUT), tl.float32)
    for start in range(0, M, DEPTH):
        row = start + tl.arange(0, DEPTH)
        present = row < M
        a = tl.load(x + (e * M + row)[None, :] * K + k[:, None], mask=present[None, :], other=0.0)
        b = tl.load(dy + (e * M + row)[:, None] * N + n[None, :], mask=present[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    place = dw + (e * J + j) * IN * OUT + tl.arange(0, IN)[:, None] * OUT + tl.arange(0, OUT)[None, :]
    tl.store(place, total.to(dw.dtype.element_ty))
