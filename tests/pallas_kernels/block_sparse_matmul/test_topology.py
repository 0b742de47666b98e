"""Topologies: every constructor renders the mask it was given, edits keep the count, faults are named."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse_matmul import (
    check_topology,
    cost,
    dense_mask,
    edit_topology,
    from_dense,
    picture,
    to_dense,
    topology_from_indices,
    topology_from_mask,
)

BLOCK = 16


@st.composite
def masks(draw):
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    bits = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    return np.array(bits).reshape(rows, columns)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(masks())
def test_a_topology_renders_its_mask_and_lists_every_block_once_in_pairs(mask):
    topology = topology_from_mask(mask, BLOCK, BLOCK)
    np.testing.assert_array_equal(np.asarray(dense_mask(topology)), mask)
    assert topology.density == pytest.approx(mask.mean())
    check_topology(topology)
    column, row = np.nonzero(mask.T)
    listed = []
    for row0, column0, slot0, row1, column1, slot1 in np.asarray(topology.pairs).T:
        if slot0 == topology.blocks:  # an entry that this pattern does not need
            assert slot1 == topology.blocks
            continue
        assert (row[slot0], column[slot0]) == (row0, column0)
        assert row0 == row1 or column0 == column1  # the kernel loads a shared tile once
        listed.append(slot0)
        if slot1 < topology.blocks:
            assert (row[slot1], column[slot1]) == (row1, column1)
            listed.append(slot1)
    assert sorted(listed) == list(range(topology.blocks))


def test_indices_in_any_order_give_the_same_topology_and_the_order_that_sorts_values():
    mask = np.random.default_rng(0).random((5, 4)) < 0.5
    wanted = topology_from_mask(mask, BLOCK, 2 * BLOCK)
    column, row = np.nonzero(mask.T)
    shuffle = np.random.default_rng(1).permutation(len(row))
    build = jax.jit(
        lambda r, c: topology_from_indices(
            r, c, features_in=5 * BLOCK, features_out=8 * BLOCK, block_in=BLOCK, block_out=2 * BLOCK
        )
    )
    found, order = build(row[shuffle], column[shuffle])
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    np.testing.assert_array_equal(row[shuffle][np.asarray(order)], row)


def test_from_dense_and_to_dense_are_inverse_and_keep_only_blocks_with_a_nonzero():
    mask = np.random.default_rng(0).random((3, 4)) < 0.5
    dense = jax.random.normal(jax.random.key(0), (3 * BLOCK, 4 * BLOCK))
    dense = dense * np.kron(mask, np.ones((BLOCK, BLOCK)))
    values, topology = from_dense(dense, BLOCK, BLOCK)
    assert values.shape == (mask.sum(), BLOCK, BLOCK)
    np.testing.assert_array_equal(to_dense(values, topology), dense)
    np.testing.assert_array_equal(dense_mask(topology, elements=True), np.kron(mask, np.ones((BLOCK, BLOCK))) > 0)


def test_an_edit_inside_jit_replaces_blocks_and_says_where_each_came_from():
    mask = np.zeros((4, 4), bool)
    mask[[0, 1, 2, 3, 0], [0, 1, 2, 3, 2]] = True
    values, topology = from_dense(np.kron(mask, np.ones((BLOCK, BLOCK))) * 3.0, BLOCK, BLOCK)
    edited, source = jax.jit(edit_topology)(topology, jnp.array([0, 3]), jnp.array([3, 1]), jnp.array([0, 3]))
    wanted = mask.copy()
    column, row = np.nonzero(mask.T)
    wanted[row[[0, 3]], column[[0, 3]]] = False
    wanted[[3, 1], [0, 3]] = True
    np.testing.assert_array_equal(np.asarray(dense_mask(edited)), wanted)
    check_topology(edited)
    source = np.asarray(source)
    new_column, new_row = np.nonzero(wanted.T)
    for block, old in enumerate(source):
        if old < 0:
            assert (new_row[block], new_column[block]) in {(3, 0), (1, 3)}
        else:
            assert (new_row[block], new_column[block]) == (row[old], column[old])
    assert (source < 0).sum() == 2


def test_experts_have_their_own_patterns_of_equal_size():
    masks_ERC = np.stack([np.eye(3, dtype=bool), np.eye(3, dtype=bool)[::-1]])
    topology = topology_from_mask(masks_ERC, BLOCK, BLOCK)
    assert topology.batch_shape == (2,)
    np.testing.assert_array_equal(np.asarray(dense_mask(topology)), masks_ERC)
    np.testing.assert_array_equal(topology.block_column, [[0, 1, 2], [0, 1, 2]])
    np.testing.assert_array_equal(topology.row_index, [[0, 1, 2], [2, 1, 0]])
    check_topology(topology)
    assert cost(topology, rows=10)["flops"] == 2 * 2 * 10 * 3 * BLOCK * BLOCK
    masks_ERC[0, 0, 1] = True
    with pytest.raises(ValueError, match="mask has .* blocks in different experts"):
        topology_from_mask(masks_ERC, BLOCK, BLOCK)


def test_a_picture_has_a_mark_for_each_block():
    assert picture(topology_from_mask(np.array([[True, False], [False, True]]), BLOCK, BLOCK)) == "#.\n.#"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_index": [0, 0, 9]}, r"row_index has values 0..9: allowed 0..2"),
        ({"row_index": [2, 1, 0]}, "row_index must rise strictly"),
        ({"column_start": [0, 3, 2, 3]}, "column_start must rise"),
        ({"row_order": [0, 2, 1]}, "row_order disagrees"),
    ],
)
def test_check_mode_names_the_list_that_is_wrong(change, message):
    mask = np.zeros((3, 3), bool)
    mask[[0, 1, 2], [0, 0, 1]] = True
    topology = topology_from_mask(mask, BLOCK, BLOCK)
    broken = dataclasses.replace(topology, **{name: jnp.array(value, jnp.int32) for name, value in change.items()})
    with pytest.raises(ValueError, match=message):
        check_topology(broken)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features_in": 40, "features_out": 32, "block_in": 16, "block_out": 16}, "features_in=40"),
        ({"features_in": 32, "features_out": 32, "block_in": 12, "block_out": 16}, "block_in=12: block sizes are"),
    ],
)
def test_geometry_that_does_not_tile_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        topology_from_indices(np.zeros(1, int), np.zeros(1, int), **arguments)


def test_coordinates_of_another_dtype_or_shape_are_refused():
    geometry = {"features_in": 32, "features_out": 32, "block_in": 16, "block_out": 16}
    with pytest.raises(ValueError, match="row_index has dtype float32"):
        topology_from_indices(jnp.zeros(2), jnp.zeros(2, int), **geometry)
    with pytest.raises(ValueError, match=r"row_index has shape \(2,\) and block_column \(3,\)"):
        topology_from_indices(jnp.zeros(2, int), jnp.zeros(3, int), **geometry)
