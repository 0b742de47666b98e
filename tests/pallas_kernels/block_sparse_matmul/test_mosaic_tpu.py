"""The TPU kernels on a CPU: values in interpret mode, and compilation ahead of time through libtpu."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse_matmul import (
    block_sparse_matmul,
    mosaic_tpu,
    mosaic_tpu_kernel,
    reference,
    topology_from_mask,
)


def problem(dtype, rows=40, experts=2):
    mask = np.zeros((3, 4), bool)
    mask[[0, 1, 2, 0, 2], [0, 0, 2, 3, 3]] = True  # column 1 is empty
    topology = topology_from_mask(np.stack([np.roll(mask, e, axis=0) for e in range(experts)]), 128, 128)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (experts, rows, 384), dtype)
    dy = jax.random.normal(keys[1], (experts, rows, 512), dtype)
    return topology, x, jax.random.normal(keys[2], (experts, 5, 128, 128), dtype), dy


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-6), pytest.param(jnp.bfloat16, 2.5e-3, marks=pytest.mark.slow)]
)
def test_values_in_interpret_mode(dtype, tolerance):
    topology, x, values, dy = problem(dtype)
    for name, first, second in (("product", x, values), ("product_transposed", dy, values), ("sampled_product", x, dy)):
        found = np.asarray(getattr(mosaic_tpu_kernel, name)(first, second, topology, interpret=True), np.float32)
        wanted = np.asarray(getattr(reference, name)(first, second, topology), np.float32)
        assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted), name


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_compiles_ahead_of_time(name, dtype, monkeypatch):
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask about itself
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compilers of several test processes do not meet on a chip
    device = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    topology, x, values, _ = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), problem(dtype, rows=300)
    )
    step = jax.jit(lambda x, v, t: jax.grad(lambda x, v: block_sparse_matmul(x, v, t).sum(), (0, 1))(x, v))
    compiled = step.trace(x, values, topology).lower().compile()
    assert compiled.as_text().count("tpu_custom_call") == 2  # dx and dvalues; the sum needs no forward product


@pytest.mark.parametrize(
    ("values", "dtype", "reason"),
    [
        ((1, 4, 64, 64), jnp.bfloat16, "multiples of 128"),
        ((1, 4, 128, 128), jnp.float16, "bfloat16 or float32"),
        ((1, 1 << 20, 128, 128), jnp.bfloat16, "scalar memory"),
    ],
)
def test_what_the_kernels_do_not_support_has_a_reason(values, dtype, reason):
    assert reason in mosaic_tpu.supports({"values": values}, {"values": dtype}, "TPU v5e")
