"""Training runs in processes of their own, started in a fraction of a second: a server that has imported everything forks them.

A child is told what to do by plain values; hooks are names of functions below, so that nothing of a test has to travel.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import signal
import socket
import sys
import threading
import time
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["processes", "tiny", "sparse_lm.train.loop"])

STEPS = 12


@dataclasses.dataclass(frozen=True)
class Child:
    """What one process of a run does.

    Attributes:
      folder: holds the texts, the prepared data and the compiled programs.
      run_dir: the run's directory.
      changes: fields of the recipe, as for `tiny.recipe`.
      devices: fake devices of the process.
      distributed: fields of `Distributed`.
      hook: name of a function below that is called with its arguments before training.
    """

    folder: str
    run_dir: str
    changes: dict[str, Any]
    devices: int = 1
    distributed: dict[str, Any] | None = None
    hook: tuple[Any, ...] = ()

    def log(self) -> pathlib.Path:
        """Where the output goes."""
        number = (self.distributed or {}).get("process", 0)
        return pathlib.Path(f"{self.run_dir}.{number}.log")

    def start(self) -> Any:
        """Starts the process."""
        process = CONTEXT.Process(target=main, args=(self,), daemon=True)
        process.start()
        return process


def recipe(folder: pathlib.Path, changes: dict[str, Any], distributed: dict[str, Any] | None = None) -> Any:
    """A dense run of one block that any number of processes can share."""
    import tiny

    from sparse_lm.parallel.distributed import Distributed

    start = {"train__steps": STEPS, "model__layers": 1, "data__batch_size": 8, "validation__every": 0}
    start |= {"checkpoint__every": 2, "distributed": Distributed(**distributed or {})}
    return tiny.recipe(folder, **{**start, **changes})


def main(child: Child) -> None:
    """Runs in the child: what scripts/pretrain.py does up to the end of training."""
    output = os.open(child.log(), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", child.devices)
    jax.config.update("jax_compilation_cache_dir", f"{child.folder}/compiled")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    from sparse_lm.parallel.distributed import join
    from sparse_lm.train.checkpoint_reader import CheckpointError
    from sparse_lm.train.loop import TrainingDiverged, train

    if child.hook:
        globals()[child.hook[0]](*child.hook[1:])
    whole = recipe(pathlib.Path(child.folder), child.changes, child.distributed)
    try:
        with join(whole.distributed) as cluster:
            code = train(whole, pathlib.Path(child.run_dir), cluster=cluster)
    except (ValueError, TrainingDiverged, CheckpointError) as error:
        print(f"error: {error}", flush=True)
        code = 2
    sys.stdout.flush()
    sys.exit(code)


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def run_all(*children: Child, timeout_s: float = 240) -> list[int]:
    """Starts processes and waits for all; returns their exit codes (minus the signal for a killed one)."""
    started = [child.start() for child in children]
    deadline = time.monotonic() + timeout_s
    for process in started:
        process.join(max(0.1, deadline - time.monotonic()))
    hanging = [number for number, process in enumerate(started) if process.is_alive()]
    for process in started:
        process.kill()
        process.join()
    texts = "\n".join(f"--- {child.log()}\n{child.log().read_text()}" for child in children) if hanging else ""
    assert not hanging, f"processes {hanging} did not end in {timeout_s} s\n{texts}"
    return [process.exitcode for process in started]


def pair(
    folder: pathlib.Path, run_dir: pathlib.Path, *hooks: tuple[Any, ...], devices: int = 4, **changes: Any
) -> list[Child]:
    """Two processes of one run; hooks and `changes_1` (of the second process alone) set them apart."""
    port = free_port()
    own = changes.pop("changes_1", {})
    limits = changes.pop("limits", {})
    return [
        Child(
            folder=str(folder),
            run_dir=str(run_dir),
            changes={**changes, **(own if number else {})},
            devices=devices,
            distributed={
                "coordinator": f"localhost:{port}",
                "processes": 2,
                "process": number,
                "peer_timeout_s": 10.0,
                **limits,
            },
            hook=hooks[number] if number < len(hooks) else (),
        )
        for number in range(2)
    ]


# Hooks. Each changes the child's own copy of the library.


def at_step(step: int, action: str, *arguments: Any) -> None:
    """Calls another function below when the loop asks for the batch that it takes after `step` steps."""
    from sparse_lm.train.prefetch import Prefetch

    taken, take = [0], Prefetch.next

    def next_and_act(self: Any) -> Any:
        taken[0] += 1
        if taken[0] == step + 3:  # two batches are taken ahead
            globals()[action](*arguments)
        return take(self)

    Prefetch.next = next_and_act


def signal_self(name: str) -> None:
    """Sends a signal to this process."""
    os.kill(os.getpid(), getattr(signal, name))


def sleep_forever() -> None:
    """Hangs, while other threads of the process live on."""
    time.sleep(10_000)


def raise_error() -> None:
    """Fails as a broken disk would."""
    raise OSError("the disk of this process is gone")


def poison(step: int) -> None:
    """Makes a parameter NaN before a step."""
    from sparse_lm.train import session

    compile_step = session.Session.compile_step

    def compile_and_poison(self: Any, documents: int) -> Any:
        compiled, seconds = compile_step(self, documents)
        calls = [0]

        def run(state: Any, batch: Any) -> Any:
            calls[0] += 1
            if calls[0] == step:
                scale = state.params["final_norm"]["scale"] * float("nan")
                state = dataclasses.replace(state, params={**state.params, "final_norm": {"scale": scale}})
            return compiled(state, batch)

        return run, seconds

    session.Session.compile_step = compile_and_poison


def kill_in_save(which: int, point: str, delay_s: float = 0.0) -> None:
    """Kills this process in a save: the `which`-th one, at a point of it.

    Points: submitted (the save has been handed to its thread), begun (Orbax is about to begin; the kill comes `delay_s` later, from
    another thread, wherever the save is then), arrays (all items are written, the inventory is not), listed (the inventory is
    written, the step has not got its name), named (the step has got its name).
    """
    import orbax.checkpoint as ocp

    from sparse_lm.train import checkpoint, checkpoint_files

    # Counted where a save begins, in its own thread: the loop may hand over the next one while this one is being written.
    begun, submitted, beginning = [0], [0], [False]
    begin, finalize = ocp.CheckpointManager.save, checkpoint_files.InventoryHandler.finalize
    wait, submit = ocp.CheckpointManager.wait_until_finished, checkpoint.Checkpointer.save

    def kill(where: str, count: int) -> None:
        if count == which and where == point:
            if delay_s:
                threading.Timer(delay_s, signal_self, ("SIGKILL",)).start()
            else:
                signal_self("SIGKILL")

    def begin_and_kill(self: Any, *arguments: Any, **keywords: Any) -> Any:
        begun[0] += 1
        kill("begun", begun[0])
        beginning[0] = True  # Orbax waits for the save before, which has long been finished
        try:
            return begin(self, *arguments, **keywords)
        finally:
            beginning[0] = False

    def finalize_and_kill(self: Any, directory: Any) -> None:
        kill("arrays", begun[0])
        finalize(self, directory)
        kill("listed", begun[0])

    def wait_and_kill(self: Any) -> None:
        wait(self)
        if threading.current_thread().name.startswith("checkpoint") and not beginning[0]:
            kill("named", begun[0])

    def submit_and_kill(self: Any, *arguments: Any) -> None:
        submitted[0] += 1
        submit(self, *arguments)
        kill("submitted", submitted[0])

    ocp.CheckpointManager.save = begin_and_kill
    ocp.CheckpointManager.wait_until_finished = wait_and_kill
    checkpoint_files.InventoryHandler.finalize = finalize_and_kill
    checkpoint.Checkpointer.save = submit_and_kill


def kill_after(steps: int, delay_s: float) -> None:
    """Kills this process some time after it has begun so many steps, of which it takes few more; 0: some time after its start."""

    def start_timer() -> None:
        threading.Timer(delay_s, signal_self, ("SIGKILL",)).start()

    if steps == 0:
        start_timer()
        return
    globals()["start_timer"] = start_timer
    at_step(steps, "start_timer")
    at_step(steps + 3, "sleep_forever")  # however late the kill comes on a busy machine


def limit_file_size(step: int, size: int) -> None:
    """Makes every write beyond `size` bytes of a file fail from the save of a step on, as a full disk does."""
    import resource

    from sparse_lm.train import checkpoint

    save = checkpoint.Checkpointer.save

    def save_on_full_disk(self: Any, at: int, *arguments: Any) -> None:
        if at == step:
            self.wait()
            with contextlib.suppress(ValueError):
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        save(self, at, *arguments)

    checkpoint.Checkpointer.save = save_on_full_disk


def chdir(directory: str) -> None:
    """Works in another directory, as a process on another host would."""
    os.chdir(directory)


def environment(variables: dict[str, str]) -> None:
    """Sets environment variables, as a launcher does."""
    os.environ.update(variables)
