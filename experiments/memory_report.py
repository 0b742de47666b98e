"""Table and figure of what a memory is worth: paired gains, in all, split into recall and reasoning, by domain and by kind of token; and how each
arm was tuned."""

import math
import pathlib
from typing import Any

import numpy as np

from experiments.comparison_figure import draw_losses
from experiments.paired import interval, paired

PAIRS = (
    ("dense_engram", "dense"),
    ("dense_engram", "dense_unigram"),
    ("dense_engram", "dense_shuffled"),
    ("moe_engram", "moe"),
    ("moe_engram", "moe_unigram"),
    ("moe_engram", "moe_shuffled"),
    ("moe_engram", "dense_engram"),
    ("moe", "dense_engram"),
)
"""(arm, what its gain is measured from)."""
GAINS = PAIRS[:6]
"""Those whose gains are split by kind."""


def shares(row: dict[str, Any], held_out: dict[str, Any], kinds: list[str]) -> np.ndarray:
    """Returns what some kinds of tokens contribute to the loss of all tokens, by seed: nats a token of all kinds together."""
    everything = sum(held_out["kinds"].values())
    parts = [np.array(row["kinds"][kind]) * held_out["kinds"][kind] / everything for kind in kinds]
    return np.sum(parts, axis=0) if parts else np.zeros(len(row["losses"]))


def split(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns, for each pair that is there, the paired gain (loss of the other minus the arm's own) in all and of each part.

    The parts and the rest add up to the gain in all.
    """
    results, held_out, out = report["results"], report["held_out"], []
    parts = held_out["parts"]
    known = {kind for kinds in parts.values() for kind in kinds}
    rest = [kind for kind in held_out["kinds"] if kind not in known]
    for arm, other in PAIRS:
        if arm in results and other in results:
            own, of_other = results[arm], results[other]
            found = {"all": paired(own["losses"], of_other["losses"])}
            for name, kinds in (*parts.items(), *([("rest", rest)] if rest else [])):
                found[name] = paired(*(shares(row, held_out, kinds).tolist() for row in (own, of_other)))
            out.append({"arm": arm, "other": other, "gains": found})
    return out


def by(report: dict[str, Any], what: str) -> list[dict[str, Any]]:
    """Returns the paired gain of each pair of `GAINS` by "domains" or "kinds", nats a token of that domain or kind."""
    results = report["results"]
    return [
        {
            "arm": arm,
            "other": other,
            "gains": {name: paired(results[arm][what][name], results[other][what][name]) for name in names},
        }
        for arm, other in GAINS
        if arm in results and other in results and (names := report["held_out"][what])
    ]


def cell(found: dict[str, Any]) -> str:
    """Renders a paired gain."""
    mean, half = found["difference"]
    return f"{mean:+.4f} ± {half:.4f} (p {found['p']:.1g})"


def gains_table(title: str, rows: list[dict[str, Any]]) -> list[str]:
    """Renders rows of gains with one column for each name."""
    if not rows:
        return []
    names = list(rows[0]["gains"])
    lines = [
        "",
        f"## {title}",
        "",
        f"| arm | gain from | {' | '.join(names)} |",
        "| --- | --- |" + " ---: |" * len(names),
    ]
    for row in rows:
        lines.append(f"| {row['arm']} | {row['other']} | {' | '.join(cell(row['gains'][name]) for name in names)} |")
    return lines


def tuning_table(report: dict[str, Any]) -> list[str]:
    """Renders what each arm lost in tuning at each rate, and says where the best lay."""
    results, tuning, setup = report["results"], report["tuning"], report["setup"]
    rates = list(next(iter(results.values()))["tuning"])
    edge = [name for name, row in results.items() if row["learning_rate_at_edge"]]
    lines = [
        "",
        "## Tuning",
        "",
        f"Training loss of the last tenth of {tuning['steps']} steps ({tuning['tokens'] / 1e6:.2f} M tokens), seed {', '.join(map(str, setup['tuning_seeds']))}, which no final run has. "
        f"The lowest or highest rate is the best one of {'these arms: ' + ', '.join(edge) if edge else 'no arm'}.",
        "",
        f"| arm | {' | '.join(rates)} |",
        "| --- |" + " ---: |" * len(rates),
    ]
    for name, row in results.items():
        best = min(row["tuning"].values(), key=lambda loss: (math.isnan(loss), loss))
        cells = (f"**{loss:.4f}**" if loss == best else f"{loss:.4f}" for loss in row["tuning"].values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def markdown(report: dict[str, Any]) -> str:
    """Renders the tables."""
    results, setup, held_out, tuning = report["results"], report["setup"], report["held_out"], report["tuning"]
    sizes = setup["sizes"]
    repeats = report["tokens"] != report["unique_tokens"]
    unique = f"{report['unique_tokens'] / 1e6:.2f} M unique" if repeats else "all unique"
    parts = "; ".join(f"{name}: {', '.join(kinds)}" for name, kinds in held_out["parts"].items())
    lines = [
        f"# What a memory is worth: {report['source']}",
        "",
        f"{report['device']}, JAX {report['jax']}, {report['date']}. `{report['command']}`. Written by the driver.",
        "",
        f"{sizes['layers']} blocks, D = {sizes['d_model']}, {report['tokens'] / 1e6:.2f} M tokens a member ({unique}), {setup['steps']} steps of "
        f"{setup['batch']} x {sizes['length']}, schedules finished. {len(setup['seeds'])} paired seeds. Each arm's learning rate is the best of {len(setup['multipliers'])} over "
        f"other seeds ({len(setup['tuning_seeds'])}) in runs of {tuning['steps']} steps, whose schedules are finished too. Loss: nats a "
        "token on held-out tokens, mean and 95% interval over seeds. Equal active operations; equal parameters but for `dense`. `unigram` and `shuffled`: the same rows, addressed by "
        "single tokens, or by n-grams mixed with their position.",
        "",
        "| arm | learning rate | held-out loss | parameters | in rows | M operations a trained token |",
        "| --- |" + " ---: |" * 5,
    ]
    for name, row in sorted(results.items(), key=lambda item: item[1]["loss"][0]):
        (mean, half), size = row["loss"], report["sizes"][name]
        edge = " (edge)" if row["learning_rate_at_edge"] else ""
        lines.append(
            f"| {name} | {row['learning_rate']:.1e}{edge} | {mean:.4f} ± {half:.4f} | {size['parameters'] / 1e6:.3f} M | {size['row_parameters'] / 1e6:.3f} M | "
            f"{size['flops_per_token'] / 1e6:.3f} |"
        )
    lines += gains_table(f"Gains, nats a token of all ({parts})", split(report))
    if split(report):
        lines += [
            "",
            "Positive: the arm's loss is lower. p: paired t test, two sides, not corrected for the number of comparisons. Parts add up to `all`.",
        ]
    lines += gains_table("Gains by domain, nats a token of it", by(report, "domains"))
    lines += gains_table("Gains by kind of token, nats a token of it", by(report, "kinds"))
    for what in ("domains", "kinds"):
        optimum = held_out["optimum"] if what == "kinds" else None
        lines += ["", f"## Held-out loss by {what.removesuffix('s')}", ""]
        lines += [f"| arm | {' | '.join(held_out[what])} |", "| --- |" + " ---: |" * len(held_out[what])]
        lines += [f"| tokens | {' | '.join(f'{tokens:,}' for tokens in held_out[what].values())} |"]
        if optimum:
            lines += [f"| best possible | {' | '.join(f'{optimum[name]:.4f}' for name in held_out[what])} |"]
        for name, row in results.items():
            cells = (interval(np.array(row[what][one])) for one in held_out[what])
            lines.append(f"| {name} | {' | '.join(f'{mean:.4f} ± {half:.4f}' for mean, half in cells)} |")
    lines += tuning_table(report)
    return "\n".join([*lines, ""])


def picture(report: dict[str, Any], path: pathlib.Path) -> None:
    """Draws held-out losses with intervals, and gains split into parts."""
    from matplotlib.figure import Figure

    frame = Figure(figsize=(11, 4), layout="constrained")
    left, right = frame.subplots(1, 2)
    draw_losses(left, sorted(report["results"].items(), key=lambda item: item[1]["loss"][0]))
    found = [one for one in split(report) if (one["arm"], one["other"]) in GAINS]
    for i, name in enumerate(found[0]["gains"] if found else ()):
        means, halves = zip(*(one["gains"][name]["difference"] for one in found))
        places = np.arange(len(found)) + 0.2 * i
        right.barh(places, means, 0.18, xerr=halves, color=f"C{i}", label=name, error_kw={"capsize": 2})
    right.set_yticks(np.arange(len(found)) + 0.2, [f"{one['arm']}\nfrom {one['other']}" for one in found], fontsize=8)
    right.invert_yaxis()
    right.axvline(0, color="black", linewidth=0.8)
    right.set_xlabel("gain, nats a token of all; parts add up")
    if found:
        right.legend(fontsize=8)
    frame.savefig(path)


def write(report: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes table and figure."""
    if report["results"]:
        stem = folder / f"memory_quality_{report['source']}"
        stem.with_suffix(".md").write_text(markdown(report))
        picture(report, stem.with_suffix(".svg"))
