"""What Hopper's copy engine cannot do with the rows of a swizzled slot: gather and scatter them by index, leave some of them zero, store only some of them. Threads of a warpgroup do it.

A slot of r rows and w columns of 16-bit numbers lies in shared memory as [r / 8, w / 64, 8, 64] (TILED), where the eight 16-byte pieces of row i of a tile
stand in the order piece ^ i. Rows are copied by `cp.async`, 16 bytes a thread: the copies run while those of the next step are asked for. A slot is handed to
the consumers one step later: then its copies have mostly landed, and each thread waits for its own, makes them visible to wgmma and meets the others.

The interpreter does not run inlined code; `mosaic_gpu_rows_plain.py` holds the same functions for it.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, nvvm
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.mosaic_gpu_ring import TILED

PIECE = 8  # numbers of 16 bits that one thread moves at a time
THREADS = 128
SPLAT = plgpu.Layout.WG_SPLAT


def _i32(value: int):
    return arith.constant(ir.IntegerType.get_signless(32), value)


def _at_least(a, b):
    return arith.cmpi(arith.CmpIPredicate.sge, a, b)


def _less(a, b):
    return arith.cmpi(arith.CmpIPredicate.slt, a, b)


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


def _per_piece(rows: int, width: int):
    """Shape and layout of an int32 array that holds a number for each piece of a slot, where the thread that moves the piece has it."""
    shape = (rows * width // PIECE,)
    return shape, plgpu.Layout.WG_STRIDED(shape, vec_size=1)


def row_indices(index_g, first, rows: int, width: int):
    """The rows index_g[first : first + rows], or first .. first + rows - 1 without an index, as `copy_rows` takes them to fill a slot of `rows` x `width`.

    Loaded where nobody waits for them, a step or more before they are used.
    """
    shape, layout = _per_piece(rows, width)
    references = [] if index_g is None else [index_g]
    returned = plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(SPLAT, *[plgpu.RefType() for _ in references]), return_type=returned)
    def find(_, first, *index):
        pieces, one = _Pieces(rows, width), ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
        found = np.empty((pieces.steps,), object)
        for step in range(pieces.steps):
            row = arith.addi(first.registers.item(), pieces.row(step))
            if index:
                source = llvm.addrspacecast(llvm.PointerType.get(1), mgpu.utils.memref_ptr(index[0]))
                found[step] = llvm.load(one, mgpu.utils.getelementptr(source, [row], one.element_type))
            else:
                found[step] = llvm.insertelement(llvm.mlir_undef(one), row, _i32(0))
        return mgpu.FragmentedArray(_registers=found, _layout=layout.to_mgpu(), _is_signed=True)

    return find(first, *references)


def copy_rows(x_g, indices, slot_s, column, own=None) -> None:
    """Asks for slot_s[i] = x_g[row i of indices, column : column + w], by all threads of the warpgroup; `hand_over` waits for it, after `end_step`.

    Args:
        x_g: [R, K] in global memory, 16-bit numbers.
        indices: from `row_indices` for this shape; those out of range are clipped.
        slot_s: [r, w] in shared memory, laid out as TILED; w a multiple of 64, r * w of 1024.
        column: int32.
        own: (first, end) of the rows of the slot to copy, int32; the others become zero. None: all.
    """
    rows, width = slot_s.shape
    _, layout = _per_piece(rows, width)
    limits = () if own is None else own

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, plgpu.RefType(TILED), SPLAT, *[SPLAT for _ in limits]))
    def copy(_, x, indices, slot, *numbers):
        column, *bounds = (n.registers.item() for n in numbers)
        i64, pieces = ir.IntegerType.get_signless(64), _Pieces(rows, width)
        element = ir.MemRefType(x.type).element_type
        stored, features = ir.MemRefType(x.type).shape
        begin = arith.extsi(i64, arith.addi(column, arith.muli(pieces.piece, _i32(PIECE))))
        source = llvm.addrspacecast(llvm.PointerType.get(1), mgpu.utils.memref_ptr(x))
        for step, register in enumerate(indices.registers.flat):
            index = llvm.extractelement(register, _i32(0))
            index = arith.extsi(i64, arith.minsi(arith.maxsi(index, _i32(0)), _i32(stored - 1)))
            offset = arith.addi(arith.muli(index, arith.constant(i64, features)), begin)
            taken = None  # bytes, if not all; the rest of the piece becomes zero
            if bounds:
                inside = arith.andi(_at_least(pieces.row(step), bounds[0]), _less(pieces.row(step), bounds[1]))
                taken = arith.select(inside, _i32(2 * PIECE), _i32(0))
            origin, target = mgpu.utils.getelementptr(source, [offset], element), pieces.pointer(slot, step)
            nvvm.cp_async_shared_global(target, origin, 2 * PIECE, nvvm.LoadCacheModifierKind.CG, cp_size=taken)

    copy(x_g, indices, slot_s, column, *limits)


def end_step() -> None:
    """Marks the end of a step's calls of `copy_rows`; also where there were none."""

    @plgpu.inline_mgpu()
    def commit(_):
        nvvm.cp_async_commit_group()

    commit()


def landed(later: int) -> None:
    """Waits until the copies of all but the last `later` steps are there, seen by wgmma and done by all threads of the warpgroup."""

    @plgpu.inline_mgpu()
    def wait(_):
        nvvm.cp_async_wait_group(later)
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)
        mgpu.utils.warpgroup_barrier()

    wait()


def store_rows(buffer_s, out_g, index_g, row, column, own, end) -> None:
    """out_g[index_g[row + i] or row + i, column : column + w] = buffer_s[i] for own <= row + i < end; afterwards the buffer may be written again."""
    rows, width = buffer_s.shape

    references = (buffer_s, out_g) if index_g is None else (buffer_s, out_g, index_g)
    types = [plgpu.RefType(TILED), *[plgpu.RefType() for _ in references[1:]]]

    @plgpu.inline_mgpu(arg_types=(*[SPLAT] * 4, *types))
    def put(_, row, column, own, end, buffer, out, *index):
        pieces, (row, column, own, end) = _Pieces(rows, width), (n.registers.item() for n in (row, column, own, end))
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        element = ir.MemRefType(out.type).element_type
        stored, features = ir.MemRefType(out.type).shape
        first = arith.extsi(i64, arith.addi(column, arith.muli(pieces.piece, _i32(PIECE))))
        to, *indices = (llvm.addrspacecast(llvm.PointerType.get(1), mgpu.utils.memref_ptr(r)) for r in (out, *index))
        for step in range(pieces.steps):
            place = arith.addi(row, pieces.row(step))
            with mgpu.utils.when(arith.andi(_at_least(place, own), _less(place, end))):
                target = llvm.load(i32, mgpu.utils.getelementptr(indices[0], [place], i32)) if indices else place
                with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, target, _i32(stored))):
                    four = ir.VectorType.get((4,), i32)
                    value = llvm.load(four, pieces.pointer(buffer, step), alignment=2 * PIECE)
                    offset = arith.addi(arith.muli(arith.extsi(i64, target), arith.constant(i64, features)), first)
                    llvm.store(value, mgpu.utils.getelementptr(to, [offset], element), alignment=2 * PIECE)
        mgpu.utils.warpgroup_barrier()

    put(row, column, own, end, *references)
