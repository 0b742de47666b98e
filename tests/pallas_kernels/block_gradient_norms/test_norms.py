"""Block norms of x^T dy: every backend against the dense gradient, slabs against the whole, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backend import jax_version
from pallas_kernels.block_gradient_norms import block_gradient_norms, gradient_slab, slab_square_norms


def problem(k, n, dtype=jnp.float32, leading=(3, 21)):
    keys = jax.random.split(jax.random.key(0), 2)
    return jax.random.normal(keys[0], (*leading, k), dtype), jax.random.normal(keys[1], (*leading, n), dtype)


def dense_norms(x, dy, block_in, block_out):
    x, dy = (np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (x, dy))
    blocks = (x.T @ dy).reshape(x.shape[1] // block_in, block_in, dy.shape[1] // block_out, block_out)
    return (blocks**2).sum((1, 3))


def error(found, wanted):
    return np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize(("block_in", "block_out"), [(16, 16), (32, 64), (128, 128)])
@pytest.mark.parametrize("backend", [None, "xla", "reference"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norms_equal_those_of_the_dense_gradient(block_in, block_out, backend, dtype):
    x, dy = problem(256, 384, dtype)
    found = block_gradient_norms(x, dy, block_in=block_in, block_out=block_out, backend=backend)
    assert found.dtype == jnp.float32
    assert error(found, dense_norms(x, dy, block_in, block_out)) <= 1e-6


def test_experts_and_vmap_keep_members_apart():
    x, dy = problem(32, 48)
    wanted = np.stack([dense_norms(x[e], dy[e], 16, 16) for e in range(3)])
    assert error(block_gradient_norms(x, dy, block_in=16, block_out=16, experts=True), wanted) <= 1e-6
    mapped = jax.vmap(lambda x, dy: block_gradient_norms(x, dy, block_in=16, block_out=16))(x, dy)
    assert error(mapped, wanted) <= 1e-6


def test_slabs_add_up_over_microbatches_where_norms_do_not():
    x, dy = problem(64, 96)
    wanted = dense_norms(x, dy, 32, 16)
    slabs = [
        sum(gradient_slab(x[i], dy[i], first, columns=2, block_out=16) for i in range(3)) for first in range(0, 6, 2)
    ]
    found = np.concatenate([slab_square_norms(slab, block_in=32, block_out=16) for slab in slabs], axis=1)
    assert error(found, wanted) <= 1e-6
    separate = sum(block_gradient_norms(x[i], dy[i], block_in=32, block_out=16) for i in range(3))
    assert error(separate, wanted) > 1e-2


def test_no_tokens_give_zero():
    x, dy = problem(32, 32, leading=(0,))
    assert not np.asarray(block_gradient_norms(x, dy, block_in=16, block_out=16)).any()


@pytest.mark.parametrize(
    ("x_shape", "dy_shape", "block", "message"),
    [
        ((4, 32), (5, 32), 16, "expected equal shapes but for the last"),
        ((4, 32), (4, 40), 16, "features_out=40"),
        ((4, 32), (4, 32), 24, "block_in=24"),
    ],
)
def test_wrong_arguments_are_refused_by_name(x_shape, dy_shape, block, message):
    with pytest.raises(ValueError, match=message):
        block_gradient_norms(jnp.zeros(x_shape), jnp.zeros(dy_shape), block_in=block, block_out=block)


def test_tpu_kernel_in_interpret_mode():
    from pallas_kernels.block_gradient_norms import mosaic_tpu_kernel

    x, dy = problem(256, 384, leading=(1, 93))
    found = mosaic_tpu_kernel.square_norms(x, dy, block_in=128, block_out=128, interpret=True)
    assert error(found[0], dense_norms(x, dy, 128, 128)) <= 1e-6


@pytest.mark.skipif(jax_version() < (0, 11, 0), reason="the GPU interpreter came with JAX 0.11")
def test_hopper_kernel_under_the_interpreter_and_lowered():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.block_gradient_norms import mosaic_gpu

    x, dy = problem(128, 192, jnp.bfloat16, leading=(1, 70))  # an odd number of block columns
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    found = jax.jit(lambda x, dy: mosaic_gpu.square_norms(x, dy, block_in=64, block_out=64, interpret=interpret))(x, dy)
    assert error(found[0], dense_norms(x, dy, 64, 64)) <= 1e-6
    traced = jax.jit(lambda x, dy: block_gradient_norms(x, dy, block_in=64, block_out=64)).trace(x, dy)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
