"""What Hopper's copy engine cannot do with the rows of a swizzled slot: gather and scatter them by index, clear some of them. The threads of a warpgroup do it.

A slot of r rows and w columns of 16-bit numbers lies in shared memory as [r / 8, w / 64, 8, 64] (TILED), where the eight 16-byte pieces of row i of a tile
stand in the order piece ^ i. Rows are gathered by `cp.async`, 16 bytes a thread: the copies run while those of the next step are asked for. A slot is handed to
the consumers one step later: then its copies have mostly landed, and each thread waits for its own, makes them visible to wgmma and meets the others.

The interpreter does not run inlined code; for it each function has a plain form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, nvvm
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.mosaic_gpu_ring import CHUNK, TILED, Tile

PIECE = 8  # numbers of 16 bits that one thread moves at a time
THREADS = 128
SPLAT = plgpu.Layout.WG_SPLAT


def _i32(value: int):
    return arith.constant(ir.IntegerType.get_signless(32), value)


class _Pieces:
    """The pieces of a slot [rows, width] that the calling thread moves: the same piece of every `stride`-th row."""

    def __init__(self, rows: int, width: int):
        across = width // PIECE
        self.stride = THREADS // across
        self.steps = rows // self.stride
        thread = arith.remui(mgpu.utils.thread_idx(), _i32(THREADS))
        self.piece, self.lane = arith.remui(thread, _i32(across)), arith.divui(thread, _i32(across))

    def row(self, step: int):
        """Row of the slot."""
        return arith.addi(self.lane, _i32(step * self.stride))

    def pointer(self, slot, step: int):
        """Where the piece lies in the slot, a reference as TILED shapes it."""
        (tile_row, tile_column, line, _), _ = ir.MemRefType(slot.type).get_strides_and_offset()
        row = self.row(step)
        within = arith.remui(row, _i32(8))
        swizzled = arith.xori(arith.remui(self.piece, _i32(8)), within)
        offset = arith.muli(swizzled, _i32(PIECE))
        for index, stride in (
            (arith.divui(row, _i32(8)), tile_row),
            (arith.divui(self.piece, _i32(8)), tile_column),
            (within, line),
        ):
            offset = arith.addi(offset, arith.muli(index, _i32(stride)))
        element = ir.MemRefType(slot.type).element_type
        return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(slot), [offset], element)


def load_indices(index_g, first, rows: int, width: int, interpret: bool):
    """The indices index_g[first : first + rows], as `copy_rows` takes them to fill a slot of `rows` x `width`.

    Loaded where nobody waits for them, a step or more before they are used: int32 [rows * width / 8], each where the thread that needs it has it.
    """
    if interpret:
        return index_g[pl.ds(first, rows)]
    shape = (rows * width // PIECE,)
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SPLAT), return_type=plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=layout)
    )
    def load(_, index, first):
        pieces, one = _Pieces(rows, width), ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
        source = llvm.addrspacecast(llvm.PointerType.get(1), mgpu.utils.memref_ptr(index))
        found = np.empty((pieces.steps,), object)
        for step in range(pieces.steps):
            place = arith.addi(first.registers.item(), pieces.row(step))
            found[step] = llvm.load(one, mgpu.utils.getelementptr(source, [place], one.element_type))
        return mgpu.FragmentedArray(_registers=found, _layout=layout.to_mgpu(), _is_signed=True)

    return load(index_g, first)


def copy_rows(x_g, indices, slot_s, column, interpret: bool) -> None:
    """Asks for slot_s[i] = x_g[index of row i, column : column + w], by all threads of the warpgroup; `hand_over` waits for it.

    Args:
        x_g: [R, K] in global memory, 16-bit numbers.
        indices: from `load_indices` for this shape; those out of range are clipped.
        slot_s: [r, w] in shared memory, laid out as TILED; w a multiple of 64, r * w of 1024.
        column: int32.
        interpret: Take the plain form.
    """
    rows, width = slot_s.shape
    if interpret:
        for i in range(rows):
            row = jnp.clip(indices[i], 0, x_g.shape[0] - 1)
            slot_s[pl.ds(i, 1)] = x_g[pl.ds(row, 1), pl.ds(column, width)]
        return
    layout = plgpu.Layout.WG_STRIDED(indices.shape, vec_size=1)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, plgpu.RefType(TILED), SPLAT))
    def copy(_, x, indices, slot, column):
        i64, pieces = ir.IntegerType.get_signless(64), _Pieces(rows, width)
        element = ir.MemRefType(x.type).element_type
        stored, features = ir.MemRefType(x.type).shape
        first = arith.addi(column.registers.item(), arith.muli(pieces.piece, _i32(PIECE)))
        source = llvm.addrspacecast(llvm.PointerType.get(1), mgpu.utils.memref_ptr(x))
        for step, register in enumerate(indices.registers.flat):
            index = llvm.extractelement(register, _i32(0))
            index = arith.extsi(i64, arith.minsi(arith.maxsi(index, _i32(0)), _i32(stored - 1)))
            offset = arith.addi(arith.muli(index, arith.constant(i64, features)), arith.extsi(i64, first))
            origin = mgpu.utils.getelementptr(source, [offset], element)
            target = pieces.pointer(slot, step)
            nvvm.cp_async_shared_global(target, origin, 2 * PIECE, nvvm.LoadCacheModifierKind.CG)
        nvvm.cp_async_commit_group()

    copy(x_g, indices, slot_s, column)


def _landed(later: int, interpret: bool) -> None:
    """Waits until the copies of all but the last `later` calls of `copy_rows` are there, seen by wgmma and done by all threads of the warpgroup."""
    if interpret:
        plgpu.commit_smem()
        return

    @plgpu.inline_mgpu()
    def wait(_):
        nvvm.cp_async_wait_group(later)
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)
        mgpu.utils.warpgroup_barrier()

    wait()


def hand_over(step, slots: int, full, copies: int, interpret: bool) -> None:
    """Gives the consumers the slot of the step before, after the `copies` calls of `copy_rows` of this step."""

    @pl.when(step > 0)
    def _():
        _landed(copies, interpret)
        plgpu.barrier_arrive(full.at[lax.rem(step - 1, jnp.int32(slots))])


def hand_over_last(step, slots: int, full, interpret: bool) -> None:
    """Gives the consumers the slot that `hand_over` has kept back, when `step` steps have been asked for in all."""

    @pl.when(step > 0)
    def _():
        _landed(0, interpret)
        plgpu.barrier_arrive(full.at[lax.rem(step - 1, jnp.int32(slots))])


def clear_rows(slot_s, own, stop, interpret: bool) -> None:
    """Writes zeros to the rows of a slot before `own` and from `stop` on, by all threads of the warpgroup; `commit_smem` makes them visible to wgmma.

    Args:
        slot_s: [r, w] in shared memory, laid out as TILED; w a multiple of 64.
        own, stop: int32.
        interpret: Take the plain form.
    """
    rows, width = slot_s.shape
    if interpret:
        for c in range(0, width, CHUNK):
            piece = slot_s.at[:, pl.ds(c, CHUNK)]
            value = piece[...]
            row = lax.broadcasted_iota(jnp.int32, value.shape, 0)
            piece[...] = jnp.where((row >= own) & (row < stop), value, jnp.zeros_like(value))
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(TILED), SPLAT, SPLAT))
    def clear(_, slot, own, stop):
        pieces, own, stop = _Pieces(rows, width), own.registers.item(), stop.registers.item()
        zero = llvm.mlir_zero(ir.VectorType.get((4,), ir.IntegerType.get_signless(32)))
        for step in range(pieces.steps):
            row = pieces.row(step)
            before = arith.cmpi(arith.CmpIPredicate.slt, row, own)
            after = arith.cmpi(arith.CmpIPredicate.sge, row, stop)
            with mgpu.utils.when(arith.ori(before, after)):
                llvm.store(zero, pieces.pointer(slot, step), alignment=2 * PIECE)

    clear(slot_s, own, stop)


def scattered_stores(tile: Tile, out_g, index_g, tiled_s, interpret: bool) -> list[Callable[[], None]]:
    """Calls that store a tile row by row, out_g[index_g[row]], one for each 64 x 64 piece; rows that are not its own, and places out of range, are left out.

    Args:
        tile: A finished tile.
        out_g: [O, N] in global memory.
        index_g: int32 [A].
        tiled_s: `tiled_buffers`.
        interpret: Take the plain form.
    """

    def store(r, c):
        buffer_s = tiled_s.at[lax.axis_index("wg")]
        buffer_s[...] = tile.value[r : r + CHUNK, c : c + CHUNK]
        plgpu.commit_smem()
        _scatter(buffer_s, out_g, index_g, tile.row + r, tile.column + c, tile.own, tile.end, interpret)

    return [functools.partial(store, *corner) for corner in tile.corners()]


def _scatter(buffer_s, out_g, index_g, row, column, own, end, interpret: bool) -> None:
    """out_g[index_g[row + i], column : column + w] = buffer_s[i] for own <= row + i < end; afterwards the buffer may be written again."""
    rows, width = buffer_s.shape
    if interpret:

        def one(i, _):
            @pl.when((row + i >= own) & (row + i < end))
            def _():
                target = index_g[row + i]

                @pl.when((target >= 0) & (target < out_g.shape[0]))
                def _():
                    out_g[pl.ds(target, 1), pl.ds(column, width)] = buffer_s[pl.ds(i, 1)]

        lax.fori_loop(0, rows, one, None)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(TILED), plgpu.RefType(), plgpu.RefType(), *[SPLAT] * 4))
    def scatter(_, buffer, out, index, *numbers):
        pieces, (row, column, own, end) = _Pieces(rows, width), (n.registers.item() for n in numbers)
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        element = ir.MemRefType(out.type).element_type
        stored, features = ir.MemRefType(out.type).shape
        compare, relation = arith.cmpi, arith.CmpIPredicate
        first = arith.extsi(i64, arith.addi(column, arith.muli(pieces.piece, _i32(PIECE))))
        to, indices = (llvm.addrspacecast(llvm.PointerType.get(1), mgpu.utils.memref_ptr(r)) for r in (out, index))
        for step in range(pieces.steps):
            place = arith.addi(row, pieces.row(step))
            with mgpu.utils.when(arith.andi(compare(relation.sge, place, own), compare(relation.slt, place, end))):
                target = llvm.load(i32, mgpu.utils.getelementptr(indices, [place], i32))
                with mgpu.utils.when(compare(relation.ult, target, _i32(stored))):
                    four = ir.VectorType.get((4,), i32)
                    value = llvm.load(four, pieces.pointer(buffer, step), alignment=2 * PIECE)
                    offset = arith.addi(arith.muli(arith.extsi(i64, target), arith.constant(i64, features)), first)
                    llvm.store(value, mgpu.utils.getelementptr(to, [offset], element), alignment=2 * PIECE)
        mgpu.utils.warpgroup_barrier()

    scatter(buffer_s, out_g, index_g, row, column, own, end)
