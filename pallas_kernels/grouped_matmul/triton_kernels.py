"""The grouped products in Triton, with the gather of rows in and the scatter of rows out inside the kernel.

One program computes one tile: rows of one group by some columns of its weight, or a piece of one group's weight gradient.

Legend: A rows in sorted order, G groups, W stored weights, V row tiles, K contraction, N columns of the output.
"""

import triton
import triton.language as tl


@triton.jit
def grouped_product(
    x,  # [R, K]
    w,  # [W, K, N], or [W, N, K] if TRANSPOSED
    tiles,  # int32 [4, V]: -, first row, end of rows, weight
    count,  # int32 [2]: tiles of groups, all tiles
    row_index,  # int32 [A]; read only if GATHER
    output_index,  # int32 [A]; read only if SCATTER
    y,  # [O, N]
    V: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y[a] = x[a] @ w[group of a]; tiles without a group write zeros, or nothing if SCATTER (the output starts as zeros)."""
    column_tiles: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    slab_items: tl.constexpr = WIDTH * column_tiles
    slab = tl.program_id(0) // slab_items
    left = tl.minimum(V - slab * WIDTH, WIDTH)
    v = slab * WIDTH + (tl.program_id(0) % slab_items) % left
    n_tile = (tl.program_id(0) % slab_items) // left
    limit = tl.load(count) if SCATTER else tl.load(count + 1)
    if v < limit:
        row = tl.load(tiles + V + v) + tl.arange(0, ROWS)
        own = row < tl.load(tiles + 2 * V + v)
        weight = tl.load(tiles + 3 * V + v).to(tl.int64)
        steps = tl.where(v < tl.load(count), (K + DEPTH - 1) // DEPTH, 0)
        source = tl.load(row_index + row, mask=own, other=0) if GATHER else row
        columns = n_tile * COLUMNS + tl.arange(0, COLUMNS)
        depth = tl.arange(0, DEPTH)
        x_rows = x + source.to(tl.int64)[:, None] * K
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(0, steps):
            k = step * DEPTH + depth
            a = tl.load(x_rows + k[None, :], mask=own[:, None] & (k < K)[None, :], other=0.0)
            inside = (k < K)[:, None] & (columns < N)[None, :]
            if TRANSPOSED:
                b = tl.load(w + weight * K * N + columns[None, :] * K + k[:, None], mask=inside, other=0.0)
            else:
                b = tl.load(w + weight * K * N + k[:, None] * N + columns[None, :], mask=inside, other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        target = tl.load(output_index + row, mask=own, other=0) if SCATTER else row
        place = y + target.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(place, total.to(y.dtype.element_ty), mask=own[:, None] & (columns < N)[None, :])


@triton.jit
def grouped_swiglu(
    x,  # [R, K]
    gate,  # [W, K, N]
    up,  # [W, K, N]
    tiles,  # int32 [4, V]
    count,  # int32 [2]
    row_index,  # int32 [A]; read only if GATHER
    h,  # [A, N]
    gate_out,  # [A, N]; written only if SAVE
    up_out,  # [A, N]; written only if SAVE
    V: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GATHER: tl.constexpr,
    SAVE: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h[a] = silu(x[a] @ gate) * (x[a] @ up) by the weights of a's group, and both products."""
    column_tiles: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    slab_items: tl.constexpr = WIDTH * column_tiles
    slab = tl.program_id(0) // slab_items
    left = tl.minimum(V - slab * WIDTH, WIDTH)
    v = slab * WIDTH + (tl.program_id(0) % slab_items) % left
    n_tile = (tl.program_id(0) % slab_items) // left
    if v < tl.load(count + 1):
        row = tl.load(tiles + V + v) + tl.arange(0, ROWS)
        own = row < tl.load(tiles + 2 * V + v)
        first_weight = tl.load(tiles + 3 * V + v).to(tl.int64) * K * N
        steps = tl.where(v < tl.load(count), (K + DEPTH - 1) // DEPTH, 0)
        source = tl.load(row_index + row, mask=own, other=0) if GATHER else row
        columns = n_tile * COLUMNS + tl.arange(0, COLUMNS)
        depth = tl.arange(0, DEPTH)
        x_rows = x + source.to(tl.int64)[:, None] * K
        gate_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
        up_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(0, steps):
            k = step * DEPTH + depth
            a = tl.load(x_rows + k[None, :], mask=own[:, None] & (k < K)[None, :], other=0.0)
            inside = (k < K)[:, None] & (columns < N)[None, :]
            place_w = first_weight + k[:, None] * N + columns[None, :]
            gate_sum = tl.dot(a, tl.load(gate + place_w, mask=inside, other=0.0), gate_sum, input_precision=PRECISION)
            up_sum = tl.dot(a, tl.load(up + place_w, mask=inside, other=0.0), up_sum, input_precision=PRECISION)
        place = row.to(tl.int64)[:, None] * N + columns[None, :]
        written = own[:, None] & (columns < N)[None, :]
        tl.store(h + place, (gate_sum * tl.sigmoid(gate_sum) * up_sum).to(h.dtype.element_ty), mask=written)
        if SAVE:
            tl.store(gate_out + place, gate_sum.to(h.dtype.element_ty), mask=written)
            tl.store(up_out + place, up_sum.to(h.dtype.element_ty), mask=written)


@triton.jit
def grouped_weight_gradient(
    x,  # [R, K]
    dy,  # [O, N]
    start,  # int32 [G], first row of a group
    end,  # int32 [G]
    row_index,  # int32 [A]; read only if GATHER
    output_index,  # int32 [A]; read only if SCATTER
    dw,  # [G, K, N]
    K: tl.constexpr,
    N: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dw[g] = x(rows of g)^T dy(rows of g), each tile contracted by one program in a fixed order."""
    g = tl.program_id(1)
    n_tiles: tl.constexpr = (N + OUT - 1) // OUT
    k = (tl.program_id(0) // n_tiles) * IN + tl.arange(0, IN)
    n = (tl.program_id(0) % n_tiles) * OUT + tl.arange(0, OUT)
    first = tl.load(start + g)
    last = tl.load(end + g)
    total = tl.zeros((IN, OUT), tl.float32)
    for begin in range(first, last, DEPTH):
        row = begin + tl.arange(0, DEPTH)
        own = row < last
        x_row = (tl.load(row_index + row, mask=own, other=0) if GATHER else row).to(tl.int64)
        dy_row = (tl.load(output_index + row, mask=own, other=0) if SCATTER else row).to(tl.int64)
        a = tl.load(x + x_row[None, :] * K + k[:, None], mask=own[None, :] & (k < K)[:, None], other=0.0)
        b = tl.load(dy + dy_row[:, None] * N + n[None, :], mask=own[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    place = dw + g.to(tl.int64) * K * N + k[:, None] * N + n[None, :]
    tl.store(place, total.to(dw.dtype.element_ty), mask=(k < K)[:, None] & (n < N)[None, :])
