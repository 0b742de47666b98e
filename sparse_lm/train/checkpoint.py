"""Checkpoints: one thin module over Orbax. One atomic directory a step holds the state, the data state and the recipe.

Saving copies the state on the device, which takes milliseconds; a thread moves the copy to the host and writes it while training
goes on. The layout on disk has unrolled block names whatever the layout in memory, so scanned and unrolled runs, and any mesh,
read each other's checkpoints.
"""

import concurrent.futures
import dataclasses
import logging
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from orbax.checkpoint import checkpoint_managers

from sparse_lm.config import Config
from sparse_lm.layers.parameter import RUN_KEY, map_leaves
from sparse_lm.parallel.rules import spec_of
from sparse_lm.train.state import TrainState, rolled, unrolled

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports each save at warning level.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints(Config):
    """When to save and what to keep."""

    every: int = 500
    """Steps between two saves; 0: only at the end (and on SIGTERM)."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_every: int | None = None
    """Also keep every checkpoint whose step is a multiple of this; None: none."""
    keep_best: int = 0
    """Also keep this many checkpoints with the lowest validation loss."""

    def check(self) -> None:
        """See Config.check."""
        self.require(self.every >= 0, "every", "0 (only at the end) or above")
        self.require(self.keep_last >= 1, "keep_last", "at least 1")
        self.require(self.keep_every is None or self.keep_every >= 1, "keep_every", "None or at least 1")
        self.require(self.keep_best >= 0, "keep_best", "0 or above")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which and what to do."""


def without_layers(dims: Any) -> Any:
    """Returns a tree of dims with unrolled block names: the layers dim of stacked runs removed."""
    if not isinstance(dims, dict):
        return dims
    out: dict[str, Any] = {}
    for key, value in dims.items():
        match = RUN_KEY.match(key)
        if match is None:
            out[key] = without_layers(value)
            continue
        inner = map_leaves(lambda _, names: tuple(name for name in names if name != "layers"), value)
        out.update({str(n): inner for n in range(int(match[1]), int(match[2]) + 1)})
    return out


class Checkpointer:
    """Saves and restores one run's checkpoints in RUN/checkpoints.

    Args:
      directory: RUN/checkpoints.
      config: what to keep.
      like: abstract state in the layout in memory.
      dims: logical dims of every leaf, in the same layout.
      mesh: where restored arrays go.
      population: whether every leaf has a leading members dimension.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        config: Checkpoints,
        like: TrainState,
        dims: TrainState,
        mesh: Mesh,
        *,
        population: bool,
    ):
        policies: list[Any] = [checkpoint_managers.LatestN(config.keep_last)]
        if config.keep_every:
            policies.append(checkpoint_managers.EveryNSteps(config.keep_every))
        if config.keep_best:
            best = checkpoint_managers.BestN(
                get_metric_fn=lambda metrics: -metrics["loss"],
                n=config.keep_best,
                keep_checkpoints_without_metrics=False,
            )
            policies.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies), cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options, item_handlers=_handlers())
        self._directory, self._like, self._mesh = directory, like, mesh
        self._axis = 1 if population else 0
        self._dims = without_layers({field.name: getattr(dims, field.name) for field in dataclasses.fields(dims)})
        self._copy = jax.jit(lambda state: jax.tree.map(jnp.copy, unrolled(state, self._axis)))
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future | None = None

    def latest(self) -> int | None:
        """Returns the newest finished step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Returns all finished steps, oldest first."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
          CheckpointError: if it failed.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except Exception as error:
            raise CheckpointError(
                f"saving to {self._directory} failed: {error}. Finished checkpoints: {self.steps()}"
            ) from error

    def save(
        self, step: int, state: TrainState, data_state: dict[str, Any], recipe: dict[str, Any], loss: float
    ) -> None:
        """Saves a state in the background; waits for the save before it.

        Args:
          step: finished steps.
          state: the state after them.
          data_state: the data stream's state after the last consumed batch.
          recipe: the run's config as JSON-ready dictionaries.
          loss: the newest validation loss, for `keep_best`; NaN when there is none.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        copy = self._copy(state)
        jax.block_until_ready(copy)

        def write() -> None:
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(copy), data=ocp.args.JsonSave(data_state), recipe=ocp.args.JsonSave(recipe)
            )
            metrics = {"loss": loss} if np.isfinite(loss) else None
            self._manager.save(step, args=items, metrics=metrics)
            self._manager.wait_until_finished()

        self._pending = self._thread.submit(write)

    def _abstract(self) -> dict[str, Any]:
        shapes = jax.eval_shape(lambda state: unrolled(state, self._axis), self._like)

        def leaf(_: str, dims: tuple[str, ...], shape: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=NamedSharding(self._mesh, spec_of(dims, shape.shape, self._mesh))
            )

        return map_leaves(leaf, {name: self._dims[name] for name in shapes}, shapes)

    def restore(self, step: int, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores (state, data state) of a finished step onto the current mesh.

        Raises:
          CheckpointError: when the checkpoint's leaves are not those of this model, with the paths.
        """
        wanted = self._abstract()
        problems = mismatches(wanted, _tree(self._manager, step))
        if problems:
            raise CheckpointError(
                f"checkpoint {step} in {self._directory} does not fit this recipe:\n" + "\n".join(problems)
            )
        items = ocp.args.Composite(state=ocp.args.StandardRestore(wanted), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        place = jax.jit(lambda tree: rolled(tree, self._like, self._axis), out_shardings=shardings)
        return place(restored["state"]), restored["data"]

    def close(self) -> None:
        """Waits for the last save and closes."""
        self.wait()
        self._thread.shutdown()
        self._manager.close()


def mismatches(wanted: Any, found: Any) -> list[str]:
    """Lists missing, unexpected and reshaped leaves of a checkpoint by path."""
    shapes: list[dict[str, tuple[int, ...]]] = []
    for tree in (wanted, found):
        flat: dict[str, tuple[int, ...]] = {}
        map_leaves(lambda path, leaf, flat=flat: flat.__setitem__(path, tuple(leaf.shape)), tree)
        shapes.append(flat)
    want, have = shapes
    lines = [f"  missing:    {path} {want[path]}" for path in sorted(want.keys() - have.keys())]
    lines += [f"  unexpected: {path} {have[path]}" for path in sorted(have.keys() - want.keys())]
    both = sorted(want.keys() & have.keys())
    return lines + [f"  reshaped:   {p} {have[p]} -> {want[p]}" for p in both if want[p] != have[p]]


class Source(NamedTuple):
    """A checkpoint read as it is.

    Attributes:
      step: finished steps.
      state: nested dicts of arrays with unrolled names.
      data_state: the data stream's state.
      recipe: the content of its run's config.json.
    """

    step: int
    state: dict[str, Any]
    data_state: dict[str, Any]
    recipe: dict[str, Any]


def _handlers() -> dict[str, Any]:
    """Returns who reads and writes each item; a manager that has not saved needs them to tell what a checkpoint holds."""
    return {
        "state": ocp.StandardCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
        "recipe": ocp.JsonCheckpointHandler(),
    }


def read_checkpoint(directory: pathlib.Path, step: int | None = None, *, without: tuple[str, ...] = ()) -> Source:
    """Reads a checkpoint without knowing its model.

    Args:
      directory: RUN/checkpoints.
      step: which; None: the newest.
      without: parts of the state that are left on disk, such as "opt_state".

    Raises:
      CheckpointError: when there is no such checkpoint.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist: no checkpoint to read")
    options = ocp.CheckpointManagerOptions(read_only=True)
    handlers = {**_handlers(), "state": ocp.PyTreeCheckpointHandler()}  # the same files, and it reads them in part
    with ocp.CheckpointManager(directory.absolute(), options=options, item_handlers=handlers) as manager:
        steps = sorted(manager.all_steps())
        chosen = step if step is not None else max(steps, default=-1)
        if chosen not in steps:
            wanted = "checkpoint" if step is None else f"checkpoint {step}"
            raise CheckpointError(f"{directory} has no finished {wanted}; finished: {steps or 'none'}")
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        found = {name: part for name, part in _tree(manager, chosen).items() if name not in without}
        abstract = map_leaves(lambda _, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), found)
        state = ocp.args.PyTreeRestore(
            abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
        )
        items = ocp.args.Composite(state=state, data=ocp.args.JsonRestore(), recipe=ocp.args.JsonRestore())
        restored = manager.restore(chosen, args=items)
    return Source(chosen, restored["state"], restored["data"], restored["recipe"])


def _tree(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """Returns the nested dict of array metadata of a finished step."""
    found = manager.item_metadata(step)["state"]
    return found.tree if hasattr(found, "tree") else found
