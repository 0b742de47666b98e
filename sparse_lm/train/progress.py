"""What a run shows on the console: a live display on a terminal, one aligned line a logging interval elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import rich.console
import rich.live
import rich.progress_bar
import rich.table
import rich.text

from sparse_lm.train.metrics import Row, plain

NONE = "–"


def mean(value: Any) -> float | None:
    """Returns a measured value as one number: itself, or the mean over the finite members of a population; None when there is none."""
    value = plain(value)
    if isinstance(value, list):
        found = [item for item in value if item is not None]
        return sum(found) / len(found) if found else None
    return value


def count(value: float | None) -> str:
    """Writes a count with three digits and a unit: 48300 is 48.3k."""
    if value is None:
        return NONE
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            scaled = value / size
            return f"{scaled:.3g}{unit}" if scaled < 999.5 else f"{scaled:.0f}{unit}"
    return f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Writes a time span as 42s, 3m20s, 2h05m or 4d06h."""
    if seconds is None:
        return NONE
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def number(value: float | None, form: str) -> str:
    """Formats a number, or writes a dash for None."""
    return NONE if value is None else format(value, form)


def validation_text(row: Row) -> str:
    """Writes a validation row as one line: bits per byte (or loss, where bytes are unknown) over all and by domain."""
    measure = "bits_per_byte" if mean(row.get("bits_per_byte")) is not None else "loss"
    parts = [
        f"{name} {number(mean(domain.get(measure)), '.3f')}" for name, domain in sorted(row.get("domains", {}).items())
    ]
    if row.get(measure) is not None:
        parts.append(f"all {number(mean(row[measure]), '.3f')}")
    return f"validation at step {row['step']}: {', '.join(parts)} {measure.replace('_', ' ')}"


class Progress:
    """Shows one run. Calls, in order: start, any of update / validation / event, close (or use it as a context manager).

    Args:
      name: what is trained.
      total_steps: steps of the whole run.
      mode: "live", "lines", "off", or "auto": live on a terminal, lines elsewhere.
      console: where to; by default standard output.
      clock: seconds, for the estimate of the time left.
    """

    HEADER = f"{'step':>13} {'loss':>8} {'grad norm':>10} {'rate':>9} {'tokens/s':>9} {'a step':>8} {'wait':>6} {'MFU':>6} {'left':>7}"

    def __init__(
        self,
        name: str,
        total_steps: int,
        mode: Literal["auto", "live", "lines", "off"] = "auto",
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.name, self.total_steps = name, total_steps
        self.console = console or rich.console.Console(file=sys.stdout)
        if mode == "auto":
            mode = "live" if self.console.is_terminal else "lines"
        self.mode = mode
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._row: Row | None = None
        self._validation: Row | None = None
        self._step = 0
        self._live: rich.live.Live | None = None
        self._header_due = True

    def start(self, step: int = 0, note: str = "") -> None:
        """Begins at a number of finished steps, with a note to print first."""
        self._step = step
        if note:
            self._print(note)
        if self.mode == "live":
            self._live = rich.live.Live(
                self._picture(), console=self.console, refresh_per_second=4, get_renderable=self._picture
            )
            self._live.start()

    def update(self, row: Row) -> None:
        """Shows a training row."""
        self._row, self._step = row, row["step"]
        self._first = self._first or (row["step"], self._clock())
        if self.mode == "lines":
            if self._header_due:
                self._print(self.HEADER)
                self._header_due = False
            self._print(self._line(row))

    def validation(self, row: Row) -> None:
        """Shows a validation row."""
        self._validation, self._step = row, row["step"]
        if self.mode == "lines":
            self._print(validation_text(row))

    def event(self, text: str) -> None:
        """Prints a line that stays: a checkpoint, a skipped step, a warning."""
        self._print(text)

    def close(self, note: str = "") -> None:
        """Ends the display, leaving its last state, and prints a last note; a second call does nothing."""
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)
            self._live.stop()
            self._live = None
        if note:
            self._print(note)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def seconds_left(self) -> float | None:
        """Estimates the time left from the pace since the first row shown, validation and saving included, compilation not."""
        remaining = self.total_steps - self._step
        if self._first is not None and self._step > self._first[0]:
            return remaining * (self._clock() - self._first[1]) / (self._step - self._first[0])
        step_s = mean(self._row.get("step_s")) if self._row else None
        return None if step_s is None else remaining * step_s

    def _print(self, text: str) -> None:
        if self.mode != "off":
            self.console.print(rich.text.Text(text), soft_wrap=True)

    def _cells(self, row: Row) -> dict[str, str]:
        step_s, wait_s, mfu = (mean(row.get(key)) for key in ("step_s", "data_wait_s", "mfu"))
        wait = None if not step_s or wait_s is None else wait_s / step_s
        time_form = f"{step_s * 1e3:.0f}ms" if step_s is not None and step_s < 10 else duration(step_s)
        return {
            "loss": number(mean(row.get("loss")), ".4f"),
            "grad norm": number(mean(row.get("grad_norm")), ".3g"),
            "rate": number(mean(row.get("learning_rate")), ".2e"),
            "tokens/s": count(mean(row.get("tokens_per_s"))),
            "a step": time_form,
            "wait": number(wait, ".1%"),
            "MFU": number(mfu, ".1%"),
            "left": duration(self.seconds_left()),
        }

    def _line(self, row: Row) -> str:
        cells = self._cells(row)
        skipped = mean(row.get("skipped"))
        return (
            f"{f'{self._step}/{self.total_steps}':>13} {cells['loss']:>8} {cells['grad norm']:>10} {cells['rate']:>9} "
            f"{cells['tokens/s']:>9} {cells['a step']:>8} {cells['wait']:>6} {cells['MFU']:>6} {cells['left']:>7}"
            + (f"   {skipped:g} skipped" if skipped else "")
        )

    def _picture(self) -> rich.console.RenderableType:
        """The live display: a bar, a line of numbers, the last validation."""
        bar = rich.table.Table.grid(padding=(0, 1))
        cells = self._cells(self._row) if self._row else {}
        bar.add_row(
            rich.text.Text(self.name, style="bold"),
            rich.progress_bar.ProgressBar(total=self.total_steps, completed=self._step, width=32),
            f"{self._step}/{self.total_steps}",
            f"{cells['left']} left" if cells and self._step < self.total_steps else "",
        )
        if not cells:
            return rich.console.Group(bar, rich.text.Text("compiling", style="dim"))
        numbers = rich.text.Text()
        for label, value in (
            ("loss", cells["loss"]),
            ("tokens/s", cells["tokens/s"]),
            ("a step", cells["a step"]),
            ("MFU", cells["MFU"]),
            ("waiting for data", cells["wait"]),
        ):
            numbers.append(f"{label} ", style="dim").append(value + "   ")
        lines: list[rich.console.RenderableType] = [bar, numbers]
        if self._validation is not None:
            lines.append(rich.text.Text(validation_text(self._validation), style="cyan"))
        return rich.console.Group(*lines)
