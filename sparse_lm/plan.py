"""What a recipe will take, before it runs: parameters, operations and bytes per device by component, under any mesh.

Nothing is computed and no device is needed: the state is abstract and shard sizes follow from the mesh sizes.

Legend: B batch, L length.
"""

import dataclasses
import math
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from sparse_lm.accounting import Account, account
from sparse_lm.config import ConfigError
from sparse_lm.layers.parameter import map_leaves
from sparse_lm.layers.tree_paths import flatten
from sparse_lm.memory.owners import owners_of
from sparse_lm.memory.working_set import working_set
from sparse_lm.model.definition import Definition
from sparse_lm.model.loss import chunks_of
from sparse_lm.parallel import rules
from sparse_lm.parallel.mesh import AXES, MeshShape
from sparse_lm.recipe import Recipe
from sparse_lm.train.session import Session, check_placement, open_session
from sparse_lm.train.validation import MODEL_ARRAYS

PARTS = ("params", "gradients", "opt_state", "ema", "model_state", "tables")
"""What a component holds on a device through a step; gradients are as large as the parameters, those of
tables as the rows that a step reads."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
      recipe: the recipe.
      mesh: sizes of the mesh axes.
      account: parameters and forward operations per token by component, of one member.
      bytes: component -> part of PARTS -> bytes on each device, all members together; of tables in host memory the working sets.
      host_bytes: of tables in the host memory of a process, rows and slots.
      activation_bytes: estimate of what the backward pass keeps of one microbatch on each device; see `activation_bytes`.
      logits_bytes: float32 logits of one chunk of the loss and their gradient, on each device.
      whole: the dims that a mesh axis should split but does not divide.
      members: models trained at once.
    """

    recipe: Recipe
    mesh: dict[str, int]
    account: Account
    bytes: dict[str, dict[str, int]]
    host_bytes: int
    activation_bytes: int
    logits_bytes: int
    whole: tuple[str, ...]
    members: int

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.mesh.values())

    @property
    def state_bytes(self) -> int:
        """Bytes of the training state and gradients on each device."""
        return sum(sum(parts.values()) for parts in self.bytes.values())

    @property
    def total_bytes(self) -> int:
        """State, gradients and the estimates."""
        return self.state_bytes + self.activation_bytes + self.logits_bytes

    @property
    def tokens_per_step(self) -> int:
        """Tokens that every member reads in a step."""
        return self.recipe.data.batch_size * self.recipe.data.sequence_length

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.tokens_per_step * self.recipe.train.steps

    @property
    def step_flops(self) -> float:
        """Operations of one step, all members and devices together."""
        return self.account.train_flops * self.tokens_per_step * self.members

    @property
    def training_flops(self) -> float:
        """Operations of the whole run."""
        return self.step_flops * self.recipe.train.steps


def device_count(shape: MeshShape, here: int) -> int:
    """Returns the devices of a mesh when nobody says: the product of its sizes, and for an inferred axis those of this machine."""
    fixed = math.prod(size for axis in AXES if (size := getattr(shape, axis)) != -1)
    inferred = any(getattr(shape, axis) == -1 for axis in AXES)
    return here if inferred and here % fixed == 0 else fixed


def make_plan(recipe: Recipe, devices: int) -> Plan:
    """Plans a recipe for a number of devices, which need not be there.

    Raises:
      ConfigError: when the mesh does not fit the devices or the batch does not divide over it.
    """
    sizes = recipe.mesh.sizes(devices)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    check_batch(recipe, mesh)
    check_placement(recipe, mesh)
    # The session's shapes do not depend on the mesh: one local device is enough to get them.
    session = open_session(dataclasses.replace(recipe, mesh=MeshShape(data=1)), jax.devices()[:1])
    shapes = jax.tree.map(lambda leaf: leaf.shape, session.abstract.params)
    rows = recipe.data.batch_size // rules.batch_shards(mesh) // recipe.train.microbatches
    length, members = recipe.data.sequence_length, session.members or 1
    return Plan(
        recipe=recipe,
        mesh=sizes,
        account=account(recipe.model, length),
        bytes=state_bytes(session, mesh),
        host_bytes=host_bytes(session) // (recipe.distributed.processes or 1),
        activation_bytes=members * activation_bytes(session.definition, rows, length) // mesh.shape["context"],
        logits_bytes=members * logits_bytes(recipe, max(rows, 1), mesh),
        whole=tuple(rules.undivided(session.dims.params, shapes, mesh)),
        members=members,
    )


def check_batch(recipe: Recipe, mesh: Any) -> None:
    """Raises ConfigError if the batch does not divide over the mesh."""
    pieces, data = rules.batch_shards(mesh), recipe.data
    if data.batch_size % (pieces * recipe.train.microbatches):
        axes = " x ".join(rules.BATCH_AXES)
        allowed = f"a multiple of mesh {axes} ({pieces}) x train.microbatches ({recipe.train.microbatches})"
        raise ConfigError("data.batch_size", data.batch_size, allowed)
    if data.sequence_length % mesh.shape["context"]:
        allowed = f"a multiple of mesh context ({mesh.shape['context']})"
        raise ConfigError("data.sequence_length", data.sequence_length, allowed)


def component_of(path: str, dims: tuple[str, ...]) -> str:
    """Returns the line of the account that a parameter belongs to, from its path and dims."""
    parts = path.split(".")
    if parts[0] in ("embedding", "head"):
        return parts[0]
    if parts[0] == "memory":
        return "memory"
    if parts[0] != "blocks":
        return "norms"
    layer = parts[2]
    if layer == "depth":
        return "router"
    if layer != "feed_forward":
        return "attention" if layer == "attention" else "norms"
    if parts[3] in ("router", "zero_computation"):
        return "router"
    if parts[3] == "shared":
        return "shared_expert"
    return "experts" if "experts" in dims else "feed_forward"


def shard_bytes(leaf: Any, dims: tuple[str, ...], mesh: Any) -> int:
    """Returns the bytes of one device's shard of an abstract array."""
    spec = rules.spec_of(dims, leaf.shape, mesh)
    axes = [axis for entry in spec if entry is not None for axis in ((entry,) if isinstance(entry, str) else entry)]
    pieces = math.prod(mesh.shape[axis] for axis in axes)
    return math.prod(leaf.shape) * leaf.dtype.itemsize // pieces


def state_bytes(session: Session, mesh: Any) -> dict[str, dict[str, int]]:
    """Returns component -> part -> bytes on each device; "other" is what belongs to no parameter."""
    by_path = flatten(session.dims.params)
    lines: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(PARTS, 0))

    def component(path: str) -> str:
        parts = path.split(".")
        suffixes = (".".join(parts[start:]) for start in range(len(parts)))
        found = next((suffix for suffix in suffixes if suffix in by_path), None)
        if found is not None:
            return component_of(found, by_path[found])
        return "router" if "router" in parts else "other"

    for part in ("params", "opt_state", "ema", "model_state"):

        def add(path: str, dims: tuple[str, ...], leaf: Any, part: str = part) -> None:
            size = shard_bytes(leaf, dims, mesh)
            line = lines[component(path)]
            line[part] += size
            if part == "params":
                line["gradients"] += size

        map_leaves(add, getattr(session.dims, part), getattr(session.abstract, part))

    def add_table(path: str, dims: tuple[str, ...], leaf: Any) -> None:
        lines["memory_rows"]["tables"] += shard_bytes(leaf, dims, mesh)

    held = {name: session.dims.tables[name] for name in session.shardings.tables}
    map_leaves(add_table, held, {name: session.abstract.tables[name] for name in held})
    if session.recipe.model.memory.placement.on_host:
        data = session.recipe.data
        arguments = (session.recipe.model.memory, session.abstract.tables, data.batch_size, data.sequence_length, False)
        # Places are split as the tokens, so both by the same axes as the rows.
        owners = owners_of(mesh)
        working = jax.tree.leaves(working_set(*arguments, owners))
        # That of the step that runs, which the next one takes rows from, and those of the two steps after it.
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in working)
        lines["memory_rows"]["tables"] += 3 * size // owners.pieces_OM.size
    return dict(lines)


def host_bytes(session: Session) -> int:
    """Returns the bytes of the tables that are in host memory; a save takes as much again while it is under way."""
    held = [part for name, part in session.abstract.tables.items() if name not in session.shardings.tables]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(held))


def activation_bytes(definition: Definition, rows: int, length: int) -> int:
    """Estimates what the backward pass keeps: the residuals of automatic differentiation that grow with the batch.

    XLA fuses some of them away, and the GPU's attention keeps no scores, which plain attention does for up to 1024 positions; so
    this is rather too much than too little. Under remat it counts what remat keeps.

    Args:
      definition: the model.
      rows: sequences on one device.
      length: L.
    """
    unit = definition.group_sequences()
    growth = _residual_bytes(definition, 2 * unit, length) - _residual_bytes(definition, unit, length)
    return growth * rows // unit


def _residual_bytes(definition: Definition, rows: int, length: int) -> int:
    batch = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in MODEL_ARRAYS}
    params = map_leaves(lambda _, shape: jax.ShapeDtypeStruct(shape, jnp.float32), definition.shapes)
    state = jax.eval_shape(definition.initial_state)  # the lists of sparse matrices are integers
    looked_up = {
        name: jax.ShapeDtypeStruct((rows, length, len(table.primes) * table.width), table.read_dtype)
        for name, table in definition.config.memory.tables().items()
    }

    def residuals(params: Any, state: Any, batch: Any, looked_up: Any) -> Any:
        units = definition.units(batch)

        def objective(params: Any, looked_up: Any) -> Any:
            return definition.objective(params, state, batch, units, None, rows=looked_up)

        _, pullback, _ = jax.vjp(objective, params, looked_up, has_aux=True)
        return pullback

    kept = jax.tree.leaves(jax.eval_shape(residuals, params, state, batch, looked_up))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in kept)


def logits_bytes(recipe: Recipe, rows: int, mesh: Any) -> int:
    """Returns the bytes of one chunk's float32 logits and their gradient on each device."""
    vocabulary, tensor = recipe.model.vocab_size, mesh.shape["tensor"]
    vocabulary = vocabulary if vocabulary % tensor else vocabulary // tensor
    length = recipe.data.sequence_length // mesh.shape["context"]
    chunk = length // chunks_of(rows, length, vocabulary)
    return 2 * 4 * rows * chunk * vocabulary


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What XLA says of the compiled step on this machine's devices.

    Attributes:
      seconds: of compilation.
      argument_bytes: state and batch on each device.
      output_bytes: new state and metrics, of which `alias_bytes` reuse the arguments' memory.
      alias_bytes: donated.
      temporary_bytes: gradients, activations and scratch space at their peak.
      flops: counted once for the body of each loop, so comparable only where nothing is scanned, chunked or accumulated; None
        where the backend does not say.
    """

    seconds: float
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    flops: float | None

    @property
    def peak_bytes(self) -> int:
        """What a device holds at most: arguments, outputs that reuse none of them, and scratch."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temporary_bytes


def compile_here(recipe: Recipe) -> Compiled:
    """Lowers and compiles the real step for this machine's devices; nothing runs.

    Raises:
      ConfigError: when the mesh does not fit this machine.
    """
    session = open_session(recipe)
    check_batch(recipe, session.mesh)
    return analysis(*session.compile_step())


def analysis(compiled: Any, seconds: float) -> Compiled:
    """Reads XLA's analysis of a compiled step."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, (list, tuple)) else cost
    return Compiled(
        seconds=seconds,
        argument_bytes=int(getattr(memory, "argument_size_in_bytes", 0)),
        output_bytes=int(getattr(memory, "output_size_in_bytes", 0)),
        alias_bytes=int(getattr(memory, "alias_size_in_bytes", 0)),
        temporary_bytes=int(getattr(memory, "temp_size_in_bytes", 0)),
        flops=(cost or {}).get("flops"),
    )
