"""Every fast path of the grouped products equals masked dense products in float32, gradients included."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu

SLOW = pytest.mark.slow
TOLERANCE = {"float32": 1e-6, "bfloat16": 2.5e-3, "float16": 1e-3}
XLA = {"backend": "xla", "precision": "highest"}


def error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)


def oracle(x, w, sizes):
    """Float64 loop over experts: independent of the library's own reference."""
    x, w, y, start = np.asarray(x, np.float64), np.asarray(w, np.float64), np.zeros((x.shape[0], w.shape[2])), 0
    for e, size in enumerate(np.asarray(sizes)):
        y[start : start + size] = x[start : start + size] @ w[e]
        start += size
    return y


def inputs(seed, rows, experts, k, n, dtype="float32"):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((rows, k), (experts, k, n), (rows, n))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]


@functools.partial(jax.jit, static_argnames=("op_options",))
def value_and_grads(x, w, sizes, dy, op_options):
    y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, **dict(op_options)), x, w)
    return (y, *vjp(dy))


def both(x, w, sizes, dy, **options):
    actual = value_and_grads(x, w, sizes, dy, tuple(options.items()))
    expected = value_and_grads(
        *(a.astype(jnp.float32) for a in (x, w)), sizes, dy.astype(jnp.float32), (("backend", "reference"),)
    )
    return list(zip(actual, expected))


SIZES = {
    "even": [40, 40, 40, 40],
    "zero groups": [0, 100, 0, 60],
    "all to the first": [160, 0, 0, 0],
    "all to the last": [0, 0, 0, 160],
    "fewer than rows": [3, 50, 1, 70],
    "none": [0, 0, 0, 0],
    "odd": [1, 129, 7, 23],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float16", marks=SLOW)])
@pytest.mark.parametrize("name", list(SIZES))
def test_xla_equals_reference(name, dtype):
    x, w, dy = inputs(0, 160, 4, 24, 40, dtype)
    sizes = jnp.array(SIZES[name])
    for actual, expected in both(x, w, sizes, dy, **XLA):
        assert error(actual, expected) <= TOLERANCE[dtype]


def test_reference_equals_loop_in_float64():
    x, w, _ = inputs(1, 160, 4, 24, 40)
    for sizes in SIZES.values():
        assert error(grouped_matmul(x, w, jnp.array(sizes), backend="reference"), oracle(x, w, sizes)) <= 1e-6


def test_rows_past_the_sum_are_zero_even_when_their_inputs_are_not_finite():
    x, w, dy = inputs(2, 50, 3, 8, 16)
    sizes = jnp.array([10, 0, 21])
    x, dy = x.at[31:].set(jnp.nan), dy.at[31:].set(jnp.inf)
    y, dx, dw = value_and_grads(x, w, sizes, dy, tuple(XLA.items()))
    assert not np.asarray(y[31:]).any() and not np.asarray(dx[31:]).any()
    assert np.isfinite(y).all() and np.isfinite(dx).all() and np.isfinite(dw).all()


def test_zero_rows():
    x, w, dy = inputs(3, 0, 3, 8, 16)
    y, dx, dw = value_and_grads(x, w, jnp.zeros(3, jnp.int32), dy, tuple(XLA.items()))
    assert y.shape == (0, 16) and dx.shape == (0, 8) and not np.asarray(dw).any()


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_sizes(data):
    rows = data.draw(st.sampled_from([1, 33, 130]))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), min_size=3, max_size=3)))
    sizes = jnp.array(np.diff([0, *cuts]))
    x, w, dy = inputs(rows, rows, 3, 16, 8)
    for actual, expected in both(x, w, sizes, dy, **XLA):
        assert error(actual, expected) <= 1e-6


def routed(seed, tokens, experts, k):
    """A top-k routing: sorted rows, the token of each, the place of each token's assignments."""
    rng = np.random.default_rng(seed)
    expert = np.stack([rng.permutation(experts)[:k] for _ in range(tokens)]).reshape(-1)
    order = np.argsort(expert, kind="stable")
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    sizes = np.bincount(expert, minlength=experts)
    return jnp.array(sizes), jnp.array(order // k), jnp.array(inverse.reshape(tokens, k)), jnp.array(order)


@pytest.mark.parametrize("with_inverse", [pytest.param(False, marks=SLOW), True])
def test_gather_equals_gather_before(with_inverse):
    sizes, token, inverse, _ = routed(0, 60, 4, 2)
    sizes = sizes.at[3].add(-5)  # the last five rows are dropped
    x, w, _ = inputs(4, 60, 4, 16, 24)
    dy = jax.random.normal(jax.random.key(9), (120, 24))
    places = inverse if with_inverse else None

    @jax.jit
    def fused(x, w):
        return grouped_matmul(x, w, sizes, row_index_A=token, inverse_TS=places, **XLA)

    @jax.jit
    def plain(x, w):
        return grouped_matmul(x[token], w, sizes, backend="reference")

    (y, vjp), (expected, expected_vjp) = jax.vjp(fused, x, w), jax.vjp(plain, x, w)
    assert error(y, expected) <= 1e-6
    for actual, wanted in zip(vjp(dy), expected_vjp(dy)):
        assert error(actual, wanted) <= 1e-6


@pytest.mark.parametrize("backend", ["xla", pytest.param("reference", marks=SLOW)])
def test_scatter_equals_scatter_after(backend):
    sizes, token, _, order = routed(1, 60, 4, 2)
    sizes = sizes.at[3].add(-5)
    x, w, _ = inputs(5, 60, 4, 16, 24)
    dy = jax.random.normal(jax.random.key(9), (130, 24))
    options = {
        "row_index_A": token,
        "output_index_A": order,
        "output_rows": 130,
        "backend": backend,
        "precision": "highest",
    }
    kept = (jnp.arange(120) < sizes.sum())[:, None]

    def plain(x, w):
        y = jnp.where(kept, grouped_matmul(x[token], w, sizes, backend="reference"), 0)
        return jnp.zeros((130, 24)).at[order].set(y)

    (y, vjp), (expected, expected_vjp) = (
        jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, **options), x, w),
        jax.vjp(plain, x, w),
    )
    assert error(y, expected) <= 1e-6
    for actual, wanted in zip(vjp(dy), expected_vjp(dy)):
        assert error(actual, wanted) <= 1e-6


@pytest.mark.parametrize(
    "backend, dtype",
    [
        ("xla", "float32"),
        *(
            pytest.param(*c, marks=SLOW)
            for c in (("xla", "bfloat16"), ("reference", "float32"), ("reference", "bfloat16"))
        ),
    ],
)
def test_swiglu_equals_two_products(backend, dtype):
    sizes, token, inverse, _ = routed(2, 60, 4, 2)
    x, gate, _ = inputs(6, 60, 4, 16, 24, dtype)
    up = jax.random.normal(jax.random.key(7), gate.shape, dtype)
    dh = jax.random.normal(jax.random.key(8), (120, 24), dtype)
    index = {"row_index_A": token, "inverse_TS": inverse}

    def plain(x, gate, up):
        products = [grouped_matmul(x, w, sizes, **index, backend="reference") for w in (gate, up)]
        return jax.nn.silu(products[0]) * products[1]

    @jax.jit
    def fused(*weights):
        return grouped_swiglu(*weights, sizes, **index, backend=backend, precision="highest")

    h, vjp = jax.vjp(fused, x, gate, up)
    expected, expected_vjp = jax.vjp(plain, *(a.astype(jnp.float32) for a in (x, gate, up)))
    assert error(h, expected) <= TOLERANCE[dtype]
    assert error(fused(x, gate, up), expected) <= TOLERANCE[dtype]
    # In bf16 the chain rounds several times, fused or not: the fused one may not be worse than the same chain of plain bf16 products.
    _, bf16_vjp = jax.vjp(plain, x, gate, up)
    for actual, wanted, chain in zip(vjp(dh), expected_vjp(dh.astype(jnp.float32)), bf16_vjp(dh)):
        assert error(actual, wanted) <= (1e-6 if dtype == "float32" else max(2.5e-3, error(chain, wanted)))
