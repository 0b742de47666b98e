"""Table and figure of a comparison of routers: means with intervals over seeds, paired differences."""

import json
import pathlib
from typing import Any

import numpy as np

from experiments.comparison_figure import draw_curves, draw_losses
from experiments.paired import interval

BASELINE = "top_k"
"""What causal routers are compared with."""


def compare(results: dict[str, dict[str, Any]]) -> None:
    """Adds paired differences: causal arms from the baseline, the others from the first of their own kind."""
    others = [name for name, row in results.items() if not row["causal"]]
    for name, row in results.items():
        base = BASELINE if row["causal"] else others[0]
        if base in results and name != base:
            difference = np.array(row["losses"]) - np.array(results[base]["losses"])
            row["difference"] = {"from": base, "mean": interval(difference)}


def markdown(report: dict[str, Any]) -> str:
    """Renders the table."""
    results, setup, (tuning_seeds, seeds) = report["results"], report["setup"], report["seeds"]
    lines = [
        "# Routers compared",
        "",
        f"{report['device']}, JAX {report['jax']}, {report['date']}. `{report['command']}`",
        "",
        f"{setup['layers']} layers, D = {setup['d_model']}, {setup['experts']} experts of {setup['hidden']} units, K = {setup['k']} (switch: half as many, "
        f"twice as large, K = 1), {report['tokens'] / 1e6:.2f} M tokens a member ({report['unique_tokens'] / 1e6:.2f} M unique), "
        f"{seeds} paired seeds at a learning rate tuned on {tuning_seeds} other seeds. Loss: nats a token on held-out text, mean and 95% "
        "interval over seeds; difference: paired. FLOPs: measured, training, a token. tokens/s: the whole population.",
        "",
    ]
    header = "| router | learning rate | held-out loss | difference | MFLOPs | experts a token | MaxVio | dropped | tokens/s |"
    for causal, title in (
        (True, "## Causal"),
        (False, "## Not causal: their loss sees the future; compare among themselves only"),
    ):
        rows = {name: row for name, row in results.items() if row["causal"] is causal}
        if not rows:
            continue
        lines += [title, "", header, "| --- |" + " ---: |" * 8]
        for name, row in sorted(rows.items(), key=lambda item: item[1]["loss"][0]):
            mean, half = row["loss"]
            change = row.get("difference")
            difference = f"{change['mean'][0]:+.4f} ± {change['mean'][1]:.4f}" if change else "-"

            def cell(value: float | None, form: str) -> str:
                return "-" if value is None else format(value, form)

            edge = " (edge)" if row["learning_rate_at_edge"] else ""
            lines.append(
                f"| {name} | {row['learning_rate']:.1e}{edge} | {mean:.4f} ± {half:.4f} | {difference} | {row['flops_per_token'] / 1e6:.1f} | "
                f"{cell(row['experts_per_token'], '.2f')} | {cell(row['max_violation'], '.2f')} | {cell(row['dropped'], '.2%')} | "
                f"{row['tokens_per_s']:,.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def picture(report: dict[str, Any], path: pathlib.Path) -> None:
    """Draws held-out losses with intervals, and the training curves."""
    from matplotlib.figure import Figure

    frame = Figure(figsize=(10, 4), layout="constrained")
    left, right = frame.subplots(1, 2)
    ordered = sorted(report["results"].items(), key=lambda item: (not item[1]["causal"], item[1]["loss"][0]))
    rows = [(name if row["causal"] else f"{name} (not causal)", row) for name, row in ordered]
    draw_losses(left, rows, lambda row: "o" if row["causal"] else "s")
    draw_curves(right, rows, lambda row: "-" if row["causal"] else "--")
    frame.savefig(path)


def write(report: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes numbers, table and figure."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "routing_comparison.json").write_text(json.dumps(report, indent=1) + "\n")
    if report["results"]:
        (folder / "routing_comparison.md").write_text(markdown(report))
        picture(report, folder / "routing_comparison.svg")
