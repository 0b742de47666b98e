"""What a run reports of its routers: loads and their violation, entropy, drops; from (sum, count) pairs of one step.

Legend: E experts, P members of a population.
"""

import re
from typing import Any

import numpy as np

RUN = re.compile(r"^(\d+)(?:_to_(\d+))?$")


def router_row(blocks: dict[str, dict[str, tuple[Any, Any]]], *, population: bool) -> dict[str, Any]:
    """Renders one step's router metrics by block.

    Args:
      blocks: {run of blocks: {name: (sum, count)}}; stacked runs have a layers dimension after the members dimension.
      population: whether a members dimension leads.

    Returns:
      {"router/blocks.3/load": fraction of assignments by expert, "router/blocks.3/max_violation": (max - mean) / mean load
      (Wang et al. 2024, arXiv 2408.15664, equation 4), and the mean of every other metric}; lists by member in a population.
    """
    row: dict[str, Any] = {}
    layer_axis = 1 if population else 0
    for run, metrics in blocks.items():
        match = RUN.match(run)
        assert match is not None, f"{run!r} is no run of blocks"
        first, last = int(match[1]), int(match[2] or match[1])
        for layer in range(first, last + 1):
            for name, (total, count) in metrics.items():
                total, count = np.asarray(total, np.float64), np.asarray(count, np.float64)
                if match[2]:
                    total, count = (np.take(a, layer - first, axis=layer_axis) for a in (total, count))
                prefix = f"router/blocks.{layer}/"
                if name == "load":
                    load = total / np.maximum(count, 1.0)[..., None]
                    row[prefix + "load"] = load.tolist()
                    row[prefix + "max_violation"] = (load.max(-1) * load.shape[-1] - 1.0).tolist()
                else:
                    row[prefix + name] = (total / np.maximum(count, 1.0)).tolist()
    return row
