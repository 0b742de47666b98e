"""The layers that `benchmark.py` times: sizes, routing drawn by popularity, products of other libraries, a step, what it stores.

Legend: T tokens, D model, F ffn, E experts, K experts of a token, A rows sorted by expert, I inputs, O outputs, B batch, L length.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparse_lm.layers.feed_forward import FeedForward, TokenInfo
from sparse_lm.layers.parameter import declare, map_leaves
from sparse_lm.layers.projection import DenseProjection, Projection
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.routing.router import RouterInputs, Scores
from sparse_lm.routing.top_k import TopKRouter

SEQUENCE = 2048
"""Tokens of a sequence, which is a routing group."""


ZIPF = {"uniform": 0.0, "zipf": 1.0}
"""How popular experts are: as their rank to minus this power."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnRouter(TopKRouter):
    """A token's experts are drawn by popularity, one after the other without returning them (Gumbel-top-k, Kool et al. 2019, arXiv
    1903.06059), so that none takes more than every token. Scores, weights, losses and cost are those of top-k. Popularity is state:
    one compiled program serves any."""

    def initial_state(self, experts: int) -> dict[str, np.ndarray]:
        """See Router.initial_state: the logarithm of each expert's popularity."""
        return {**super().initial_state(experts), "popularity": np.zeros((experts,), np.float32)}

    def choose(self, scores: Scores, inputs: RouterInputs, state: dict[str, jax.Array]) -> jax.Array:
        """See Router.choose."""
        assert inputs.key is not None, "draws in training only"
        drawn_GSE = jax.random.gumbel(inputs.key, scores.score_GSE.shape) + state["popularity"]
        return jax.lax.top_k(drawn_GSE, self.k)[1]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a layer; every split of the active size among experts computes the same."""

    tokens: int = 32768
    d_model: int = 2048
    active: int = 8192
    experts: int = 64
    k: int = 8

    @property
    def name(self) -> str:
        """Experts and experts of a token."""
        return f"E{self.experts} K{self.k}"

    def moe(self, projection: Projection | None = None) -> MoEFeedForward:
        """The layer; its experts are drawn by popularity."""
        return MoEFeedForward(
            experts=self.experts,
            hidden=self.active // self.k,
            router=DrawnRouter(k=self.k, balance_coefficient=0.01, z_coefficient=1e-3),
            projection=projection or DenseProjection(),
        )

    @property
    def flops(self) -> float:
        """Operations of the products of one forward and backward pass, router left out."""
        return 18.0 * self.tokens * self.d_model * self.active


OLMOE = Shape()
SMALL = Shape(tokens=512, d_model=64, active=256, experts=16, k=4)
SPLITS = ((16, 2), (64, 8), (256, 32))
FEW_TOKENS = 2048
"""Tokens at which products are timed that expand every row by the number of experts."""

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class OtherMatrix(nnx.Module):
    """Experts' matrices multiplied by a product of another library; the layer around them stays the same."""

    def __init__(self, inputs: int, outputs: int, dims: tuple[str, str], experts: int, by: Product):
        self.weight = declare((experts, inputs, outputs), ("experts", *dims))
        self.by = by

    def grouped(self, x_AI: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
        """Multiplies each expert's rows by its matrix."""
        return self.by(x_AI, self.weight[...].astype(x_AI.dtype), group_sizes_E)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherProjection(Projection):
    """A dense projection on a product of another library, or on the plain steps of this one."""

    by: Product

    def build(self, inputs: int, outputs: int, dims: tuple[str, str], *, experts: int = 0) -> OtherMatrix:
        """See Projection.build."""
        return OtherMatrix(inputs, outputs, dims, experts, self.by)


def tokamax_product() -> Product:
    """tokamax's ragged dot for GPUs (https://github.com/openxla/tokamax).

    Raises:
      ImportError: it is not installed.
    """
    import tokamax

    return lambda x_AI, w_EIO, sizes_E: tokamax.ragged_dot(x_AI, w_EIO, sizes_E, implementation="mosaic")


def abstract(config: FeedForward, shape: Shape, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """(graph, shapes of its values) of a layer; matrices in the compute dtype, the router's in float32."""
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(shape.d_model)))
    kind = lambda path: jnp.float32 if "router" in path else dtype  # noqa: E731
    return graph, map_leaves(lambda p, leaf: jax.ShapeDtypeStruct(leaf.shape, kind(p)), nnx.to_pure_dict(state))


def drawn(values: dict[str, Any]) -> dict[str, Any]:
    """Random values of these shapes."""
    numbers = iter(range(1000))

    def draw(_: str, leaf: Any) -> jax.Array:
        return jax.random.normal(jax.random.key(next(numbers)), leaf.shape, leaf.dtype) * jnp.asarray(0.02, leaf.dtype)

    return map_leaves(draw, values)


def step_of(graph: Any, *, diagnostics: bool) -> Callable[..., Any]:
    """(values, x, dy, key) -> output and gradients of a layer, with or without what it reports."""

    def step(values: Any, x_BLD: jax.Array, dy_BLD: jax.Array, key: jax.Array) -> Any:
        (y_BLD, objective), vjp, aux = jax.vjp(forward_of(graph, x_BLD.shape[:2], key), values, x_BLD, has_aux=True)
        grads = vjp((dy_BLD, jax.tree.map(jnp.ones_like, objective)))
        return (y_BLD, grads, aux) if diagnostics else (y_BLD, grads)

    return step


def forward_of(graph: Any, batch: tuple[int, int], key: jax.Array) -> Callable[..., Any]:
    """(values, x) -> ((output, objective), metrics)."""
    ones_BL = jnp.ones(batch, jnp.int32)

    def forward(values: Any, x_BLD: jax.Array) -> Any:
        y_BLD, aux = nnx.merge(graph, values)(x_BLD, TokenInfo(ones_BL, ones_BL, ones_BL, key))
        return (y_BLD, aux.objective), (aux.metrics, aux.statistics)

    return forward


def stored_bytes(graph: Any, values: Any, x_BLD: jax.Array) -> int:
    """Bytes a layer keeps from its forward to its backward pass, parameters left out; its input counts once, reshaped or not."""

    def residuals(values: Any, x_BLD: jax.Array) -> Any:
        return jax.vjp(forward_of(graph, x_BLD.shape[:2], jax.random.key(0)), values, x_BLD, has_aux=True)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, values, x_BLD))
    parameters = {leaf.shape for leaf in jax.tree.leaves(values)}
    inputs = [leaf for leaf in kept if leaf.size == x_BLD.size and leaf.dtype == x_BLD.dtype]
    rest = [leaf for leaf in kept if leaf.shape not in parameters and not any(leaf is one for one in inputs)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in rest + inputs[:1])
