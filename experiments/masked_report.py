"""Table and figure of a comparison of masked algorithms: means with intervals over seeds, orderings with p-values."""

import pathlib
from typing import Any

from experiments.comparison_figure import draw_curves, draw_losses
from experiments.paired import paired

ORDERINGS = (
    ("dense", "ste"),
    ("dense", "magnitude"),
    ("ste", "rigl"),
    ("ste", "set"),
    ("magnitude", "rigl"),
    ("magnitude", "set"),
    ("rigl", "static"),
    ("set", "static"),
)
"""(the arm with the lower loss, the other) as the JaxPruner paper finds them on T5 (Lee et al. 2023, arXiv 2304.14082)."""
OTHERS = (
    ("rigl", "set"),
    ("ste", "magnitude"),
    ("ste", "small_dense"),
    ("magnitude", "small_dense"),
    ("rigl", "small_dense"),
    ("set", "small_dense"),
    ("static", "small_dense"),
)
"""Pairs that the paper does not order, or does not have."""


def verdict(found: dict[str, Any]) -> str:
    """Says what a comparison shows: the paper's sign, the other one, or neither at the 5% level."""
    if found["p"] > 0.05:
        return "no difference shown"
    return "as there" if found["difference"][0] > 0 else "the other way round"


def comparisons(results: dict[str, dict[str, Any]], pairs: tuple[tuple[str, str], ...]) -> list[dict[str, Any]]:
    """Returns the comparison of every pair whose arms are both there."""
    return [
        {"first": first, "second": second, **paired(results[first]["losses"], results[second]["losses"])}
        for first, second in pairs
        if first in results and second in results
    ]


def markdown(report: dict[str, Any]) -> str:
    """Renders the tables."""
    results, setup, (tuning_seeds, seeds) = report["results"], report["setup"], report["seeds"]
    lines = [
        "# Masked algorithms compared",
        "",
        f"{report['device']}, JAX {report['jax']}, {report['date']}. `{report['command']}`. Written by the driver.",
        "",
        f"The model of `population_small`, density {setup['density']} in every matrix but embedding and head, {report['tokens'] / 1e6:.2f} M tokens a member "
        f"({report['unique_tokens'] / 1e6:.2f} M unique), {setup['steps']} steps of {setup['batch']} x {setup['length']} tokens, schedules finished. {seeds} paired seeds "
        f"at a learning rate tuned on {tuning_seeds} other seeds over the rates tried. Loss: nats a token on held-out text, mean and "
        f"95% interval over seeds. ste and magnitude: cubic schedule to three quarters of the run; rigl and set: exchanges every {setup['every']} steps, 0.3 of the weights "
        "falling as a cosine. Masked arms begin with the dense model's initial values under the mask.",
        "",
        "| arm | learning rate | rates tried | held-out loss | parameters | not zero | tokens/s, all members |",
        "| --- |" + " ---: |" * 6,
    ]
    for name, row in sorted(results.items(), key=lambda item: item[1]["loss"][0]):
        mean, half = row["loss"]
        edge = " (edge)" if row["learning_rate_at_edge"] else ""
        lines.append(
            f"| {name} | {row['learning_rate']:.1e}{edge} | {', '.join(row['tuning'])} | {mean:.4f} ± {half:.4f} | {row['parameters'] / 1e6:.2f} M | {row['nonzeros'] / 1e6:.2f} M | "
            f"{row['tokens_per_s']:,.0f} |"
        )
    for title, pairs in (("Orderings of the literature", ORDERINGS), ("Other pairs", OTHERS)):
        lines += [
            "",
            f"## {title}",
            "",
            "| first < second | second - first | seeds where first is lower | p (paired t, two sides) |"
            + (" |" if pairs is ORDERINGS else ""),
            "| --- |" + " ---: |" * 3 + (" --- |" if pairs is ORDERINGS else ""),
        ]
        for found in comparisons(results, pairs):
            mean, half = found["difference"]
            end = f" {verdict(found)} |" if pairs is ORDERINGS else ""
            lines.append(
                f"| {found['first']} < {found['second']} | {mean:+.4f} ± {half:.4f} | {found['lower']} of {seeds} | {found['p']:.1e} |{end}"
            )
    return "\n".join([*lines, ""])


def picture(report: dict[str, Any], path: pathlib.Path) -> None:
    """Draws held-out losses with intervals, and the training curves."""
    from matplotlib.figure import Figure

    frame = Figure(figsize=(10, 4), layout="constrained")
    left, right = frame.subplots(1, 2)
    rows = sorted(report["results"].items(), key=lambda item: item[1]["loss"][0])
    draw_losses(left, rows)
    draw_curves(right, rows)
    frame.savefig(path)


def write(report: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes table and figure."""
    if report["results"]:
        (folder / "masked_orderings.md").write_text(markdown(report))
        picture(report, folder / "masked_orderings.svg")
