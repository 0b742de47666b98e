"""Figures of a report: matplotlib drawings, as SVG whose colours are the page's.

Matplotlib writes fixed colours; here it is given marks ("#01..", "#02..") that are exchanged for CSS variables afterwards, so one
drawing serves light and dark pages. Text stays text, in the page's own typeface.
"""

import io
import logging
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from sparse_lm.train.progress import count

NAMED = {"#010101": "var(--ink)", "#010102": "var(--soft)", "#010103": "var(--line)", "#010104": "var(--paper)"}
INK, SOFT, LINE, PAPER = NAMED
SERIES = tuple(f"#0102{i:02x}" for i in range(6))
NAMED |= {mark: f"var(--s{i})" for i, mark in enumerate(SERIES)}
MARKERS = ("o", "s", "^", "D", "v", "P")
POINTS = 500
"""Most points that one line is drawn with."""

# On its first use on a machine matplotlib may announce, as a warning, that it looks for fonts; the page asks it for none.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

RC = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
}


def series_colour(index: int) -> str:
    """CSS colour of a series, for legends."""
    return f"var(--s{index % len(SERIES)})"


def blend(series: int, percent: float) -> str:
    """Mark of a colour between paper (0) and a series (100)."""
    return f"#02{series % len(SERIES):02x}{round(min(max(percent, 0), 100)):02x}"


def themed(drawing: str, description: str) -> str:
    """Turns matplotlib's SVG document into an inline, themed, described element."""
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>\s*", "", drawing, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', drawing)
    assert box is not None
    label = description.replace("&", "and").replace('"', "'").replace("<", "below ")
    head = f'<svg viewBox="{box.group(1)}" role="img" aria-label="{label}">'
    drawing = re.sub(r"<svg[^>]*>", head, drawing, count=1, flags=re.DOTALL)
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)  # the same in every drawing; ids of a page must differ
    drawing = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", drawing)
    drawing = re.sub(r"font-family: [^;\"]*;? ?", "", drawing)
    drawing = re.sub(r"#02([0-9a-f]{2})([0-9a-f]{2})", _mixed, drawing)
    return re.sub(r"#01[0-9a-f]{4}", lambda match: NAMED[match.group()], drawing)


def _mixed(match: re.Match[str]) -> str:
    return f"color-mix(in oklab, var(--s{int(match.group(1), 16)}) {int(match.group(2), 16)}%, var(--paper))"


def draw(name: str, description: str, size: tuple[float, float], paint: Callable[[Axes], None]) -> str:
    """Draws one frame.

    Args:
      name: unique in the page (the ids inside the SVG are made from it).
      description: what a reader who cannot see it is told.
      size: inches; the page scales the drawing to the width it has.
      paint: draws into the axes.
    """
    with matplotlib.rc_context({**RC, "svg.hashsalt": name}):
        frame = Figure(figsize=size, layout="constrained")
        frame.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
        frame.patch.set_alpha(0)
        axes = frame.add_subplot()
        axes.patch.set_alpha(0)
        paint(axes)
        stream = io.StringIO()
        frame.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return themed(stream.getvalue(), description)


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shortens a long line to POINTS means of neighbours."""
    if len(x) <= POINTS:
        return x, y
    edges = np.linspace(0, len(x), POINTS + 1).astype(int)[:-1]
    sizes = np.diff(np.append(edges, len(x)))
    return np.add.reduceat(x, edges) / sizes, np.add.reduceat(y, edges) / sizes


def smooth(y: np.ndarray, share: float = 0.02) -> np.ndarray:
    """Means over a centred window of a share of the line, narrower at the ends."""
    half = int(len(y) * share / 2)
    if half < 1:
        return y
    total = np.concatenate([[0.0], np.cumsum(y)])
    positions = np.arange(len(y))
    reach = np.minimum(half, np.minimum(positions, len(y) - 1 - positions))
    return (total[positions + reach + 1] - total[positions - reach]) / (2 * reach + 1)


def short(value: float) -> str:
    """Writes a small number shortly: 0.0015 is 1.5e-3."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return "0" if value == 0 else f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _frame(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.margins(x=0.01)


def loss_against(
    name: str,
    label: str,
    train_x: np.ndarray,
    train_PN: np.ndarray,
    validation: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> str:
    """Draws training loss and validation loss per domain against tokens, seconds or FLOPs.

    Args:
      name: of the figure.
      label: of the x axis.
      train_x: positions of N training rows.
      train_PN: losses of P members (P = 1 outside populations), not a number where a step was skipped.
      validation: domain -> (positions, losses).
    """

    def paint(axes: Axes) -> None:
        _frame(axes, "Loss, nats a token", label)
        lowest, highest = [], []
        for line in train_PN:
            good = np.isfinite(line)
            if not good.any():
                continue
            x, y = thin(train_x[good], line[good])
            axes.plot(x, y, color=SOFT, alpha=0.3, linewidth=0.9)
            if len(train_PN) == 1:
                axes.plot(x, smooth(y), color=INK, linewidth=1.5)
            lowest.append(y.min())
            highest.append(y[min(len(y) - 1, max(1, len(y) // 25))])
        if len(train_PN) > 1:
            finite = np.isfinite(train_PN)
            mean = np.where(finite, train_PN, 0).sum(0) / np.maximum(finite.sum(0), 1)
            good = finite.any(0)
            x, y = thin(train_x[good], mean[good])
            axes.plot(x, smooth(y), color=INK, linewidth=1.5)
        for i, (x, y) in enumerate(validation.values()):
            every = max(1, len(x) // 12)
            marker = MARKERS[i % len(MARKERS)]
            axes.plot(x, y, color=SERIES[i % len(SERIES)], marker=marker, markersize=4, markevery=every, linewidth=1.3)
            if np.isfinite(y).any():
                lowest.append(np.nanmin(y))
                highest.append(y[np.isfinite(y)][min(1, np.isfinite(y).sum() - 1)])
        if lowest and max(highest) > min(lowest):
            room = 0.06 * (max(highest) - min(lowest))
            axes.set_ylim(min(lowest) - room, max(highest) + room)

    return draw(name, f"Training and validation loss against {label}", (4.0, 2.9), paint)


def line(
    name: str,
    title: str,
    step: np.ndarray,
    lines: Sequence[tuple[np.ndarray, str]],
    form: Callable[[float], str] = count,
    log: bool = False,
    from_zero: bool = False,
    smoothed: bool = False,
) -> str:
    """Draws one or several quantities against steps; each line is (values, colour mark). `log` holds where they span decades."""

    def paint(axes: Axes) -> None:
        _frame(axes, title, "step")
        for values, colour in lines:
            good = np.isfinite(values) & ((values > 0) | (not log))
            if not good.any():
                continue
            x, y = thin(step[good], values[good])
            if smoothed and len(y) > 20:
                axes.plot(x, y, color=colour, alpha=0.3, linewidth=0.9)
                y = smooth(y, 0.04)
            axes.plot(x, y, color=colour, linewidth=1.4)
        low, high = axes.get_ylim()
        if log and low > 0 and high / low > 8:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 3.0)))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.tick_params(axis="y", which="minor", length=0)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
        lowest = min(
            (values[np.isfinite(values)].min() for values, _ in lines if np.isfinite(values).any()), default=1.0
        )
        if from_zero or lowest == 0:
            high = axes.get_ylim()[1]
            axes.set_ylim(0, high * 1.05 if any(np.nanmax(values, initial=0) > 0 for values, _ in lines) else 1)

    return draw(name, f"{title} against steps", (4.0, 2.4), paint)


def load_map(name: str, layers: Sequence[str], load_LE: np.ndarray) -> str:
    """Draws the load of each expert of each layer as a multiple of the even share: paper is 1, below and above have a colour each."""
    relative_LE = load_LE * load_LE.shape[1]
    rows, columns = relative_LE.shape
    lettered = columns <= 16 and rows <= 32

    def paint(axes: Axes) -> None:
        for row in range(rows):
            for column in range(columns):
                value = relative_LE[row, column]
                if not np.isfinite(value):
                    continue
                # twice the even share is as strong as an expert that gets nothing
                strength = 100 * min(1.0, abs(value - 1.0))
                colour = blend(1 if value > 1 else 0, 0.85 * strength)
                axes.fill(
                    [column, column + 1, column + 1, column],
                    [row, row, row + 1, row + 1],
                    facecolor=colour,
                    edgecolor=LINE,
                    linewidth=0.6,
                )
                if lettered:
                    axes.text(
                        column + 0.5,
                        row + 0.52,
                        f"{value:.2f}",
                        ha="center",
                        va="center",
                        color=INK,
                        fontsize=8 if columns <= 8 else 6.5,
                    )
        axes.set_xlim(0, columns)
        axes.set_ylim(rows, 0)
        every = max(1, columns // 16)
        axes.set_xticks(np.arange(0, columns, every) + 0.5, [str(i) for i in range(0, columns, every)])
        axes.set_yticks(np.arange(rows) + 0.5, layers)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title("Tokens per expert, as a multiple of the even share")
        axes.set_xlabel("expert")

    height = min(9.0, 1.0 + 0.3 * rows)
    return draw(name, f"Load of {columns} experts in {rows} layers", (4.9, height), paint)


def _beside(axes: Axes, x: float, y: float, words: str, colour: str) -> None:
    axes.annotate(words, (x, y), xytext=(6, 0), textcoords="offset points", va="center", color=colour, fontsize=9)


def bits_per_byte(
    name: str, rows: Sequence[tuple[str, float, tuple[float, float] | None, float | None, float | None]]
) -> str:
    """Draws bits per byte by domain: the model with its interval, and xz plain and primed beside it.

    Args:
      name: of the figure.
      rows: (domain, bits per byte, interval or None, xz or None, primed xz or None).
    """

    def paint(axes: Axes) -> None:
        for y, (_, value, interval, plain, primed) in enumerate(rows):
            axes.barh(y - 0.2, value, height=0.34, color=SERIES[0])
            if interval is not None:
                axes.plot(interval, [y - 0.2] * 2, color=INK, linewidth=1.6, marker="|", markersize=7)
            _beside(axes, max([value, *(interval or ())]), y - 0.2, f"{value:.2f}", INK)
            if plain is not None:
                axes.barh(y + 0.2, plain, height=0.34, color=blend(1, 45))
                _beside(axes, plain, y + 0.2, f"{plain:.2f}", SOFT)
            if primed is not None:
                axes.plot([primed] * 2, [y + 0.01, y + 0.39], color=SERIES[1], linewidth=2, linestyle=(0, (1.6, 1)))
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        highest = max(max(filter(None, (value, plain, primed))) for _, value, _, plain, primed in rows)
        axes.set_xlim(0, highest * 1.16)
        axes.grid(axis="x")
        axes.set_title("Bits per byte of held-out text; shorter is better")

    return draw(name, "Bits per byte by domain, beside xz", (4.9, 0.75 + 0.72 * len(rows)), paint)
