"""Where the numbers of a run go: rows, the writers they are handed to, and the meter that times steps.

A row is a flat dictionary, written one step late so that the device never waits for the host:

    {"kind": "train", "step": 30, "tokens": 491520, "seconds": 12.5, "flops": 4.1e12, "loss": 5.1, ...}

`kind` is train, validation or event; `step` counts finished steps; `tokens`, `seconds` and `flops` are totals of the whole run,
resumed parts included. Keys of one mechanism share a prefix: "router/blocks.3/load" holds a list, one entry an expert. In the
rows of a population of P members each measured value is a list of P.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import numpy as np

from sparse_lm.config import Config

Row = dict[str, Any]

KINDS = ("train", "validation", "event")
TOTALS = ("kind", "step", "tokens", "seconds", "flops")
"""Keys that every row has; the rest is measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig(Config):
    """What a run reports while it trains, how often and where."""

    log_every: int = 10
    """Steps between two training rows."""
    display: Literal["auto", "live", "lines", "off"] = "auto"
    """Progress on the console: a live display, plain lines, nothing; auto: live on a terminal, lines elsewhere."""
    tensorboard: bool = True
    """Also write TensorBoard event files, into the run directory."""
    wandb_project: str | None = None
    """Weights & Biases project that also receives the rows (needs the extra `wandb`); None: none."""
    profile_start: int | None = None
    """First step of a window that the profiler traces into the run directory; None: no trace. Leave compilation out of it."""
    profile_steps: int = 5
    """Length of the profiler's window, in steps."""

    def check(self) -> None:
        """See Config.check."""
        self.require(self.log_every >= 1, "log_every", "at least 1")
        self.require(self.wandb_project is None or bool(self.wandb_project.strip()), "wandb_project", "None or a name")
        self.require(self.profile_start is None or self.profile_start >= 0, "profile_start", "None or a step from 0")
        self.require(self.profile_steps >= 1, "profile_steps", "at least 1")


class Writer(Protocol):
    """Anything that takes rows."""

    def write(self, row: Row) -> None:
        """Takes one row; must not keep a reference to it."""

    def flush(self) -> None:
        """Makes what was written readable by others."""

    def close(self) -> None:
        """Flushes and lets go of files; no row may follow."""


def plain(value: Any) -> Any:
    """Renders arrays and array scalars as Python numbers and lists; what is not finite becomes None, since JSON has no word for it.

    A float32 keeps its shortest decimal form: 0.1 is written as 0.1, and reading it back as float32 is exact.
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float) and not isinstance(value, np.floating):
        return value if math.isfinite(value) else None
    array = np.asarray(value)
    if array.dtype == object:
        raise ValueError(
            f"a metric of type {type(value).__name__} cannot be written: {value!r}; allowed: numbers, text, arrays"
        )
    if array.ndim:
        return [plain(item) for item in array]
    if array.dtype.kind not in "fV":  # "V": bfloat16 and the other narrow floats
        return array.item()
    if not np.isfinite(array.astype(np.float64)):
        return None
    return float(array) if array.dtype.itemsize >= 8 else float(str(array.astype(np.float32)))


class JsonLines:
    """Rows as lines of a JSON file. Each row is one append to the file, so that a killed run leaves whole lines."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, row: Row) -> None:
        """Appends one row."""
        if row.get("kind") not in KINDS:
            raise ValueError(f"row of kind {row.get('kind')!r}; allowed: {', '.join(KINDS)}")
        os.write(self._file, (json.dumps(plain(row), allow_nan=False) + "\n").encode())

    def cut(self, step: int) -> int:
        """Drops rows past `step` (they belong to a future that a resumed run lives again) and returns how many."""
        rows = read_rows(self.path)
        kept = [row for row in rows if row["step"] <= step]
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.close(self._file)
        os.replace(beside, self.path)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        return len(rows) - len(kept)

    def flush(self) -> None:
        """Makes the rows survive a crash of the machine."""
        os.fsync(self._file)

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._file >= 0:
            self.flush()
            os.close(self._file)
            self._file = -1


def read_rows(path: str | os.PathLike[str], kind: str | None = None) -> list[Row]:
    """Reads the rows of a metrics.jsonl, of one kind or all; a last line cut short by a kill is left out.

    Raises:
      ValueError: for a damaged line elsewhere, with its number.
    """
    lines = pathlib.Path(path).read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not JSON: {line[:80]!r}") from None
        if kind is None or row["kind"] == kind:
            rows.append(row)
    return rows


def scalars_and_lists(row: Row, members: int | None = None) -> Iterator[tuple[str, Any]]:
    """Yields (name, number or list of numbers) of a row for writers that know no nesting.

    Args:
      row: any row; nested dictionaries become names with slashes, text and None are left out.
      members: size of the population whose rows these are; each value is then taken apart into "name/member i".
    """

    def walk(name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from walk(f"{name}/{key}", item)
        elif members is not None and isinstance(value, list) and len(value) == members:
            for member, item in enumerate(value):
                if item is not None:
                    yield f"{name}/member {member}", item
        elif value is not None and not isinstance(value, str):
            yield name, value

    for key, value in plain(row).items():
        if key not in TOTALS:
            yield from walk(f"{row['kind']}/{key}", value)


class TensorBoard:
    """Rows as TensorBoard event files, through tensorboardX: numbers as scalars, lists as histograms, events as text."""

    def __init__(self, directory: str | os.PathLike[str], resumed_step: int | None = None, members: int | None = None):
        import tensorboardX

        self._members = members
        # A file name counts whole seconds, so a quick restart would write into the file of the run before it.
        suffix = f".{os.getpid()}.{time.monotonic_ns()}"
        purge = None if resumed_step is None else resumed_step + 1
        self._writer = tensorboardX.SummaryWriter(str(directory), purge_step=purge, filename_suffix=suffix)

    def write(self, row: Row) -> None:
        """Takes one row."""
        step = row["step"]
        if row["kind"] == "event":
            self._writer.add_text("event", str(row.get("event", plain(row))), step)
            return
        for name, value in scalars_and_lists(row, self._members):
            if isinstance(value, list):
                values = np.asarray([item for item in value if item is not None], np.float64)
                if values.size:
                    self._writer.add_histogram(name, values, step)
            else:
                self._writer.add_scalar(name, value, step)
        for name in ("tokens", "seconds", "flops"):
            self._writer.add_scalar(f"total/{name}", row[name], step)

    def flush(self) -> None:
        """Writes what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class Wandb:
    """Rows to Weights & Biases. A resumed run goes on under the same id; rows past the resumed step stay there, superseded."""

    def __init__(self, project: str, run_dir: pathlib.Path, recipe: Row | None = None, members: int | None = None):
        try:
            import wandb
        except ImportError:
            raise ValueError(
                f"wandb_project = {project!r} needs the package wandb: pip install 'sparse_lm[wandb]', or leave the field None"
            ) from None
        identity = run_dir / "wandb_id"
        if not identity.exists():
            identity.write_text(secrets.token_hex(8))
        self._members = members
        self._run = wandb.init(
            project=project, name=run_dir.name, dir=str(run_dir), id=identity.read_text(), resume="allow", config=recipe
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Row) -> None:
        """Takes one row; lists stay out, as they would fill the service with one chart an expert."""
        if row["kind"] == "event":
            return
        values = {name: value for name, value in scalars_and_lists(row, self._members) if not isinstance(value, list)}
        self._run.log({key: row[key] for key in TOTALS if key != "kind"} | values)

    def flush(self) -> None:
        """Nothing to do: the client sends by itself."""

    def close(self) -> None:
        """Ends the session and waits for the last rows to be sent."""
        self._run.finish()


class Writers:
    """Hands every row to several writers; a context manager that closes them all, whatever one of them raises."""

    def __init__(self, *writers: Writer):
        self.writers = writers

    def write(self, row: Row) -> None:
        """Hands on one row."""
        for writer in self.writers:
            writer.write(row)

    def flush(self) -> None:
        """Flushes all."""
        for writer in self.writers:
            writer.flush()

    def close(self) -> None:
        """Closes all, in reverse order."""
        with contextlib.ExitStack() as stack:
            for writer in self.writers:
                stack.callback(writer.close)

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_writers(
    run_dir: str | os.PathLike[str],
    config: LogConfig,
    resumed_step: int | None = None,
    members: int | None = None,
    recipe: Row | None = None,
) -> Writers:
    """Opens the writers that a config asks for: RUN/metrics.jsonl always, TensorBoard in RUN/tensorboard, Weights & Biases.

    Args:
      run_dir: directory of the run.
      config: what to write to.
      resumed_step: finished steps of the checkpoint that the run goes on from (rows past it are dropped); None: a new run.
      members: size of the population, or None.
      recipe: the whole config as a dictionary, shown by Weights & Biases.
    """
    run_dir = pathlib.Path(run_dir)
    lines = JsonLines(run_dir / "metrics.jsonl")
    lines.cut(-1 if resumed_step is None else resumed_step)
    writers: list[Writer] = [lines]
    if config.tensorboard:
        writers.append(TensorBoard(run_dir / "tensorboard", -1 if resumed_step is None else resumed_step, members))
    if config.wandb_project is not None:
        writers.append(Wandb(config.wandb_project, run_dir, recipe, members))
    return Writers(*writers)


class Meter:
    """Times training from the host: tokens per second, time a step, time spent waiting for data, MFU.

    MFU = tokens per second x FLOPs per token / peak FLOP/s of all devices, with the FLOPs that the model needs (active
    parameters only, causal attention counted half, no recomputation). Training is asynchronous, so single steps cannot be timed
    from the host; means between two `read`s can. Time inside `paused` (validation, saving, compiling) is not training time.
    `flops_per_token` may be set anew while training: it counts for the steps that follow.
    """

    def __init__(
        self,
        flops_per_token: float,
        peak_flops: float | None,
        tokens: int = 0,
        seconds: float = 0.0,
        flops: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.tokens, self.seconds, self.flops = tokens, seconds, flops
        self._clock = clock
        self._last = clock()
        self._steps, self._tokens, self._elapsed, self._waited = 0, 0, 0.0, 0.0

    def _advance(self) -> float:
        """Books the time since the last booking as training time and returns it."""
        now = self._clock()
        passed, self._last = now - self._last, now
        self._elapsed += passed
        self.seconds += passed
        return passed

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Marks the time in which the loop waits for its next batch."""
        self._advance()
        yield
        self._waited += self._advance()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Marks time that is not training."""
        self._advance()
        yield
        self._last = self._clock()

    def step(self, tokens: int) -> None:
        """Counts one step over this many tokens (of one member, in a population)."""
        self._steps += 1
        self._tokens += tokens
        self.tokens += tokens
        self.flops += tokens * self.flops_per_token

    def read(self) -> Row:
        """Returns totals and the means since the last call, as the part of a row that is about time."""
        self._advance()
        steps, tokens, elapsed, waited = self._steps, self._tokens, self._elapsed, self._waited
        self._steps, self._tokens, self._elapsed, self._waited = 0, 0, 0.0, 0.0
        speed = tokens / elapsed if elapsed > 0 else 0.0
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "flops": self.flops,
            "tokens_per_s": speed,
            "step_s": elapsed / max(steps, 1),
            "data_wait_s": waited / max(steps, 1),
            "mfu": speed * self.flops_per_token / self.peak_flops if self.peak_flops else None,
        }
