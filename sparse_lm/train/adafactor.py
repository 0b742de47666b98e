"""Adafactor: second moments of a matrix kept as one row and one column (Shazeer and Stern 2018, arXiv 1804.04235).

optax.adafactor factors the two *largest* dims of a leaf and takes its root mean squares over the whole leaf; with stacked
layers or experts both would mix matrices. Here the last two dims are factored and every mean is over one matrix, so that a
stacked step equals the unrolled one. On a single matrix the result is optax's (a test).
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from sparse_lm.layers.parameter import Dims, map_leaves
from sparse_lm.layers.parametrization import UpdateKind
from sparse_lm.layers.tree_paths import Tree, core_dims, flatten, prune
from sparse_lm.train.optimizer import Optimizer, core_axes


def root_mean_square(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns the root mean square over axes, kept as dims of size 1."""
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Adam's second moment in factors, updates clipped by root mean square and relative to the size of the weights."""

    elementwise: ClassVar[bool] = False

    learning_rate: float = 1e-2
    """Peak learning rate, relative to the root mean square of each matrix when scale_by_parameter is on."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices, head and router; norms, biases and embeddings have none."""
    decay_exponent: float = 0.8
    """Second moments decay with 1 - t ** -decay_exponent at update t (section 7.2)."""
    clip_threshold: float = 1.0
    """Largest root mean square of a matrix's update (section 6)."""
    scale_by_parameter: bool = True
    """Whether an update is multiplied by the root mean square of its weights (section 8)."""
    smallest_parameter_scale: float = 1e-3
    """Lower bound of that root mean square."""
    smallest_factored_dim: int = 128
    """Matrices with a smaller dim keep full second moments."""
    momentum: float = 0.0
    """Decay of an average of updates; 0: none, and no memory for it."""
    epsilon: float = 1e-30
    """Added to squared gradients."""

    def check(self) -> None:
        super().check()
        self.require(0.0 < self.decay_exponent <= 1.0, "decay_exponent", "a number above 0, at most 1")
        self.require(self.clip_threshold > 0.0, "clip_threshold", "a number > 0")
        self.require(self.smallest_parameter_scale > 0.0, "smallest_parameter_scale", "a number > 0")
        self.require(self.smallest_factored_dim >= 1, "smallest_factored_dim", "a number >= 1")
        self.require(0.0 <= self.momentum < 1.0, "momentum", "a number from 0 to below 1")
        self.require(self.epsilon > 0.0, "epsilon", "a number > 0")

    def update_kind(self, dims: Dims) -> UpdateKind:
        return "adafactor" if self.scale_by_parameter else "adam"

    def factored(self, dims: Dims, shape: tuple[int, ...]) -> bool:
        """Says whether a leaf's second moments are kept in factors."""
        return len(core_dims(dims)) >= 2 and min(shape[-2:]) >= self.smallest_factored_dim

    def direction(self, dims: Tree) -> optax.GradientTransformation:
        """Returns the (init, update) pair; state {count, row, column: factored leaves, full: the others, momentum}."""
        flat_dims = flatten(dims)

        def init(params: Tree) -> Tree:
            shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
            in_factors = {path: self.factored(flat_dims[path], shape) for path, shape in shapes.items()}
            factored = prune(params, lambda path: in_factors[path])
            state = {
                "count": jnp.zeros((), jnp.int32),
                "row": map_leaves(lambda _, leaf: jnp.zeros_like(leaf[..., 0], dtype=jnp.float32), factored),
                "column": map_leaves(lambda _, leaf: jnp.zeros_like(leaf[..., 0, :], dtype=jnp.float32), factored),
                "full": map_leaves(
                    lambda _, leaf: jnp.zeros_like(leaf, dtype=jnp.float32),
                    prune(params, lambda path: not in_factors[path]),
                ),
            }
            if self.momentum:
                state["momentum"] = map_leaves(lambda _, leaf: jnp.zeros_like(leaf, dtype=jnp.float32), params)
            return state

        def update(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
            count = optax.safe_increment(state["count"])
            keep = 1.0 - count.astype(jnp.float32) ** -self.decay_exponent
            squares = map_leaves(lambda _, grad: jnp.square(grad) + self.epsilon, grads)
            flat_squares = flatten(squares)

            def average(axis: int | None) -> Callable[[str, jax.Array], jax.Array]:
                def step(path: str, old: jax.Array) -> jax.Array:
                    new = flat_squares[path] if axis is None else jnp.mean(flat_squares[path], axis=axis)
                    return keep * old + (1.0 - keep) * new

                return step

            new_state = {
                "count": count,
                "row": map_leaves(average(-1), state["row"]),
                "column": map_leaves(average(-2), state["column"]),
                "full": map_leaves(average(None), state["full"]),
            }
            rows, columns, full = (flatten(new_state[name]) for name in ("row", "column", "full"))

            def direct(path: str, grad: jax.Array, weight: jax.Array) -> jax.Array:
                axes = core_axes(flat_dims[path])
                if path in full:
                    out = grad * jax.lax.rsqrt(full[path])
                else:
                    row = rows[path] / jnp.mean(rows[path], axis=-1, keepdims=True)
                    out = grad * jax.lax.rsqrt(row)[..., :, None] * jax.lax.rsqrt(columns[path])[..., None, :]
                out = out / jnp.maximum(1.0, root_mean_square(out, axes) / self.clip_threshold)
                if self.scale_by_parameter:
                    out = out * jnp.maximum(root_mean_square(weight, axes), self.smallest_parameter_scale)
                return out

            directions = map_leaves(direct, grads, params)
            if self.momentum:
                directions = map_leaves(
                    lambda _, old, new: self.momentum * old + (1.0 - self.momentum) * new, state["momentum"], directions
                )
                new_state["momentum"] = directions
            return directions, new_state

        return optax.GradientTransformation(init, update)
