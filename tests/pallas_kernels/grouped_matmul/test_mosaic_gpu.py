"""The Hopper kernels without a GPU: values and races in the interpreter on tiny shapes, and lowering for CUDA at the tile sizes in use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backend import jax_version
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu, mosaic_gpu, reference
from pallas_kernels.grouped_matmul.groups import contiguous

pytestmark = pytest.mark.skipif(
    jax_version() < (0, 11, 0), reason="the GPU interpreter and these kernels need JAX 0.11"
)

RAGGED = [100, 0, 93, 51]  # of 256 rows: odd starts, an empty group, rows of no group


def error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(actual).all()
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)


def interpreter():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams(detect_races=True)


def inputs(rows=256, inner=128, outer=256):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (rows, inner), (4, inner, outer), (rows, outer)
    return [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes)]


def run_product(capfd, weights, x, sizes, **options):
    from pallas_kernels.grouped_matmul.mosaic_gpu_product import ProductTiles, grouped_product

    tiles = ProductTiles(**options.pop("tiles"))
    out = grouped_product(
        (x,), weights, contiguous(jnp.array(sizes)), tiles=tiles, ctas=2, interpret=interpreter(), **options
    )
    out = [np.asarray(o, np.float32) for o in out]
    assert "RACE" not in "".join(capfd.readouterr())
    return out


@pytest.mark.parametrize(
    "transpose, sizes, tiles",
    [
        pytest.param(False, RAGGED, {"bm": 128, "bn": 256, "slots": 2}, marks=pytest.mark.slow),
        pytest.param(True, RAGGED, {"bm": 128, "bn": 128, "slots": 3, "minor": 1, "width": 1}, marks=pytest.mark.slow),
        pytest.param(False, [0, 0, 256, 0], {"bm": 256, "bn": 128, "slots": 2}, marks=pytest.mark.slow),
        pytest.param(False, [0, 0, 0, 0], {"bm": 128, "bn": 256, "slots": 2}, marks=pytest.mark.slow),
    ],
)
def test_product(capfd, transpose, sizes, tiles):
    x, w, dy = inputs()
    x = (dy if transpose else x).at[sum(sizes) :].set(jnp.nan)
    (y,) = run_product(capfd, (w,), x, sizes, tiles=tiles, transpose=transpose)
    groups = contiguous(jnp.array(sizes))
    expected = reference.product(jnp.nan_to_num(x), w, groups, None, None, transpose=transpose, output_rows=256)
    assert error(y, expected) <= 2.5e-3
    assert not y[sum(sizes) :].any()


@pytest.mark.slow
@pytest.mark.parametrize("save", [False, True])
def test_swiglu(capfd, save):
    x, gate, _ = inputs()
    up = jax.random.normal(jax.random.key(5), gate.shape, gate.dtype)
    actual = run_product(capfd, (gate, up), x, RAGGED, tiles={"bm": 128, "bn": 128, "slots": 2}, save=save)
    for a, e in zip(actual, reference.swiglu(x, gate, up, contiguous(jnp.array(RAGGED)), None, save=save), strict=True):
        assert error(a, e) <= 2.5e-3


@pytest.mark.parametrize(
    "sizes, tiles",
    [
        (RAGGED, {"bm": 128, "bn": 256, "slots": 2}),
        pytest.param([65, 64, 0, 71], {"bm": 128, "bn": 128, "slots": 3}, marks=pytest.mark.slow),
        pytest.param([0, 253, 0, 0], {"bm": 128, "bn": 128, "bk": 32, "slots": 2, "life": 2}, marks=pytest.mark.slow),
    ],
)
def test_weight_gradient(capfd, sizes, tiles):
    from pallas_kernels.grouped_matmul.mosaic_gpu_weight import WeightTiles, grouped_weight_gradient

    x, _, dy = inputs()
    x, dy = (a.at[sum(sizes) :].set(jnp.nan) for a in (x, dy))
    groups = contiguous(jnp.array(sizes))
    options = {"tiles": WeightTiles(**tiles), "ctas": 2, "interpret": interpreter()}
    dw = np.asarray(grouped_weight_gradient(x, dy, groups, **options), np.float32)
    assert "RACE" not in "".join(capfd.readouterr())
    assert error(dw, reference.weight_gradient(jnp.nan_to_num(x), jnp.nan_to_num(dy), groups, None, None)) <= 2.5e-3


def gathered(count, stored=80):
    """An index of `count` places into `stored` rows, garbage at the last, which no group owns."""
    index = jax.random.randint(jax.random.key(9), (count,), 0, stored)
    return index.at[sum(RAGGED) :].set(jnp.resize(jnp.array([-3, 10**9]), (count - sum(RAGGED),)))


@pytest.mark.slow
def test_rows_by_index(capfd):
    """The same bits as on a sorted copy."""
    from pallas_kernels.grouped_matmul.mosaic_gpu_product import ProductTiles, grouped_product

    x, w, _ = inputs()
    index, groups = gathered(256), contiguous(jnp.array(RAGGED))
    options = {"tiles": ProductTiles(bm=128, bn=128, slots=2), "ctas": 2, "interpret": interpreter()}
    (y,) = grouped_product((x[:80],), (w,), groups, index, **options)
    (expected,) = grouped_product((jnp.take(x[:80], index, axis=0, mode="clip"),), (w,), groups, **options)
    assert "RACE" not in "".join(capfd.readouterr())
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(expected, np.float32))


@pytest.mark.slow
def test_output_by_index(capfd):
    """Rows go where the index says, over memory that is zero elsewhere; two of them go nowhere."""
    from pallas_kernels.grouped_matmul.mosaic_gpu_product import ProductTiles, grouped_product

    x, w, _ = inputs()
    index, groups = jax.random.permutation(jax.random.key(9), 300)[:256], contiguous(jnp.array(RAGGED))
    index = index.at[0].set(-1).at[150].set(300)
    options = {"tiles": ProductTiles(bm=128, bn=128, slots=2), "ctas": 2, "interpret": interpreter()}
    (y,) = grouped_product((x,), (w,), groups, None, index, output_rows=300, **options)
    (sorted_y,) = grouped_product((x,), (w,), groups, **options)
    assert "RACE" not in "".join(capfd.readouterr())
    expected = np.zeros((300, 256), np.float32)
    for a in range(sum(RAGGED)):
        if 0 <= index[a] < 300:
            expected[index[a]] = sorted_y[a]
    np.testing.assert_array_equal(np.asarray(y, np.float32), expected)


@pytest.mark.slow
@pytest.mark.parametrize("of_x, of_dy", [(True, False), (False, True), (True, True)])
def test_weight_gradient_of_rows_by_index(capfd, of_x, of_dy):
    from pallas_kernels.grouped_matmul.mosaic_gpu_weight import WeightTiles, grouped_weight_gradient

    x, _, dy = inputs()
    index, groups = gathered(256), contiguous(jnp.array(RAGGED))
    options = {"tiles": WeightTiles(bm=128, bn=128, slots=3), "ctas": 2, "interpret": interpreter()}
    x, x_index, sorted_x = (x[:80], index, jnp.take(x[:80], index, axis=0, mode="clip")) if of_x else (x, None, x)
    dy, dy_index, sorted_dy = (
        (dy[:80], index, jnp.take(dy[:80], index, axis=0, mode="clip")) if of_dy else (dy, None, dy)
    )
    dw = grouped_weight_gradient(x, dy, groups, x_index, dy_index, **options)
    expected = grouped_weight_gradient(sorted_x, sorted_dy, groups, **options)
    assert "RACE" not in "".join(capfd.readouterr())
    np.testing.assert_array_equal(np.asarray(dw, np.float32), np.asarray(expected, np.float32))


@pytest.mark.slow
def test_sum_of_two_products(capfd):
    from pallas_kernels.grouped_matmul.mosaic_gpu_product import ProductTiles, grouped_product

    _, gate, dgate = inputs()
    up, dup = (jax.random.normal(jax.random.key(s), a.shape, a.dtype) for s, a in ((5, gate), (6, dgate)))
    groups, tiles = contiguous(jnp.array(RAGGED)), ProductTiles(bm=128, bn=128, slots=2)
    options = {"tiles": tiles, "transpose": True, "ctas": 2, "interpret": interpreter()}
    (dx,) = grouped_product((dgate, dup), (gate, up), groups, **options)
    assert "RACE" not in "".join(capfd.readouterr())
    assert error(dx, reference.summed_product(dgate, dup, gate, up, groups, transpose=True)) <= 2.5e-3


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows, inner, outer, experts",
    [
        (1024, 256, 512, 4),
        (65536, 4096, 14336, 8),
        (131072, 2048, 768, 128),
    ],
)
def test_training_step_lowers_for_cuda(rows, inner, outer, experts):
    def loss(x, gate, up, down, sizes):
        h = grouped_swiglu(x, gate, up, sizes)
        return jnp.sum(grouped_matmul(h, down, sizes).astype(jnp.float32) ** 2)

    weight = struct(experts, inner, outer)
    args = struct(rows, inner), weight, weight, struct(experts, outer, inner), struct(experts, dtype=jnp.int32)
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(*args).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu") >= 7  # swiglu, down; dx of down, dx of gate and up; dw of the three


def test_batch_of_calls_lowers_for_cuda():
    batch = jax.vmap(functools.partial(grouped_matmul, backend="mosaic_gpu"), in_axes=(0, None, 0))
    args = struct(2, 128, 128), struct(4, 128, 128), struct(2, 4, dtype=jnp.int32)
    assert "mosaic_gpu" in jax.jit(batch).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"shapes": {"x": (100, 128), "w": (4, 128, 128)}}, "rows"),
        ({"shapes": {"x": (256, 96), "w": (4, 96, 128)}}, "dims"),
        ({"dtypes": {"x": jnp.dtype("float32")}}, "16-bit"),
        ({"kind": "NVIDIA A100-SXM4-80GB"}, "Hopper"),
        ({"kind": "NVIDIA B200"}, "Hopper"),
    ],
)
def test_reasons(change, reason):
    fine = {
        "shapes": {"x": (256, 128), "w": (4, 128, 128)},
        "dtypes": {"x": jnp.dtype("bfloat16")},
        "kind": "NVIDIA H100 80GB HBM3",
    }
    assert mosaic_gpu.supports("product", False, *fine.values()) is None
    assert reason in mosaic_gpu.supports("product", False, *{**fine, **change}.values())


@functools.cache
def on_device(name, options):
    return jax.jit(functools.partial(getattr(mosaic_gpu, name), **dict(options)))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [[512] * 8, [1, 0, 1003, 7, 0, 2048, 129, 500], [0, 0, 0, 4000, 0, 0, 0, 0]])
def test_on_the_device_every_product_equals_the_reference(sizes):
    keys = jax.random.split(jax.random.key(0), 5)
    x, dy = (jax.random.normal(k, (4096, n), jnp.bfloat16) for k, n in zip(keys, (512, 256)))
    gate, up = (0.05 * jax.random.normal(k, (8, 512, 256), jnp.bfloat16) for k in keys[2:4])
    few, index = x[:700], jax.random.randint(keys[4], (4096,), 0, 700)
    index = jnp.where(
        jnp.arange(4096) < sum(sizes), index, 10**9 * (-1) ** jnp.arange(4096)
    )  # garbage where no group is
    target = jax.random.permutation(keys[4], 5000)[:4096]
    x, dy = (a.at[sum(sizes) :].set(jnp.nan) for a in (x, dy))
    clean_x, clean_dy = jnp.nan_to_num(x), jnp.nan_to_num(dy)
    groups = contiguous(jnp.array(sizes, jnp.int32))
    plain = {"transpose": False, "output_rows": 4096}
    turned = {**plain, "transpose": True}
    cases = [
        ("product", (x, gate, groups, None, None), (clean_x, gate, groups, None, None), plain),
        ("product", (few, gate, groups, index, None), None, plain),
        ("product", (few, gate, groups, index, target), None, {**plain, "output_rows": 5000}),
        (
            "product",
            (x, gate, groups, None, target),
            (clean_x, gate, groups, None, target),
            {**plain, "output_rows": 5000},
        ),
        ("product", (dy, gate, groups, None, None), (clean_dy, gate, groups, None, None), turned),
        ("summed_product", (dy, dy, gate, up, groups), (clean_dy, clean_dy, gate, up, groups), {"transpose": True}),
        ("weight_gradient", (x, dy, groups, None, None), (clean_x, clean_dy, groups, None, None), {}),
        ("weight_gradient", (few, dy, groups, index, None), (few, clean_dy, groups, index, None), {}),
        ("weight_gradient", (dy, few, groups, None, index), (clean_dy, few, groups, None, index), {}),
        ("swiglu", (x, gate, up, groups, None), (clean_x, gate, up, groups, None), {"save": True}),
        ("swiglu", (few, gate, up, groups, index), None, {"save": False}),
    ]
    for name, arguments, clean, options in cases:
        jax.block_until_ready([jnp.full((4096, 512), jnp.nan, jnp.bfloat16) for _ in range(4)])  # poisons free memory
        run = on_device(name, tuple(options.items()))
        found, again = jax.tree.leaves(run(*arguments)), jax.tree.leaves(run(*arguments))
        expected = jax.tree.leaves(getattr(reference, name)(*(clean or arguments), **options))
        for a, b, c in zip(found, again, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
            assert error(a, c) <= 2.5e-3, name
