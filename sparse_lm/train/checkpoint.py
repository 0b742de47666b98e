"""Checkpoints: one thin module over Orbax. One atomic directory a step holds the state, the data state and the recipe.

Saving copies the state on the device, behind the step under way and without waiting for it; a thread moves the copy to the host and
writes it while training goes on. Tables in host memory are copied there, before training goes on. The layout on disk has unrolled
block names whatever the layout in memory, so scanned and unrolled runs, and any mesh, read each other's checkpoints: each process reads
the parts that its devices hold (`checkpoint_arrays`). It also writes those parts; Orbax then waits at barriers of the coordination
service, never on the devices, so a save may run beside steps.
"""

import concurrent.futures
import contextlib
import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint import options as orbax_options

from sparse_lm.config import Config
from sparse_lm.layers.parameter import RUN_KEY, map_leaves
from sparse_lm.memory.host_array import HostArray
from sparse_lm.memory.owners import Owners, mesh_of_memories
from sparse_lm.parallel.rules import spec_of
from sparse_lm.train import checkpoint_files
from sparse_lm.train.checkpoint_arrays import Leaf, aligned
from sparse_lm.train.checkpoint_reader import (
    HOST_PARTS,
    HOST_PATHS,
    CheckpointError,
    DamagedCheckpoint,
    absolute,
    array_tree,
    item_handlers,
    read_arrays,
)
from sparse_lm.train.state import TrainState, unrolled

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax warns of each save, and prints what it also raises.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints(Config):
    """When to save and what to keep."""

    directory: str | None = None
    """Where checkpoints are kept, seen by all processes; may be remote (gs://..., s3://...). None: RUN/checkpoints."""
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
        self.require(self.directory is None or bool(self.directory), "directory", "None or a path")
        self.require(self.every >= 0, "every", "0 (only at the end) or above")
        self.require(self.keep_last >= 1, "keep_last", "at least 1")
        self.require(self.keep_every is None or self.keep_every >= 1, "keep_every", "None or at least 1")
        self.require(self.keep_best >= 0, "keep_best", "0 or above")


def checkpoint_directory(run_dir: epath.PathLike, config: Checkpoints) -> epath.Path:
    """Returns where a run keeps its checkpoints."""
    return epath.Path(config.directory) if config.directory else epath.Path(run_dir) / "checkpoints"


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
      owners: who keeps rows and slots of tables in host memory; None: they are on devices.
      population: whether every leaf has a leading members dimension.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        config: Checkpoints,
        like: TrainState,
        dims: TrainState,
        mesh: Mesh,
        *,
        population: bool,
        owners: Owners | None = None,
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
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        everybody = orbax_options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            create=False,
            multiprocessing_options=everybody,
        )
        self._directory, self._like, self._mesh = directory, like, mesh
        self._axis, self._owners = 1 if population else 0, owners
        self._memories = None if owners is None else mesh_of_memories(owners)
        self._dims = without_layers({field.name: getattr(dims, field.name) for field in dataclasses.fields(dims)})
        self._abstract = self._abstract_on_disk()
        handlers = item_handlers(everybody)
        self._manager = ocp.CheckpointManager(absolute(directory), options=options, item_handlers=handlers)
        self._copy = jax.jit(
            lambda state: jax.tree.map(jnp.copy, unrolled(state, self._axis)),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, self._devices_part(self._abstract)),
        )
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, concurrent.futures.Future] | None = None

    def _on_devices(self, state: TrainState) -> TrainState:
        if self._owners is None:
            return state
        return dataclasses.replace(state, tables={"address": state.tables["address"]})

    def _devices_part(self, tree: dict[str, Any]) -> dict[str, Any]:
        return tree if self._owners is None else {**tree, "tables": {"address": tree["tables"]["address"]}}

    def prepare(self, state: TrainState) -> None:
        """Compiles the copy of a state that a save begins with, so that the first save does not hold up the steps for it."""
        self._copy = self._copy.lower(self._on_devices(state)).compile()

    def steps(self) -> list[int]:
        """Returns all finished steps, oldest first."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
          CheckpointError: if it failed; earlier checkpoints are as they were.
        """
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except Exception as error:
            if jax.process_index() == 0:
                for left in self._directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                    left.rmtree(missing_ok=True)
            finished = sorted(checkpoint_files.step_directories(self._directory))
            message = f"saving step {step} to {self._directory} failed: {error}. Finished checkpoints: {finished}"
            raise CheckpointError(message) from error

    def poll(self) -> None:
        """Raises CheckpointError if the save under way has failed; does not wait."""
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def save(
        self, step: int, state: TrainState, data_state: dict[str, Any], recipe: dict[str, Any], loss: float
    ) -> None:
        """Saves a state in the background; waits for the save before it, not for the state.

        Args:
          step: finished steps.
          state: the state after them; may be donated to the next step at once.
          data_state: the data stream's state after the last consumed batch.
          recipe: the run's config as JSON-ready dictionaries.
          loss: the newest validation loss, for `keep_best`; NaN when there is none.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        copies = [self._copy(self._on_devices(state))]
        if self._owners is not None:
            held = {name: state.tables[name] for name in HOST_PARTS}
            copies[0]["tables"].update(map_leaves(lambda _, leaf: self._copy_held(leaf), held))

        def write() -> None:
            items = ocp.args.Composite(
                state=ocp.args.PyTreeSave(copies.pop()),
                data=ocp.args.JsonSave(data_state),
                recipe=ocp.args.JsonSave(recipe),
                inventory=checkpoint_files.InventorySave(),
            )
            metrics = {"loss": loss} if np.isfinite(loss) else None
            self._manager.save(step, args=items, metrics=metrics)
            self._manager.wait_until_finished()

        self._pending = step, self._thread.submit(write)

    def _copy_held(self, held: HostArray) -> np.ndarray | jax.Array:
        """Returns a copy of rows in host memory; of several processes, the array of them all."""
        if self._memories is None:
            return held.values.copy()
        copy = aligned(held.values.shape, held.dtype)
        np.copyto(copy, held.values)
        sharding = NamedSharding(self._memories, P("owner"))
        (device,) = sharding.addressable_devices
        return jax.make_array_from_single_device_arrays(held.shape, sharding, [jax.device_put(copy, device)])

    def _abstract_on_disk(self) -> dict[str, Any]:
        shapes = jax.eval_shape(lambda state: unrolled(state, self._axis), self._like)

        def leaf(path: str, dims: tuple[str, ...], shape: Any) -> jax.ShapeDtypeStruct:
            if self._owners is not None and path.startswith(HOST_PATHS):
                return jax.ShapeDtypeStruct(shape.shape, shape.dtype)
            return jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=NamedSharding(self._mesh, spec_of(dims, shape.shape, self._mesh))
            )

        return map_leaves(leaf, {name: self._dims[name] for name in shapes}, shapes)

    def restore(self, step: int, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores (state, data state) of a finished step onto the current mesh.

        Raises:
          CheckpointError: when the checkpoint's leaves are not those of this model, with the paths.
          DamagedCheckpoint: when a file cannot be read.
        """
        problems = mismatches(self._abstract, array_tree(self._manager, step))
        if problems:
            raise CheckpointError(
                f"checkpoint {step} in {self._directory} does not fit this recipe:\n" + "\n".join(problems)
            )
        leaves = _leaves(self._like, shardings, self._axis, self._owners)
        try:
            state = read_arrays(self._directory, step, leaves)
            data = self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]
        except jax.errors.JaxRuntimeError:
            raise  # a device failed, for want of memory perhaps: the files are sound
        except Exception as error:
            message = f"checkpoint {step} in {self._directory} cannot be read: {error}"
            raise DamagedCheckpoint(message) from error
        if (owners := self._owners) is not None:
            for part in HOST_PARTS:
                read, like = state["tables"][part], self._like.tables[part]
                state["tables"][part] = map_leaves(lambda _, leaf, like: owners.keep(leaf, like.shape[0]), read, like)
        return TrainState(**state), data

    def close(self) -> None:
        """Waits for the last save and closes."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            with contextlib.suppress(Exception):  # Orbax raises once more what `wait` has raised
                self._manager.close()


def _leaves(like: TrainState, shardings: TrainState, axis: int, owners: Owners | None) -> dict[str, Any]:
    """Returns which arrays on disk become which leaf: nested dicts like the state, with a Leaf for each array.

    What has no sharding is rows, of which this process reads those that it keeps.
    """

    def walk(like: Any, shardings: Any, names: tuple[str, ...], stacked: int | None) -> Any:
        if not isinstance(like, dict):
            rows = owners.rows(like.shape[0]) if owners is not None and shardings is None else None
            return Leaf(names, stacked, like.shape, like.dtype, shardings, rows)
        out: dict[str, Any] = {}
        for key, inner in like.items():
            below = None if shardings is None else shardings.get(key)
            if match := RUN_KEY.match(key):
                members = tuple(f"{names[0]}.{n}" for n in range(int(match[1]), int(match[2]) + 1))
                out[key] = walk(inner, below, members, axis)
            else:
                out[key] = walk(inner, below, tuple(f"{name}.{key}" for name in names), stacked)
        return out

    fields = [field.name for field in dataclasses.fields(like)]
    return {name: walk(getattr(like, name), getattr(shardings, name), (name,), None) for name in fields}


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
