"""Sums what each component says it costs: parameters (total and active), forward operations per token, bytes.

Conventions, stated wherever the numbers are printed: a multiply-add is two operations; a training step costs three forward
passes; causal attention counts half of the full score matrix (or its window); the embedding lookup counts no operations; the
head counts; the mean number of experts per token counts, not their total.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from sparse_lm.model.transformer import Model
from sparse_lm.routing.diagnostics import by_layer

FORMULA = (
    "MFU = 3 x forward operations per token x tokens per second / peak operations per second; forward operations = "
    "2 x (active matrix parameters with head, without embedding) + attention 4 x heads x head_dim x keys seen on average "
    "(causal: half of the length) per layer"
)


class Cost(NamedTuple):
    """One line of the account.

    Attributes:
      component: what is counted.
      parameters: leaves of the parameter tree.
      active_parameters: those a token passes through.
      flops_per_token: forward floating-point operations of one token.
      bytes: parameter bytes in float32.
    """

    component: str
    parameters: int
    active_parameters: int
    flops_per_token: float
    bytes: int


@dataclasses.dataclass(frozen=True)
class Account:
    """All lines of a model at one sequence length."""

    rows: tuple[Cost, ...]

    @property
    def parameters(self) -> int:
        """Total parameters; equals the leaf count of the real tree."""
        return sum(row.parameters for row in self.rows)

    @property
    def active_parameters(self) -> int:
        """Parameters a token passes through."""
        return sum(row.active_parameters for row in self.rows)

    @property
    def forward_flops(self) -> float:
        """Forward operations per token."""
        return sum(row.flops_per_token for row in self.rows)

    @property
    def train_flops(self) -> float:
        """Operations per trained token: three forward passes, recomputation not counted."""
        return 3.0 * self.forward_flops


def mean_keys(length: int, window: int | None, *, causal_half: bool = True) -> float:
    """Returns the keys that a query sees on average in a row of one document.

    Args:
      length: row length L.
      window: attention window, or None.
      causal_half: count causal attention as L / 2 (the field's convention); False counts all L keys.
    """
    if not causal_half:
        return float(length)
    if window is None or window >= length:
        return length / 2
    return window - window * window / (2 * length)


class Measured(NamedTuple):
    """What a routed layer was measured to do; None: its nominal value.

    Attributes:
      experts_per_token: mean of the feed-forward, over the tokens that reach it.
      depth: fraction of the tokens that pass through the block.
    """

    experts_per_token: float | None = None
    depth: float | None = None


def measured_in(row: Mapping[str, Any]) -> dict[int, Measured]:
    """Returns what the routed blocks of a row did, means over members, for the account."""
    experts, depth = by_layer(row, "experts_per_token"), by_layer(row, "depth_fraction")
    return {
        layer: Measured(
            float(experts[layer].mean()) if layer in experts else None,
            float(depth[layer].mean()) if layer in depth else None,
        )
        for layer in {*experts, *depth}
    }


def absent_operations(model: Model, absent: Mapping[str, Any], measured: Mapping[int, Measured] | None = None) -> Any:
    """Returns the forward operations per token that weights would do that do not exist: those that a sparse executor need not do.

    Args:
      model: the model's config.
      absent: weights that do not exist by path of the parameter, numbers or arrays.
      measured: what routed layers were measured to do, by number of the block.
    """
    total: Any = 0.0
    for path, weights in absent.items():
        share = 1.0
        if match := re.match(r"blocks\.(\d+)(?:_to_\d+)?\.(.*)", path):
            layer, inner = int(match[1]), match[2]
            found, router = (measured or {}).get(layer, Measured()), model.depth.router_of(layer)
            if router is not None:
                share = router.experts_per_token(1) if found.depth is None else found.depth
            lines = model.feed_forward_of(layer).cost(model.d_model, found.experts_per_token)
            if "experts" in lines and re.match(r"feed_forward\.(experts\.)?(gate|up|down)\b", inner):
                parameters, active, _ = lines["experts"]
                share *= active / parameters
        total = total + 2.0 * share * weights
    return total


def with_operations(description: dict[str, Any], model: Model, dense: float) -> dict[str, Any]:
    """Returns the description of sparse weights with the forward operations per token that they need, `dense` if all existed."""
    sizes = {row["path"]: row["matrices"] * math.prod(row["shape"]) for row in description["matrices"]}

    def line(kept: dict[str, float]) -> dict[str, float]:
        absent = {path: size - kept[path] for path, size in sizes.items()}
        return {"weights": sum(kept.values()), "operations": dense - absent_operations(model, absent)}

    others = {name: line(kept) for name, kept in description.get("allocations", {}).items()}
    return {**description, "dense_operations": dense, "allocations": others}


def account(
    model: Model, length: int, *, causal_half: bool = True, measured: Mapping[int, Measured] | None = None
) -> Account:
    """Counts a model at a sequence length.

    Args:
      model: the model's config.
      length: sequence length, for attention.
      causal_half: see `mean_keys`.
      measured: what routed layers were measured to do, by number of the block.
    """
    d_model, vocabulary = model.d_model, model.vocab_size
    totals: dict[str, list[float]] = {}

    def add(component: str, parameters: float, active: float, flops: float) -> None:
        line = totals.setdefault(component, [0, 0, 0.0])
        for i, value in enumerate((parameters, active, flops)):
            line[i] += value

    # The lookup reads one row: no operations. A tied table is the head's matrix as well and is counted once.
    add("embedding", vocabulary * d_model, d_model, 0.0)
    attention, scores = model.attention, 0.0
    for layer in range(model.layers):
        found, router, part = (measured or {}).get(layer, Measured()), model.depth.router_of(layer), 1.0
        if router is not None:
            # A block that a fraction of the tokens passes through: so many operations, and attention among them alone.
            part = router.experts_per_token(1) if found.depth is None else found.depth
            add("router", d_model * router.columns, d_model * router.columns, 2.0 * d_model * router.columns)
        parameters, flops = attention.cost(d_model)
        add("attention", parameters, part * parameters, part * flops)
        keys = mean_keys(round(part * length), attention.window, causal_half=causal_half)
        scores += part * 4.0 * attention.heads * attention.head_dim * keys
        lines = model.feed_forward_of(layer).cost(d_model, found.experts_per_token)
        for component, (parameters, active, flops) in lines.items():
            add(component, parameters, part * active, part * flops)
        add("norms", 2 * d_model, part * 2 * d_model, 0.0)
    for block in model.memory.blocks:
        parameters, flops = model.memory.cost(block, d_model)
        add("memory", parameters, parameters, flops)
    for table in model.memory.tables().values():
        # A token reads one row of each head and computes nothing with the others.
        add("memory_rows", table.rows * table.width, len(table.primes) * table.width, 0.0)
    add("attention_scores", 0, 0, scores)
    add("norms", d_model, d_model, 0.0)
    head = 0 if model.tied_embeddings else vocabulary * d_model
    add("head", head, vocabulary * d_model, 2.0 * vocabulary * d_model)
    return Account(tuple(Cost(name, int(p), int(a), f, 4 * int(p)) for name, (p, a, f) in totals.items()))
