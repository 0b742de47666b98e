"""The training step: one pure function of (state, batch, learning-rate multiplier), with no branch per mechanism.

Phases: rows of the memory's tables; gradients by the effective weights, summed over microbatches; update of the parameters; update
of the rows that were read; advance of the model state; masks and topology of sparse weights. A step whose loss or gradient
is not finite changes nothing but the step number and the count of skipped steps.

Legend: B batch, L length, M microbatches.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparse_lm.config import Config
from sparse_lm.layers.parameter import map_leaves
from sparse_lm.model.definition import Batch, Definition, token_info
from sparse_lm.model.transformer import advance
from sparse_lm.train.optimizer import Optimizer, ema_update, global_norm_by_group
from sparse_lm.train.state import TrainState
from sparse_lm.weight_sparsity.door import Moment, Sparsifier, same_for_all

PULSE = ("loss", "grad_norm", "learning_rate", "skipped", "tokens")
"""The scalars that the loop reads of every step, in one array."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Config):
    """Length and numerics of the training run."""

    steps: int = 1000
    """Updates of the whole schedule."""
    microbatches: int = 1
    """Pieces of a batch whose gradients are summed before the update; results do not depend on it."""
    clip_norm: float | None = 1.0
    """Global gradient norm above which gradients are scaled down; None: never. Tables are not counted."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the parameters; None: no average."""
    skip_limit: int = 10
    """Steps in a row that may be skipped for a NaN or infinity before the run stops."""

    def check(self) -> None:
        """See Config.check."""
        self.require(self.steps >= 1, "steps", "at least 1")
        self.require(self.microbatches >= 1, "microbatches", "at least 1")
        self.require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "None or above 0")
        self.require(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", "None or between 0 and 1")
        self.require(self.skip_limit >= 0, "skip_limit", "0 or above")


def split_microbatches(batch: Batch, microbatches: int, group_sequences: int) -> Batch:
    """Splits [B, L] arrays into [M, B / M, L] so that every shard keeps its rows and no routing group is cut."""

    def split(a_BL: jax.Array) -> jax.Array:
        grouped = a_BL.reshape(-1, microbatches, group_sequences, *a_BL.shape[1:])
        return jnp.moveaxis(grouped, 1, 0).reshape(microbatches, -1, *a_BL.shape[1:])

    return {name: split(array) for name, array in batch.items()}


def join_microbatches(parts: Batch, group_sequences: int) -> Batch:
    """The inverse of `split_microbatches`."""

    def join(a: jax.Array) -> jax.Array:
        grouped = a.reshape(a.shape[0], -1, group_sequences, *a.shape[2:])
        return jnp.moveaxis(grouped, 0, 1).reshape(-1, *a.shape[2:])

    return {name: join(array) for name, array in parts.items()}


def gradients(
    definition: Definition,
    params: Any,
    model_state: Any,
    batch: Batch,
    microbatches: int,
    key: jax.Array,
    rows: dict[str, jax.Array] | None = None,
) -> tuple[jax.Array, Any, dict[str, Any], Any]:
    """Computes the gradients of a whole batch, equal for every number of microbatches.

    Returns:
      (objective, gradient, {"metrics", "statistics"}, gradient of the memory's rows).
    """
    rows = rows or {}
    units = definition.units(batch)

    def value_and_grad(part: Batch, rows: Any, index: jax.Array | int) -> Any:
        part_key = jax.random.fold_in(key, index)

        def objective(params: Any, rows: Any) -> Any:
            return definition.objective(params, model_state, part, units, part_key, rows=rows)

        value, (grads, row_grads) = jax.value_and_grad(objective, (0, 1), has_aux=True)(params, rows)
        return (value, grads), row_grads

    if microbatches == 1:
        ((objective, aux), grads), row_grads = value_and_grad(batch, rows, 0)
        return objective, grads, aux, row_grads
    sequences = definition.group_sequences()
    parts = split_microbatches(batch, microbatches, sequences), split_microbatches(rows, microbatches, sequences)
    first = jax.tree.map(lambda a: a[0], parts)
    sums = jax.eval_shape(value_and_grad, *first, 0)[0]
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), sums)

    def add(total: Any, part: tuple[Batch, Any, jax.Array]) -> tuple[Any, Any]:
        found, row_grads = value_and_grad(*part)
        return jax.tree.map(jnp.add, total, found), row_grads

    ((objective, aux), grads), row_grads = jax.lax.scan(add, zeros, (*parts, jnp.arange(microbatches)))
    return objective, grads, aux, join_microbatches(row_grads, sequences)


def build_step(
    definition: Definition,
    optimizer: Optimizer,
    train: Train,
    sparsifier: Sparsifier | None = None,
    members: str | None = None,
    changes: bool = True,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, Any]]]:
    """Builds the pure step.

    Args:
      definition: the model.
      optimizer: the optimizer.
      train: length and numerics.
      sparsifier: what makes weights sparse; None: nothing does.
      members: name of the axis over which the step will be vmapped, or None.
      changes: False builds the program for the steps that `Sparsifier.apart` does not name.

    Returns:
      step(state, batch, multiplier) -> (state, metrics). `multiplier` scales the learning rate (1 outside populations).
      metrics: {"pulse": float32 array in the order of PULSE, "group_norms": {group: norm}, "blocks", "memory": (sum, count) pairs,
      "sparsity": see `Sparsifier.numbers`}.
    """
    transformation = optimizer.build(definition.dims, definition.learning_rate_scales(optimizer))
    sparse = sparsifier or Sparsifier()

    def step(state: TrainState, batch: Batch, multiplier: jax.Array) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        rows, address = definition.fetch(state.tables, token_info(batch))

        def at(weights: Any) -> Any:
            return gradients(definition, weights, state.model_state, batch, train.microbatches, key, rows)

        _, dense_grads, aux, row_grads = at(sparse.forward_params(state.params, state.sparsity, state.step))
        grads = sparse.optimizer_grads(dense_grads, state.params, state.sparsity, state.step)
        group_norms = global_norm_by_group(grads, depth=2)
        norm = jnp.sqrt(sum(jnp.square(n) for n in group_norms.values()))
        group_norms |= {f"tables.{name}": jnp.linalg.norm(grad.reshape(-1)) for name, grad in row_grads.items()}
        loss_sum, loss_count = aux["metrics"]["loss"]
        loss = loss_sum / jnp.maximum(loss_count, 1.0)
        finite = jnp.isfinite(loss) & jnp.isfinite(sum(group_norms.values()))

        # The clipping factor and the mask of a skipped step are one multiplication, fused into the update.
        clip = 1.0 if train.clip_norm is None else jnp.minimum(1.0, train.clip_norm / jnp.maximum(norm, 1e-12))
        grads = jax.tree.map(lambda g: jnp.where(finite, g * clip, 0.0), grads)
        learning_rate = optimizer.schedule_at(state.step, train.steps) * optimizer.learning_rate * multiplier
        learning_rate = learning_rate * sparse.rate_multiplier(state.step)
        moves = finite & jnp.logical_not(sparse.replaces(state.step))
        updates, opt_state = transformation.update(grads, state.opt_state, state.params)

        def keep(new: Any, old: Any, sound: jax.Array = finite) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(sound, n, o), new, old)

        rate = jnp.where(moves, learning_rate, 0.0)
        params = map_leaves(
            lambda _, p, u, frozen: p if frozen else p - rate * u, state.params, updates, definition.frozen
        )
        change = sparse.update(
            Moment(
                step=same_for_all(state.step, members),
                finite=finite,
                key=key,
                before=state.params,
                params=params,
                opt_state=keep(opt_state, state.opt_state, moves),
                model_state=keep(advance(definition.config, state.model_state, aux["statistics"]), state.model_state),
                sparsity=state.sparsity,
                grads=dense_grads,
                ema=state.ema,
                changes=changes,
                gradient=lambda weights: at(weights)[1],
            )
        )
        ema = change.ema
        if train.ema_decay is not None:
            ema = keep(ema_update(ema, change.params, train.ema_decay, state.step), ema)
            ema = sparse.only_existing(ema, change.sparsity)
        new_state = TrainState(
            step=state.step + 1,
            params=change.params,
            opt_state=change.opt_state,
            model_state=change.model_state,
            tables=definition.update_tables(state.tables, address, row_grads, learning_rate, state.step + 1, ~finite),
            ema=ema,
            key=state.key,
            skipped=jnp.where(finite, 0, state.skipped + 1),
            sparsity=change.sparsity,
        )
        pulse = jnp.stack([loss, norm, learning_rate, new_state.skipped.astype(jnp.float32), loss_count])
        measured = {name: aux["metrics"][name] for name in ("blocks", "memory")}
        measured["sparsity"] = sparse.numbers(change.sparsity)
        return new_state, {"pulse": pulse, "group_norms": group_norms, **measured}

    return step
