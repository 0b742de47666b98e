"""Logits of 16-bit inputs have the precision of float32, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from sparse_lm.routing.logits import parts, router_logits


def test_parts_add_up() -> None:
    # 8 bits at 1 have the last bit 2^-7: 1 + 2^-8 + 2^-17 rounds up; what is left, -2^-8 + 2^-17, rounds to -2^-8
    whole = jnp.float32(1 + 2.0**-8 + 2.0**-17)
    assert [float(part) for part in parts(whole, 3)] == [1 + 2.0**-7, -(2.0**-8), 2.0**-17]
    numbers = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    # Compiled: a compiler that drops a cast and back would leave nothing for the second part.
    three = tiny.jit(lambda a: [part.astype(jnp.float32) for part in parts(a, 3)])(numbers)
    assert (np.asarray(three[1]) != 0).mean() > 0.9
    np.testing.assert_array_equal(np.sum(np.asarray(three, np.float64), axis=0).astype(np.float32), numbers)


def test_logits_of_16_bit_inputs_are_those_of_float32() -> None:
    normal = np.random.default_rng(1).normal
    x_GSD = jnp.asarray(normal(size=(2, 5, 64)), jnp.bfloat16)
    weight_DE, d_GSE = (normal(size=shape).astype(np.float32) for shape in ((64, 6), (2, 5, 6)))
    logits_GSE, vjp = jax.vjp(router_logits, x_GSD, weight_DE)
    dx_GSD, dweight_DE = vjp(d_GSE)
    exact = np.asarray(x_GSD, np.float64)
    np.testing.assert_allclose(logits_GSE, exact @ weight_DE, rtol=1e-6, atol=3e-6)
    np.testing.assert_allclose(dweight_DE, np.einsum("gsd,gse->de", exact, d_GSE), rtol=1e-6, atol=3e-6)
    # rounded to bfloat16: half of the last of 8 bits
    np.testing.assert_allclose(
        np.asarray(dx_GSD, np.float64), d_GSE @ weight_DE.T.astype(np.float64), rtol=2.0**-8, atol=1e-3
    )
    assert logits_GSE.dtype == dweight_DE.dtype == jnp.float32 and dx_GSD.dtype == jnp.bfloat16
