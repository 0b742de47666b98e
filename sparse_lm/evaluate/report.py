"""Writes report.html of a run directory: everything that the run left behind, in one file to look at.

Reads what is there, and leaves out the sections whose files are missing: metrics.jsonl, config.json, environment.json,
accounting.json, sparsity.json, memory.json, data.json, evaluation.json, samples.json.
"""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sparse_lm.evaluate import report_figures as draw
from sparse_lm.evaluate import report_page as page
from sparse_lm.evaluate.memory_section import memory
from sparse_lm.evaluate.run_files import Run, average, flat, number
from sparse_lm.evaluate.sparsity_section import weight_sparsity
from sparse_lm.train.metrics import TOTALS
from sparse_lm.train.progress import count, duration, mean

BITS = "bits_per_byte"


def write_report(run_dir: str | os.PathLike[str], *, extra: Mapping[str, Any] | None = None) -> pathlib.Path:
    """Writes RUN/report.html and returns its path.

    Args:
      run_dir: the run's directory.
      extra: more headline numbers, what -> value; numbers are written with three digits.
    """
    run = Run(pathlib.Path(run_dir))
    sections = [(heading, content) for heading, build in SECTIONS if (content := build(run))]
    if not sections:
        raise ValueError(f"{run_dir} holds nothing to report; expected some of: metrics.jsonl, {', '.join(Run.FILES)}")
    path = run.directory / "report.html"
    beside = path.with_suffix(".part")
    beside.write_text(page.page(run.title, run.subtitle, headline(run, extra or {}), sections), encoding="utf-8")
    os.replace(beside, path)
    return path


def headline(run: Run, extra: Mapping[str, Any]) -> str:
    """The numbers to remember."""
    entries: list[tuple[str, str]] = []
    for name, result in sorted((run.evaluation or {}).get("domains", {}).items()):
        if not np.isfinite(number(result.get(BITS))):
            continue
        against = ""
        if result.get("xz_bits_per_byte"):
            change = result[BITS] / result["xz_bits_per_byte"] - 1
            against = f", {abs(change):.0%} {'below' if change < 0 else 'above'} xz"
        entries.append((f"{result[BITS]:.3f}", f"bits per byte, {name}{against}"))
    if not entries and run.validation:
        last = run.validation[-1]
        measure, unit = (BITS, "bits per byte") if mean(last.get(BITS)) is not None else ("loss", "nats a token")
        if mean(last.get(measure)) is not None:
            entries.append((f"{mean(last[measure]):.3f}", f"{unit}, validation"))
    if run.train:
        last = run.train[-1]
        entries += [
            (f"{number(mean(last.get('loss'))):.3f}", "training loss, nats a token"),
            (count(last["tokens"]), "tokens"),
        ]
        entries += [(duration(last["seconds"]), "of training")]
        speed, mfu = (
            np.nanmedian(values) if np.isfinite(values).any() else None
            for values in map(run.series, ("tokens_per_s", "mfu"))
        )
        if speed is not None:
            entries.append((count(speed), "tokens a second, median"))
        if mfu is not None:
            entries.append((f"{mfu:.1%}", "MFU, median"))
        if (joules := mean(last.get("joules_per_token"))) is not None:
            entries.append((count(joules), "joules a token"))
        if (memory := mean(last.get("memory_peak_bytes"))) is not None:
            entries.append((f"{memory / 2**30:.2f}", "GiB of device memory at most"))
    if run.accounting:
        total, active = (sum(row[key] for row in run.accounting) for key in ("parameters", "active_parameters"))
        entries.append((count(total), "parameters" if active == total else f"parameters, {count(active)} active"))
    for name, value in extra.items():
        entries.append(
            (count(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value), name)
        )
    return page.tiles(entries)


def quality(run: Run) -> str:
    """Bits per byte beside xz."""
    domains = (run.evaluation or {}).get("domains", {})
    if not domains:
        return ""
    rows, bars = [], []
    names = [name for name in run.domains if name in domains and np.isfinite(number(domains[name].get(BITS)))]
    if not names:
        return ""
    for name in names:
        result = domains[name]
        interval, plain, primed = (
            result.get(key) for key in ("interval", "xz_bits_per_byte", "xz_primed_bits_per_byte")
        )
        bars.append((name, result[BITS], tuple(interval) if interval else None, plain, primed))
        value = f"{result[BITS]:.3f}" + (f"  ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
        below = "" if plain is None else f"{1 - (interval[1] if interval else result[BITS]) / plain:.1%}"
        rows.append(
            [
                name,
                value,
                *(written(v, ".3f") for v in (plain, primed)),
                below,
                *(written(result.get(k), ".2f") for k in ("loss", "perplexity")),
            ]
        )
    weak = "color-mix(in oklab, var(--s1) 45%, var(--paper))"
    legend = (
        (("model, with its 95% interval", draw.series_colour(0), "bar"), True),
        (("xz -9", weak, "bar"), any(bar[3] is not None for bar in bars)),
        (("xz primed with training text", draw.series_colour(1), "dashes"), any(bar[4] is not None for bar in bars)),
    )
    header = ("domain", "bits per byte (95%)", "xz -9", "xz primed", "below xz, at least", "loss", "perplexity")
    remarks = []
    for name in names:
        if (share := domains[name].get("xz_primed_share", 1.0)) < 0.999:
            remarks.append(f"{name}: xz was primed with {share:.0%} of the training text.")
        if optimum := domains[name].get("optimum"):
            remarks.append(f"{name}: {optimum['excess']:.4f} nats a token above the known optimum.")
    explanation = (
        "How many bits the model needs for a byte of text that it was not trained on; the interval is a bootstrap over documents. "
        "xz -9 compresses the same text from nothing; primed, it has seen training text first."
    )
    return (
        f"<p>{explanation}</p>"
        + page.figure(draw.bits_per_byte("bits", bars), wide=True)
        + page.keys(key for key, shown in legend if shown)
        + page.table(header, rows, numeric=range(1, 7))
        + "".join(f'<p class="soft">{page.text(remark)}</p>' for remark in remarks)
    )


def written(value: float | None, form: str) -> str:
    """Formats a number, or nothing for None."""
    return "" if value is None else format(value, form)


def learning(run: Run) -> str:
    """Loss against tokens, seconds and FLOPs."""
    if not run.train:
        return ""
    by_row = [row.get("loss") for row in run.train]
    losses = np.array(
        [[number(v) for v in (loss if isinstance(loss, list) else [loss] * run.members)] for loss in by_row]
    ).T
    panels = []
    total = run.train[-1]["seconds"]
    unit, unit_s = ("seconds", 1) if total < 180 else ("minutes", 60) if total < 10_800 else ("hours", 3600)
    axes = (("tokens", "tokens", 1), ("seconds", f"{unit} of training", unit_s), ("flops", "FLOPs", 1))
    trained = [d for d in run.domains if any(d in row.get("domains", {}) for row in run.validation)]
    for key, label, scale in axes:
        lines = {}
        for domain in trained:
            rows = [row for row in run.validation if domain in row.get("domains", {})]
            values = np.array([number(mean(row["domains"][domain].get("loss"))) for row in rows])
            lines[domain] = (np.array([row[key] / scale for row in rows]), values)
        where = np.array([row[key] / scale for row in run.train])
        panels.append(page.figure(draw.loss_against(f"loss-{key}", label, where, losses, lines)))
    kept = "var(--ink)"
    legend = [("training, smoothed", kept, "line")] if run.members == 1 else [
        (f"training, mean of {run.members}", kept, "line"), ("members", "var(--soft)", "faint")
    ]  # fmt: skip
    legend += [(f"validation, {domain}", draw.series_colour(i), "dots") for i, domain in enumerate(trained)]
    note = "The frame leaves out the first few percent of the run, where the loss falls from that of a guess."
    steps = np.array([row["step"] for row in run.train])
    rates = [
        page.figure(draw.line("rate", "Learning rate", steps, [(run.series("learning_rate"), draw.INK)], draw.short)),
        page.figure(
            draw.line("norm", "Gradient norm", steps, [(run.series("grad_norm"), draw.INK)], log=True, smoothed=True)
        ),
    ]
    return (
        page.figures(panels) + page.keys(legend) + f'<p class="soft">{note}</p>' + page.figures(rates) + happenings(run)
    )


def happenings(run: Run) -> str:
    """Events as a folded list."""
    rows = []
    for row in run.events:
        details = page.flatten({name: value for name, value in row.items() if name not in (*TOTALS, "event")})
        words = "; ".join(
            f"{name} {value}" if name else value for name, value in [("", row.get("event", "")), *details]
        )
        rows.append((f"{row['step']:,}", words))
    return page.folded(f"{len(rows)} events", page.table(("step", "event"), rows, numeric=[0])) if rows else ""


ROUTER_TITLES = {
    "max_violation": "Most loaded expert, excess over the even share",
    "dead_experts": "Experts without a token in the last 20 rows",
    "churn": "Assignments that changed since the last checkpoint",
    "coactivation": "Largest share of an expert's tokens that another takes too",
    "depth_fraction": "Tokens that pass through the block",
}
PERCENT = ("max_violation", "churn", "coactivation", "dropped", "overflow", "depth_fraction", "depth_dropped")


def routing(run: Run) -> str:
    """Load of the experts at the end; its worst, and what else the routers measure, over time."""
    loads = run.per_layer("load")
    if not loads:
        return ""
    recent = max(1, len(run.train) // 10)
    maps = []
    for width in sorted({values.shape[1] for values in loads.values()}):
        layers = [name for name, values in loads.items() if values.shape[1] == width]
        ends_LE = np.array([average(loads[name][-recent:], 0) for name in layers])
        ends_LE = ends_LE / np.maximum(ends_LE.sum(axis=1, keepdims=True), 1e-12)
        maps.append(page.figure(draw.load_map(f"load-{width}", layers, ends_LE), wide=True))
    steps = np.array([row["step"] for row in run.train])
    measures = {key.rsplit("/", 1)[1] for row in run.train for key in flat(row) if key.startswith("router/")} - {"load"}
    panels = []
    for measure in sorted(measures):
        by_layer = run.per_layer(measure)
        if any(values.ndim != 1 for values in by_layer.values()):
            continue
        depth = max(1, len(by_layer) - 1)
        lines = [(values, draw.blend(0, 35 + 65 * i / depth)) for i, values in enumerate(by_layer.values())]
        title = ROUTER_TITLES.get(measure, measure.replace("_", " ").capitalize())
        form = "{:.0%}".format if measure in PERCENT else count
        from_zero = measure in ("max_violation", "dead_experts", "churn")
        panels.append(page.figure(draw.line(f"router-{measure}", title, steps, lines, form, from_zero=from_zero)))
    names = list(loads)
    faint = "color-mix(in oklab, var(--s0) 35%, var(--paper))"
    legend = [(names[0], faint, "line"), (names[-1], draw.series_colour(0), "line")] if len(names) > 1 else []
    alarms = [f"Step {row['step']:,}: {row['alarm']}." for row in run.events if row.get("event") == "routing alarm"]
    return (
        "<p>How evenly the routers spread tokens: the mean over the last tenth of the run, then over time.</p>"
        + "".join(f"<p><b>{page.text(alarm)}</b></p>" for alarm in alarms)
        + "".join(maps)
        + page.figures(panels)
        + page.keys(legend if panels else [])
    )


def speed(run: Run) -> str:
    """Throughput, waiting for data, MFU."""
    if not run.train or not np.isfinite(run.series("tokens_per_s")).any():
        return ""
    steps = np.array([row["step"] for row in run.train])
    waiting = run.series("data_wait_s") / np.maximum(run.series("step_s"), 1e-9)
    panels = [draw.line("speed", "Tokens a second", steps, [(run.series("tokens_per_s"), draw.INK)], from_zero=True)]
    if np.isfinite(waiting).any():
        most = np.nanmax(waiting)
        percent = ("{:.2%}" if most < 0.01 else "{:.1%}" if most < 0.1 else "{:.0%}").format
        panels.append(
            draw.line(
                "waiting",
                "Share of time spent waiting for data",
                steps,
                [(waiting, draw.INK)],
                percent,
                from_zero=True,
                smoothed=True,
            )
        )
    if np.isfinite(run.series("mfu")).any():
        panels.append(draw.line("mfu", "MFU", steps, [(run.series("mfu"), draw.INK)], "{:.0%}".format, from_zero=True))
        note = "MFU: operations that the model needs (active parameters, causal attention counted half, nothing recomputed) over the device's peak."
    else:
        note = "MFU is not given: the peak rate of this device is not known."
    return page.figures(map(page.figure, panels)) + f'<p class="soft">{note}</p>'


def samples(run: Run) -> str:
    """Generated text."""
    quotes = "".join(
        f"<blockquote><b>{page.text(sample['prompt'])}</b>{page.text(sample['text'].removeprefix(sample['prompt']))}</blockquote>"
        for sample in run.samples or []
    )
    return quotes and "<p>The prompt in bold; the rest is the model's.</p>" + quotes


def parts(run: Run) -> str:
    """Parameters, FLOPs and bytes by component."""
    if not run.accounting:
        return ""
    columns = ("parameters", "active_parameters", "flops_per_token", "bytes")
    totals = [sum(row[column] for row in run.accounting) for column in columns]
    rows = [
        [
            row["component"].replace("_", " "),
            *(count(row[c]) for c in columns),
            page.share_bar(row["flops_per_token"] / (totals[2] or 1)),
        ]
        for row in run.accounting
    ]
    rows.append(["total", *map(count, totals), ""])
    header = ("component", "parameters", "active", "forward FLOPs a token", "bytes", "share of FLOPs")
    return page.table(header, rows, numeric=range(1, 5), total=True)


def text_learnt(run: Run) -> str:
    """The data: a table of counts by domain and split, the rest as facts."""
    if run.data is None:
        return ""
    rest = dict(run.data)
    domains = rest.get("domains")
    content = counts_table(domains) if isinstance(domains, dict) else ""
    if content:
        del rest["domains"]
    return content + (page.folded("all facts", page.facts(rest)) if rest else "")


def counts_table(domains: Mapping[str, Any]) -> str:
    """A table of {domain: {split: {what: count}}}; nothing if it is of another form."""
    lines = [
        (d, s, counts)
        for d, splits in sorted(domains.items())
        if isinstance(splits, dict)
        for s, counts in splits.items()
    ]
    if not lines or not all(isinstance(counts, dict) for _, _, counts in lines):
        return ""
    columns = list(dict.fromkeys(name for _, _, counts in lines for name in counts))

    def cell(value: Any) -> str:
        return f"{value:,}" if isinstance(value, int) else str(value)

    rows = [(domain, split, *(cell(counts.get(name, "")) for name in columns)) for domain, split, counts in lines]
    return page.table(("domain", "split", *columns), rows, numeric=range(2, 2 + len(columns)))


def settings(run: Run) -> str:
    """The recipe, part by part."""
    if not run.config:
        return ""
    recipe = run.recipe or run.config
    plain = {key: value for key, value in recipe.items() if not isinstance(value, (dict, list))}
    nested = {key: value for key, value in recipe.items() if isinstance(value, (dict, list))}
    return (page.facts(plain) if plain else "") + "".join(
        page.folded(key, page.facts({key: value})) for key, value in nested.items()
    )


def surroundings(run: Run) -> str:
    """Machine and versions."""
    return page.facts(run.environment) if run.environment else ""


SECTIONS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("Against a compressor", quality),
    ("Samples", samples),
    ("Learning", learning),
    ("Experts", routing),
    ("Memory", memory),
    ("Weight sparsity", weight_sparsity),
    ("Speed", speed),
    ("Parameters and operations", parts),
    ("Data", text_learnt),
    ("Configuration", settings),
    ("Environment", surroundings),
)
