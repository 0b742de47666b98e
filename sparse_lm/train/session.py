"""What a run needs before its first step: mesh, shardings, state, compiled step; built once, explicit, without side effects.

Legend: B batch, L length.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from sparse_lm.config import ConfigError
from sparse_lm.layers.parameter import map_leaves
from sparse_lm.memory.compression import Tokens
from sparse_lm.memory.device_tables import Tables
from sparse_lm.memory.host_tables import tables_of
from sparse_lm.memory.owners import Owners, owners_of
from sparse_lm.memory.table import hash_differences
from sparse_lm.memory.working_set import working_set, working_shardings
from sparse_lm.model.definition import Definition, define, for_documents, with_classes
from sparse_lm.parallel import rules
from sparse_lm.recipe import Recipe, checkpoints_of_run
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.train.checkpoint_reader import CheckpointError, read_checkpoint
from sparse_lm.train.initialize import initialize, is_partial, transforms_of
from sparse_lm.train.population import MEMBERS, member_arrays, over_members
from sparse_lm.train.state import MASKS, TABLES, TrainState, dims_of, fresh_state, initial_state, member_keys
from sparse_lm.train.step import build_step
from sparse_lm.train.validation import MODEL_ARRAYS
from sparse_lm.weight_sparsity.block_sparse import check_mesh
from sparse_lm.weight_sparsity.door import Sparsifier


@dataclasses.dataclass(frozen=True)
class Session:
    """A recipe placed on devices.

    Attributes:
      recipe: the recipe.
      definition: the abstract model.
      mesh: the devices.
      abstract: shapes of the state; a population's leaves have a leading members dimension.
      dims: logical dims of every leaf of the state.
      shardings: sharding of every leaf that is on devices: rows and slots in host memory have none.
      multipliers: learning-rate multiplier, or one per member.
      sparsifier: what makes weights sparse.
      create: makes the initial state of every member, sharded.
    """

    recipe: Recipe
    definition: Definition
    mesh: Mesh | AbstractMesh
    abstract: TrainState
    dims: TrainState
    shardings: TrainState
    multipliers: jax.Array
    sparsifier: Sparsifier
    create: Callable[[], TrainState]

    @property
    def members(self) -> int | None:
        """Size of the population, or None."""
        return len(self.recipe.population.members(self.recipe.seed)) if self.recipe.population.active else None

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """The rows of a global batch that this process's devices hold, ascending; processes may share rows."""
        data, sharding = self.recipe.data, rules.batch_sharding(self.mesh)
        held = sharding.addressable_devices_indices_map((data.batch_size, data.sequence_length)).values()
        return np.unique(np.concatenate([np.arange(data.batch_size)[index[0]] for index in held]))

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Places a batch of which this process has `rows`; together the processes make the batch that one process would make."""
        data, sharding = self.recipe.data, rules.batch_sharding(self.mesh)

        def place(local: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                start, stop, _ = index[0].indices(data.batch_size)
                begin, end = np.searchsorted(self.rows, (start, stop))
                return local[begin:end, index[1]]

            return jax.make_array_from_callback((data.batch_size, data.sequence_length), sharding, part)

        return {name: place(batch[name]) for name in MODEL_ARRAYS}

    @property
    def owners(self) -> Owners | None:
        """Who keeps which rows of tables in host memory; None where tables are on devices."""
        return owners_of(self.mesh) if self.recipe.model.memory.placement.on_host else None

    def tables(self, state: TrainState) -> Tables:
        """Returns what stands between the steps of a run and the tables of its state."""
        assert isinstance(self.mesh, Mesh)
        return tables_of(self.definition.config.memory, self.definition.hashes(), state.tables, self.mesh)

    def place(self, state: TrainState) -> TrainState:
        """Puts a state where the shardings say; what is in host memory stays there."""
        held = {name: part for name, part in state.tables.items() if name in self.shardings.tables}
        placed = rules.place(dataclasses.replace(state, tables=held), self.shardings)
        return dataclasses.replace(placed, tables={**state.tables, **placed.tables})

    def trace_step(self, documents: int = 1, changes: bool = False, full: bool = False) -> Any:
        """Traces the step for batches with up to `documents` documents in a row; returns JAX's traced program.

        Args:
          documents: most documents in a row.
          changes: whether it is the program for the steps that `Sparsifier.apart` names.
          full: whether it is the program for batches whose distinct rows outgrow the room of tables in host memory.
        """
        recipe, definition = self.recipe, for_documents(self.definition, documents)
        memory, abstract, shardings = definition.config.memory, self.abstract, self.shardings
        shape = (recipe.data.batch_size, recipe.data.sequence_length)
        if memory.placement.on_host:
            tables = working_set(memory, abstract.tables, *shape, full, self.owners)
            spread = {
                part: jax.tree.map(lambda _, own=own: own, tables[part])
                for part, own in working_shardings(self.mesh).items()
            }
            abstract = dataclasses.replace(abstract, tables=tables)
            shardings = dataclasses.replace(shardings, tables=spread)
        members = MEMBERS if recipe.population.active else None
        step = build_step(definition, recipe.optimizer, recipe.train, self.sparsifier, members, changes)
        step = over_members(step, recipe.population, (0, None, 0))
        batch = {
            name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rules.batch_sharding(self.mesh))
            for name in MODEL_ARRAYS
        }
        state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            shardings,
        )
        multipliers = self.multipliers

        def placed(state: TrainState, batch: dict[str, jax.Array]) -> Any:
            return step(state, batch, multipliers)

        jitted = jax.jit(placed, donate_argnums=0, out_shardings=(shardings, rules.replicated(self.mesh)))
        return jitted.trace(state, batch)

    def compile_step(self, documents: int = 1, changes: bool = False, full: bool = False) -> tuple[Any, float]:
        """Compiles the step ahead of time; arguments as for `trace_step`.

        Returns:
          (step(state, batch) -> (state, metrics), seconds).
        """
        start = time.perf_counter()
        compiled = self.trace_step(documents, changes, full).lower().compile()
        return compiled, time.perf_counter() - start


def check_division(recipe: Recipe, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError if a batch does not divide over the mesh: routing groups and microbatches stay whole on their shard."""
    pieces, sequences, shards = recipe.train.microbatches, recipe.group_sequences(), rules.batch_shards(mesh)
    if recipe.data.batch_size % (pieces * sequences * shards):
        allowed = (
            f"a multiple of train.microbatches ({pieces}) x group_sequences of the routed layers ({sequences}) x "
            f"the mesh's {' x '.join(rules.BATCH_AXES)} ({shards})"
        )
        raise ConfigError("data.batch_size", recipe.data.batch_size, allowed)
    if recipe.data.sequence_length % mesh.shape["context"]:
        allowed = f"a multiple of the mesh's context ({mesh.shape['context']})"
        raise ConfigError("data.sequence_length", recipe.data.sequence_length, allowed)


def check_placement(recipe: Recipe, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError if the rows of tables in host memory cannot be shared out evenly among the run's processes."""
    memory = recipe.model.memory
    if not memory.placement.on_host:
        return
    processes = owners_of(mesh).count if isinstance(mesh, Mesh) else recipe.distributed.processes or 1
    if uneven := [name for name, spec in memory.tables().items() if spec.rows % processes]:
        allowed = f"OnDevice where the processes that keep rows ({processes}) do not divide those of table {uneven[0]}"
        raise ConfigError("model.memory.placement", type(memory.placement).__name__, allowed)


def open_session(
    recipe: Recipe,
    devices: list[jax.Device] | None = None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    encoder: Tokens | None = None,
) -> Session:
    """Builds the mesh, the abstract model and the shardings of a recipe.

    Args:
      recipe: the recipe.
      devices: the devices of the mesh; None: all.
      mesh: the mesh itself instead, for planning: an abstract one can be traced for but holds no arrays.
      encoder: the data's tokenizer, whose tokens a memory compresses; None: it takes token ids as they are.

    Raises:
      ConfigError: if the mesh does not fit the devices or the batch does not divide over it.
    """
    mesh = recipe.mesh.build(devices) if mesh is None else mesh
    check_division(recipe, mesh)
    check_placement(recipe, mesh)
    attention = recipe.model.attention
    if recipe.population.active:
        attention = dataclasses.replace(attention, backend="plain")
    definition = define(dataclasses.replace(recipe.model, attention=attention))
    definition = dataclasses.replace(with_classes(definition, encoder), mesh=mesh.abstract_mesh)
    check_mesh(definition.packed, mesh)
    optimizer, population = recipe.optimizer, recipe.population
    try:
        scales = definition.learning_rate_scales(optimizer)
    except ConfigError as error:
        raise error.within("model.parametrization") from None
    try:
        transformation = optimizer.build(definition.dims, scales)
    except ConfigError as error:
        raise error.within("optimizer") from None
    try:
        train = recipe.train
        sparsifier = recipe.weight_sparsity.build(definition, optimizer, train.steps, train.microbatches)
    except ConfigError as error:
        raise error.within("weight_sparsity") from None
    with_ema = recipe.train.ema_decay is not None

    def create(seed: jax.Array) -> TrainState:
        return initial_state(definition, transformation, seed, with_ema=with_ema, sparsifier=sparsifier)

    seeds, multipliers = member_arrays(population, recipe.seed)
    dims = dims_of(definition, jax.eval_shape(create, 0), sparsifier)
    if population.active:
        dims = TrainState(
            **{
                field.name: map_leaves(lambda _, names: ("members", *names), getattr(dims, field.name))
                for field in dataclasses.fields(dims)
            }
        )
    create_all = over_members(create, population, (0,))
    abstract = jax.eval_shape(create_all, seeds)

    def shard(names: Any, shapes: Any) -> Any:
        return rules.shardings(names, jax.tree.map(lambda leaf: leaf.shape, shapes), mesh)

    shardings = TrainState(
        **{
            field.name: shard(getattr(dims, field.name), getattr(abstract, field.name))
            for field in dataclasses.fields(dims)
        }
    )
    on_host = recipe.model.memory.placement.on_host
    if on_host:
        shardings = dataclasses.replace(shardings, tables={"address": shardings.tables["address"]})

    def create_sharded() -> TrainState:
        init_keys, run_keys = over_members(member_keys, population, (0,))(seeds)
        params = definition.initial_params(init_keys, shardings.params)

        def around(params: Any, run_key: jax.Array) -> TrainState:
            made = fresh_state(definition, transformation, params, run_key, with_ema=with_ema, sparsifier=sparsifier)
            return dataclasses.replace(made, tables={name: made.tables[name] for name in shardings.tables})

        made = jax.jit(over_members(around, population, (0, 0)), out_shardings=shardings, donate_argnums=0)
        state = made(params, run_keys)
        if on_host:
            rows = definition.host_rows(jax.random.fold_in(run_keys, TABLES), owners_of(mesh))
            state = dataclasses.replace(state, tables={**state.tables, **rows})
        return state

    return Session(recipe, definition, mesh, abstract, dims, shardings, multipliers, sparsifier, create_sharded)


def check_addresses(definition: Definition, tables: dict[str, Any], origin: str) -> None:
    """Raises CheckpointError if saved tables are addressed otherwise than the recipe and its tokenizer say."""
    if different := hash_differences(tables.get("address", {}), definition.hashes()):
        raise CheckpointError(f"the tables of {origin} are addressed by other hashes: {', '.join(different)}")


def sparse_anew(sparsifier: Sparsifier, state: TrainState) -> TrainState:
    """Returns a state of step 0 with masks or topology chosen from its own parameters, which came from elsewhere."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), MASKS)
    params, model_state, sparsity = sparsifier.init(state.params, state.model_state, key)
    ema = params if state.ema else state.ema
    return dataclasses.replace(state, params=params, model_state=model_state, sparsity=sparsity, ema=ema)


def starting_point(session: Session) -> tuple[TrainState, dict[str, Any] | None]:
    """Returns the state to begin with and, when a run is continued whole, its data state.

    Raises:
      CheckpointError: when `start_from` names a checkpoint that is not there or does not fit.
    """
    state, start = session.create(), session.recipe.start_from
    if start.run is None:
        return state, None
    model = session.recipe.model
    on_host = model.memory.placement.on_host
    source = read_checkpoint(checkpoints_of_run(start.run), start.step, on_host=on_host)
    experts = {
        layer: forward.experts
        for layer in range(model.layers)
        if isinstance(forward := model.feed_forward_of(layer), MoEFeedForward)
    }
    transforms, partial = transforms_of(start, experts, session.recipe.seed, session.definition), is_partial(start)

    def loaded(fresh: TrainState, tree: dict[str, Any]) -> TrainState:
        """The fresh state of the run, or of all its members, with what the source has."""
        if session.members is None:
            return initialize(fresh, tree, transforms, partial=partial)
        members = [jax.tree.map(lambda leaf, i=i: leaf[i], fresh) for i in range(session.members)]
        members = [initialize(member, tree, transforms, partial=partial) for member in members]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)

    state = loaded(state, source.state)
    if start.keep == "parameters":
        state = over_members(functools.partial(sparse_anew, session.sparsifier), session.recipe.population, (0,))(state)
    if start.rewind is not None:
        if start.rewind >= 0:
            past = read_checkpoint(checkpoints_of_run(start.run), start.rewind, on_host=on_host)
            early = loaded(state, past.state).params
        else:
            keys, _ = over_members(member_keys, session.recipe.population, (0,))(
                member_arrays(session.recipe.population, session.recipe.seed)[0]
            )
            early = session.definition.initial_params(keys, session.shardings.params)
        params = session.sparsifier.only_existing(early, state.sparsity)
        state = dataclasses.replace(state, params=params, ema=params if state.ema else state.ema)
    state = session.place(state)
    return state, source.data_state if start.keep == "everything" else None
