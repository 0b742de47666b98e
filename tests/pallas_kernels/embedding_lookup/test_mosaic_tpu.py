"""The TPU lookup: values in interpret mode, and compiled ahead of time for three TPU generations through libtpu where it is installed."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.embedding_lookup import embedding_lookup, mosaic_tpu, mosaic_tpu_kernel


def test_rows_and_zeros_outside_the_table(monkeypatch):
    """40 addresses are two programs and a half of 16, with 4 copies in flight."""
    for name, value in (("INTERPRET", True), ("TAKEN", 16), ("FLIGHT", 4)):
        monkeypatch.setattr(mosaic_tpu_kernel, name, value)
    draw = np.random.default_rng(0)
    table = jnp.asarray(draw.standard_normal((50, 128)), jnp.float32)
    address = jnp.asarray(draw.integers(-5, 55, 40), jnp.int32).at[:3].set(jnp.array([-(2**31), 2**31 - 1, 49]))
    found, expected = (embedding_lookup(table, address, backend=name) for name in ("mosaic_tpu", "reference"))
    assert (found == expected).all() and 1 < int((expected == 0).all(1).sum()) < 20


def test_what_is_not_taken_is_named():
    def reason(width, dtype):
        return mosaic_tpu.supports({"table": (9, width)}, {"table": jnp.dtype(dtype)}, None)

    assert reason(256, jnp.float32) is None
    assert "multiple of 128 numbers, not 64" in reason(64, jnp.float32)
    assert "takes float32, not bfloat16" in reason(128, jnp.bfloat16)


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
    """Without a copy of the table: 0.5 GB would be temporary memory."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling holds no chip, so it needs no lock on one
    sharding = jax.sharding.SingleDeviceSharding(topology(name)[0])
    table = jax.ShapeDtypeStruct((1_000_192, 128), jnp.float32, sharding=sharding)
    address = jax.ShapeDtypeStruct((50_000,), jnp.int32, sharding=sharding)
    lookup = jax.jit(functools.partial(embedding_lookup, backend="mosaic_tpu"))
    compiled = lookup.trace(table, address).lower(lowering_platforms=("tpu",)).compile()
    assert compiled.as_text().count("tpu_custom_call") == 1
    assert compiled.memory_analysis().temp_size_in_bytes < 100e6
