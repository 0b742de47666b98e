"""block_sparse_matmul against dense float32 products: values, gradients, batching, refusals."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse_matmul import block_sparse_matmul, to_dense, topology_from_mask
from pallas_kernels.block_sparse_matmul.dense_form import gather_blocks

TOLERANCE = {jnp.float32: 1e-6, jnp.bfloat16: 2.5e-3, jnp.float16: 2.5e-3}


def error(found, wanted):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    return np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-30)


def problem(mask, block_in, block_out, rows, dtype, seed=0, experts=()):
    topology = topology_from_mask(mask, block_in, block_out)
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (*experts, *rows, topology.features_in), dtype)
    dy = jax.random.normal(keys[1], (*experts, *rows, topology.features_out), dtype)
    values = jax.random.normal(keys[2], (*experts, topology.blocks, block_in, block_out), dtype)
    return topology, x, values, dy


def products(x, values, topology, dy, backend):
    y, pull = jax.vjp(lambda x, v: block_sparse_matmul(x, v, topology, backend=backend), x, values)
    return y, *pull(dy)


def dense_products(x, values, topology, dy):
    """In float64 on the host."""
    w = np.asarray(to_dense(values, topology), np.float64)
    x2, dy2 = (np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (x, dy))
    dense = (x2.T @ dy2).astype(np.float32)
    return (x2 @ w).reshape(dy.shape), (dy2 @ w.T).reshape(x.shape), gather_blocks(dense, topology)


@pytest.mark.parametrize(
    ("block_in", "block_out", "dtype"),
    [
        (16, 16, jnp.float32),
        pytest.param(32, 64, jnp.float32, marks=pytest.mark.slow),
        pytest.param(128, 128, jnp.float32, marks=pytest.mark.slow),
        pytest.param(64, 32, jnp.bfloat16, marks=pytest.mark.slow),
        (128, 128, jnp.bfloat16),
        pytest.param(16, 16, jnp.float16, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_equal_the_dense_products(block_in, block_out, dtype):
    mask = np.random.default_rng(0).random((5, 4)) < 0.4
    mask[:, 1], mask[2], mask[:, 0] = False, False, True  # an empty column, an empty row, a full column
    mask[2, 0] = False
    topology, x, values, dy = problem(mask, block_in, block_out, (3, 7), dtype)
    for backend in ("xla", "reference"):
        found = products(x, values, topology, dy, backend)
        for name, a, b in zip(("y", "dx", "dvalues"), found, dense_products(x, values, topology, dy), strict=True):
            assert a.dtype == dtype
            assert error(a, b) <= TOLERANCE[dtype], (backend, name)


@hypothesis.settings(deadline=None, max_examples=6)
@hypothesis.given(
    rows=st.sampled_from([0, 1, 5]),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_pattern_and_row_count(rows, shape, density, seed):
    mask = np.random.default_rng(seed).random(shape) < density
    topology, x, values, dy = problem(mask, 16, 16, (rows,), jnp.float32, seed)
    found = products(x, values, topology, dy, "xla")
    for a, b in zip(found, dense_products(x, values, topology, dy), strict=True):
        assert error(a, b) <= 1e-6 or (not np.asarray(b).any() and not np.asarray(a).any())


@functools.cache
def small():
    mask = np.random.default_rng(3).random((4, 3)) < 0.5
    return problem(mask, 16, 16, (6,), jnp.float32)


def test_the_default_backend_agrees_under_jit_and_twice_gives_the_same_bits():
    topology, x, values, dy = small()
    step = jax.jit(lambda x, v, t, dy: products(x, v, t, dy, None))
    first, second = step(x, values, topology, dy), step(x, values, topology, dy)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    for a, b in zip(first, dense_products(x, values, topology, dy), strict=True):
        assert error(a, b) <= 1e-6


def test_the_topology_is_an_argument_without_gradient():
    topology, x, values, _ = small()
    gradient = jax.grad(lambda v, t: block_sparse_matmul(x, v, t).sum(), argnums=1, allow_int=True)(values, topology)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jax.dtypes.float0}


def test_a_changed_pattern_of_equal_size_does_not_compile_again():
    topology, x, values, _ = small()
    other = topology_from_mask(np.roll(np.asarray(jnp.asarray(small_mask())), 1, axis=1), 16, 16)
    step = jax.jit(lambda x, v, t: block_sparse_matmul(x, v, t, backend="xla"))
    step(x, values, topology)
    assert error(step(x, values, other), np.asarray(x, np.float64) @ np.asarray(to_dense(values, other))) <= 1e-6
    assert step._cache_size() == 1


def small_mask():
    return np.random.default_rng(3).random((4, 3)) < 0.5


def test_experts_each_have_their_weight_and_may_share_a_pattern():
    mask = np.stack([np.random.default_rng(s).permutation(12).reshape(4, 3) < 5 for s in range(2)])
    topology, x, values, dy = problem(mask, 16, 16, (5,), jnp.float32, experts=(2,))
    found = products(x, values, topology, dy, None)
    one = [jax.tree.map(lambda a, e=e: a[e], topology) for e in range(2)]
    for e in range(2):
        for a, b in zip(found, dense_products(x[e], values[e], one[e], dy[e]), strict=True):
            assert error(a[e], b) <= 1e-6
    shared = block_sparse_matmul(x, values, one[0])
    np.testing.assert_array_equal(shared[1], block_sparse_matmul(x[1], values[1], one[0]))


@pytest.mark.parametrize(
    "axes",
    [
        (0, 0, 0),
        *(pytest.param(axes, marks=pytest.mark.slow) for axes in ((0, None, None), (None, 0, None), (0, 0, None))),
    ],
)
def test_vmap_equals_a_loop_with_gradients(axes):
    topology, x, values, _ = small()
    other = topology_from_mask(np.roll(small_mask(), 1, axis=0), 16, 16)
    members = (
        jnp.stack([x, x + 1]) if axes[0] == 0 else x,
        jnp.stack([values, 2 * values]) if axes[1] == 0 else values,
        jax.tree.map(lambda a, b: jnp.stack([a, b]), topology, other) if axes[2] == 0 else topology,
    )

    def gradients(x, v, t):
        return jax.value_and_grad(lambda x, v: (block_sparse_matmul(x, v, t) ** 2).sum(), (0, 1))(x, v)

    together = jax.vmap(gradients, in_axes=axes)(*members)
    for i in range(2):
        single = gradients(*(m if a is None else jax.tree.map(lambda l, i=i: l[i], m) for m, a in zip(members, axes)))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=2e-5, atol=1e-4), together, single)


def test_it_runs_under_scan_and_remat():
    topology = topology_from_mask(np.ones((2, 2), bool), 16, 16)
    values = jax.random.normal(jax.random.key(0), (3, 4, 16, 16)) * 0.1
    x = jax.random.normal(jax.random.key(1), (5, 32))

    def scanned(values):
        body = jax.checkpoint(lambda h, v: (jnp.tanh(block_sparse_matmul(h, v, topology)), None))
        return jax.lax.scan(body, x, values)[0].sum()

    def looped(values):
        h = x
        for v in values:
            h = jnp.tanh(h @ to_dense(v, topology))
        return h.sum()

    assert error(jax.grad(scanned)(values), jax.grad(looped)(values)) <= 2e-6


@pytest.mark.filterwarnings("ignore:Some donated buffers")  # the output has another shape
@pytest.mark.parametrize("check_vma", [True, False])
def test_it_runs_inside_shard_map_with_gradients_and_donated_rows(check_vma):
    topology, x, values, _ = small()
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def shard(x, v, t):
        y, pull = jax.vjp(lambda v: block_sparse_matmul(x, v, t), v)
        (dv,) = pull(y)
        return y, dv if check_vma else jax.lax.psum(dv, "data")  # with checks, the gradient is added up by itself

    step = jax.jit(
        jax.shard_map(
            shard,
            mesh=mesh,
            in_specs=(spec("data"), spec(), spec()),
            out_specs=(spec("data"), spec()),
            check_vma=check_vma,
        ),
        donate_argnums=0,
    )
    y, pull = jax.vjp(lambda v: block_sparse_matmul(x, v, topology), values)
    found = step(x + 0, values, topology)
    assert error(found[0], y) <= 1e-6 and error(found[1], pull(y)[0]) <= 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, v, t: (x[:, :-1], v, t), r"x has shape \(6, 63\): expected \[\.\.\., 64\]"),
        (lambda x, v, t: (x, v[:-1], t), "values has shape"),
        (lambda x, v, t: (x.astype(jnp.bfloat16), v, t), "x has dtype bfloat16 and values float32"),
        (lambda x, v, t: (x.astype(int), v.astype(int), t), "x has dtype int32: expected one of"),
        (lambda x, v, t: (x, v, t.row_index), "topology is a"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, message):
    topology, x, values, _ = small()
    with pytest.raises(ValueError, match=message):
        block_sparse_matmul(*change(x, values, topology))


def test_an_unknown_or_unfit_backend_is_refused_with_the_reason():
    topology, x, values, _ = small()
    with pytest.raises(ValueError, match=r"backend='cuda' is unknown; allowed: \['mosaic_gpu'"):
        block_sparse_matmul(x, values, topology, backend="cuda")
    with pytest.raises(ValueError, match="cannot run here"):
        block_sparse_matmul(x, values, topology, backend="mosaic_gpu")


def test_check_mode_refuses_a_trace_and_finds_a_fault():
    topology, x, values, _ = small()
    block_sparse_matmul(x, values, topology, check=True)
    with pytest.raises(ValueError, match="topology is traced"):
        jax.jit(lambda t: block_sparse_matmul(x, values, t, check=True))(topology)


def test_a_permutation_of_the_input_columns_equals_permuting_x_first():
    topology, x, values, dy = small()
    permutation = jnp.asarray(np.random.default_rng(0).permutation(x.shape[-1]))

    def permuted(x, v):
        return block_sparse_matmul(
            x, v, topology, input_permutation=permutation, check=not isinstance(x, jax.core.Tracer)
        )

    def plain(x, v):
        return block_sparse_matmul(x[..., permutation], v, topology)

    np.testing.assert_array_equal(permuted(x, values), plain(x, values))
    gradients = [jax.jit(lambda x, v, f=f: jax.vjp(f, x, v)[1](dy))(x, values) for f in (permuted, plain)]
    jax.tree.map(np.testing.assert_array_equal, *gradients)


@pytest.mark.parametrize("permutation", [jnp.arange(63), jnp.ones((64,)), jnp.zeros((64,), jnp.int32)])
def test_what_is_no_permutation_of_the_input_columns_is_named(permutation):
    topology, x, values, _ = small()
    with pytest.raises(ValueError, match="input_permutation"):
        block_sparse_matmul(x, values, topology, input_permutation=permutation, check=True)
