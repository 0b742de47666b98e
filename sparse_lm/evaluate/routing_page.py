"""Writes what `routing_analysis` found as a page with figures, RUN/routing.html.

Legend: L layers, E experts.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sparse_lm.evaluate import report_figures as draw
from sparse_lm.evaluate import report_page as page


def dots(name: str, title: str, unit: str, values: Mapping[str, list[float | None]], line: float) -> str:
    """Draws one row of dots a layer, one dot an expert, and a line at a reference value."""

    def paint(axes: Axes) -> None:
        for y, row in enumerate(values.values()):
            known = [(value, expert) for expert, value in enumerate(row) if value is not None]
            axes.plot([v for v, _ in known], [y] * len(known), "o", color=draw.SERIES[0], markersize=4.5, alpha=0.75)
            for value, expert in [min(known), max(known)] if len(known) > 1 else known:
                axes.annotate(
                    str(expert),
                    (value, y),
                    xytext=(0, 5),
                    textcoords="offset points",
                    ha="center",
                    color=draw.SOFT,
                    fontsize=8,
                )
        axes.axvline(line, color=draw.SOFT, linewidth=1.0, linestyle=(0, (3, 2)))
        axes.set_yticks(range(len(values)), [f"blocks.{layer}" for layer in values])
        axes.set_ylim(len(values) - 0.4, -0.7)
        axes.grid(axis="x")
        axes.set_title(title)
        axes.set_xlabel(unit)

    return draw.draw(name, f"{title} by layer", (4.9, 0.9 + 0.36 * len(values)), paint)


def load_figures(layers: Mapping[str, Any], domains: Mapping[str, Any]) -> str:
    """One map of loads for each number of experts and domain."""
    figures = []
    for width in sorted({found["experts"] for found in layers.values()}):
        rows = {layer: found for layer, found in layers.items() if found["experts"] == width}
        for number, domain in enumerate(domains):
            load_LE = np.array([found["loads"][domain] for found in rows.values()])
            drawing = draw.load_map(f"load-{width}-{number}", [f"blocks.{layer}" for layer in rows], load_LE)
            figures.append(page.figure(drawing, domain))
    return page.figures(figures)


def token_table(layers: Mapping[str, Any]) -> str:
    """Folded tables of the tokens that say most about each expert."""
    parts = []
    for layer, found in layers.items():
        rows = [
            (str(expert), "  ".join(f"{text!r} {share:.0%}" for text, share in best))
            for expert, best in enumerate(found["tokens"])
        ]
        parts.append(
            page.folded(f"blocks.{layer}", page.table(("expert", "tokens, and how much of each it takes"), rows, [0]))
        )
    return "".join(parts)


def write_page(run_dir: pathlib.Path, title: str, found: Mapping[str, Any]) -> pathlib.Path:
    """Writes RUN/routing.html and returns its path.

    Args:
      run_dir: the run's directory.
      title: of the page.
      found: from `routing_analysis.analyse`.
    """
    layers, domains, routes = found["layers"], found["domains"], found["paths"]
    tokens = sum(domain["tokens"] for domain in domains.values() if domain["trained"])
    mean = sum(domain["tokens"] * domain["loss"] for domain in domains.values() if domain["trained"]) / max(tokens, 1)
    sections = [
        (
            "Load by domain",
            "<p>Tokens per expert as a multiple of the even share, on held-out text of each domain.</p>"
            + load_figures(layers, domains),
        ),
        (
            "Shift of routing",
            "<p>Kullback-Leibler divergence of each corpus's loads from those of all the run's domains, in nats: 0 where the experts "
            "do not tell the corpora apart.</p>"
            + page.table(
                ("layer", *domains),
                [(f"blocks.{n}", *(f"{layer['shift'][d]:.4f}" for d in domains)) for n, layer in layers.items()],
                range(1, 1 + len(domains)),
            ),
        ),
        (
            "Loss by expert",
            "<p>Mean loss of the tokens that each expert takes; the line is the mean of all.</p>"
            + page.figure(
                dots(
                    "loss",
                    "Loss of an expert's tokens",
                    "nats a token",
                    {n: x["loss"] for n, x in layers.items()},
                    mean,
                ),
                wide=True,
            ),
        ),
        ("Tokens by expert", token_table(layers)),
        (
            "Paths",
            f"<p>A path is the first expert of a token in every routed block. {routes['distinct']:,} different ones among "
            f"{tokens:,} tokens; the path explains {routes['explained']:.1%} of the variance of the loss.</p>"
            + page.table(
                ("path", "share of tokens", "loss"),
                [(" ".join(map(str, p["path"])), f"{p['share']:.2%}", f"{p['loss']:.3f}") for p in routes["frequent"]],
                (1, 2),
            ),
        ),
    ]
    if all(layer["ablation"] for layer in layers.values()):
        effects = {n: layer["ablation"] for n, layer in layers.items()}
        drawing = dots("ablation", "Rise of the loss without an expert", "nats a token", effects, 0.0)
        explanation = (
            "<p>The expert's outputs are left out, all other routes stay. Near 0: the model would not miss it.</p>"
        )
        sections.insert(3, ("Effect of each expert", explanation + page.figure(drawing, wide=True)))
    path = run_dir / "routing.html"
    part = path.with_suffix(".part")
    subtitle = f"routing after {found['step']:,} steps, {tokens:,} held-out tokens"
    part.write_text(page.page(title, subtitle, "", sections), encoding="utf-8")
    os.replace(part, path)
    return path
