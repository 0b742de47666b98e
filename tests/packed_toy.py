"""States of packed models drawn on the host: the programs that draw them on devices are tested elsewhere, and long to compile."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_matmul import topology_from_mask
from sparse_lm.layers.parameter import map_leaves
from sparse_lm.train.state import TrainState
from sparse_lm.weight_sparsity.packed_matrix import BlockPattern, PackedMatrix, best_mask, lists_of, replaced


def random_lists(pattern: BlockPattern, experts: int, draw: np.random.Generator) -> dict[str, jax.Array]:
    """Lists of a random topology, or of one for each expert."""

    def one() -> dict[str, Any]:
        scores = jnp.asarray(draw.random((pattern.rows, pattern.columns)))
        return lists_of(topology_from_mask(np.asarray(best_mask(scores, pattern)), pattern.block, pattern.block))

    lists = [one() for _ in range(max(1, experts))]
    return jax.tree.map(lambda *own: jnp.stack(own) if experts else own[0], *lists)


def random_state(abstract: TrainState, packed: Mapping[str, PackedMatrix]) -> TrainState:
    """A state of step 0 of unrolled blocks, with its average and without what a sparsifier keeps, which is zero."""
    draw = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    params = map_leaves(
        lambda _, leaf: draw.normal(0, leaf.shape[-1] ** -0.5, leaf.shape).astype(np.float32), state.params
    )
    lists = {f"{path}.topology": random_lists(matrix.pattern, matrix.experts, draw) for path, matrix in packed.items()}
    drawn = dataclasses.replace(
        state, params=params, model_state=replaced(state.model_state, lists), ema=params if state.ema else {}
    )
    return jax.tree.map(jnp.asarray, drawn)
