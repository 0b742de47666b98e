"""Arms of a comparison at equal seconds: a recipe's compiled programs, timed, for runs of any length at any learning rate.

Learning rate and topology changes enter the compiled step as numbers, so that nothing is compiled again when the length is known.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import experiments
from experiments.smoke import smoke
from sparse_lm.data.pipeline import DataConfig
from sparse_lm.model.cudnn_attention import documents_bucket
from sparse_lm.parallel import rules
from sparse_lm.recipe import Recipe
from sparse_lm.train.schedule import Constant, Cosine
from sparse_lm.train.session import open_session
from sparse_lm.train.step import PULSE, build_step
from sparse_lm.train.validation import MODEL_ARRAYS
from sparse_lm.weight_sparsity.packed import Packed
from sparse_lm.weight_sparsity.schedules import Periodic


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the comparison."""

    seconds: float = 22.0
    """Training time of a run."""
    multipliers: tuple[float, ...] = (1.0, 2.0, 0.5)
    """Of the recipe's learning rate, in the order of their turn."""
    batch: int = 4
    """Sequences a step: a quarter of the recipe's, as half a minute has few dense steps."""
    length: int = 2048
    warmup_fraction: float = 0.1
    every: int = 50
    """Steps between two changes of the topology: half of the recipe's, as runs are short."""
    smoothing: int = 30
    """Steps over which training losses are averaged."""
    probes: int = 16
    """Readings of held-out text in a run."""
    probe_batches: int = 2
    """Batches of each domain in a reading."""
    validation_tokens: int | None = None
    """Held-out tokens of each domain that are read at the end of a run; none: all."""
    timed: int = 12
    """Steps that are timed before the length of a run is chosen."""
    smoke: bool = False


SMOKE = Setup(
    seconds=0.1,
    batch=2,
    length=32,
    every=3,
    smoothing=2,
    probes=2,
    probe_batches=1,
    validation_tokens=256,
    timed=2,
    smoke=True,
)


def recipe_of(name: str, setup: Setup, data: DataConfig) -> Recipe:
    """Returns an arm's recipe; its learning rate is constant, as the driver's argument carries the schedule."""
    recipe = experiments.load(name)
    if setup.smoke:
        recipe = smoke(recipe)
        recipe = dataclasses.replace(
            recipe, model=dataclasses.replace(recipe.model, layers=1, vocab_size=512, compute_dtype="float32")
        )
    if isinstance(recipe.weight_sparsity, Packed):
        recipe = dataclasses.replace(
            recipe, weight_sparsity=dataclasses.replace(recipe.weight_sparsity, schedule=Periodic(every=setup.every))
        )
    optimizer = dataclasses.replace(recipe.optimizer, schedule=Constant(warmup_steps=0))
    return dataclasses.replace(recipe, data=data, optimizer=optimizer)


class Asked:
    """Stands in a compiled step for the schedule of a run whose length is not known yet: the host says when and how much."""

    def __init__(self, share: jax.Array | None):
        self.share = share

    def due(self, step: Any, steps: int) -> bool:
        """Says whether this is the program of the steps that change the topology."""
        return self.share is not None

    def drop_fraction(self, step: Any, steps: int) -> Any:
        """Returns the share of the blocks that is exchanged."""
        return self.share


class Arm:
    """A recipe on one device with its compiled programs, for runs of any length at any learning rate."""

    def __init__(self, name: str, setup: Setup, data: DataConfig):
        self.name, self.setup = name, setup
        self.recipe = recipe_of(name, setup, data)
        self.session = open_session(self.recipe, jax.devices()[:1])
        sparsity = self.recipe.weight_sparsity
        self.topology = sparsity.schedule if isinstance(sparsity, Packed) else None
        self.rate = Cosine(warmup_fraction=setup.warmup_fraction)
        self.programs: dict[str, Any] = {}

    @functools.cached_property
    def initial(self) -> Any:
        """The state of step 0. It stays on the device, as making it compiles; runs begin with copies."""
        return self.session.create()

    def fresh(self) -> Any:
        """Returns a copy of the state of step 0, which a step may overwrite."""
        return jax.block_until_ready(jax.tree.map(jnp.copy, self.initial))

    def place(self, numbers: list[float]) -> list[jax.Array]:
        """Puts numbers on the device and waits: a program's first run loads kernels, during which nothing should travel."""
        return jax.block_until_ready(
            jax.device_put([np.float32(n) for n in numbers], rules.replicated(self.session.mesh))
        )

    def lower(self) -> dict[str, Any]:
        """Returns the lowered programs.

        step(state, batch, factor of the learning rate) and change(state, batch, share of the blocks) return (state, pulse);
        evaluate(params, inference state, batch) returns cross-entropies [B, L].
        """
        session, recipe, definition = self.session, self.recipe, self.session.definition
        data = recipe.data

        def bare(state: Any, batch: Any, factor: jax.Array, share: jax.Array | None) -> tuple[Any, jax.Array]:
            sparsifier: Any = recipe.weight_sparsity.build(definition, recipe.optimizer, recipe.train.steps, 1)
            if self.topology is not None:
                sparsifier.schedule = Asked(share)
            step = build_step(definition, recipe.optimizer, recipe.train, sparsifier, changes=share is not None)
            state, found = step(state, batch, factor)
            return state, found["pulse"]  # numbers about blocks would be the host's work

        def step(state: Any, batch: Any, factor: jax.Array) -> tuple[Any, jax.Array]:
            return bare(state, batch, factor, None)

        def change(state: Any, batch: Any, share: jax.Array) -> tuple[Any, jax.Array]:
            return bare(state, batch, jnp.float32(0.0), share)

        def evaluate(params: Any, inference_state: Any, batch: Any) -> jax.Array:
            return definition.token_losses(params, inference_state, batch)[0]

        def shaped(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        whole, sharding = rules.replicated(session.mesh), rules.batch_sharding(session.mesh)
        state = jax.tree.map(shaped, session.abstract, session.shardings)
        tokens = jax.ShapeDtypeStruct((data.batch_size, data.sequence_length), jnp.int32, sharding=sharding)
        batch = dict.fromkeys(MODEL_ARRAYS, tokens)
        number = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
        trained = {"step": step} if self.topology is None else {"step": step, "change": change}
        lowered = {
            name: jax.jit(function, donate_argnums=0, out_shardings=(session.shardings, whole)).lower(
                state, batch, number
            )
            for name, function in trained.items()
        }
        return lowered | {"evaluate": jax.jit(evaluate).lower(state.params, state.inference_state(), batch)}

    def time(self, batches: "Batches") -> dict[str, float]:
        """Returns the seconds of a step and of one that changes the topology, timed on a state of their own."""
        state, found = self.fresh(), {}
        first, nothing = batches.take(1)[0], self.place([0.0])[0]
        for name, repeats in (("step", self.setup.timed), ("change", 2)):
            if name in self.programs:
                for warm in (True, False):
                    jax.block_until_ready(state)
                    start = time.perf_counter()
                    for _ in range(2 if warm else repeats):
                        state, _ = self.programs[name](state, first, nothing)
                    jax.block_until_ready(state)
                found[name] = (time.perf_counter() - start) / repeats
        return found

    def changes(self, steps: int) -> list[int]:
        """Returns the steps of a run that change the topology."""
        topology = self.topology
        return [] if topology is None else [step for step in range(steps) if topology.due(step, steps)]

    def run(
        self, multiplier: float, steps: int, moves: bool, batches: "Batches", probe: Callable[[Any], float]
    ) -> tuple[Any, dict[str, Any]]:
        """Trains from fresh initial values.

        Returns:
          (state, {"curve": {"seconds", "loss"} of every step, "probes": [step, seconds, held-out loss], "seconds", "changes"}).
        """
        fixed, state = batches.take(steps), self.fresh()
        numbers = [multiplier * self.rate.at(step, steps) for step in range(steps)]
        shares = {}
        if moves and self.topology is not None:
            shares = {step: float(self.topology.drop_fraction(step, steps)) for step in self.changes(steps)}
        placed = self.place([shares.get(step, number) for step, number in enumerate(numbers)])
        marks = {round(steps * (n + 1) / self.setup.probes) for n in range(self.setup.probes)}
        losses: list[float] = []
        seconds: list[float] = []
        probes: list[tuple[int, float, float]] = []
        waiting: collections.deque[jax.Array] = collections.deque()
        before, start = 0.0, time.perf_counter()

        def read(most: int) -> None:
            """Reads losses of enqueued steps but the last `most`: the device never waits for the host."""
            while len(waiting) > most:
                losses.append(float(np.asarray(waiting.popleft())[PULSE.index("loss")]))
                seconds.append(before + time.perf_counter() - start)

        for step, batch in enumerate(fixed):
            program = self.programs["change" if step in shares else "step"]
            state, pulse = program(state, batch, placed[step])
            waiting.append(pulse)
            read(2)
            if step + 1 in marks:
                read(0)
                jax.block_until_ready(state)
                before += time.perf_counter() - start
                probes.append((step + 1, before, probe(state)))
                start = time.perf_counter()
        curve = {"seconds": np.round(seconds, 4).tolist(), "loss": np.round(losses, 5).tolist()}
        return state, {"curve": curve, "probes": probes, "seconds": before, "changes": len(shares)}


def planned(seconds: float, timing: dict[str, float], changes: Callable[[int], int]) -> int:
    """Returns how many steps fit into the seconds.

    Args:
      seconds: of training.
      timing: seconds of a "step" and, where there is one, of a "change".
      changes: steps of a run -> how many of them change the topology.
    """
    steps = max(2, math.floor(seconds / timing["step"]))
    more = timing.get("change", 0.0) - timing["step"]
    while steps > 2 and steps * timing["step"] + changes(steps) * more > seconds:
        steps -= 1
    return steps


class Batches:
    """The first batches of the stream, on the device, for arms that all have the same data."""

    def __init__(self, stream: Iterator[Any], arms: list[Arm]):
        self._stream, self._arms, self._batches = stream, arms, list[Any]()

    def take(self, count: int) -> list[Any]:
        """Returns the first `count`.

        Raises:
          ValueError: for a row with more documents than the steps are built for.
        """
        while len(self._batches) < count:
            batch, _ = next(self._stream)
            arm, found = self._arms[0], int(batch["segments_BL"].max())
            most = arm.recipe.model.attention.max_documents
            if documents_bucket(most, found) != most:
                raise ValueError(f"{found} documents in a row; allowed: {most}, attention.max_documents")
            self._batches.append(arm.session.put(batch))
        return jax.block_until_ready(self._batches[:count])


def compile_all(arms: dict[str, Arm], say: Callable[[str], Any], workers: int) -> None:
    """Compiles every arm's programs and makes its first state, side by side; Mosaic kernels must be lowered in turn."""

    def compiled(lowered: Any) -> tuple[Any, float]:
        start = time.perf_counter()
        return lowered.compile(), time.perf_counter() - start

    with concurrent.futures.ThreadPoolExecutor(max_workers=workers) as pool:
        waiting = [
            (arm, name, pool.submit(compiled, lowered))
            for arm in arms.values()
            for name, lowered in arm.lower().items()
        ]
        made = pool.submit(lambda: [jax.block_until_ready(arm.initial) for arm in arms.values()])
        for arm, name, future in waiting:
            arm.programs[name], seconds = future.result()
            say(f"{arm.name}, {name}: compiled in {seconds:.1f} s")
        made.result()
