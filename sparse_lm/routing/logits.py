"""Float32 logits from inputs of any dtype, at the speed of 16-bit products where the inputs have 16 bits.

bfloat16 inputs are exact in products with bfloat16 factors that are summed in float32; a float32 weight is the sum of three bfloat16
numbers (8 significant bits each). One product with the three side by side therefore gives what a float32 product gives, without a
float32 copy of the inputs, which would be twice as large as they are and live until the backward pass. The idea is that of split
products (Henry et al. 2019, arXiv 1904.06376).

Legend: G routing groups, S tokens of a group, D model, E columns, P parts.
"""

import jax
import jax.numpy as jnp


def router_logits(x_GSD: jax.Array, weight_DE: jax.Array) -> jax.Array:
    """Returns x @ weight in float32 with the precision of float32.

    Args:
      x_GSD: any float dtype.
      weight_DE: float32.
    """
    if x_GSD.dtype == jnp.bfloat16:
        return _split(x_GSD, weight_DE)
    return jnp.einsum("gsd,de->gse", x_GSD.astype(jnp.float32), weight_DE, precision=jax.lax.Precision.HIGHEST)


def parts(a: jax.Array, count: int) -> list[jax.Array]:
    """Splits float32 numbers into bfloat16 ones that add up to them, the largest first; what `count` parts leave is below 2^(-8 count)."""
    found = []
    for _ in range(count):
        # Not a cast and back, which XLA may leave out as excess precision.
        part = jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7)
        found.append(part.astype(jnp.bfloat16))
        a = a - part
    return found


def _product(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _split(x_GSD: jax.Array, weight_DE: jax.Array) -> jax.Array:
    three_DPE = jnp.stack(parts(weight_DE, 3), axis=1)
    return jnp.sum(_product("gsd,dpe->gspe", x_GSD, three_DPE), axis=2)


def _split_forward(x_GSD, weight_DE):
    return _split(x_GSD, weight_DE), (x_GSD, weight_DE)


def _split_backward(residuals, d_GSE):
    x_GSD, weight_DE = residuals
    w0, w1 = parts(weight_DE, 2)
    d0, d1, d2 = parts(d_GSE, 3)
    # Rounded to 16 bits in the end, so what is below 2^-16 may go.
    dx_GSD = _product("gspe,dpe->gsd", jnp.stack([d0, d0, d1], axis=2), jnp.stack([w0, w1, w0], axis=1))
    dweight_DE = jnp.sum(_product("gsd,gspe->dpe", x_GSD, jnp.stack([d0, d1, d2], axis=2)), axis=1)
    return dx_GSD.astype(x_GSD.dtype), dweight_DE


_split.defvjp(_split_forward, _split_backward)
