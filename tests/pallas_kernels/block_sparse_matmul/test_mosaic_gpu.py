"""The Hopper kernels on a CPU: values and races under the interpreter, and lowering for CUDA of every tuned tiling."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backend import jax_version
from pallas_kernels.block_sparse_matmul import block_sparse_matmul, mosaic_gpu, reference, topology_from_mask, tuning
from pallas_kernels.block_sparse_matmul.tuned_tiles import TILES

pytestmark = pytest.mark.skipif(jax_version() < (0, 11, 0), reason="the GPU interpreter came with JAX 0.11")


def problem(block, shape=(3, 4), rows=256, dtype=jnp.bfloat16, experts=1, seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.permuted(np.arange(shape[0] * shape[1]) < 5, axis=None).reshape(shape)
    masks = np.stack([np.roll(mask, e, axis=1) for e in range(experts)])
    topology = topology_from_mask(masks, block, block)
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (experts, rows, shape[0] * block), dtype)
    dy = jax.random.normal(keys[1], (experts, rows, shape[1] * block), dtype)
    return topology, x, jax.random.normal(keys[2], (experts, topology.blocks, block, block), dtype), dy


def error(found, wanted):
    found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.fixture
def interpret():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams(detect_races=True)


def test_forward_with_an_odd_row_count_an_empty_column_and_two_experts(interpret):
    topology, x, values, _ = problem(64, rows=200, experts=2)
    assert (np.diff(np.asarray(topology.column_start)) == 0).any()
    found = jax.jit(lambda *a: mosaic_gpu.product(*a, interpret=interpret))(x, values, topology)
    assert error(found, reference.product(x, values, topology)) <= 1e-6  # the same bf16 rounding of a float32 sum


def test_input_gradient(interpret):
    topology, _, values, dy = problem(64, rows=128)
    found = jax.jit(lambda *a: mosaic_gpu.product_transposed(*a, interpret=interpret))(dy, values, topology)
    assert error(found, reference.product_transposed(dy, values, topology)) <= 1e-6


@pytest.mark.parametrize("split", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_weight_gradient_whole_and_cut(interpret, split):
    from pallas_kernels.block_sparse_matmul.mosaic_gpu_sampled import SampledTile

    topology, x, _, dy = problem(64, rows=130)
    tile = SampledTile(split=split)
    found = jax.jit(lambda *a: mosaic_gpu.sampled_product(*a, interpret=interpret, tile=tile))(x, dy, topology)
    assert error(found, reference.sampled_product(x, dy, topology)) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("fields", [{"swapped": True}, {"rows": 128}, {"swapped": True, "stores": 4}, {"stores": 1}])
def test_every_form_of_the_product_tile(interpret, fields, transposed):
    from pallas_kernels.block_sparse_matmul.mosaic_gpu_product import ProductTile

    tile = ProductTile(stages=3, **fields)
    topology, x, values, dy = problem(128, rows=512)
    run, wanted = (
        (mosaic_gpu.product_transposed, reference.product_transposed)
        if transposed
        else (mosaic_gpu.product, reference.product)
    )
    first = dy if transposed else x
    found = jax.jit(lambda *a: run(*a, interpret=interpret, tile=tile))(first, values, topology)
    # The kernel adds 64 features at a time: a few sums in a thousand round to the other neighbour in bfloat16 (2 ** -8 apart).
    assert error(found, wanted(first, values, topology)) <= 5e-5


@pytest.mark.parametrize("block", [pytest.param(64, marks=pytest.mark.slow), 128])
@pytest.mark.parametrize(
    ("operation", "fields"),
    [(name, fields) for name, entries in TILES[tuning.DEFAULT_KIND].items() for _, fields in entries],
)
def test_every_tuned_tiling_lowers_for_cuda(operation, fields, block):
    from pallas_kernels.block_sparse_matmul.mosaic_gpu_product import ProductTile
    from pallas_kernels.block_sparse_matmul.mosaic_gpu_sampled import SampledTile

    topology, x, values, dy = problem(block, shape=(4, 4), rows=512)
    tile = SampledTile(**fields) if operation == "sampled_product" else ProductTile(**fields)
    if block == 64 and fields.get("swapped"):
        pytest.skip("half of 64 columns is too narrow for a store; tuning never asks for it")
    arguments = {"product": (x, values), "product_transposed": (dy, values), "sampled_product": (x, dy)}[operation]
    run = jax.jit(lambda a, b, t: getattr(mosaic_gpu, operation)(a, b, t, tile=tile))
    assert "mosaic_gpu" in run.trace(*arguments, topology).lower(lowering_platforms=("cuda",)).as_text()


def test_the_public_function_chooses_the_kernel_when_lowered_for_cuda_and_xla_for_cpu():
    topology, x, values, _ = problem(64)
    one = jax.tree.map(lambda a: a[0], topology)
    traced = jax.jit(jax.grad(lambda x, v: block_sparse_matmul(x, v, one).sum().astype(jnp.float32), (0, 1))).trace(
        x[0], values[0]
    )
    assert "block_product_transposed" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize(
    ("shapes", "dtype", "kind", "reason"),
    [
        ((1, 4, 32, 32), jnp.bfloat16, "NVIDIA H100 80GB HBM3", "takes blocks of"),
        ((1, 4, 128, 64), jnp.bfloat16, None, "square blocks"),
        ((1, 4, 128, 128), jnp.float32, None, "takes bfloat16 or float16"),
        ((1, 4, 128, 128), jnp.bfloat16, "NVIDIA A100-SXM4-80GB", "needs a Hopper GPU"),
    ],
)
def test_what_the_kernels_do_not_support_has_a_reason(shapes, dtype, kind, reason):
    assert reason in mosaic_gpu.supports({"values": shapes}, {"values": dtype}, kind)


def test_an_unknown_device_gets_the_default_tilings_and_says_so_once(monkeypatch):
    monkeypatch.setattr(tuning, "device_kind", lambda platform: "NVIDIA H999")
    monkeypatch.setattr(tuning, "_said", set())
    with pytest.warns(UserWarning, match="no tilings for 'NVIDIA H999'"):
        first = tuning.tuned("product", 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a second warning would be raised
        assert tuning.tuned("product", 4) == first


def test_a_slab_of_wide_inputs_has_fewer_rows():
    """Slabs of 4 tiles of 256 rows hold 16 MiB of 8192 features in 16 bits; of 16384 features they would hold 32 MiB."""
    mask = np.zeros((64, 128), bool)
    mask[:16] = True  # 16 blocks of 128 a column: 32 steps of 64
    wide = topology_from_mask(mask, 128, 128)
    assert [tuning.product_tile(4096, wide, transposed).width for transposed in (False, True)] == [4, 2]


@pytest.mark.gpu
def test_on_the_device_values_equal_the_bf16_dense_products():
    topology, x, values, dy = problem(128, shape=(8, 16), rows=1000)
    for name, first, second in (("product", x, values), ("product_transposed", dy, values), ("sampled_product", x, dy)):
        jax.block_until_ready(jnp.full((4096, 4096), jnp.nan))  # poisons memory that the output may reuse
        found = jax.jit(getattr(mosaic_gpu, name))(first, second, topology)
        assert error(found, getattr(reference, name)(first, second, topology)) <= 2.5e-3
