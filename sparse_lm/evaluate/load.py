"""Opens a finished (or running) run for evaluation: its recipe, its data, and the parameters of one checkpoint."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from sparse_lm.data.dataset import Dataset
from sparse_lm.data.pipeline import prepare
from sparse_lm.layers.parameter import map_leaves
from sparse_lm.memory.host_array import HostArray
from sparse_lm.model.definition import Definition, define, with_classes
from sparse_lm.recipe import Recipe, load_recipe
from sparse_lm.train.checkpoint import checkpoint_directory
from sparse_lm.train.checkpoint_reader import CheckpointError, read_checkpoint
from sparse_lm.train.population import Population
from sparse_lm.train.session import check_addresses
from sparse_lm.train.state import stack, with_tables

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A run at one checkpoint.

    Attributes:
      directory: the run's directory.
      recipe: its recipe.
      dataset: its prepared data.
      definition: its abstract model.
      step: finished steps of the checkpoint.
      params: nested dict of weights in the model's layout, as the model computes with them; of the parameters' moving average when
        the run kept one.
      model_state: nested dict of model state, and of the addresses and rows of a memory's tables.
      population: the members that `params` holds (a leading dimension of every leaf), inactive for a single model.
      averaged: whether `params` is the moving average.
    """

    directory: pathlib.Path
    recipe: Recipe
    dataset: Dataset
    definition: Definition
    step: int
    params: Tree
    model_state: Tree
    population: Population
    averaged: bool

    @property
    def members(self) -> int:
        """Models held: the population's size, or 1."""
        return len(self.population.members(self.recipe.seed))

    def member(self, index: int) -> "Loaded":
        """Returns one member of a population as a single model; a single model is its own member 0.

        Raises:
          ValueError: for a member that does not exist.
        """
        if not 0 <= index < self.members:
            allowed = f"0 to {self.members - 1}" if self.population.active else "0: this run has no population"
            raise ValueError(f"member = {index}; allowed: {allowed}")
        if not self.population.active:
            return self
        params, model_state = jax.tree.map(lambda leaf: leaf[index], (self.params, self.model_state))
        return dataclasses.replace(self, params=params, model_state=model_state, population=Population())


def open_run(run_dir: pathlib.Path, *, step: int | None = None) -> Loaded:
    """Opens a run at a checkpoint.

    Args:
      run_dir: the run's directory.
      step: which checkpoint; None: the newest.

    Raises:
      FileNotFoundError: when the directory holds no run.
      CheckpointError: when it holds no such checkpoint, or one of another model; the message says what there is.
    """
    recipe = load_recipe(run_dir)
    directory = checkpoint_directory(run_dir, recipe.checkpoint)
    train = recipe.train
    sparsifier = recipe.weight_sparsity.build(define(recipe.model), recipe.optimizer, train.steps, train.microbatches)
    unread = ("opt_state", "tables.slots", *([] if sparsifier.forward_reads else ["sparsity"]))
    on_host = recipe.model.memory.placement.on_host
    source = read_checkpoint(directory, step, without=unread, on_host=on_host)
    averaged = bool(source.state.get("ema"))
    tree = source.state.pop("ema" if averaged else "params")
    model_state = source.state.get("model_state", {})
    tables, sparsity = source.state.get("tables", {}), source.state.get("sparsity", {})
    source.state.clear()
    dataset = prepare(recipe.data, report=lambda line: None)
    definition = with_classes(define(recipe.model), dataset.tokenizer)
    axis = 1 if recipe.population.active else 0
    origin = f"checkpoint {source.step} in {directory}"
    params = _stacked(tree, definition.shapes, axis, origin)
    if sparsifier.forward_reads:
        abstract = map_leaves(lambda _, shape: jax.ShapeDtypeStruct(shape, np.float32), definition.shapes)
        like = jax.eval_shape(lambda params: sparsifier.init(params, {}, jax.random.key(0))[2], abstract)
        wanted = {name: like[name] for name in sparsifier.forward_reads}
        params = sparsifier.forward_params(params, stack(sparsity, wanted, axis), source.step)
    state = _stacked(model_state, definition.state_shapes, axis, origin)
    check_addresses(definition, tables, origin)
    if on_host:
        tables = {**tables, "rows": {name: HostArray(rows).readable() for name, rows in tables["rows"].items()}}
    state = with_tables(state, tables)
    return Loaded(run_dir, recipe, dataset, definition, source.step, params, state, recipe.population, averaged)


def _stacked(tree: Tree, shapes: Tree, axis: int, origin: str) -> Tree:
    """Brings a tree with unrolled names into the model's layout; refuses one of another model."""
    try:
        stacked = stack(tree, shapes, axis)
    except KeyError as error:
        raise CheckpointError(f"{origin} does not fit the run's config.json: it has no {error}") from None
    wanted = jax.tree.leaves(shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    found = [np.shape(leaf)[axis:] for leaf in jax.tree.leaves(stacked)]
    if wanted != found:
        raise CheckpointError(f"{origin} does not fit the run's config.json: its arrays have other shapes")
    return stacked
