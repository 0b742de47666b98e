"""Measures checkpoints on this machine: how long a save stalls training, how fast a restore is, and how much memory it takes.

Each measurement that depends on memory runs in a process of its own, so that its peak is its own.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.config import override
from sparse_lm.parallel.mesh import MeshShape
from sparse_lm.parallel.rules import replicated
from sparse_lm.recipe import Recipe
from sparse_lm.train import loop
from sparse_lm.train.checkpoint import Checkpointer, Checkpoints
from sparse_lm.train.state import TrainState

BLOCKS = 16
"""Blocks of the made-up state; they are stacked in memory and apart on disk, as in a scanned run."""


def abstract_state(gigabytes: float) -> tuple[TrainState, TrainState]:
    """Returns (abstract state, dims) like a scanned dense model with AdamW: parameters and two moments, float32."""
    # A block has 12 D^2 parameters: q, k, v, o and two feed-forward matrices of 4 D.
    width = int((gigabytes * 1e9 / (3 * 4 * 12 * BLOCKS)) ** 0.5) // 128 * 128
    run = f"0_to_{BLOCKS - 1}"
    shapes = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width)}
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}
    leaves = {name: jax.ShapeDtypeStruct((BLOCKS, *shape), jnp.float32) for name, shape in shapes.items()}
    params = {"blocks": {run: leaves}}
    dims = {"blocks": {run: dict.fromkeys(shapes, ("layers", "embed", "ffn"))}}
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    state = TrainState(scalar, params, {"mu": params, "nu": params}, {}, {}, {}, key, scalar)
    return state, TrainState((), dims, {"mu": dims, "nu": dims}, {}, {}, {}, ("key",), ())


def state_bytes(state: TrainState) -> int:
    """Bytes of a state."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def open_checkpointer(directory: pathlib.Path, gigabytes: float) -> tuple[Checkpointer, TrainState, Any]:
    """Returns (checkpointer, abstract state, shardings) of the made-up state on one device."""
    like, dims = abstract_state(gigabytes)
    mesh = MeshShape(data=1).build(jax.devices()[:1])
    checkpointer = Checkpointer(directory, Checkpoints(), like, dims, mesh, population=False)
    return checkpointer, like, jax.tree.map(lambda _: replicated(mesh), like)


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def save_once(directory: pathlib.Path, gigabytes: float) -> dict[str, Any]:
    """Saves a random state: seconds until training could go on, and until it is on disk."""
    checkpointer, like, _ = open_checkpointer(directory, gigabytes)
    keys = iter(jax.random.split(jax.random.key(0), 100))

    def draw(leaf: Any) -> jax.Array:
        return (
            jax.random.normal(next(keys), leaf.shape)
            if leaf.dtype == jnp.float32
            else jnp.zeros(leaf.shape, leaf.dtype)
        )

    state = jax.block_until_ready(jax.tree.map(draw, like))
    start = time.perf_counter()
    checkpointer.save(1, state, {"windows": 0}, {}, float("nan"))
    handed_over = time.perf_counter() - start
    checkpointer.wait()
    written = time.perf_counter() - start
    checkpointer.close()
    return {"bytes": state_bytes(like), "handed_over_s": handed_over, "written_s": written}


def restore_once(directory: pathlib.Path, gigabytes: float) -> dict[str, Any]:
    """Restores that state: seconds, and the peak of resident memory above what there was before, sampled every 5 ms."""
    checkpointer, like, shardings = open_checkpointer(directory, gigabytes)
    jax.block_until_ready(jnp.zeros(8))
    before, peak, done = resident_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    state, _ = checkpointer.restore(1, shardings)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    size = state_bytes(like)
    return {"bytes": size, "restore_s": seconds, "memory_peak_over_state": (peak[0] - before) / size}


def read_raw(directory: pathlib.Path, _: float) -> dict[str, Any]:
    """Reads the same files into memory with plain reads of 8 MiB, several files at a time: what the disk gives."""
    import concurrent.futures

    files = [path for path in directory.rglob("*") if path.is_file()]

    def read(path: pathlib.Path) -> int:
        total = 0
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(8 << 20):
                total += len(piece)
        return total

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        total = sum(pool.map(read, files))
    return {"bytes": total, "read_s": time.perf_counter() - start, "files": len(files)}


def forget_cached_files() -> bool:
    """Drops the system's file cache, so that reading means reading from the disk; needs root. Says whether it worked."""
    os.sync()
    try:
        pathlib.Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


def stall(recipe: Recipe, steps: int, every: int) -> dict[str, Any]:
    """Trains a recipe with and without saves: what a save takes from training.

    The stall is the time that the main thread spends in the call that starts a save, over the steps between two saves. On a CPU the
    thread that writes also takes arithmetic time from the steps, so the slowdown of the whole run is given beside it.
    """
    for path, value in {
        "train.steps": steps,
        "log.display": "off",
        "log.tensorboard": False,
        "log.log_every": steps,
        "validation.every": 0,
    }.items():
        recipe = override(recipe, path, value)
    calls: list[float] = []
    save, polls = Checkpointer.save, []

    def timed(self: Checkpointer, *arguments: Any) -> None:
        start = time.perf_counter()
        save(self, *arguments)
        calls.append(time.perf_counter() - start)

    def clock(self: Checkpointer) -> None:
        polls.append(time.perf_counter())

    found: dict[str, Any] = {"steps": steps, "every": every}
    for name, saves in (("without", 0), ("with", every)):
        calls.clear()
        polls.clear()
        with (
            tempfile.TemporaryDirectory() as run_dir,
            mock.patch.object(Checkpointer, "save", timed),
            mock.patch.object(Checkpointer, "poll", clock),
        ):
            loop.train(override(recipe, "checkpoint.every", saves), pathlib.Path(run_dir))
        # From the second save on: the first compiles the copy. The last save is that of the end.
        begin = min(2 * every, steps - 1)
        found[f"step_s_{name}"] = (polls[-1] - polls[begin]) / (len(polls) - 1 - begin)
        if saves:
            middle = calls[1:-1]
            found["save_call_s"] = sum(middle) / len(middle)
            found["saves_timed"] = len(middle)
    found["stall_share"] = found["save_call_s"] / (every * found["step_s_without"])
    found["slowdown"] = found["step_s_with"] / found["step_s_without"] - 1
    return found


MEASUREMENTS = {"save": save_once, "restore": restore_once, "read": read_raw}


def in_process(name: str, directory: pathlib.Path, gigabytes: float) -> dict[str, Any]:
    """Runs one measurement in a process of its own."""
    code = (
        "import json, pathlib, sys; from sparse_lm.train import checkpoint_benchmark as b; "
        "print(json.dumps(b.MEASUREMENTS[sys.argv[1]](pathlib.Path(sys.argv[2]), float(sys.argv[3]))))"
    )
    command = [sys.executable, "-c", code, name, str(directory), str(gigabytes)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def benchmark(directory: pathlib.Path, gigabytes: float, *, repeats: int = 3) -> dict[str, Any]:
    """Saves once, then reads plainly and restores in turn, each from a cold cache where this user may drop it."""
    found: dict[str, Any] = {"save": in_process("save", directory, gigabytes), "runs": []}
    for _ in range(repeats):
        cold = forget_cached_files()
        raw = in_process("read", directory, gigabytes)
        cold &= forget_cached_files()
        restored = in_process("restore", directory, gigabytes)
        row = {
            "cold": cold,
            "read_gb_s": raw["bytes"] / raw["read_s"] / 1e9,
            "restore_gb_s": restored["bytes"] / restored["restore_s"] / 1e9,
            "memory_peak_over_state": restored["memory_peak_over_state"],
        }
        row["share_of_disk"] = row["restore_gb_s"] / row["read_gb_s"]
        found["runs"].append(row)
    return found
