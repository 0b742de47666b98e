"""Table and figure of a comparison at equal seconds: losses at the end, and how long each arm took to the dense twin's loss."""

import math
import pathlib
from typing import Any

import numpy as np

STATIC = "_static"
"""What the names of arms end with whose topology stays."""


def best_run(runs: dict[str, Any], arm: str) -> dict[str, Any] | None:
    """Returns an arm's run over all seconds with the lowest held-out loss; None if there is none."""
    whole = [run for run in runs.values() if run["arm"] == arm and run["share"] == 1.0]
    sound = [run for run in whole if math.isfinite(run["held_out"])]
    return min(sound, key=lambda run: run["held_out"], default=None)


def at_edge(runs: dict[str, Any], best: dict[str, Any]) -> bool:
    """Says whether the best learning rate of an arm is the lowest or the highest of those that were tried."""
    tried = [run["multiplier"] for run in runs.values() if run["arm"] == best["arm"] and run["share"] == 1.0]
    return best["multiplier"] in (min(tried), max(tried))


def smoothed(curve: dict[str, list[float]], window: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (seconds, mean of the last `window` losses at each), from step `window` on."""
    window = min(window, len(curve["loss"]))
    loss = np.convolve(np.array(curve["loss"]), np.ones(window) / window, "valid")
    return np.array(curve["seconds"])[window - 1 :], loss


def first_below(seconds: np.ndarray, loss: np.ndarray, target: float) -> float | None:
    """Returns when a curve first is at or below the target, linear between its points; None if never."""
    reached = np.flatnonzero(loss <= target)
    if not reached.size:
        return None
    at = int(reached[0])
    if at == 0:
        return float(seconds[0])
    share = (loss[at - 1] - target) / (loss[at - 1] - loss[at])
    return float(seconds[at - 1] + share * (seconds[at] - seconds[at - 1]))


def times_to_loss(report: dict[str, Any], dense: str = "wide_dense") -> dict[str, dict[str, Any]]:
    """Returns {arm: {"training", "held_out"}}: each {"seconds", "speed_up"} to the loss at the end of the dense twin's best run.

    The same rule holds for the twin itself. Training losses are means over `smoothing` steps; held-out losses are those of the readings.
    None stands for a loss that was not reached.
    """
    runs, window = report["runs"], report["setup"]["smoothing"]
    twin = best_run(runs, dense)
    if twin is None:
        return {}

    def curves(run: dict[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        _, seconds, losses = zip(*run["probes"])
        return {"training": smoothed(run["curve"], window), "held_out": (np.array(seconds), np.array(losses))}

    target = {kind: float(loss[-1]) for kind, (_, loss) in curves(twin).items()}
    base = {kind: first_below(*curve, target[kind]) for kind, curve in curves(twin).items()}
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(run["arm"] for run in runs.values()):
        best = best_run(runs, name)
        found[name] = {}
        for kind, curve in curves(best).items() if best else ():
            seconds, own = first_below(*curve, target[kind]), base[kind]
            found[name][kind] = {
                "target": target[kind],
                "seconds": seconds,
                "speed_up": None if seconds is None or own is None else own / seconds,
            }
    return found


def reached(found: dict[str, Any] | None) -> str:
    """Renders a time to a loss."""
    if not found or found["seconds"] is None:
        return "not reached"
    return f"{found['seconds']:.1f} s, {found['speed_up']:.2f}x"


def halved(report: dict[str, Any], dense: str = "wide_dense") -> list[str]:
    """Says of each arm's run in half of the seconds how its held-out loss stands to the dense twin's at the end of all seconds."""
    runs = report["runs"]
    twin, lines = best_run(runs, dense), []
    for run in runs.values():
        if run["share"] == 1.0 or twin is None:
            continue
        difference = run["held_out"] - twin["held_out"]
        how = "at or below" if difference <= 0 else "above"
        lines.append(
            f"- {run['arm']}, {run['seconds']:.1f} s with schedules finished, rate {run['learning_rate']:.1e}: {run['held_out']:.4f}, {how} the dense "
            f"twin's {twin['held_out']:.4f} after {twin['seconds']:.1f} s ({difference:+.4f})."
        )
    return lines


def markdown(report: dict[str, Any]) -> str:
    """Renders the tables."""
    runs, setup, times = report["runs"], report["setup"], times_to_loss(report)
    domains = list(next(iter(runs.values()))["domains"])
    lines = [
        "# Loss at equal seconds: wide sparse models and their dense twin",
        "",
        f"{report['device']}, JAX {report['jax']}, {report['date']}. `{report['command']}`. Written by the driver.",
        "",
        f"{setup['seconds']:g} s of training a run, {setup['batch']} x {setup['length']} tokens a step, document masks, {report['unique_tokens'] / 1e6:.1f} M unique tokens, "
        f"warm-up {setup['warmup_fraction']:g} of the run, cosine to a tenth, finished; topology changes every {setup['every']} steps to three quarters of the run. The "
        "tokenizer has 4096 of the model's 32768 tokens. Held-out: all held-out documents, nats a token. Static arms ran at the best rate of the arm they belong to only. "
        "**One seed: no claim that one arm is better.**",
        "",
        f"| arm | parameters | best rate | steps | tokens | seconds | held-out loss | {' | '.join(domains)} | training loss |",
        "| --- |" + " ---: |" * (7 + len(domains)),
    ]
    for name in times:
        best = best_run(runs, name)
        if best is None:
            continue
        edge = " (only one)" if name.endswith(STATIC) else " (edge)" if at_edge(runs, best) else ""
        each = " | ".join(f"{best['domains'][domain]:.4f}" for domain in domains)
        lines.append(
            f"| {name} | {best['parameters'] / 1e6:.1f} M | {best['learning_rate']:.1e}{edge} | {best['steps']} | {best['tokens'] / 1e6:.2f} M | "
            f"{best['seconds']:.1f} | {best['held_out']:.4f} | {each} | {best['training_loss']:.4f} |"
        )
    if times:
        target = times["wide_dense"]
        lines += [
            "",
            "## Time to the dense twin's loss",
            "",
            f"Training: mean of {setup['smoothing']} steps at the end of the dense run, {target['training']['target']:.4f}. Held-out: the dense run's last of "
            f"{setup['probes']} readings of the same held-out text, {target['held_out']['target']:.4f}. Seconds until the arm's best run is there, and how many times "
            "faster than the dense twin under the same rule. An arm gets there in the middle of its schedule, the twin at the end of its own.",
            "",
            "| arm | training loss | held-out loss |",
            "| --- | ---: | ---: |",
            *(
                f"| {name} | {reached(found.get('training'))} | {reached(found.get('held_out'))} |"
                for name, found in times.items()
            ),
        ]
    if half := halved(report):
        lines += ["", "Half of the seconds:", "", *half]
    lines += ["", "## Every run", "", "| run | steps | changes | seconds | held-out loss |", "| --- |" + " ---: |" * 4]
    for name, run in runs.items():
        lines.append(f"| {name} | {run['steps']} | {run['changes']} | {run['seconds']:.2f} | {run['held_out']:.4f} |")
    return "\n".join([*lines, ""])


def picture(report: dict[str, Any], path: pathlib.Path) -> None:
    """Draws smoothed training losses and the readings of held-out text against seconds, best runs only."""
    from matplotlib.figure import Figure

    frame = Figure(figsize=(10, 4), layout="constrained")
    left, right = frame.subplots(1, 2)
    tops = []
    for number, name in enumerate(times_to_loss(report)):
        best = best_run(report["runs"], name)
        if best is None:
            continue
        seconds, loss = smoothed(best["curve"], report["setup"]["smoothing"])
        left.plot(seconds, loss, color=f"C{number}", label=name)
        _, seconds, loss = zip(*best["probes"])
        right.plot(seconds, loss, "o-", markersize=3, color=f"C{number}")
        tops.append(loss[min(2, len(loss) - 1)])
    left.set_ylabel(f"training loss, mean of {report['setup']['smoothing']} steps")
    right.set_ylabel("held-out loss, part of the text")
    for side in (left, right):
        side.set_xlabel("seconds of training")
        side.set_ylim(top=max(tops))
    left.legend(fontsize=8)
    frame.savefig(path)


def write(report: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes table and figure."""
    if best_run(report["runs"], "wide_dense") is not None:
        (folder / "time_to_loss.md").write_text(markdown(report))
        picture(report, folder / "time_to_loss.svg")
