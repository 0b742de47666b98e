"""The report's section on weight sparsity: how dense, what changed, what never was, and where the weights are.

Legend: N rows of metrics, L layers, R rows and C columns of cells.
"""

import base64
import io
from typing import Any

import numpy as np
from matplotlib import image

from sparse_lm.evaluate import report_figures as draw
from sparse_lm.evaluate import report_page as page
from sparse_lm.evaluate.run_files import Run
from sparse_lm.train.progress import count, mean
from sparse_lm.weight_sparsity.pictures import read_pictures
from sparse_lm.weight_sparsity.telemetry import kind_of

MEASURES = {
    "density": "Density",
    "churn": "Weights that the last change brought",
    "regrown": "Of the grown weights, those that had existed before",
    "never": "Weights that never existed",
    "dead_outputs": "Outputs without a weight",
    "dead_inputs": "Inputs without a weight",
}
MAPS = 6
"""Most steps, and most layers, of a block map."""

SCALE = 4
"""Pixels of a cell."""

INK = (0.17, 0.45, 0.75)
"""Colour of a cell; its opacity is the density, so that it reads on paper of any colour."""


def weight_sparsity(run: Run) -> str:
    """The section's HTML; empty for dense training."""
    if not run.sparsity:
        return ""
    steps = np.array([row["step"] for row in run.train])
    panels, kinds = [], [str(row["kind"]) for row in by_kind(run.sparsity["matrices"])]
    whole = [
        (run.series(f"sparsity/{name}"), colour) for name, colour in (("density", draw.INK), ("requested", draw.SOFT))
    ]
    if run.train and np.isfinite(whole[0][0]).any():
        panels.append(
            draw.line("sparsity-whole", "Density of all sparse matrices", steps, whole, "{:.1%}".format, from_zero=True)
        )
    for name, title in MEASURES.items():
        found = {kind: values for kind, values in run.per_layer(name, "sparsity").items() if kind in kinds}
        if found and any(np.nanmax(values, initial=0) > 0 for values in found.values()):
            lines = [(values.mean(-1), draw.blend(kinds.index(kind), 100)) for kind, values in found.items()]
            panels.append(draw.line(f"sparsity-{name}", title, steps, lines, "{:.0%}".format, from_zero=True))
    legend = [(kind, draw.series_colour(i), "line") for i, kind in enumerate(kinds)]
    return (
        summary(run)
        + page.figures(map(page.figure, panels))
        + page.keys(legend if panels else [])
        + fan_in(run, kinds)
        + block_maps(run)
        + page.folded(
            f"{len(run.sparsity['dense'])} parameters stay dense",
            page.table(("parameter", "why"), run.sparsity["dense"].items()),
        )
    )


def by_kind(matrices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sums the rows of sparsity.json over layers: {"kind", "layers", "size", "kept", "densities" (smallest, largest)}."""
    found: dict[str, dict[str, Any]] = {}
    for row in matrices:
        size = row["matrices"] * row["shape"][0] * row["shape"][1]
        kind = kind_of(row["path"])
        line = found.setdefault(kind, {"kind": kind, "layers": 0, "size": 0, "kept": 0, "densities": []})
        line["layers"] += 1
        line["size"] += size
        line["kept"] += row["kept"]
        line["densities"].append(row["kept"] / size)
    return list(found.values())


def summary(run: Run) -> str:
    """What was asked for, the averages over training, and what other allocations would cost."""
    rows = []
    for line in by_kind(run.sparsity["matrices"]):
        low, high = min(line["densities"]), max(line["densities"])
        spread = f"{low:.1%}" if high - low < 5e-4 else f"{low:.1%} to {high:.1%}"
        rows.append((line["kind"], line["layers"], count(line["size"]), count(line["kept"]), spread))
    parts = [page.table(("matrices", "layers", "weights", "kept in the end", "density"), rows, range(1, 5))]
    if run.train and (density := mean(run.train[-1].get("sparsity/mean_density"))) is not None:
        last, dense = run.train[-1], run.sparsity["dense_operations"]
        flops = (mean(last.get("sparsity/mean_flops_per_token")) or 0.0) / 3
        parts.append(
            f"<p>Mean density over training {density:.2%}; at the end {mean(last['sparsity/density']):.2%}. Forward operations a token "
            f"if absent weights did nothing: {count(flops)} on average, {flops / dense:.0%} of the dense model's {count(dense)}.</p>"
        )
    if run.sparsity.get("masked", False):
        parts.append(
            '<p class="soft">Masks are applied to dense matrices: time and memory are those of dense training. MFU counts dense operations.</p>'
        )
    if allocations := run.sparsity.get("allocations"):
        lines = [
            (name.upper() if name.startswith("er") else name, count(line["weights"]), count(line["operations"]))
            for name, line in allocations.items()
        ]
        parts.append(
            "<p>The same density under other allocations: weights that are kept, and forward operations a token.</p>"
            + page.table(("allocation", "sparse weights", "operations"), lines, (1, 2))
        )
    return "".join(parts)


def fan_in(run: Run, kinds: list[str]) -> str:
    """The histogram of inputs per output at the end."""
    found = {kind: values[-1] for kind, values in run.per_layer("fan_in", "sparsity").items() if kind in kinds}
    if not found:
        return ""
    used = max(int(np.flatnonzero(values).max(initial=0)) for values in found.values()) + 1
    names = ["0", "1"] + [f"{2 ** (b - 1):,} to {2**b - 1:,}" for b in range(2, used)]
    rows = [(kind, *(f"{share:.0%}" if share else "" for share in values[:used])) for kind, values in found.items()]
    content = page.table(("outputs with so many inputs", *names[:used]), rows, range(1, used + 1))
    return page.folded("Fan-in at the end", content)


def spaced(values: list[Any], most: int) -> list[Any]:
    """At most so many of a list, evenly spaced, the ends included."""
    picked = np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))
    return [values[i] for i in picked]


def block_maps(run: Run) -> str:
    """Where the weights of each kind of matrix are: layers downwards, steps to the right."""
    pictures = read_pictures(run.directory)
    if not pictures:
        return ""
    steps = spaced(list(pictures), MAPS)
    layers: dict[str, list[str]] = {}
    for path in pictures[steps[0]]:
        layers.setdefault(kind_of(path), []).append(path)
    drawings = []
    for kind, paths in layers.items():
        shown = spaced(sorted(paths, key=lambda path: [int(p) if p.isdigit() else 0 for p in path.split(".")]), MAPS)
        tiles = [[pictures[step][path] for step in steps if path in pictures[step]] for path in shown]
        blocks = [path.split(".")[1] for path in shown if path.startswith("blocks.")]
        where = f"blocks {', '.join(blocks)} downwards" if len(blocks) > 1 else f"block {''.join(blocks)}"
        caption = f"{kind}: {where}; steps {', '.join(f'{step:,}' for step in steps)} to the right"
        drawings.append(page.figure(map_image(tiles, caption), caption))
    return (
        "<p>Density of parts of each matrix, inputs downwards, outputs to the right; the densest part is darkest.</p>"
        + page.figures(drawings)
    )


def map_image(tiles: list[list[np.ndarray]], description: str) -> str:
    """Returns an image element of a grid of density maps [R, C], as many pixels a cell as `SCALE`."""
    highest = max(float(tile.max()) for row in tiles for tile in row) or 1.0

    def framed(tile: np.ndarray) -> np.ndarray:
        return np.pad(np.kron(tile / highest, np.ones((SCALE, SCALE))), 2)

    opacity = np.concatenate([np.concatenate([framed(tile) for tile in row], axis=1) for row in tiles])
    pixels = np.empty((*opacity.shape, 4))
    pixels[..., :3], pixels[..., 3] = INK, opacity
    stream = io.BytesIO()
    image.imsave(stream, pixels, format="png")
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="{page.text(description)}" src="data:image/png;base64,{data}">'
