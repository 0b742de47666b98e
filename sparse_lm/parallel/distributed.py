"""Several processes as one run: how they meet, what they must agree on, and who is named when one of them dies.

JAX gives the processes a coordination service: a small key-value store and barriers, hosted by process 0. Each process writes a sign
of life into it (`watchdog.py`), so a run whose main threads hang in a collective still ends, with the name of the process that is to
blame.

All the sizes of a run are the same without this module: one process joins nothing.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NoReturn

import jax

from sparse_lm.config import Config, ConfigError
from sparse_lm.parallel.watchdog import BEAT_S, RESUMABLE, Watchdog, number

LONG_MS = 7 * 24 * 3600 * 1000
"""Time limit of waits that the watchdog ends earlier, in milliseconds."""


class Disagreement(ValueError):
    """Processes that were started with different things; the message names which process differs in what."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distributed(Config):
    """How the processes of a run find each other and when one is given up."""

    coordinator: str | None = None
    """Address host:port of process 0, free to listen on; with `processes` and `process`. None: one process, or see `cluster`."""
    processes: int | None = None
    """Number of processes of the run."""
    process: int | None = None
    """Number of this process, from 0."""
    cluster: Literal["none", "auto", "slurm", "ompi", "mpi4py", "k8s", "gketpu", "gcetpu"] = "none"
    """Take the three from the environment as JAX detects it: of a named kind, or auto: whatever is found."""
    connect_timeout_s: float = 300.0
    """Seconds to wait at the start until all processes are there."""
    peer_timeout_s: float = 60.0
    """Seconds without a sign of life after which a process counts as dead and all others stop."""
    stall_timeout_s: float = 1800.0
    """Seconds without progress (a step, a compilation, a validation batch, a save) after which a process counts as hanging."""

    def check(self) -> None:
        """See Config.check."""
        explicit = (self.coordinator, self.processes, self.process)
        if self.cluster != "none":
            for name, value in zip(("coordinator", "processes", "process"), explicit):
                self.require(value is None, name, f"None when cluster is given ({self.cluster!r})")
        elif any(value is not None for value in explicit):
            for name, value in zip(("coordinator", "processes", "process"), explicit):
                self.require(value is not None, name, "a value: coordinator, processes and process go together")
            assert self.coordinator is not None and self.processes is not None and self.process is not None
            host, _, port = self.coordinator.rpartition(":")
            self.require(bool(host) and port.isdigit(), "coordinator", "host:port of process 0, such as node7:8476")
            self.require(self.processes >= 1, "processes", "at least 1")
            self.require(0 <= self.process < self.processes, "process", f"0 to {self.processes - 1}")
        for name in ("connect_timeout_s", "peer_timeout_s", "stall_timeout_s"):
            self.require(getattr(self, name) >= 1, name, "at least 1 second")

    @property
    def active(self) -> bool:
        """Whether the run has several processes, or asks its environment."""
        return self.coordinator is not None or self.cluster != "none"


@contextlib.contextmanager
def join(config: Distributed) -> Iterator["Cluster"]:
    """Connects this process with the others of its run; leaves in order at the end. To be called before any device is asked for.

    An error of this process is told to the others, which then stop too. When the error was caused by another process, the process
    ends with the exit code RESUMABLE and the other one's name.

    Raises:
      ConfigError: when the processes do not meet in time, or the environment does not say what the config leaves to it.
    """
    if not config.active:
        yield Cluster(config, None, 0, 1)
        return
    cluster = _connect(config)
    try:
        yield cluster
    except BaseException as error:
        cluster.fail(error)
        raise
    cluster.leave()


def _connect(config: Distributed) -> "Cluster":
    # Collectives between CPU processes; has no effect on other platforms.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # The loop handles SIGTERM itself; JAX's service would take the signal away from it.
    jax.config.update("jax_enable_preemption_service", False)
    # Otherwise the service kills every process as soon as one is missed, before anybody could say which.
    jax.config.update("jax_enable_recoverability", True)
    address = config.coordinator or f"the address that cluster = {config.cluster!r} says"
    undo = _on_abort(
        f"not all {config.processes or ''} processes met at {address} within distributed.connect_timeout_s = "
        f"{config.connect_timeout_s:g}. Look for one that ended, or was not started, and start all again."
    )
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.processes,
            config.process,
            cluster_detection_method={"none": "deactivate", "auto": None}.get(config.cluster, config.cluster),
            initialization_timeout=round(config.connect_timeout_s),
            heartbeat_timeout_seconds=max(10, round(config.peer_timeout_s)),
        )
    except (RuntimeError, ValueError) as error:
        allowed = f"an address where all processes meet within {config.connect_timeout_s:g} s ({str(error).splitlines()[0][:300]})"
        raise ConfigError("distributed.coordinator", address, allowed) from None
    finally:
        undo()
    state = jax._src.distributed.global_state  # the store has no public door
    cluster = Cluster(config, state.client, state.process_id, state.num_processes)
    cluster.start()
    return cluster


class Cluster:
    """The processes of a run, seen from one of them. With one process every method does nothing, at once.

    Attributes:
      index: number of this process.
      count: number of processes.
      ending: set once this process ends by itself.
    """

    def __init__(self, config: Distributed, client: Any, index: int, count: int):
        self.config, self.index, self.count = config, index, count
        self._client = client
        self._names: dict[int, str] = {index: f"process {index} ({socket.gethostname()}, pid {os.getpid()})"}
        self._progress, self._activity = 0, "starting"
        self.ending = threading.Event()
        self._barriers = 0
        self._watchdog: Watchdog | None = None
        self._abort: Callable[[], None] | None = None

    @property
    def first(self) -> bool:
        """Whether this is process 0, which writes what is written once."""
        return self.index == 0

    def name(self, index: int) -> str:
        """Returns a process's number, host and process id."""
        return self._names.get(index, f"process {index}")

    def start(self) -> None:
        """Learns the names of all processes and begins to watch them."""
        if self.count == 1:
            return
        self._client.key_value_set(f"name/{self.index}", self._names[self.index])
        self._client.wait_at_barrier("names", round(self.config.connect_timeout_s * 1000))
        self._names = {number(key): name for key, name in self._client.key_value_dir_get("name/")}
        self._abort = _on_abort(
            f"{self.name(0)} ended without a word, and with it the coordination service that it hosts; "
            f"{self.name(self.index)} stops. Start all processes again to go on after the last finished save."
        )
        self._watchdog = Watchdog(self, self._client)
        self._watchdog.start()

    def progress(self, activity: str) -> None:
        """Says that this process does something; a process that says nothing for long counts as hanging."""
        self._progress, self._activity = self._progress + 1, activity

    def sign_of_life(self, beat: int) -> str:
        """Returns what this process writes into the store at a beat: that it lives, how far it is, and with what."""
        return json.dumps([beat, self._progress, self._activity])

    def barrier(self, activity: str) -> None:
        """Waits for all processes. They must call this in the same order."""
        if self.count == 1:
            return
        self.progress(activity)
        self._barriers += 1
        self._client.wait_at_barrier(f"barrier/{self._barriers}", LONG_MS)

    def first_then_others(self, activity: str, action: Callable[[], Any]) -> Any:
        """Runs an action on process 0, then on all others, so that these find what it left on a shared disk."""
        if not self.first:
            self.barrier(activity)
        result = action()
        if self.first:
            self.barrier(activity)
        return result

    def of_first(self, key: str, value: Callable[[], str]) -> str:
        """Returns on every process the text that process 0 computes."""
        if self.count == 1:
            return value()
        if self.first:
            text = value()
            self._client.key_value_set(f"of_first/{key}", text)
            return text
        return self._client.blocking_key_value_get(f"of_first/{key}", LONG_MS)

    def agree(self, topic: str, facts: Callable[[], Mapping[str, Any]]) -> None:
        """Compares facts with those of process 0.

        Args:
          topic: names the comparison; each is made once.
          facts: returns name -> JSON-ready value.

        Raises:
          Disagreement: on every process, if any process differs: which, in what.
        """
        if self.count == 1:
            return
        own = json.loads(json.dumps(dict(facts())))
        reference = json.loads(self.of_first(f"facts/{topic}", lambda: json.dumps(own)))
        lines = [
            f"  {self.name(self.index)}: {key} = {own.get(key)!r}; {self.name(0)}: {reference.get(key)!r}"
            for key in sorted(own.keys() | reference.keys())
            if own.get(key) != reference.get(key)
        ]
        self._client.key_value_set(f"differs/{topic}/{self.index}", json.dumps(lines))
        self.barrier(f"comparing {topic}")
        found = sorted((number(key), text) for key, text in self._client.key_value_dir_get(f"differs/{topic}/"))
        lines = [line for _, text in found for line in json.loads(text)]
        if lines:
            shown = lines[:20] + ([f"  and {len(lines) - 20} more"] if len(lines) > 20 else [])
            raise Disagreement(f"the processes of this run differ in their {topic}:\n" + "\n".join(shown))

    def fail(self, error: BaseException) -> None:
        """Tells the others about an error of this process, after making sure that it is its own."""
        if self.count == 1:
            return
        # What JAX raises may be the echo of another process's end: the watchdog then ends this one within its time.
        if isinstance(error, jax.errors.JaxRuntimeError):
            print(f"{self.name(self.index)}: {str(error).splitlines()[0][:300]}; asking who is gone", file=sys.stderr)
            time.sleep(self.config.peer_timeout_s + 4 * BEAT_S)
        self.ending.set()
        shared = False
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            text = f"{type(error).__name__}: {error}"[:2000]
            self._client.key_value_set(f"failed/{self.index}", text, allow_overwrite=True)
            # Passes at once where all failed alike; otherwise gives the others the time to read what happened.
            self._client.wait_at_barrier("failed", round(4 * BEAT_S * 1000))
            shared = True
        self._part(together=shared)

    def leave(self) -> None:
        """Waits until all processes are done, then disconnects."""
        if self.count == 1:
            return
        self.barrier("done")
        self.ending.set()
        self._part(together=True)

    def _part(self, *, together: bool) -> None:
        assert self._watchdog is not None and self._abort is not None
        self._watchdog.stop()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if self.first and together:  # the service, which lives in this process, must outlive its clients
                while len(self._client.get_live_nodes(list(range(self.count)))) > 1:
                    time.sleep(0.05)
            jax.distributed.shutdown()
        self._abort()

    def stop_now(self, reason: str, code: int = RESUMABLE) -> NoReturn:
        """Ends this process from whatever thread, while its main thread hangs in a collective."""
        sys.stdout.flush()
        print(f"stopped: {reason}", file=sys.stderr, flush=True)
        os._exit(code)


def _on_abort(message: str) -> Callable[[], None]:
    """Lets this process end with RESUMABLE and a message when JAX aborts it; returns what undoes that.

    When the process that hosts the coordination service dies, JAX aborts all others at once from a C++ thread, before Python could
    notice. A handler in C is the only place left to say what happened (JAX's own callback for it cannot take a Python function).
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    text = f"stopped: {message}\n".encode()

    def handler(_: int) -> None:
        os.write(2, text)
        os._exit(RESUMABLE)

    pointer = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    previous = libc.signal(signal.SIGABRT, ctypes.cast(pointer, ctypes.c_void_p))

    def undo() -> None:
        libc.signal(signal.SIGABRT, previous)
        assert pointer  # kept alive until here

    return undo
