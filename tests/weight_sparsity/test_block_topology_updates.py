"""Changes of a block topology: worked by hand, exact counts for any input, and values that follow their blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.block_sparse_matmul import check_topology, dense_mask, topology_from_mask
from sparse_lm.weight_sparsity.packed_matrix import BlockPattern, best_mask, even_mask, ranks
from sparse_lm.weight_sparsity.topology_update import change_topology, companion_norms, moved, next_mask, on_grid

# Four block rows, two block columns, two blocks in each column.
PATTERN = BlockPattern(inputs=64, outputs=32, block=16, blocks=4)
FREE = BlockPattern(inputs=64, outputs=32, block=16, blocks=4, constant_fan_in=False)
RANGES = BlockPattern(inputs=64, outputs=32, block=16, blocks=4, row_shards=2)

#        column 0          column 1
# row 0  norm 3            -
# row 1  -                 norm 2
# row 2  norm 1            -
# row 3  -                 norm 5
MASK = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], bool)
NORM = np.array([[3, 0], [0, 2], [1, 0], [0, 5]], np.float32)
SCORE = np.array([[0, 7], [4, 0], [9, 1], [6, 3]], np.float32)


@functools.cache
def compiled(pattern: BlockPattern):
    return tiny.jit(lambda mask, norm, score, count: next_mask(mask, norm, score, count, pattern))


def changed(pattern: BlockPattern, count: int, score: np.ndarray = SCORE) -> list[list[int]]:
    return np.asarray(compiled(pattern)(MASK, NORM, score, jnp.int32(count))).astype(int).tolist()


def test_nothing_is_dropped_at_count_zero() -> None:
    assert changed(PATTERN, 0) == MASK.astype(int).tolist()


def test_a_dropped_block_may_grow_again() -> None:
    """One block: the smallest norm is 1 at (2, 0). Column 0 grows the best of rows 1 (4), 2 (9, just dropped), 3 (6): row 2."""
    assert changed(PATTERN, 1) == MASK.astype(int).tolist()


def test_the_column_that_lost_a_block_grows_one() -> None:
    """As before, but row 2 wants 5 only: row 3 (6) grows, although (0, 1) wants 7: that column lost nothing."""
    score = SCORE.copy()
    score[2, 0] = 5
    assert changed(PATTERN, 1, score) == [[1, 0], [0, 1], [0, 0], [1, 1]]


def test_two_columns_lose_a_block_each() -> None:
    """Norms 1 at (2, 0) and 2 at (1, 1) go. Column 0 grows row 2 again (9); column 1 grows row 0 (7)."""
    assert changed(PATTERN, 2) == [[1, 1], [0, 0], [1, 0], [0, 1]]


def test_three_blocks_of_which_one_column_loses_two() -> None:
    """Norms 1, 2 and 3 go: column 0 is empty and grows rows 2 (9) and 3 (6); column 1 keeps row 3 and grows row 0 (7)."""
    assert changed(PATTERN, 3) == [[0, 1], [0, 0], [1, 0], [1, 1]]


def test_free_fan_in_grows_anywhere() -> None:
    """Norms 1 and 2 go; of all places that do not stay, (2, 0) wants 9 and (0, 1) wants 7. With three gone also (3, 0), 6."""
    assert changed(FREE, 2) == [[1, 1], [0, 0], [1, 0], [0, 1]]
    assert changed(FREE, 3) == [[0, 1], [0, 0], [1, 0], [1, 1]]
    score = SCORE.copy()
    score[0, 1] = 0  # then (3, 0) is second, and column 1 is left with one block
    assert changed(FREE, 2, score) == [[1, 0], [0, 0], [1, 0], [1, 1]]


def test_ranges_of_rows_keep_their_share() -> None:
    """Ranges (0, 1) and (2, 3). Norms 1 at (2, 0), 2 at (1, 1): the lower range of column 0 grows row 2 (9 against 6), the upper one
    of column 1 row 0 (7 against 0)."""
    assert changed(RANGES, 2) == [[1, 1], [0, 0], [1, 0], [0, 1]]
    score = SCORE.copy()
    score[2, 0] = 0
    # Row 1 of column 0 (4) is in the other range: row 3 grows.
    assert changed(RANGES, 1, score) == [[1, 0], [0, 1], [0, 0], [1, 1]]


def test_ties_go_to_the_first() -> None:
    assert ranks(jnp.array([1.0, 3.0, 1.0, 3.0])).tolist() == [2, 0, 3, 1]
    norm, score = np.where(MASK, 1, 0).astype(np.float32), np.zeros((4, 2), np.float32)
    # All norms are 1: (0, 0) goes, and of rows 0, 1, 3 with score 0 the first grows again.
    assert np.asarray(compiled(PATTERN)(MASK, norm, score, jnp.int32(1))).tolist() == MASK.tolist()


def test_blocks_follow_the_topology() -> None:
    """Slots in the order of columns: (0, 0), (2, 0), (1, 1), (3, 1). After the change of two blocks with 5 wanted at (2, 0):
    column 0 has rows 0, 3 and column 1 rows 0, 3: (0, 0) from slot 0, (3, 0) new, (0, 1) new, (3, 1) from slot 3."""
    score = SCORE.copy()
    score[2, 0] = 5
    topology = topology_from_mask(MASK, 16, 16)
    norm_J = jnp.array([3.0, 1.0, 2.0, 5.0])
    assert np.asarray(on_grid(norm_J, topology, 0.0)).tolist() == NORM.tolist()
    run = tiny.jit(lambda norm_J, score: change_topology(topology, norm_J, score, jnp.int32(2), PATTERN))
    new, source, before, after = run(norm_J, jnp.asarray(score))
    check_topology(new)
    assert source.tolist() == [0, -1, -1, 3]
    assert np.asarray(before).tolist() == MASK.tolist()
    assert np.asarray(after).astype(int).tolist() == [[1, 1], [0, 0], [0, 0], [1, 1]]
    np.testing.assert_array_equal(dense_mask(new), after)
    values = jnp.arange(1.0, 5.0)[:, None, None] * jnp.ones((4, 16, 16))
    assert np.asarray(moved(values, source))[:, 0, 0].tolist() == [1, 0, 0, 4]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_counts_are_exact(data: st.DataObject) -> None:
    """Whatever norms and scores: every group keeps its number of blocks, and exactly `count` blocks lose their place before growth."""
    pattern = data.draw(st.sampled_from((PATTERN, FREE, RANGES)))
    numbers = st.lists(st.integers(0, 3), min_size=8, max_size=8)
    drawn = [np.array(data.draw(numbers), np.float32).reshape(4, 2) for _ in range(3)]
    count = data.draw(st.integers(0, 4))
    mask = np.asarray(best_mask(jnp.asarray(drawn[0]), pattern))
    groups = np.asarray(pattern.grouped(jnp.asarray(mask))).sum(-1)
    assert mask.sum() == 4 and len(set(groups.tolist())) == 1
    after = np.asarray(compiled(pattern)(mask, drawn[1], drawn[2], jnp.int32(count)))
    np.testing.assert_array_equal(np.asarray(pattern.grouped(jnp.asarray(after))).sum(-1), groups)
    assert (mask & ~after).sum() <= count
    # Nothing that stayed is smaller than something that went, and nothing that grew was wanted less than a free place of its group.
    if (mask & ~after).any() and (mask & after).any():
        gone, kept = drawn[1][mask & ~after], drawn[1][mask & after]
        order = np.argsort(np.where(mask, drawn[1], np.inf).reshape(-1), kind="stable")[:count]
        assert set(np.flatnonzero(mask & ~after)) <= set(order.tolist())
        assert gone.max() <= np.sort(drawn[1][mask])[max(count - 1, 0)] and kept.size
    grown, free = after & ~mask, ~after
    group_of = np.asarray(
        pattern.ungrouped(jnp.broadcast_to(jnp.arange(groups.size)[:, None], (groups.size, 8 // groups.size)))
    )
    for place in np.argwhere(grown):
        rivals = free & (group_of == group_of[tuple(place)])
        assert drawn[2][tuple(place)] >= drawn[2][rivals].max(initial=-np.inf)


@pytest.mark.parametrize("pattern", [PATTERN, FREE, RANGES])
def test_grouping_is_undone(pattern: BlockPattern) -> None:
    a = jnp.arange(16.0).reshape(2, 4, 2)
    np.testing.assert_array_equal(pattern.ungrouped(pattern.grouped(a)), a)


def test_norms_of_a_companion_are_those_of_the_product() -> None:
    draw = np.random.default_rng(0).normal
    into, out = draw(size=(64, 3)).astype(np.float32), draw(size=(3, 32)).astype(np.float32)
    blocks = (into @ out).reshape(4, 16, 2, 16)
    np.testing.assert_allclose(companion_norms(into, out, 16), (blocks**2).sum((1, 3)), rtol=1e-5)
    assert jax.eval_shape(lambda a, b: companion_norms(a, b, 16), into, out).shape == (4, 2)


@pytest.mark.parametrize(
    "pattern",
    [
        BlockPattern(16 * 8, 16 * 8, 16, 8 * 3),  # 3 of 8: columns begin in one order of the rows and end in the next
        BlockPattern(16 * 8, 16 * 5, 16, 5 * 7),  # 7 of 8, and 35 blocks in 8 rows: four or five each
        BlockPattern(16 * 12, 16 * 4, 16, 4 * 4, row_shards=2),  # 2 of 6 in each half of the rows
    ],
)
def test_a_first_pattern_is_even_in_both_directions(pattern: BlockPattern) -> None:
    draw = tiny.jit(jax.vmap(lambda key: even_mask(key, pattern)))
    masks = np.asarray(draw(jax.random.split(jax.random.key(0), 100)))
    assert (masks.sum(1) == pattern.fan_in).all()
    halves = masks.reshape(100, pattern.row_shards, -1, pattern.columns)
    assert (halves.sum(2) == pattern.fan_in // pattern.row_shards).all()
    in_row = masks.sum(2)
    assert (in_row.max(1) - in_row.min(1) <= 1).all()
    # Every place is drawn about as often as any other: 100 draws at density p have a deviation of sqrt(p (1 - p) / 100) <= 0.05.
    assert np.abs(masks.mean(0) - pattern.density).max() < 0.05 * 5
    assert len({mask.tobytes() for mask in masks}) > 15
