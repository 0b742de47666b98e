"""What a run reports of its memory, from (sum, count) pairs of one step."""

from typing import Any

import numpy as np


def memory_row(layers: dict[str, dict[str, tuple[Any, Any]]]) -> dict[str, Any]:
    """Renders one step's metrics of the memory layers.

    Args:
      layers: {"memory.1": {name: (sum, count)}}, numbers or one for each member of a population.

    Returns:
      {"memory/blocks.1/gate": mean over tokens}; lists by member in a population.
    """
    row: dict[str, Any] = {}
    for layer, metrics in layers.items():
        for name, (total, count) in metrics.items():
            mean = np.asarray(total, np.float64) / np.maximum(np.asarray(count, np.float64), 1.0)
            row[f"memory/blocks.{layer.partition('.')[2]}/{name}"] = mean.tolist()
    return row
