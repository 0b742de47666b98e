"""The TPU kernels: values in interpret mode, and compiled ahead of time for three TPU generations through libtpu where it is installed."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu, mosaic_tpu_kernel, reference
from pallas_kernels.grouped_matmul.groups import contiguous

SIZES = {
    "ragged": [100, 0, 290, 70],
    "all to one": [0, 0, 512, 0],
    "none": [0, 0, 0, 0],
    "last empty": [300, 212, 0, 0],
}


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(mosaic_tpu_kernel, "INTERPRET", True)


def error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(actual).all()
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)


@pytest.mark.parametrize("name", ["ragged", *(pytest.param(n, marks=pytest.mark.slow) for n in list(SIZES)[1:])])
def test_products_equal_reference(interpreted, name):
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (520, 128)), jax.random.normal(keys[1], (4, 128, 256))
    dy = jax.random.normal(keys[2], (520, 256))
    sizes = jnp.array(SIZES[name])
    past = sum(SIZES[name])
    x, dy = x.at[past:].set(jnp.nan), dy.at[past:].set(jnp.nan)  # rows of no group must not matter
    clean_x, clean_dy = jnp.nan_to_num(x), jnp.nan_to_num(dy)

    @functools.partial(jax.jit, static_argnums=0)
    def values(backend, x, dy):
        y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, backend=backend, precision="highest"), x, w)
        return (y, *vjp(dy))

    for actual, expected in zip(values("mosaic_tpu", x, dy), values("reference", clean_x, clean_dy)):
        assert error(actual, expected) <= 1e-6


@pytest.mark.parametrize("save", [pytest.param(False, marks=pytest.mark.slow), True])
def test_swiglu_equals_reference(interpreted, save):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (260, 128))
    gate, up = (jax.random.normal(k, (4, 128, 128)) for k in keys[1:])
    groups = contiguous(jnp.array([100, 0, 29, 70]))
    options = {"transpose": False, "outs": 3 if save else 1, "precision": "highest"}
    actual = mosaic_tpu_kernel.grouped_product(x, (gate, up), groups, **options)
    for a, e in zip(actual, reference.swiglu(x, gate, up, groups, None, save=save)):
        assert error(a, e) <= 1e-6


@functools.cache
def topology(name):
    """Devices of a TPU that is not there."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(name, platform="tpu").devices


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(
    "name", ["v5e:2x2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("v5p:2x2x1", "v6e:2x2"))]
)
def test_compiles_ahead_of_time(name, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling holds no chip, so it needs no lock on one
    devices = topology(name)
    sharding = jax.sharding.SingleDeviceSharding(devices[0])

    def struct(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def loss(x, gate, up, down, sizes):
        h = grouped_swiglu(x, gate, up, sizes)
        return jnp.sum(grouped_matmul(h, down, sizes).astype(jnp.float32) ** 2)

    args = (
        struct(1024, 512),
        struct(8, 512, 1024),
        struct(8, 512, 1024),
        struct(8, 1024, 512),
        struct(8, dtype=jnp.int32),
    )
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(*args).lower(lowering_platforms=("tpu",))
    text = lowered.compile().as_text()
    assert text.count("tpu_custom_call") == 8  # swiglu, down; dx of down, gate, up; dw of the three
