"""The report's section on memory layers: how far their gates open, what their rows gain, and after which n-grams."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparse_lm.evaluate import report_figures as draw
from sparse_lm.evaluate import report_page as page
from sparse_lm.evaluate.run_files import Run

LISTED = 12
"""N-grams that a table shows."""


def memory(run: Run) -> str:
    """The section's HTML: gates over time, and what `scripts/evaluate.py RUN --memory` has found; empty without a memory."""
    return gates_over_time(run) + (found(run.memory) if run.memory else "")


def gates_over_time(run: Run) -> str:
    """The mean gate of each memory layer."""
    gates = run.per_layer("gate", "memory")
    if not gates:
        return ""
    steps = np.array([row["step"] for row in run.train])
    lines = [(values, draw.blend(i, 100)) for i, values in enumerate(gates.values())]
    panel = draw.line("memory-gate", "Mean gate of the memory layers", steps, lines, "{:.2f}".format, from_zero=True)
    legend = [(name, draw.series_colour(i), "line") for i, name in enumerate(gates)] if len(gates) > 1 else []
    return page.figures([page.figure(panel)]) + page.keys(legend)


def found(measured: Mapping[str, Any]) -> str:
    """What memory.json holds: how full the tables are, and each domain, the first of them unfolded."""
    rows = [
        (
            name,
            f"{table['rows']:,}",
            f"{table['touched']:.1%}",
            f"{table['batch_rows']:,.0f} of {table['batch_addresses']:,}",
            f"{table['collisions']:.2%} ({table['expected_collisions']:.2%})",
        )
        for name, table in measured["tables"].items()
    ]
    header = (
        "table",
        "rows",
        "touched",
        "distinct rows of a batch's addresses",
        "n-grams that share a row (uniform hash)",
    )
    domains = [
        page.folded(
            f"{name}: loss {row['loss']:.3f}, with rows of zeros {row['loss_without']:.3f}", of_domain(row), i == 0
        )
        for i, (name, row) in enumerate(measured["domains"].items())
    ]
    return (
        f"<p>Tables after step {measured['step']:,}; collisions among the longest n-grams of the first batches.</p>"
        + page.table(header, rows, range(1, 5))
        + "".join(domains)
    )


def of_domain(row: Mapping[str, Any]) -> str:
    """Loss by how often the n-gram before a target was trained on; n-grams by what they gain, and by each layer's gate."""
    buckets = [
        (
            f"{bucket['from']:,}+ times" if bucket["from"] else "never",
            f"{bucket['tokens']:,}",
            f"{bucket['loss']:.3f}",
            f"{bucket['loss_without']:.3f}",
            f"{bucket['loss_without'] - bucket['loss']:.3f}",
        )
        for bucket in row["buckets"]
    ]
    header = ("n-gram seen in training", "tokens", "loss", "with rows of zeros", "gain")
    lists = ["<div><p>The rows gain most nats in all after</p>" + ngrams("gain", row["top"], "{:.1f}") + "</div>"]
    for block, entries in row["top_gates"].items():
        words = f"<p>The gate of block {page.text(block)} is widest after</p>"
        lists.append(f"<div>{words}{ngrams('gate', entries, '{:.2f}')}</div>")
    return f"<p>Nats a token.</p>{page.table(header, buckets, range(1, 5))}{page.figures(lists)}"


def ngrams(name: str, entries: Sequence[Mapping[str, Any]], form: str) -> str:
    """A table of n-grams with one number each, and a bar for it."""
    shown = entries[:LISTED]
    # A short bar: three tables stand beside each other.
    full = 1.0 if name == "gate" else max((entry[name] for entry in shown), default=1.0) or 1.0
    rows = [
        (
            repr(entry["text"]),
            f"{entry['tokens']:,}",
            form.format(entry[name]),
            page.share_bar(0.4 * entry[name] / full),
        )
        for entry in shown
    ]
    return page.table(("n-gram", "tokens", name, ""), rows, (1, 2))
