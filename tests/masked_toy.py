"""One step of a sparsifier on given matrices, without a model: what the tests of single algorithms are worked out with."""

import functools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from sparse_lm.layers.tree_paths import flatten
from sparse_lm.train.optimizer import AdamW, Optimizer
from sparse_lm.weight_sparsity.door import Moment
from sparse_lm.weight_sparsity.masked import Masked
from sparse_lm.weight_sparsity.sparsifier import MaskedSparsifier

PATH = "blocks.0.feed_forward.up.weight"
STEPS = 100
jit = functools.partial(jax.jit, compiler_options=tiny.FAST_COMPILE)


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": leaf} as nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        *parents, last = path.split(".")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def sparsifier(
    config: Masked,
    shapes: dict[str, tuple[int, ...]] | tuple[int, ...],
    dims: dict[str, tuple[str, ...]] | tuple[str, ...] = ("embed", "ffn"),
    optimizer: Optimizer | None = None,
    steps: int = STEPS,
) -> MaskedSparsifier:
    """The sparsifier of matrices of these shapes; a single one is called PATH."""
    shapes = shapes if isinstance(shapes, dict) else {PATH: shapes}
    dims = dims if isinstance(dims, dict) else dict.fromkeys(shapes, dims)
    definition = types.SimpleNamespace(
        shapes=nested(shapes), dims=nested(dims), frozen=nested(dict.fromkeys(shapes, False)), config=None
    )
    config.check()
    return config.build(definition, optimizer or AdamW(), steps, 1)


class After(NamedTuple):
    """What a step left: arrays of the matrix called PATH."""

    weight: np.ndarray
    mask: np.ndarray
    moments: np.ndarray
    sparsity: Any
    seen: np.ndarray


def array(rows: Any) -> jax.Array:
    return jnp.asarray(rows, jnp.float32)


def one_step(
    config: Masked,
    weight: Any,
    grad: Any,
    *,
    step: int,
    mask: Any = None,
    moved: Any = None,
    finite: bool = True,
    masks: dict[str, Any] | None = None,
    slots: dict[str, Any] | None = None,
    key: int = 0,
) -> After:
    """Runs the gradient hook and the update of one step on one matrix.

    Args:
      config: the config.
      weight: before the optimizer.
      grad: by the effective weights.
      step: finished steps.
      mask: in force; None: the one of `init`.
      moved: weights after the optimizer; None: as before it.
      finite: whether the step is sound.
      masks: masks in force by name, besides "mask".
      slots: the algorithm's own arrays.
      key: seed of the step's key.
    """
    weight, grad = array(weight), array(grad)
    moved = weight if moved is None else array(moved)
    sparse = sparsifier(config, weight.shape)

    def run(weight, grad, moved, mask, masks, slots):
        params = nested({PATH: weight})
        if mask is None:
            params, _, state = sparse.init(params, {}, jax.random.key(7))
        else:  # the choice of a first mask need not be compiled
            _, _, abstract = jax.eval_shape(lambda p: sparse.init(p, {}, jax.random.key(7)), params)
            given = {"mask": mask, **masks}
            state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
            state["masks"] = {name: nested({PATH: sparse.stored(m)}) for name, m in given.items()}
            if "ever" in state:
                state["ever"] = state["masks"]["mask"]
            state["counts"]["active"] = nested({PATH: jnp.sum(mask, dtype=jnp.int32)})
        if slots:
            state["slots"] = {name: nested({PATH: leaf}) for name, leaf in slots.items()}
        seen = sparse.optimizer_grads(nested({PATH: grad}), params, state, jnp.int32(step))
        moments = {"count": jnp.int32(3), "mu": nested({PATH: jnp.ones_like(weight)})}
        change = sparse.update(
            Moment(
                step=jnp.int32(step),
                finite=jnp.bool_(finite),
                key=jax.random.key(key),
                before=params,
                params=nested({PATH: moved}),
                opt_state=moments,
                model_state={},
                sparsity=state,
                grads=nested({PATH: grad}),
                gradient=lambda weights: nested({PATH: grad}),
            )
        )
        mask = sparse.masks_of(change.sparsity)["mask"][PATH]
        flat = flatten(change.params)[PATH], mask, flatten(change.opt_state["mu"])[PATH]
        return After(*flat, change.sparsity, flatten(seen)[PATH])

    mask = None if mask is None else jnp.asarray(mask, bool)
    masks = {name: jnp.asarray(m, bool) for name, m in (masks or {}).items()}
    slots = {name: array(leaf) for name, leaf in (slots or {}).items()}
    after = jit(run)(weight, grad, moved, mask, masks, slots)
    return jax.tree.map(np.asarray, after)
