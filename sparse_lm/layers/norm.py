"""Root mean square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4)."""

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm.layers.parameter import declare


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Returns x / rms(x) * scale over the last dimension, computed in float32 and returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (x32 * inverse * scale).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMS normalisation with a learnt scale over one dimension."""

    def __init__(self, size: int, dim: str = "embed", *, epsilon: float = 1e-6):
        self.scale = declare((size,), (dim,), "ones")
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.epsilon)
