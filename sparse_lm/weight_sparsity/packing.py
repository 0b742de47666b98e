"""Between dense matrices and packed ones: a checkpoint's tree converted to the storage that a model wants.

A dense matrix becomes blocks by magnitude: the blocks of largest Frobenius norm that the pattern allows (in every column, or in the
whole matrix); zeros under a mask count as zeros, so a block mask of the same pattern is kept as it is. A companion of rank r takes
the best approximation of what is left over (Eckart and Young 1936). Blocks become dense by standing in their place.

Trees are nested dicts with unrolled names, arrays on the host.

Legend: K inputs, N outputs, R, C block rows and columns, J blocks, b block size, r rank, E experts.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_matmul.topology import topology_from_mask
from sparse_lm.layers.parameter import RUN_KEY
from sparse_lm.layers.tree_paths import flatten
from sparse_lm.weight_sparsity.packed_matrix import BlockPattern, PackedMatrix, best_mask, lists_of, nested

Tree = dict[str, Any]
PARTS = ("values", "into", "out", "soft")


def pack(weight_KN: np.ndarray, pattern: BlockPattern, rank: int = 0) -> tuple[Tree, Tree]:
    """Packs a dense matrix by magnitude.

    Args:
      weight_KN: the matrix.
      pattern: how many blocks it may keep and where.
      rank: of the companion; 0: none.

    Returns:
      ({"values", and with a rank "into", "out"}, lists of the topology).
    """
    weight_KN = np.asarray(weight_KN, np.float32)
    block, rows, columns = pattern.block, pattern.rows, pattern.columns
    blocks_RCbb = weight_KN.reshape(rows, block, columns, block).transpose(0, 2, 1, 3)
    mask_RC = np.asarray(best_mask(jnp.asarray(np.square(blocks_RCbb).sum((2, 3))), pattern))
    topology = topology_from_mask(mask_RC, block, block)
    column_J, row_J = np.nonzero(mask_RC.T)
    parts = {"values": blocks_RCbb[row_J, column_J]}
    if rank:
        left = np.where(mask_RC[..., None, None], 0.0, blocks_RCbb).transpose(0, 2, 1, 3).reshape(weight_KN.shape)
        u, s, v = np.linalg.svd(left, full_matrices=False)
        root = np.sqrt(s[:rank])
        parts |= {"into": u[:, :rank] * root, "out": root[:, None] * v[:rank]}
    return parts, {name: np.asarray(leaf) for name, leaf in lists_of(topology).items()}


def unpack(
    parts: Mapping[str, Any], topology: Mapping[str, Any], shape: tuple[int, int], permutation: Any = None
) -> np.ndarray:
    """Returns the dense matrix, or one for each expert, that packed parts stand for.

    Args:
      parts: "values", with a companion "into" and "out", and with a learned order of inputs "soft".
      topology: its lists.
      shape: K, N.
      permutation: int [K] order in which inputs meet its rows; None: their own.
    """
    values = np.asarray(parts["values"], np.float32)
    if values.ndim == 4:
        experts = range(values.shape[0])
        one = [
            ({n: np.asarray(a)[e] for n, a in parts.items()}, {n: np.asarray(a)[e] for n, a in topology.items()})
            for e in experts
        ]
        return np.stack([unpack(own, lists, shape, permutation) for own, lists in one])
    block = values.shape[-1]
    start = np.asarray(topology["column_start"])
    column_J = np.repeat(np.arange(start.size - 1), np.diff(start))
    blocks_RCbb = np.zeros((shape[0] // block, shape[1] // block, block, block), np.float32)
    blocks_RCbb[np.asarray(topology["row_index"]), column_J] = values
    dense = blocks_RCbb.transpose(0, 2, 1, 3).reshape(shape)
    if "soft" in parts:  # x M W; of a hardened order M is the permutation's matrix
        dense = np.asarray(parts["soft"], np.float32) @ dense
    elif permutation is not None:
        inverse = np.empty_like(dense)
        inverse[np.asarray(permutation)] = dense
        dense = inverse
    if "into" in parts:
        dense = dense + np.asarray(parts["into"], np.float32) @ np.asarray(parts["out"], np.float32)
    return dense


def unrolled(packed: Mapping[str, PackedMatrix]) -> dict[str, PackedMatrix]:
    """Returns the packed matrices of a model by the paths that they have on disk."""
    found = {}
    for path, matrix in packed.items():
        parts = path.split(".")
        run = next((i for i, part in enumerate(parts) if RUN_KEY.match(part)), None)
        names = [path] if run is None else [".".join([*parts[:run], str(n), *parts[run + 1 :]]) for n in matrix.layers]
        found.update(dict.fromkeys(names, matrix))
    return found


def convert(
    tree: Tree, packed: Mapping[str, PackedMatrix], ranks: Mapping[str, int], sides: Mapping[str, tuple[int, int]]
) -> Tree:
    """Returns a source's tree with every matrix in the storage that a model wants.

    Args:
      tree: {"params", "model_state", ...} of the source.
      packed: the model's packed matrices, by unrolled path.
      ranks: ranks of their companions.
      sides: {unrolled path: (K, N)} of its dense matrices; matrices that are not named stay as they are.
    """
    params, state = flatten(tree["params"]), flatten(tree.get("model_state", {}))
    for path in {p.rpartition(".")[0] for p in params if p.endswith((".values", ".weight"))}:
        if path not in packed and path not in sides:
            continue
        parts = {name: params[f"{path}.{name}"] for name in PARTS if f"{path}.{name}" in params}
        lists = {p.rpartition(".")[2]: a for p, a in state.items() if p.startswith(f"{path}.topology.")}
        matrix = packed.get(path)
        if matrix is not None and not matrix.learned and np.min(state.get(f"{path}.hard", 0)) == 1:
            # A hardened order goes on as one that stays, without its matrix.
            parts.pop("soft"), params.pop(f"{path}.soft"), state.pop(f"{path}.hard")
        if matrix is not None and "values" in parts and _fits(parts, lists, matrix, ranks.get(path, 0)):
            continue
        shape = (matrix.pattern.inputs, matrix.pattern.outputs) if matrix is not None else sides[path]
        if "values" in parts:
            dense = unpack(parts, lists, shape, state.get(f"{path}.permutation"))
        elif matrix is not None:
            dense = np.asarray(params[f"{path}.weight"], np.float32)
        else:
            continue
        params = {p: a for p, a in params.items() if p.rpartition(".")[0] != path}
        gone = (f"{path}.topology.", f"{path}.permutation", f"{path}.hard")
        state = {p: a for p, a in state.items() if not p.startswith(gone)}
        if matrix is None:
            params[f"{path}.weight"] = dense
            continue
        each = [pack(w, matrix.pattern, ranks.get(path, 0)) for w in (dense if matrix.experts else dense[None])]
        stack = np.stack if matrix.experts else lambda arrays: arrays[0]
        params |= {f"{path}.{name}": stack([own[name] for own, _ in each]) for name in each[0][0]}
        state |= {f"{path}.topology.{name}": stack([lists[name] for _, lists in each]) for name in each[0][1]}
        if matrix.permuted:
            state[f"{path}.permutation"] = np.arange(matrix.pattern.inputs, dtype=np.int32)
        if matrix.learned:
            params[f"{path}.soft"], state[f"{path}.hard"] = (
                np.eye(matrix.pattern.inputs, dtype=np.float32),
                np.float32(0),
            )
    return {**tree, "params": nested(params), "model_state": nested(state)}


def _fits(parts: Tree, lists: Tree, matrix: PackedMatrix, rank: int) -> bool:
    pattern = matrix.pattern
    batch = (matrix.experts,) if matrix.experts else ()
    same = tuple(np.shape(parts["values"])) == (*batch, pattern.blocks, pattern.block, pattern.block)
    found = np.shape(parts["into"])[-1] if "into" in parts else 0
    return same and found == rank and len(lists) > 0 and ("soft" in parts) == matrix.learned


def patterns_of(tree: Tree) -> Tree:
    """Returns the part of a source's model state that belongs to parameters it has: topology and permutation of packed matrices."""
    state = flatten(tree.get("model_state", {}))
    owners = {path.rpartition(".")[0] for path in flatten(tree["params"]) if path.endswith(".values")}

    def owner(path: str) -> str:
        head, _, last = path.rpartition(".")
        return head if last in ("permutation", "hard") else path.rpartition(".topology.")[0]

    return nested({path: leaf for path, leaf in state.items() if owner(path) in owners})
