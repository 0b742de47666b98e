"""Hopper kernels compiled to machine code for an H100 that need not be there, by XLA in JAX's CUDA plugin."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backend import assume_device_kind
from pallas_kernels.block_gradient_norms import block_gradient_norms
from pallas_kernels.block_sparse_matmul import block_sparse_matmul, topology_from_mask
from pallas_kernels.grouped_matmul import grouped_feed_forward, grouped_matmul
from sparse_lm.parallel.topology import topology

pytestmark = pytest.mark.slow
BF16, INT = jnp.bfloat16, jnp.int32


@functools.cache
def h100() -> jax.sharding.SingleDeviceSharding:
    pytest.importorskip("jax_cuda13_plugin")
    if jax.config.jax_platforms != "cpu":
        pytest.skip("needs JAX_PLATFORMS=cpu")
    return jax.sharding.SingleDeviceSharding(topology("h100:1").attach()[0])


def kernels_of(function, *shapes) -> int:
    """How many Mosaic kernels the program of `function` and its gradient has."""
    like = [jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=h100()), shape) for shape in shapes]
    floats = tuple(i for i, shape in enumerate(like) if getattr(shape, "dtype", None) == BF16)

    def summed(*arguments):
        return sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(function(*arguments)))

    with assume_device_kind("cuda", "NVIDIA H100 80GB HBM3"):
        compiled = jax.jit(jax.value_and_grad(summed, floats)).lower(*like).compile()
    return compiled.as_text().count('custom_call_target="mosaic_gpu')


def shape(*dims, dtype=BF16):
    return jax.ShapeDtypeStruct(dims, dtype)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("every", [2, 32])
def test_block_sparse_products(block, every) -> None:
    """Few and many steps a tile, which have tilings of their own."""
    mask = np.arange(64)[:, None] % every == np.arange(8) % every
    pattern = topology_from_mask(mask, block, block)
    x, values = shape(1024, 64 * block), shape(int(mask.sum()), block, block)
    assert kernels_of(block_sparse_matmul, x, values, pattern) >= 3


def test_block_gradient_norms() -> None:
    norms = functools.partial(block_gradient_norms, block_in=128, block_out=128)
    like = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=h100()) for a in (shape(1024, 512), shape(1024, 256))]
    with assume_device_kind("cuda", "NVIDIA H100 80GB HBM3"):
        assert 'custom_call_target="mosaic_gpu' in jax.jit(norms).lower(*like).compile().as_text()


def test_grouped_products() -> None:
    # forward, dx and dw
    assert kernels_of(grouped_matmul, shape(1024, 512), shape(8, 512, 256), shape(8, dtype=INT)) == 3


def test_the_routed_feed_forward() -> None:
    """Rows gathered and scattered by threads of the kernels, which is inlined code."""
    tokens, experts, chosen = 512, 8, 2
    rows = tokens * chosen
    arguments = (
        shape(tokens, 256),
        *(shape(experts, 256, 128), shape(experts, 256, 128), shape(experts, 128, 256)),
        shape(experts, dtype=INT),
        shape(rows, dtype=INT),
        shape(tokens, chosen, dtype=INT),
        shape(tokens, chosen, dtype=jnp.float32),
    )
    assert kernels_of(grouped_feed_forward, *arguments) >= 5
