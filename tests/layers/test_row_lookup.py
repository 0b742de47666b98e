"""Row lookups: the plain gather and its gradient; on CUDA no addition whose order the hardware chooses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm.layers.row_lookup import row_lookup, sum_by_scattering, sum_by_sorting

COMPILED = [jax.jit(sums, static_argnames="rows") for sums in (sum_by_sorting, sum_by_scattering)]
lengths = st.sampled_from([1, 2, 17, 40])  # each length is a program of its own


@given(lengths.flatmap(lambda n: st.lists(st.integers(0, 6), min_size=n, max_size=n)), st.integers(0, 2**31 - 1))
@settings(max_examples=60, deadline=None)
def test_sorting_sums_what_scattering_sums(indices, seed):
    index_T = jnp.asarray(indices, jnp.int32)
    # Small whole numbers add without rounding, so both orders give the same bits.
    values_TD = jnp.asarray(np.random.default_rng(seed).integers(-8, 9, (len(indices), 3)), jnp.float32)
    np.testing.assert_array_equal(*(sums(index_T, values_TD, rows=7) for sums in COMPILED))


def test_a_worked_sum():
    # Row 1 is looked up twice: 1 + 10 and 2 + 20; row 0 once; row 2 never.
    sums = sum_by_sorting(jnp.array([1, 0, 1]), jnp.array([[1.0, 2.0], [5.0, 6.0], [10.0, 20.0]]), rows=3)
    np.testing.assert_array_equal(sums, [[5.0, 6.0], [11.0, 22.0], [0.0, 0.0]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_value_and_gradient_are_those_of_the_gather(dtype):
    table_VD = jax.random.normal(jax.random.key(0), (9, 4))
    index = jnp.array([[3, 3, 0, 8], [8, 1, 3, 20]])  # 20 is past the table: its last row

    def loss(lookup):
        return lambda table_VD: jnp.sum(jnp.sin(lookup(table_VD).astype(jnp.float32)))

    ours, plain = (lambda t: row_lookup(t, index, dtype)), (lambda t: t.at[index].get(mode="clip").astype(dtype))
    np.testing.assert_array_equal(ours(table_VD), plain(table_VD))
    assert ours(table_VD).dtype == dtype
    ours_d, plain_d = jax.grad(loss(ours))(table_VD), jax.grad(loss(plain))(table_VD)
    np.testing.assert_allclose(ours_d, plain_d, rtol=1e-6, atol=1e-6)


def test_the_program_for_cuda_adds_no_floats_by_scatter():
    def gradient(table_VD, index):
        return jax.grad(lambda t: jnp.sum(row_lookup(t, index, jnp.float32) ** 2))(table_VD)

    arguments = jnp.ones((9, 4)), jnp.zeros(6, jnp.int32)
    for platform, expected in (("cuda", 0), ("cpu", 1)):
        text = jax.jit(gradient).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
        adding = [part for part in text.split('"stablehlo.scatter"')[1:] if "stablehlo.add" in part.split("})")[0]]
        assert len(adding) == expected, platform
