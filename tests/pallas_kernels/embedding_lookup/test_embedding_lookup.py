"""Lookup against a plain reference, and float8 rows against ml_dtypes in numpy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import SingleDeviceSharding

from pallas_kernels import embedding_lookup as operation
from pallas_kernels import triton_call
from pallas_kernels.embedding_lookup import embedding_lookup, row_width, row_words, triton

pack, unpack = jax.jit(operation.pack), jax.jit(operation.unpack, static_argnums=1)
ADDRESS = np.array([[3, 0, 6], [7, -1, 2**31 - 1], [-(2**31), 6, 3]], np.int32)


def on_host(table: jax.Array) -> jax.Array:
    return jax.device_put(table, SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"))


def table(dtype: str, width: int = 36, rows: int = 7) -> jax.Array:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((rows, width)), jnp.float32)
    return pack(x) if dtype == "packed" else x.astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "packed"])
def test_rows_and_zeros_outside_the_table(dtype: str) -> None:
    rows = table(dtype)
    found = embedding_lookup(rows, jnp.asarray(ADDRESS))
    held = np.asarray((unpack(rows) if dtype == "packed" else rows).astype(jnp.float32))
    expected = np.zeros((3, 3, 36), np.float32)
    for at in np.ndindex(3, 3):
        if 0 <= ADDRESS[at] < 7:
            expected[at] = held[ADDRESS[at]]
    np.testing.assert_array_equal(np.asarray(found.astype(jnp.float32)), expected)
    plain = embedding_lookup(rows, jnp.asarray(ADDRESS), backend="reference")
    assert plain.dtype == found.dtype and (plain == found).all()


@pytest.mark.parametrize("dtype", ["float32", "packed"])
def test_a_table_in_host_memory_gives_the_same_rows_on_the_device(dtype: str) -> None:
    rows, address = table(dtype), jnp.asarray(ADDRESS)
    found = jax.jit(embedding_lookup)(on_host(rows), address)
    assert found.sharding.memory_kind == jax.devices()[0].default_memory().kind
    assert (found == embedding_lookup(rows, address)).all()


def test_members_with_tables_of_their_own_and_with_one() -> None:
    rows = jnp.stack([table("float32"), 2 * table("float32")])
    address = jnp.asarray(ADDRESS)
    expected = jnp.stack([embedding_lookup(r, address) for r in rows])
    assert (jax.vmap(embedding_lookup, (0, None))(rows, address) == expected).all()
    both = jax.vmap(embedding_lookup, (None, 0))(rows[0], jnp.stack([address, address + 1]))
    assert (both[0] == expected[0]).all() and (both[1] == embedding_lookup(rows[0], address + 1)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_table_adds_up_those_of_its_rows(dtype: str) -> None:
    rows, weights = table(dtype), jnp.asarray(np.random.default_rng(3).standard_normal((3, 3, 36)), dtype)

    def loss(rows):
        return (weights * embedding_lookup(rows, jnp.asarray(ADDRESS))).astype(jnp.float32).sum()

    found = jax.grad(loss)(rows)
    expected = np.zeros((7, 36), np.float32)
    for at in np.ndindex(3, 3):
        if 0 <= ADDRESS[at] < 7:
            expected[ADDRESS[at]] += np.asarray(weights[at], np.float32)
    # Rows are added in float32 and rounded once.
    assert found.dtype == rows.dtype
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=1e-6 if dtype == "float32" else 2.0**-8)


def test_bad_arguments_are_named() -> None:
    rows = table("float32")
    for arguments, message in (
        ((rows[0], ADDRESS), r"shape \(36,\)"),
        ((rows, ADDRESS.astype(np.int16)), "int16: expected int32"),
        ((rows.astype(jnp.int32), ADDRESS), "dtype int32"),
    ):
        with pytest.raises(ValueError, match=message):
            embedding_lookup(*arguments)
    assert embedding_lookup(rows, jnp.zeros((2, 0), jnp.int32)).shape == (2, 0, 36)


def test_words_of_a_row() -> None:
    """64 numbers: 16 words and 2 scales in one; 256: 64 words and 8 scales in two, 264 bytes."""
    assert [row_words(width) for width in (4, 32, 64, 128, 132, 256)] == [2, 9, 17, 33, 35, 66]
    assert all(row_width(row_words(width)) == width for width in range(4, 2049, 4))
    with pytest.raises(ValueError, match="multiple of 4"):
        row_words(6)


def plain_unpack(words: np.ndarray, width: int) -> np.ndarray:
    raw = words.view(np.uint8).reshape(len(words), -1)
    values = raw[:, :width].view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    exponents = np.repeat(raw[:, width:], 32, axis=1)[:, :width].astype(int)
    return values * np.where(exponents > 0, 2.0 ** (exponents - 127), 0.0)


def test_the_layout_and_the_nearest_rounding_are_those_of_numpy() -> None:
    """Independently: scale 2**ceil(log2(largest / 448)), rounding by ml_dtypes."""
    draw = np.random.default_rng(1)
    x = (draw.standard_normal((50, 100)) * 10.0 ** draw.integers(-12, 12, (50, 1))).astype(np.float32)
    x[3], x[4, :32] = 0, 0
    words = np.asarray(pack(x))
    found = plain_unpack(words, 100)
    for group in range(4):
        part = x[:, 32 * group : 32 * group + 32].astype(np.float64)
        scale = 2.0 ** np.ceil(np.log2(np.maximum(np.abs(part).max(1, keepdims=True), 1e-300) / 448))
        expected = (part / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
        np.testing.assert_array_equal(found[:, 32 * group : 32 * group + 32], expected)
    np.testing.assert_array_equal(np.asarray(unpack(words), np.float64), found)  # exact in bfloat16
    assert not unpack(np.zeros((1, 17), np.uint32)).any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_packed_numbers_stay_whatever_the_random_bits(seed: int, bits: int) -> None:
    x = unpack(pack(jnp.asarray(np.random.default_rng(seed).standard_normal((3, 64)), jnp.float32)), jnp.float32)
    again = pack(x, jnp.full((3, 64), bits, jnp.uint32))
    assert (unpack(again, jnp.float32) == x).all()


def test_stochastic_rounding_keeps_the_mean_and_takes_neighbours() -> None:
    """17 lies between 16 and 18 in float8 (three bits after the first), a quarter and three; the largest number sets a scale of 1."""
    x = jnp.array([[448.0, 17.0, 16.5, -17.5, 0.00048828125] + [0.0] * 27])
    draws = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (4000, 32), dtype=np.uint32))
    found = np.asarray(unpack(pack(jnp.repeat(x, 4000, 0), draws), jnp.float32))
    assert set(found[:, 1]) == {16, 18} and set(found[:, 3]) == {-16, -18} and set(found[:, 0]) == {448}
    assert set(found[:, 4]) == {0, 2.0**-9}  # a quarter of the smallest number
    # Standard error of the mean: at most 1 / sqrt(4000) = 0.016 for neighbours 2 apart.
    np.testing.assert_allclose(found.mean(0)[1:4], [17, 16.5, -17.5], atol=0.06)
    assert abs(found[:, 4].mean() * 512 - 0.25) < 0.03
    assert not found[:, 5:].any()


def test_who_gets_the_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_call, "unavailable", lambda: None)
    for shape, dtype, reason in (
        ((9, 64), jnp.float32, None),
        ((9, 17), jnp.uint32, None),
        ((9, 1024), jnp.float32, "at most 2048 bytes"),
        ((9, 64), jnp.float8_e5m2, "float8_e5m2"),
    ):
        found = triton.supports({"table": shape}, {"table": dtype}, "NVIDIA H100 80GB HBM3")
        assert found is None if reason is None else reason in found


installed = pytest.mark.skipif(triton_call.unavailable() is not None, reason=str(triton_call.unavailable()))


@installed
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "packed"])
@pytest.mark.parametrize("width", [16, 36, 64, 256])
def test_lookup_on_the_device(dtype: str, width: int) -> None:
    rows = table(dtype, width, 1000)
    address = jnp.asarray(np.random.default_rng(2).integers(-5, 1005, 777), jnp.int32)
    found, expected = (embedding_lookup(rows, address, backend=b) for b in ("triton", "reference"))
    assert found.dtype == expected.dtype and (found == expected).all()
    for backend in ("triton", "xla"):
        found = embedding_lookup(on_host(rows), address, backend=backend)
        assert found.sharding.memory_kind == "device" and (found == expected).all()


@installed
@pytest.mark.gpu
def test_every_float8_number_at_every_scale_on_the_device() -> None:
    """Rows of 64: each byte, NaN too, beside the exponents of a group that `pack` makes (27 to 247)."""
    rows = np.zeros((4 * 221, 68), np.uint8)
    for n, exponent in enumerate(range(27, 248)):
        rows[4 * n : 4 * n + 4, :64] = np.arange(256, dtype=np.uint8).reshape(4, 64)
        rows[4 * n : 4 * n + 4, 64:66] = exponent
    words = jnp.asarray(rows.view(np.uint32))
    address = jnp.arange(len(rows), dtype=jnp.int32)
    found, expected = (embedding_lookup(words, address, backend=b).astype(jnp.float32) for b in ("triton", "reference"))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))  # NaN equals NaN here
