"""What is measured of masks: inside the step where they change, and rendered as a row of metrics on the host.

Legend: I inputs, O outputs, N bins, L layers, E experts.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.layers.parameter import RUN_KEY

BINS = 20
"""Bins of the fan-in histogram: 0, 1, 2-3, 4-7, ... inputs."""


def measure(before: jax.Array, after: jax.Array, ever: jax.Array | None) -> dict[str, jax.Array]:
    """Counts what a change of masks did, in each matrix.

    Args:
      before: bool [..., I, O].
      after: the next mask.
      ever: where a weight has existed at any time until `before`; None: this is not followed.

    Returns:
      int32 [...]: active (weights in `after`), kept (in both), grown (only in `after`), regrown (grown, and had existed once), never
      (never existed until now; these two only with `ever`), dead_outputs and dead_inputs (columns and rows without a weight); fan_in int32 [..., N].
    """

    def total(mask: jax.Array) -> jax.Array:
        return jnp.sum(mask, axis=(-2, -1), dtype=jnp.int32)

    fan_in = jnp.sum(after, axis=-2, dtype=jnp.int32)
    fan_out = jnp.sum(after, axis=-1, dtype=jnp.int32)
    bins = 32 - jax.lax.clz(fan_in)
    return {
        "active": total(after),
        "kept": total(before & after),
        "grown": total(after & ~before),
        "dead_outputs": jnp.sum(fan_in == 0, axis=-1, dtype=jnp.int32),
        "dead_inputs": jnp.sum(fan_out == 0, axis=-1, dtype=jnp.int32),
        "fan_in": jnp.sum(bins[..., None] == jnp.arange(BINS), axis=-2, dtype=jnp.int32),
        **({} if ever is None else {"regrown": total(after & ~before & ever), "never": total(~(ever | after))}),
    }


def absent(found: Mapping[str, Mapping[str, Any]], members: bool = False, *, mean: bool = False) -> dict[str, Any]:
    """Returns the weights of every leaf that do not exist, layers and experts together; [P] for a population.

    Args:
      found: from `Sparsifier.numbers`.
      members: whether a members dimension leads.
      mean: over all steps until now, instead of after the last one.
    """
    out = {}
    for path, leaf in found.items():
        weights = np.asarray(leaf["weights"], np.float64)
        there = (
            np.asarray(leaf["mean_density"], np.float64) * weights if mean else np.asarray(leaf["active"], np.float64)
        )
        missing = weights - there
        out[path] = missing.reshape(len(missing), -1).sum(-1) if members else missing.sum()
    return out


def kind_of(path: str) -> str:
    """Returns the path of a matrix without blocks and layer numbers: "attention.query" for all layers' queries."""
    parts = [part for part in path.split(".") if not part.isdigit() and not RUN_KEY.match(part)]
    return ".".join(part for part in parts if part not in ("blocks", "weight")) or path


def _first_layer(path: str) -> int:
    return next((int(part.partition("_")[0]) for part in path.split(".") if part[:1].isdigit()), 0)


def sparsity_row(found: Mapping[str, Mapping[str, Any]], members: bool = False) -> dict[str, Any]:
    """Renders the numbers of a step as entries of a metrics row.

    Args:
      found: from `Sparsifier.numbers`: {path: what `measure` counts, "weights", "inputs", "outputs" (sizes of a matrix), "requested",
        "mean_density" (over the steps until now)}, arrays [(members,) (layers,) (experts)].
      members: whether a members dimension leads.

    Returns:
      {"sparsity/density": fraction of all sparse weights that exist, "sparsity/mean_density": its mean over all steps until now,
      "sparsity/requested", "sparsity/churn": fraction of the weights that the last change brought, and for every kind of matrix
      "sparsity/attention.query/density", ".../churn", ".../regrown" (of the grown weights, those that had existed before),
      ".../never" (fraction never active), ".../dead_outputs", ".../dead_inputs" (fractions), of learned orders of inputs ".../soft_order"
      (how far from a permutation, see `learned_permutation.penalty`) and ".../hardened", one number a layer, and
      ".../fan_in" (fraction of the outputs in each bin, over all layers)}; every value a list by member in a population.
    """
    if not found:
        return {}
    if members:
        count = len(np.asarray(next(iter(found.values()))["active"]))
        rows = [
            sparsity_row({p: {n: np.asarray(a)[i] for n, a in leaf.items()} for p, leaf in found.items()})
            for i in range(count)
        ]
        return {name: [row[name] for row in rows] for name in rows[0]}
    sums: dict[str, float] = {}
    layers: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    for path, leaf in found.items():
        arrays = {name: np.asarray(array, np.float64) for name, array in leaf.items()}
        arrays["mean"] = arrays.pop("mean_density") * arrays["weights"]
        stacked = any(RUN_KEY.match(part) for part in path.split("."))
        for name in ("weights", "active", "requested", "mean", "kept"):
            sums[name] = sums.get(name, 0.0) + float(arrays[name].sum())
        for layer in range(len(arrays["active"]) if stacked else 1):
            own = {name: array[layer] if stacked else array for name, array in arrays.items()}
            # Summed over experts; the bins of the histogram stay.
            numbers = {n: a.reshape(-1, a.shape[-1]).sum(0) if n == "fan_in" else a.sum() for n, a in own.items()}
            layers.setdefault(kind_of(path), {})[_first_layer(path) + layer] = numbers
    row: dict[str, Any] = {
        "sparsity/density": sums["active"] / sums["weights"],
        "sparsity/mean_density": sums["mean"] / sums["weights"],
        "sparsity/requested": sums["requested"] / sums["weights"],
        "sparsity/churn": 1.0 - sums["kept"] / max(sums["active"], 1.0),
    }
    for kind, by_layer in layers.items():
        each_layer = [by_layer[layer] for layer in sorted(by_layer)]
        for name, (part, whole) in {
            "density": ("active", "weights"),
            "mean_density": ("mean", "weights"),
            "churn": ("grown", "active"),
            "regrown": ("regrown", "grown"),
            "never": ("never", "weights"),
            "dead_outputs": ("dead_outputs", "outputs"),
            "dead_inputs": ("dead_inputs", "inputs"),
            "soft_order": ("soft", "orders"),
            "hardened": ("hard", "orders"),
        }.items():
            if part in each_layer[0]:
                row[f"sparsity/{kind}/{name}"] = [float(n[part] / max(n[whole], 1.0)) for n in each_layer]
        histogram = sum(n["fan_in"] for n in each_layer)
        row[f"sparsity/{kind}/fan_in"] = (histogram / max(histogram.sum(), 1.0)).tolist()
    return row
