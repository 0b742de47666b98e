"""The Triton kernels: who gets them, and values on a GPU. They need jax-triton, which imports only where JAX has its CUDA plugin."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import triton_call
from pallas_kernels.block_sparse_matmul import block_sparse_matmul, topology_from_mask
from pallas_kernels.block_sparse_matmul import triton as block_sparse
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul import triton as grouped

installed = pytest.mark.skipif(triton_call.unavailable() is not None, reason=str(triton_call.unavailable()))
TOLERANCE = {"float32": 1e-6, "bfloat16": 2.5e-3, "float16": 1e-3}


def test_without_jax_triton_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(triton_call, "unavailable", lambda: "needs jax-triton and triton")
    arguments = {"values": (1, 4, 64, 64), "x": (8, 256)}, {"values": jnp.bfloat16, "x": jnp.bfloat16}, "NVIDIA A10G"
    for supports in (block_sparse.supports, grouped.supports):
        assert "jax-triton" in supports(*arguments)


def test_versions_that_do_not_fit_each_other_have_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", types.SimpleNamespace(__version__="0.4.1"))
    for triton_version, fits in (("3.6.0", False), ("3.7.1", True)):
        monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=triton_version))
        reason = triton_call.unavailable.__wrapped__()
        assert reason is None if fits else "needs triton 3.7" in reason


@pytest.mark.parametrize(
    ("block", "dtype", "reason"),
    [((64, 256), jnp.bfloat16, "blocks of"), ((64, 64), jnp.float64, "float64"), ((16, 128), jnp.float32, None)],
)
def test_what_the_kernels_take(monkeypatch, block, dtype, reason):
    monkeypatch.setattr(triton_call, "unavailable", lambda: None)
    found = block_sparse.supports({"values": (1, 4, *block)}, {"values": dtype}, "NVIDIA A10G")
    assert found is None if reason is None else reason in found


def test_exact_float32_is_the_default_and_tf32_only_by_name():
    assert triton_call.dot_precision(jnp.float32, None) == "ieee"
    assert triton_call.dot_precision(jnp.float32, jax.lax.Precision.HIGH) == "tf32x3"
    assert triton_call.dot_precision(jnp.float32, jax.lax.Precision.DEFAULT) == "tf32"
    assert triton_call.dot_precision(jnp.bfloat16, jax.lax.Precision.HIGH) == "ieee"


def test_float8_is_read_by_an_instruction_where_there_is_one(monkeypatch):
    for capability, converts in (("8.0", False), ("8.9", True), ("9.0", True), ("10.0", True)):
        device = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda kind, device=device: [device])
        assert triton_call.converts_float8.__wrapped__() is converts

    def without(kind):
        raise RuntimeError("no such platform")

    monkeypatch.setattr(jax, "devices", without)
    assert triton_call.converts_float8.__wrapped__() is False


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.isfinite(a).all()
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)


@installed
@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "block"), [("bfloat16", 128), ("float16", 32), ("float32", 16), ("bfloat16", 64)])
def test_block_sparse_products_on_the_device(dtype, block):
    rng = np.random.default_rng(0)
    mask = rng.random((6, 8)) < 0.4
    mask[:, 3] = False
    topology = topology_from_mask(mask, block, block)
    x, dy = (jnp.asarray(rng.standard_normal((333, n * block)), dtype) for n in (6, 8))
    values = jnp.asarray(rng.standard_normal((topology.blocks, block, block)), dtype)

    def step(x, values, dy, backend):
        y, vjp = jax.vjp(lambda x, v: block_sparse_matmul(x, v, topology, backend=backend), x, values)
        return y, *vjp(dy)

    step = jax.jit(step, static_argnums=3)
    for found, wanted in zip(step(x, values, dy, "triton"), step(x, values, dy, "reference"), strict=True):
        assert error(found, wanted) <= TOLERANCE[dtype]


@installed
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_grouped_products_on_the_device(dtype):
    rng = np.random.default_rng(0)
    x, w, up = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((500, 200), (6, 200, 136), (6, 200, 136)))
    sizes = jnp.array([100, 0, 333, 7, 60, 100])
    index = {"row_index_A": jnp.asarray(rng.integers(0, 500, 700))}
    scatter = {"output_index_A": jnp.asarray(rng.permutation(700)), "output_rows": 703}
    cotangents = (jnp.asarray(rng.standard_normal((n, 136)), dtype) for n in (703, 700))
    dy, dh = cotangents

    def step(x, w, up, backend):
        options = {"backend": backend, "precision": "highest", **index}
        y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, **scatter, **options), x, w)
        h, vjp_h = jax.vjp(lambda x, w, up: grouped_swiglu(x, w, up, sizes, **options), x, w, up)
        return y, *vjp(dy), h, *vjp_h(dh)

    step = jax.jit(step, static_argnums=3)
    for found, wanted in zip(step(x, w, up, "triton"), step(x, w, up, "reference"), strict=True):
        assert error(found, wanted) <= 2 * TOLERANCE[dtype]  # gradients pass through one more rounding
