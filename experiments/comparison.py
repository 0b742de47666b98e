"""An arm of a comparison is a population: one model, compiled once for any seeds and learning rates, tuned, trained, looked at.

All arms see the same batches in the same order, and members of equal seeds share initial values wherever models are equal, so that
differences between arms are paired by seed. The schedule of the learning rate enters the compiled step as numbers: one program serves
runs of any length, and each finishes its schedule.

Legend: P members, B batch, L length, S steps.
"""

import concurrent.futures
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.paired import interval
from sparse_lm.data.dataset import Dataset
from sparse_lm.data.pipeline import DataConfig
from sparse_lm.model.definition import Definition
from sparse_lm.train.optimizer import Optimizer
from sparse_lm.train.population import MEMBERS
from sparse_lm.train.schedule import Constant
from sparse_lm.train.state import TrainState, fresh_state, member_keys
from sparse_lm.train.step import PULSE, Train, build_step
from sparse_lm.train.validation import MODEL_ARRAYS, document_losses
from sparse_lm.weight_sparsity.door import NoSparsity, WeightSparsity

POINTS = 400
"""Most points of a training curve that are kept."""
WATCH_EVERY = 10
"""Steps between two of those whose watched numbers are kept; the last step's always are."""
LOWERING = threading.Lock()
"""Arms are lowered in turn and only compiled side by side: lowering holds the interpreter, and two threads that lower Mosaic kernels can fail."""

Compiling = concurrent.futures.Future[float]
"""What `Arm.compile` will return."""


class Trained(NamedTuple):
    """A trained population.

    Attributes:
      state: of all members.
      losses_SP: training loss of each step.
      watched: what `Arm` watches, on the device, of every tenth step and the last.
      seconds: from the first step to the last.
    """

    state: TrainState
    losses_SP: np.ndarray
    watched: list[Any]
    seconds: float


class Arm:
    """One model's population."""

    def __init__(
        self,
        definition: Definition,
        optimizer: Optimizer,
        train: Train,
        *,
        members: int,
        shape: tuple[int, int],
        sparsity: WeightSparsity | None = None,
        watch: Callable[[dict[str, Any]], Any] = lambda found: (),
    ):
        """Prepares an arm; `compile` compiles it.

        Args:
          definition: the model.
          optimizer: its learning rate is what multiples are of.
          train: length, to which schedules of sparse weights are compiled, and numerics.
          members: P.
          shape: (B, L) of all batches.
          sparsity: of the weights; None: dense.
          watch: chooses from a step's metrics what to keep; hundreds of small arrays a step would be the host's work.
        """
        self.definition, self.optimizer, self.train = definition, optimizer, train
        self.members, self.shape, self._watch = members, shape, watch
        sparsity = sparsity or NoSparsity()
        self.sparsifier = sparsity.build(definition, optimizer, train.steps, 1)
        self._fixed_length = not isinstance(sparsity, NoSparsity)
        transformation = optimizer.build(definition.dims)

        def around(params: Any, key: jax.Array) -> TrainState:
            return fresh_state(definition, transformation, params, key, with_ema=False, sparsifier=self.sparsifier)

        self._around = jax.jit(jax.vmap(around), donate_argnums=0)
        self._effective = jax.jit(jax.vmap(lambda p, s: self.sparsifier.forward_params(p, s, train.steps)))
        self._step: dict[bool, Any] = {}
        self._losses: Any = None

    def create(self, seeds: jax.Array) -> TrainState:
        """Returns the state of step 0 of all members."""
        init_keys, run_keys = jax.vmap(member_keys)(seeds)
        return self._around(self.definition.initial_params(init_keys), run_keys)

    def compile(self) -> float:
        """Compiles creation, the step (with and without a change of masks) and evaluation; returns the seconds."""
        start = time.perf_counter()
        first = self.create(jnp.arange(self.members, dtype=jnp.uint32))
        state, inference = jax.tree.map(_abstract, (first, self.inference(first)))
        del first
        rates = jax.ShapeDtypeStruct((self.members,), jnp.float32)
        batch = dict.fromkeys(MODEL_ARRAYS, jax.ShapeDtypeStruct(self.shape, jnp.int32))
        changing = any(self.sparsifier.apart(step) for step in range(self.train.steps))
        with LOWERING:
            steps = {
                changes: jax.jit(self._over_members(changes), donate_argnums=0).lower(state, batch, rates)
                for changes in ((False, True) if changing else (False,))
            }
            losses = jax.jit(jax.vmap(self._token_losses, in_axes=(0, 0, None))).lower(*inference, batch)
        self._step = {changes: lowered.compile() for changes, lowered in steps.items()}
        self._losses = losses.compile()
        return time.perf_counter() - start

    def _over_members(self, changes: bool) -> Callable[..., Any]:
        constant = dataclasses.replace(self.optimizer, schedule=Constant(warmup_steps=0))
        step = build_step(self.definition, constant, self.train, self.sparsifier, MEMBERS, changes)

        def bare(state: TrainState, batch: Any, rate: jax.Array) -> Any:
            state, found = step(state, batch, rate)
            return state, found["pulse"], self._watch(found)

        return jax.vmap(bare, in_axes=(0, None, 0), axis_name=MEMBERS)

    def _token_losses(self, params: Any, model_state: Any, batch: Any) -> jax.Array:
        return self.definition.token_losses(params, model_state, batch)[0]

    def run(self, seeds: Sequence[int], rates: Sequence[float], batches: Sequence[Any]) -> Trained:
        """Trains members of these seeds at these multiples of the learning rate, one step a batch.

        Raises:
          ValueError: for another number of members than the program has, or of sparse weights with another number of steps than theirs.
        """
        steps = len(batches)
        if not len(seeds) == len(rates) == self.members:
            raise ValueError(f"{len(seeds)} seeds and {len(rates)} rates; allowed: {self.members} each, the members")
        if self._fixed_length and steps != self.train.steps:
            raise ValueError(f"{steps} batches; allowed: {self.train.steps}, train.steps, as weights are sparse")
        scale_S = np.asarray(self.optimizer.schedule_at(np.arange(steps), steps))
        factors_SP = np.outer(scale_S, rates).astype(np.float32)
        state = self.create(jnp.asarray(seeds, jnp.uint32))
        pulses, watched = [], []
        jax.block_until_ready(state)
        start = time.perf_counter()
        for number, batch in enumerate(batches):
            state, pulse, seen = self._step[self.sparsifier.apart(number)](state, batch, factors_SP[number])
            pulses.append(pulse)
            if number % WATCH_EVERY == 0 or number == steps - 1:
                watched.append(seen)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - start
        losses_SP = np.stack([np.asarray(pulse)[:, PULSE.index("loss")] for pulse in pulses])
        return Trained(state, losses_SP, watched, seconds)

    def inference(self, state: TrainState) -> tuple[Any, Any]:
        """Returns (effective parameters, model state with tables) of all members, as evaluation takes them."""
        return self._effective(state.params, state.sparsity), state.inference_state()

    def token_losses(self, inference: tuple[Any, Any], batch: dict[str, np.ndarray]) -> np.ndarray:
        """Returns the cross-entropy of every position, nats, [P, B, L]."""
        return np.asarray(self._losses(*inference, {name: batch[name] for name in MODEL_ARRAYS}))

    def held_out(self, state: TrainState, dataset: Dataset, data: DataConfig, max_tokens: int) -> np.ndarray:
        """Returns the validation loss of each member over all domains, of which each gives at most so many tokens; nats a token."""
        (params, model_state), nats, tokens = self.inference(state), 0.0, 0
        for domain in dataset.domains:
            found = document_losses(
                self._losses, params, model_state, dataset, data, domain, batch_size=self.shape[0], max_tokens=max_tokens
            )  # fmt: skip
            nats, tokens = nats + found.nats.sum(-1), tokens + int(found.tokens.sum())
        return np.asarray(nats) / max(tokens, 1)

    def tune(self, multipliers: Sequence[float], seeds: Sequence[int], batches: Sequence[Any]) -> dict[str, Any]:
        """Chooses the learning rate by the mean training loss of the last tenth, over the tuning seeds.

        Returns:
          {"factor", "rate", "edge" (whether it is the lowest or highest tried), "losses": {rate: loss}, "seconds": of training}.
        """
        pairs = list(itertools.product(multipliers, seeds))
        found = self.run([seed for _, seed in pairs], [factor for factor, _ in pairs], batches)
        late_P = found.losses_SP[-max(1, len(batches) // 10) :].mean(0)
        last = late_P.reshape(len(multipliers), -1).mean(1)
        best, rate = int(np.argmin(np.where(np.isfinite(last), last, np.inf))), self.optimizer.learning_rate
        return {
            "factor": multipliers[best],
            "rate": multipliers[best] * rate,
            "edge": multipliers[best] in (min(multipliers), max(multipliers)),
            "losses": {f"{factor * rate:.1e}": float(loss) for factor, loss in zip(multipliers, last)},
            "seconds": found.seconds,
        }


def as_compiled(compiling: dict[str, Compiling]) -> Iterator[tuple[str, Compiling]]:
    """Yields arms that are compiled: the first in the order given among those that are now; while there is none, waits."""
    waiting = dict(compiling)
    while waiting:
        concurrent.futures.wait(waiting.values(), return_when=concurrent.futures.FIRST_COMPLETED)
        name = next(name for name, future in waiting.items() if future.done())
        yield name, waiting.pop(name)


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def outcome(tuned: dict[str, Any], losses_P: np.ndarray) -> dict[str, Any]:
    """Returns what every report's row has of a tuned arm: its rate, how it was found, and the held-out losses of its seeds."""
    return {
        "learning_rate": tuned["rate"],
        "learning_rate_at_edge": tuned["edge"],
        "tuning": tuned["losses"],
        "losses": losses_P.tolist(),
        "loss": interval(losses_P),
    }


def thinned(curve: np.ndarray) -> list[list[float]]:
    """Returns [[step, loss], ...]: means over equal stretches of a curve."""
    pieces = np.array_split(np.arange(len(curve)), min(POINTS, len(curve)))
    return [[float(piece.mean()), float(curve[piece].mean())] for piece in pieces]
