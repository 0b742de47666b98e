"""Muon: the momentum of every weight matrix is orthogonalised before the step; all other leaves take AdamW's.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon). Momentum is optax's Nesterov trace; the orthogonalisation is ours,
because it must treat leading layers and experts dims as a batch without reshaping them (a merged dim could not keep its
sharding) and choose its precision.
"""

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from sparse_lm.layers.parameter import Dims, map_leaves
from sparse_lm.layers.parametrization import UpdateKind
from sparse_lm.layers.tree_paths import Tree, core_dims, flatten, prune, role
from sparse_lm.train.optimizer import Optimizer, adam_direction, check_adam

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of Jordan et al.: fast from small singular values, then within about [0.7, 1.2] of 1, never exact."""


NORM_FLOOR = 1e-8
"""Added to the norm of a matrix: one whose gradients vanish (an expert without tokens) comes to rest, where a pure
orthogonalisation would keep taking full steps along the last bits of its momentum."""


def orthogonalize(x: jax.Array, iterations: int = 5, dtype: Literal["bfloat16", "float32"] = "bfloat16") -> jax.Array:
    """Returns nearly U V^T of each matrix U S V^T by the quintic Newton-Schulz iteration.

    X <- a X + b (X X^T) X + c (X X^T)^2 X, from X / (|X|_F + 1e-8). A zero matrix stays zero.

    Args:
      x: [..., in, out], leading dims are a batch.
      iterations: number of iterations; 5 brings singular values above about 0.01 |X|_F near 1.
      dtype: of the products.

    Returns:
      An array of the shape and dtype of x; singular values within about [0.7, 1.2].
    """
    norm = jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(-2, -1), keepdims=True))
    y = (x / (norm + NORM_FLOOR)).astype(dtype)
    wide = x.shape[-2] <= x.shape[-1]
    y = y if wide else jnp.swapaxes(y, -2, -1)
    precision = "highest" if dtype == "float32" else None  # a GPU's default for fp32 is TF32
    a, b, c = QUINTIC
    for _ in range(iterations):
        gram = jnp.matmul(y, jnp.swapaxes(y, -2, -1), precision=precision)
        polynomial = b * gram + c * jnp.matmul(gram, gram, precision=precision)
        y = a * y + jnp.matmul(polynomial, y, precision=precision)
    y = y if wide else jnp.swapaxes(y, -2, -1)
    return y.astype(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Orthogonalised momentum on matrices, AdamW on embedding, head, router, norms and biases."""

    elementwise: ClassVar[bool] = False

    momentum: float = 0.95
    """Decay of the momentum of matrices."""
    nesterov: bool = True
    """Whether the gradient is added to the momentum once more before it is orthogonalised."""
    iterations: int = 5
    """Newton-Schulz iterations."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of the Newton-Schulz products."""
    update_scale: Literal["adam_rms", "spectral"] = "adam_rms"
    """Size of a matrix's update. adam_rms: 0.2 * sqrt(max(in, out)), AdamW's usual root mean square, so that AdamW's
    learning rates and decay hold (Liu et al. 2025, arXiv 2502.16982, eq. 4). spectral: sqrt(max(1, out / in)), which
    transfers over widths by itself; learning rates near 0.02 (Jordan et al. 2024)."""
    adam_multiplier: float = 1.0
    """Multiplier of the learning rate of the leaves that take AdamW."""
    beta1: float = 0.9
    """AdamW's decay of the average of gradients."""
    beta2: float = 0.95
    """AdamW's decay of the average of squared gradients."""
    epsilon: float = 1e-8
    """Added to AdamW's root of the second moment."""

    def check(self) -> None:
        super().check()
        check_adam(self)
        self.require(0.0 <= self.momentum < 1.0, "momentum", "a number from 0 to below 1")
        self.require(self.iterations >= 1, "iterations", "a number >= 1")
        self.require(self.adam_multiplier >= 0.0, "adam_multiplier", "a multiplier >= 0")

    def update_kind(self, dims: Dims) -> UpdateKind:
        if role(dims) != "matrix":
            return "adam"
        return "muon_spectral" if self.update_scale == "spectral" else "muon_adam_rms"

    def own_multiplier(self, dims: Dims) -> float:
        return 1.0 if role(dims) == "matrix" else self.adam_multiplier

    def matrix_scale(self, inputs: int, outputs: int) -> float:
        """Returns the factor of an orthogonalised [inputs, outputs] update."""
        if self.update_scale == "spectral":
            return math.sqrt(max(1.0, outputs / inputs))
        return 0.2 * math.sqrt(max(inputs, outputs))

    def direction(self, dims: Tree) -> optax.GradientTransformation:
        """Returns the (init, update) pair; state {momentum: matrices, adam: {count, mu, nu} of the rest}.

        Raises:
          ValueError: for a matrix that is not [in, out] after its batch dims.
        """
        roles = {path: role(leaf_dims) for path, leaf_dims in flatten(dims).items()}
        for path, leaf_dims in flatten(dims).items():
            if roles[path] == "matrix" and len(core_dims(leaf_dims)) != 2:
                raise ValueError(f"muon: {path} has dims {leaf_dims}; allowed: (in, out) after layers and experts")
        trace = optax.trace(self.momentum, nesterov=self.nesterov)
        adam = adam_direction(self.beta1, self.beta2, self.epsilon)

        def matrices(tree: Tree) -> Tree:
            return prune(tree, lambda path: roles[path] == "matrix")

        def rest(tree: Tree) -> Tree:
            return prune(tree, lambda path: roles[path] != "matrix")

        def init(params: Tree) -> Tree:
            return {"momentum": trace.init(matrices(params)).trace, "adam": adam.init(rest(params))}

        def update(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
            averages, trace_state = trace.update(matrices(grads), optax.TraceState(trace=state["momentum"]))
            adam_directions, adam_state = adam.update(rest(grads), state["adam"], rest(params))
            found = {**flatten(averages), **flatten(adam_directions)}

            def pick(path: str, _: jax.Array) -> jax.Array:
                if roles[path] != "matrix":
                    return found[path]
                x = orthogonalize(found[path], self.iterations, self.precision)
                return self.matrix_scale(x.shape[-2], x.shape[-1]) * x

            return map_leaves(pick, grads), {"momentum": trace_state.trace, "adam": adam_state}

        return optax.GradientTransformation(init, update)
