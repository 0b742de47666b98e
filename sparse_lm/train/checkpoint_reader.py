"""Reading a checkpoint without the model it is of: state, data state and recipe as they lie on disk."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import options as orbax_options

from sparse_lm.layers.parameter import map_leaves
from sparse_lm.layers.tree_paths import prune
from sparse_lm.train import checkpoint_files
from sparse_lm.train.checkpoint_arrays import Leaf, read_leaves

HOST_PARTS = ("rows", "slots")
"""Parts of the tables that may be in host memory."""
HOST_PATHS = tuple(f"tables.{part}." for part in HOST_PARTS)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which and what to do."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose files are all there but cannot be read."""


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


def item_handlers(processes: orbax_options.MultiprocessingOptions) -> dict[str, Any]:
    """Returns who reads and writes each item; a manager that has not saved needs them to tell what a checkpoint holds.

    Arrays are stored uncompressed: float32 weights shrink by less than a tenth, and compressing them would make one core the limit of
    a restore.
    """
    arrays = ocp.BasePyTreeCheckpointHandler(use_compression=False, multiprocessing_options=processes)
    return {
        "state": ocp.PyTreeCheckpointHandler(handler_impl=arrays, multiprocessing_options=processes),
        "data": ocp.JsonCheckpointHandler(multiprocessing_options=processes),
        "recipe": ocp.JsonCheckpointHandler(multiprocessing_options=processes),
        checkpoint_files.ITEM: checkpoint_files.InventoryHandler(),
    }


def absolute(directory: epath.Path) -> epath.Path:
    """Returns a local path made absolute, as Orbax wants it; a remote one as it is."""
    return directory if "://" in os.fspath(directory) else epath.Path(os.path.abspath(directory))


@contextlib.contextmanager
def _reader(directory: epath.Path) -> Iterator[ocp.CheckpointManager]:
    """Opens a directory for reading by this process alone, whatever the others do."""
    alone = orbax_options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=alone)
    handlers = item_handlers(alone)
    with ocp.CheckpointManager(absolute(directory), options=options, item_handlers=handlers) as manager:
        yield manager


def saved_recipe(directory: epath.Path, step: int) -> dict[str, Any]:
    """Returns the content of config.json as it was when a step was saved."""
    with _reader(directory) as manager:
        return manager.restore(step, args=ocp.args.Composite(recipe=ocp.args.JsonRestore()))["recipe"]


def read_checkpoint(
    directory: epath.PathLike, step: int | None = None, *, without: tuple[str, ...] = (), on_host: bool = False
) -> Source:
    """Reads a checkpoint without knowing its model, onto one device of this process.

    Args:
      directory: RUN/checkpoints.
      step: which; None: the newest that is not damaged.
      without: what is left on disk, by the beginning of its path, such as "opt_state" or "tables.slots".
      on_host: whether rows and slots of tables are read into host memory, as numpy arrays.

    Raises:
      CheckpointError: when there is no such checkpoint, or it is damaged.
    """
    directory = epath.Path(directory)
    if not directory.exists():
        raise CheckpointError(f"{directory} does not exist: no checkpoint to read")
    finished = sorted(checkpoint_files.step_directories(directory))
    if step is None:
        step, notes = checkpoint_files.newest_sound_step(directory, keep_damaged=True)
        if step is None:
            raise CheckpointError("\n".join([f"{directory} has no finished checkpoint; finished: none", *notes]))
    elif step not in finished:
        raise CheckpointError(f"{directory} has no finished checkpoint {step}; finished: {finished or 'none'}")
    elif problems := checkpoint_files.damage(directory / str(step)):
        raise CheckpointError(f"checkpoint {step} is damaged: " + "; ".join(problems))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    left = tuple(f"{path}." for path in without)
    with _reader(directory) as manager:
        items = ocp.args.Composite(data=ocp.args.JsonRestore(), recipe=ocp.args.JsonRestore())
        restored = manager.restore(step, args=items)
        found = prune(array_tree(manager, step), lambda path: not f"{path}.".startswith(left))

    def leaf(path: str, saved: Any) -> Leaf:
        where = None if on_host and path.startswith(HOST_PATHS) else device
        return Leaf((path,), None, tuple(saved.shape), np.dtype(saved.dtype), where)

    try:
        state = read_arrays(directory, step, map_leaves(leaf, found))
    except jax.errors.JaxRuntimeError:
        raise
    except Exception as error:
        raise DamagedCheckpoint(f"checkpoint {step} in {directory} cannot be read: {error}") from error
    return Source(step, state, restored["data"], restored["recipe"])


def array_tree(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """Returns the nested dict of array metadata of a finished step."""
    found = manager.item_metadata(step)["state"]
    return found.tree if hasattr(found, "tree") else found


def read_arrays(directory: epath.Path, step: int, leaves: Any) -> Any:
    """Returns the tree with the arrays that its leaves name."""
    flat, shape = jax.tree.flatten(leaves, is_leaf=lambda node: isinstance(node, Leaf))
    return jax.tree.unflatten(shape, read_leaves(absolute(directory) / str(step) / "state", flat))
