"""The grouped matmul under vmap, jit, remat, scan, shard_map and donation; what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels import backend_report
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu

SLOW = pytest.mark.slow
OPTIONS = {"precision": "highest"}


def problem(members=3, rows=70, experts=4, k=8, n=12):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (members, rows, k))
    w = jax.random.normal(keys[1], (members, experts, k, n))
    sizes = jnp.array([[10, 0, 25, 30], [0, 0, 0, 70], [1, 2, 3, 4]])[:members]
    return x, w, sizes


def loss(x, w, sizes, backend=None, **index):
    return jnp.sum(jnp.sin(grouped_matmul(x, w, sizes, backend=backend, **index, **OPTIONS)))


@functools.cache
def by_loop(f):
    """Value and gradients of one member by the reference."""
    return jax.jit(jax.value_and_grad(functools.partial(f, backend="reference"), argnums=(0, 1)))


@pytest.mark.parametrize(
    "axes",
    [
        (0, 0, 0),
        (None, 0, 0),
        *(pytest.param(axes, marks=SLOW) for axes in ((0, None, 0), (None, None, 0), (0, 0, None), (0, None, None))),
    ],
)
def test_vmap_equals_loop(axes):
    args = problem()
    args = tuple(a if axis == 0 else a[0] for a, axis in zip(args, axes))
    actual = jax.jit(jax.vmap(jax.value_and_grad(loss, argnums=(0, 1)), axes))(*args)
    members = [by_loop(loss)(*(a[p] if axis == 0 else a for a, axis in zip(args, axes))) for p in range(3)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), actual, expected)


@pytest.mark.parametrize("batched_index", [pytest.param(False, marks=SLOW), True])
@pytest.mark.parametrize("batched_x", [False, pytest.param(True, marks=SLOW)])
def test_vmap_with_gather_and_scatter(batched_index, batched_x):
    x, w, sizes = problem()
    rng = np.random.default_rng(0)
    token = jnp.array(rng.integers(0, 70, (3, 90)))
    target = jnp.array(np.stack([rng.permutation(90) for _ in range(3)]))
    if not batched_index:
        token, target = token[0], target[0]
    x = x if batched_x else x[0]

    def f(x, w, sizes, token, target, backend=None):
        return loss(x, w, sizes, backend, row_index_A=token, output_index_A=target, output_rows=95)

    axes = (0 if batched_x else None, 0, 0) + ((0,) * 2 if batched_index else (None,) * 2)
    args = (x, w, sizes, token, target)
    actual = jax.jit(jax.vmap(jax.value_and_grad(f, argnums=(0, 1)), axes))(*args)
    members = [by_loop(f)(*(a[p] if axis == 0 else a for a, axis in zip(args, axes))) for p in range(3)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), actual, expected)


@pytest.mark.slow
def test_vmap_of_swiglu_with_one_shared_weight():
    x, gate, sizes = problem()
    up = gate[0] + 1

    def f(x, gate, up, sizes, backend=None):
        return jnp.sum(jnp.sin(grouped_swiglu(x, gate, up, sizes, backend=backend, **OPTIONS)))

    grad = jax.grad(f, argnums=(0, 1, 2))
    actual = jax.vmap(grad, (0, 0, None, 0))(x, gate, up, sizes)
    expected = jax.tree.map(
        lambda *a: jnp.stack(a), *[grad(x[p], gate[p], up, sizes[p], "reference") for p in range(3)]
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), actual, expected)


def test_remat_and_scan_change_nothing():
    x, w, sizes = (a[0] for a in problem(n=8))

    def stack(w, step):
        y, _ = jax.lax.scan(lambda h, _: (step(h, w), None), x, None, length=2)
        return jnp.sum(jnp.sin(y))

    def plain(h, w):
        return grouped_matmul(h, w, sizes, **OPTIONS)

    assert np.array_equal(
        *(jax.jit(jax.grad(functools.partial(stack, step=f)))(w) for f in (plain, jax.checkpoint(plain)))
    )


def test_same_bits_twice_and_under_donation():
    x, w, sizes = (a[0] for a in problem())
    f = jax.jit(jax.grad(loss, argnums=(0, 1)))
    first, second = f(x, w, sizes), f(x, w, sizes)
    donated = jax.jit(jax.grad(loss, argnums=(0, 1)), donate_argnums=0)(x + 0, w, sizes)
    for other in (second, donated):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), first, other)


def test_shard_map():
    x, w, sizes = (a[0] for a in problem())
    mesh = Mesh(np.array(jax.devices()[:1]), ("expert",))
    f = jax.shard_map(
        lambda x, w, s: grouped_matmul(x, w, s, **OPTIONS),
        mesh=mesh,
        in_specs=(P(), P("expert"), P("expert")),
        out_specs=P(),
        check_vma=False,
    )
    grads = jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(f(x, w, sizes))), argnums=(0, 1)))(x, w)
    expected = by_loop(loss)(x, w, sizes)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), grads, expected)


def test_group_sizes_have_no_gradient():
    x, w, sizes = (a[0] for a in problem())
    _, vjp = jax.vjp(lambda s: grouped_matmul(x, w, s), sizes)
    assert vjp(jnp.ones((70, 12)))[0].dtype == jax.dtypes.float0


@pytest.mark.parametrize(
    "change, name",
    [
        ({"x_RK": jnp.ones((4, 8, 2))}, "x_RK"),
        ({"x_RK": jnp.ones((70, 8), jnp.int32)}, "x_RK"),
        ({"w_EKN": jnp.ones((4, 9, 12))}, "w_EKN"),
        ({"w_EKN": jnp.ones((4, 8, 12), jnp.bfloat16)}, "w_EKN"),
        ({"group_sizes_E": jnp.ones((3,), jnp.int32)}, "group_sizes_E"),
        ({"group_sizes_E": jnp.ones((4,))}, "group_sizes_E"),
        ({"row_index_A": jnp.ones((4, 2), jnp.int32)}, "row_index_A"),
        ({"inverse_TS": jnp.ones((70, 2), jnp.int32)}, "inverse_TS"),
        ({"output_index_A": jnp.ones((3,), jnp.int32)}, "output_index_A"),
        ({"output_rows": 3}, "output_rows"),
        ({"backend": "fast"}, "backend"),
    ],
)
def test_mistakes_are_named(change, name):
    x, w, sizes = (a[0] for a in problem())
    with pytest.raises(ValueError, match=name):
        grouped_matmul(**{"x_RK": x, "w_EKN": w, "group_sizes_E": sizes, **change})


@pytest.mark.parametrize("sizes", [[10, 20, 30, 11], [10, -1, 3, 4]])
def test_check_mode(sizes):
    x, w, _ = (a[0] for a in problem())
    with pytest.raises(ValueError, match="group_sizes_E"):
        grouped_matmul(x, w, jnp.array(sizes), check=True)
    checked = checkify.checkify(jax.jit(lambda s: grouped_matmul(x, w, s, check=True)))
    with pytest.raises(Exception, match="group_sizes_E"):
        checked(jnp.array(sizes))[0].throw()
    checked(jnp.array([1, 2, 3, 4]))[0].throw()


def test_choice_is_recorded():
    x, w, sizes = (a[0] for a in problem())
    grouped_matmul(x, w, sizes)
    assert "grouped_product" in backend_report("other")
