"""Everything that training changes, in one plain tree; its initial value, dims and layout on disk."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparse_lm.layers.parameter import RUN_KEY
from sparse_lm.model.definition import Definition
from sparse_lm.train.optimizer import state_dims
from sparse_lm.weight_sparsity.door import Sparsifier

Tree = dict[str, Any]

TABLES, MASKS, STATE = 0x7AB1E5, 0x3A5C5, 0x7057A7E
"""What the keys of the initial rows, masks and model state are folded with: the keys of steps come from the same key."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State of a run, or of one member of a population (then every leaf has a leading members dimension).

    Attributes:
      step: int32, updates applied or skipped so far.
      params: nested dict, all that is differentiated, float32.
      opt_state: nested dict.
      model_state: nested dict of router biases and the like: no gradient, no decay.
      tables: nested dict of lookup tables and their optimizer slots.
      ema: nested dict like params, or {} when no average is kept.
      key: uint32 key data; every random number of a run is folded from (key, step, microbatch).
      skipped: int32, steps skipped in a row because of a NaN or an infinity.
      sparsity: nested dict of masks and what else a sparsifier keeps; {} for dense weights.
    """

    step: jax.Array
    params: Tree
    opt_state: Tree
    model_state: Tree
    tables: Tree
    ema: Tree
    key: jax.Array
    skipped: jax.Array
    sparsity: Tree = dataclasses.field(default_factory=dict)

    def inference_state(self) -> Tree:
        """Returns what a model needs besides its parameters: the model state and, of the tables, addresses and rows."""
        return with_tables(self.model_state, self.tables)


def with_tables(model_state: Tree, tables: Tree) -> Tree:
    """Returns the model state with the tables' addresses and rows, as evaluation and generation take them."""
    return {**model_state, "tables": {name: tables[name] for name in ("address", "rows")}} if tables else model_state


def member_keys(seed: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Returns (key of the initial values, key of the run) of a seed."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    return init_key, run_key


def fresh_state(
    definition: Definition,
    optimizer: optax.GradientTransformation,
    params: Tree,
    run_key: jax.Array,
    *,
    with_ema: bool,
    sparsifier: Sparsifier | None = None,
) -> TrainState:
    """Returns the state of step 0 around initial parameters. Pure."""
    masks_key, state_key = (jax.random.fold_in(run_key, name) for name in (MASKS, STATE))
    model_state = definition.initial_state(state_key)
    params, model_state, sparsity = (sparsifier or Sparsifier()).init(params, model_state, masks_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        model_state=model_state,
        tables=definition.initial_tables(jax.random.fold_in(run_key, TABLES)),
        ema=params if with_ema else {},
        key=jax.random.key_data(run_key),
        skipped=jnp.zeros((), jnp.int32),
        sparsity=sparsity,
    )


def initial_state(
    definition: Definition,
    optimizer: optax.GradientTransformation,
    seed: jax.Array | int,
    *,
    with_ema: bool,
    sparsifier: Sparsifier | None = None,
) -> TrainState:
    """Draws the state of step 0 from a seed. Pure; `Session.create` makes the same numbers leaf by leaf where they belong."""
    init_key, run_key = member_keys(seed)
    params = definition.initial_params(init_key)
    return fresh_state(definition, optimizer, params, run_key, with_ema=with_ema, sparsifier=sparsifier)


def dims_of(definition: Definition, state: TrainState, sparsifier: Sparsifier | None = None) -> TrainState:
    """Returns the logical dims of every leaf of an (abstract) state of one member."""
    return TrainState(
        step=(),
        params=definition.dims,
        opt_state=state_dims(state.opt_state, definition.dims),
        model_state=definition.state_dims,
        tables=definition.table_dims(),
        ema=definition.dims if state.ema else {},
        key=("key",),
        skipped=(),
        sparsity=(sparsifier or Sparsifier()).state_dims(state.sparsity),
    )


def unstack(tree: Any, axis: int) -> Any:
    """Renders nested dicts with unrolled block names, the layout on disk: "0_to_2": [3, ...] becomes "0", "1", "2".

    Args:
      tree: nested dicts of arrays.
      axis: position of the layers dimension in stacked leaves (1 under a population).
    """
    if not isinstance(tree, dict):
        return tree
    out: Tree = {}
    for key, value in tree.items():
        match = RUN_KEY.match(key)
        if match is None:
            out[key] = unstack(value, axis)
            continue
        first, last = int(match[1]), int(match[2])
        for n in range(first, last + 1):
            take = functools.partial(jax.lax.index_in_dim, index=n - first, axis=axis, keepdims=False)
            out[str(n)] = jax.tree.map(take, value)
    return out


def stack(tree: Any, like: Any, axis: int) -> Any:
    """The inverse of `unstack`: stacks blocks into the runs that `like` has."""
    if not isinstance(like, dict):
        return tree
    out: Tree = {}
    for key, value in like.items():
        match = RUN_KEY.match(key)
        if match is None:
            out[key] = stack(tree[key], value, axis)
        else:
            members = [tree[str(n)] for n in range(int(match[1]), int(match[2]) + 1)]
            out[key] = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *members)
    return out


def unrolled(state: TrainState, axis: int = 0) -> Tree:
    """Returns a state as nested dicts with unrolled names; empty parts are left out."""
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: unstack(part, axis) for name, part in parts.items() if not is_empty(part)}


def is_empty(part: Any) -> bool:
    """Says whether a part of a state is a nested dict without leaves."""
    return isinstance(part, dict) and all(is_empty(value) for value in part.values())


def rolled(tree: Tree, like: TrainState, axis: int = 0) -> TrainState:
    """Returns the state in the layout of `like` from nested dicts with unrolled names."""
    return TrainState(
        **{
            field.name: stack(tree.get(field.name, {}), getattr(like, field.name), axis)
            for field in dataclasses.fields(like)
        }
    )
