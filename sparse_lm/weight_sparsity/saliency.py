"""Algorithms that choose once, by what a weight does to the loss, to the flow through the network, or to its outputs.

    algorithm   score                                      looks at
    snip        |gradient x weight|                        one batch
    synflow     |w dR/dw|, R the flow of ones through |w|  no data
    wanda       |w| x norm of its input                    one batch

With the schedule `one_shot` in the first step of a fresh run this is pruning at initialisation, on a trained model (`start_from`)
pruning after training; with `cubic` it is done in rounds.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.config import ConfigError
from sparse_lm.layers.projection import observing_inputs
from sparse_lm.weight_sparsity.algorithms import Algorithm, Flat, Leaf, Magnitude, Now, Start, keep_best
from sparse_lm.weight_sparsity.flow import KNOWN, total_flow
from sparse_lm.weight_sparsity.schedules import ConstantSparsity
from sparse_lm.weight_sparsity.telemetry import kind_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class SNIP(Algorithm):
    """Connection sensitivity of the batch at hand (Lee et al. 2019, arXiv 1810.02340, eq. 5). The choice takes the place of the step."""

    needs_gradient: ClassVar[bool] = True
    replaces_step: ClassVar[bool] = True

    def scores(self, leaves: dict[str, Leaf], now: Now) -> Flat:
        """See Algorithm.scores."""
        return {path: jnp.abs(now.grads[path] * now.params[path]) for path in leaves}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanda(Algorithm):
    """Magnitude times the norm of the weight's input (Sun et al. 2024, arXiv 2306.11695, eq. 1). The choice takes the place of the step.

    As in the paper with the structure `constant_fan_in`: weights of one output compete with each other. Inputs are those of one batch.
    """

    needs_gradient: ClassVar[bool] = True
    replaces_step: ClassVar[bool] = True

    def prepare(self, leaves: dict[str, Leaf], definition: Any) -> None:
        """See Algorithm.prepare."""
        for path, leaf in leaves.items():
            if len(leaf.layout.batch) > isinstance(leaf.names, tuple):
                raise ConfigError("exclude", path, "the paths of experts too: their inputs are not observed")

    def scores(self, leaves: dict[str, Leaf], now: Now) -> Flat:
        """See Algorithm.scores."""
        with observing_inputs():
            squares = now.gradient(now.params)
        return {path: jnp.abs(now.params[path]) * jnp.sqrt(squares[path]) for path in leaves}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynFlow(Magnitude):
    """Synaptic flow, without data, in rounds before the first step (Tanaka et al. 2020, arXiv 2006.05467, algorithm 1).

    The paper's threshold is global (the allocation `global`). For the flow through a transformer see `flow.py`.
    """

    rounds: int = 100
    """Rounds; the density after round r of R is density^(r / R)."""

    def check(self) -> None:
        """See Config.check."""
        self.require(self.rounds >= 1, "rounds", "at least 1")

    def check_beside(self, masked: Any) -> None:
        """See Algorithm.check_beside."""
        super().check_beside(masked)
        if not isinstance(masked.schedule, ConstantSparsity):
            raise ConfigError(
                "schedule", type(masked.schedule).__name__, "constant: synflow prunes before the first step"
            )

    def prepare(self, leaves: dict[str, Leaf], definition: Any) -> None:
        """See Algorithm.prepare."""
        for path in leaves:
            if kind_of(path) not in KNOWN:
                raise ConfigError("exclude", path, f"this path too: the flow is defined through {', '.join(KNOWN)}")

    def first(self, leaves: dict[str, Leaf], start: Start) -> Flat:
        """See Algorithm.first."""
        attention = start.definition.config.attention

        def scores(mask: Flat) -> Flat:
            weights = {
                path: jnp.where(mask[path], leaf, 0.0) if path in mask else leaf for path, leaf in start.params.items()
            }
            slopes = jax.grad(total_flow)(weights, attention.heads, attention.key_heads)
            return {path: jnp.abs(slopes[path] * weights[path]) for path in leaves}

        def one_round(i: jax.Array, mask: Flat) -> Flat:
            density = start.density ** ((i + 1) / self.rounds)
            progress = jnp.where(i + 1 == self.rounds, 1.0, (1.0 - density) / max(1.0 - start.density, 1e-9))
            return keep_best(leaves, scores(mask), lambda found: start.requested(found, progress))

        everything = {path: jnp.ones(leaf.layout.shape, bool) for path, leaf in leaves.items()}
        return jax.lax.fori_loop(0, self.rounds, one_round, everything)
