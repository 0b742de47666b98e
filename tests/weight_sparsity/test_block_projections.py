"""Packed projections equal dense ones under their mask: values, gradients, experts, permutations, companions, probes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from packed_toy import random_lists

from pallas_kernels.block_sparse_matmul import dense_mask, to_dense
from pallas_kernels.grouped_matmul import grouped_matmul
from sparse_lm.config import ConfigError
from sparse_lm.layers.parameter import ModelState
from sparse_lm.weight_sparsity.block_sparse import grouped_product, rows_at_once
from sparse_lm.weight_sparsity.gradient_probe import observed, slab_norms
from sparse_lm.weight_sparsity.packed_matrix import (
    BlockPattern,
    PackedMatrix,
    initial_topologies,
)
from sparse_lm.weight_sparsity.projection import BlockSparseLowRankProjection, BlockSparseProjection

K, N, E, A = 64, 32, 3, 40
DRAW = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(DRAW.normal(size=shape).astype(np.float32))


def built(config: BlockSparseProjection, experts: int = 0):
    """(pattern, graph, parameters, state, probes) of a matrix with random values and topology."""
    module = nnx.eval_shape(lambda: config.build(K, N, ("embed", "ffn"), experts=experts))
    graph, params, _, probes = nnx.split(module, nnx.Param, ModelState, ...)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), nnx.to_pure_dict(params))
    state = {"topology": random_lists(module.pattern, experts, DRAW)}
    if module.permutation is not None:
        state["permutation"] = jnp.asarray(DRAW.permutation(K).astype(np.int32))
    return module.pattern, graph, params, state, jax.tree.map(lambda leaf: jnp.zeros(()), nnx.to_pure_dict(probes))


def dense_of(pattern: BlockPattern, params, state) -> jax.Array:
    """The matrix, or one for each expert, in the order of the inputs."""
    topology = pattern.from_lists(state["topology"])
    dense = to_dense(params["values"], topology)
    if "permutation" in state:
        # y = x[..., p] @ W: row i of W meets input p[i].
        dense = jnp.zeros_like(dense).at[..., state["permutation"], :].set(dense)
    return dense + params["into"] @ params["out"] if "into" in params else dense


CONFIGS = {
    "blocks": BlockSparseProjection(density=0.5, block=16),
    "free": BlockSparseProjection(density=0.4, block=16, fan_in="free"),
    "all": BlockSparseLowRankProjection(density=0.25, block=16, rank=3, permutation="random"),
}


@pytest.mark.parametrize("name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("blocks", "free")), "all"])
def test_a_packed_matrix_is_its_dense_mask(name: str) -> None:
    pattern, graph, params, state, probes = built(CONFIGS[name])
    x, dy = normal(2, 5, K), normal(2, 5, N)

    def packed(params, x):
        return nnx.merge(graph, params, state, probes)(x)

    def dense(params, x):
        return jnp.einsum("...k,kn->...n", x, dense_of(pattern, params, state), precision="highest")

    def both(params, x):
        results = []
        for function in (packed, dense):
            y, pull = jax.vjp(function, params, x)
            results.append({"y": y, "x": pull(dy)[1], "params": pull(dy)[0]})
        return results

    found, expected = tiny.jit(both)(params, x)
    tiny.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert CONFIGS[name].cost(K, N) == (size, 2 * size)


@pytest.mark.parametrize(
    "sizes", [pytest.param((14, 13, 13), marks=pytest.mark.slow), (0, 38, 1), (0, 0, 0)], ids=["even", "uneven", "none"]
)
def test_experts_are_their_dense_masks(sizes: tuple[int, ...]) -> None:
    """However uneven the loads, and with rows past the last expert."""
    pattern, graph, params, state, probes = experts()
    sizes_E = jnp.array(sizes, jnp.int32)
    found, expected = both_grouped()(params, X, sizes_E)
    tiny.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    assert not np.asarray(found["y"])[sum(sizes) :].any()


X, DY = normal(A, K), normal(A, N)


@functools.cache
def experts():
    return built(CONFIGS["all"], E)


@functools.cache
def both_grouped():
    pattern, graph, _, state, probes = experts()

    def both(params, x, sizes_E):
        packed = lambda params, x: nnx.merge(graph, params, state, probes).grouped(x, sizes_E)  # noqa: E731
        dense = lambda params, x: grouped_matmul(x, dense_of(pattern, params, state), sizes_E, precision="highest")  # noqa: E731
        results = []
        for function in (packed, dense):
            y, pull = jax.vjp(function, params, x)
            results.append({"y": y, "x": pull(DY)[1], "params": pull(DY)[0]})
        return results

    return tiny.jit(both)


def test_experts_begin_with_patterns_of_their_own_and_one_order_of_inputs() -> None:
    pattern = CONFIGS["all"].pattern(K, N)
    packed = {"m": PackedMatrix(pattern, 6, (), True, ("embed", "ffn"))}

    @tiny.jit
    def begin():
        state = initial_topologies(jax.random.key(1), packed, {"m": {"topology": {}, "permutation": 0}})["m"]
        return dense_mask(pattern.from_lists(state["topology"])), state["permutation"]

    masks, order = jax.tree.map(np.asarray, begin())
    assert masks.shape == (6, 4, 2) and any((masks[0] != mask).any() for mask in masks[1:])
    assert (masks.sum(1) == pattern.fan_in).all()
    assert sorted(order.tolist()) == list(range(K)) != order.tolist()


def test_even_loads_take_one_round() -> None:
    """40 rows of 3 experts: 1.25 x 40 / 3 = 16.7, rounded up to a multiple of 8: 24 rows at once; the fullest of even loads has 14."""
    assert rows_at_once(40, 3) == 24
    assert rows_at_once(6, 3) == 6  # never more than there are
    assert "while" in str(
        jax.make_jaxpr(grouped_product)(X, normal(E, 2, 16, 16), _topology_of_experts(), jnp.ones(E, jnp.int32))
    )


def _topology_of_experts():
    pattern = BlockPattern(K, N, 16, 2)
    return pattern.from_lists(random_lists(pattern, E, DRAW))


PATTERN = BlockPattern(K, N, 16, 4)


@pytest.mark.parametrize("axes", [None, ()])
def test_a_probe_reads_norms_of_all_blocks_and_slabs_of_the_gradient(axes: tuple[str, ...] | None) -> None:
    x, dy = normal(2, 5, K), normal(2, 5, N)
    dense = np.einsum("abk,abn->kn", x, dy)

    @tiny.jit
    def ask(x, dy):
        def one(probe, first):
            y, pull = jax.vjp(
                lambda x, y, p: observed(PATTERN, axes, x, y, p, first, None), x, jnp.zeros_like(dy), probe
            )
            return y, pull(dy)

        return one(jnp.zeros((4, 2)), jnp.float32(0)), one(jnp.zeros((K, 16)), jnp.float32(1))

    (y, (dx, back, norms)), (_, (_, _, slab)) = ask(x, dy)
    assert not np.asarray(y).any() and not np.asarray(dx).any()
    np.testing.assert_array_equal(back, dy)
    np.testing.assert_allclose(norms, (dense.reshape(4, 16, 2, 16) ** 2).sum((1, 3)), rtol=1e-5)
    np.testing.assert_allclose(slab, dense[:, 16:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(slab_norms(slab, 16)[:, 0], norms[:, 1], rtol=1e-5)


def test_a_probe_of_experts_reads_each_ones_gradient() -> None:
    sizes_E = jnp.array([14, 0, 20], jnp.int32)
    x, dy = np.asarray(X), np.asarray(DY)
    dense = np.stack([x[:14].T @ dy[:14], np.zeros((K, N)), x[14:34].T @ dy[14:34]])

    @tiny.jit
    def ask(probe):
        return jax.vjp(lambda p: observed(PATTERN, None, X, jnp.zeros_like(DY), p, jnp.float32(0), sizes_E), probe)[1](
            DY
        )[0]

    norms = ask(jnp.zeros((E, 4, 2)))
    np.testing.assert_allclose(norms, (dense.reshape(E, 4, 16, 2, 16) ** 2).sum((2, 4)), rtol=1e-4)


@pytest.mark.parametrize(
    ("density", "fan_in", "row_shards", "blocks"),
    [
        (0.1, "constant", 1, 2),  # 0.1 x 4 rows = 0.4: at least one block a column, two columns
        (0.5, "constant", 1, 4),  # 0.5 x 4 = 2 a column
        (0.65, "constant", 1, 6),  # 2.6: 3 a column
        (0.65, "free", 1, 5),  # 0.65 x 8 = 5.2
        (0.5, "constant", 2, 4),  # 0.5 x 4 / 2 = 1 in each half of a column
        (1.0, "constant", 4, 8),
    ],
)
def test_numbers_of_blocks_by_hand(density: float, fan_in: str, row_shards: int, blocks: int) -> None:
    config = BlockSparseProjection(density=density, block=16, fan_in=fan_in, row_shards=row_shards)  # type: ignore[arg-type]
    assert config.pattern(K, N).blocks == blocks
    assert config.cost(K, N) == (blocks * 256, blocks * 512)


def test_blocks_must_tile_every_matrix() -> None:
    with pytest.raises(ConfigError, match=r"projection\.block = 32 .* here 64 x 48"):
        BlockSparseProjection(block=32).pattern(64, 48)
    with pytest.raises(ConfigError, match=r"projection\.row_shards = 3 .* 4 block rows"):
        BlockSparseProjection(block=16, row_shards=3).pattern(64, 32)
