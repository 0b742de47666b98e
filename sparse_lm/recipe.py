"""A recipe: everything that defines a training run, as one tree of configs."""

import dataclasses
import json
import pathlib
from typing import Any

from etils import epath

from sparse_lm.config import Config, ConfigError, children, component, from_dict, to_dict, validate
from sparse_lm.data.pipeline import DataConfig
from sparse_lm.data.storage import write_atomically
from sparse_lm.layers.projection import Projection
from sparse_lm.model.transformer import Model
from sparse_lm.parallel.distributed import Distributed
from sparse_lm.parallel.mesh import MeshShape
from sparse_lm.train.checkpoint import Checkpoints, checkpoint_directory
from sparse_lm.train.initialize import StartFrom
from sparse_lm.train.metrics import LogConfig
from sparse_lm.train.optimizer import AdamW, Optimizer
from sparse_lm.train.population import Population
from sparse_lm.train.step import Train
from sparse_lm.train.validation import Validation
from sparse_lm.weight_sparsity.door import NoSparsity, WeightSparsity

SCHEMA = 1
"""Version of the layout of config.json and checkpoints."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    """A training run."""

    name: str = "run"
    """Name of the run; its directory is runs/NAME unless --run-dir says otherwise."""
    seed: int = 0
    """Seed of initial values, data order and every random number of the run."""
    data: DataConfig = DataConfig()
    """What to train on."""
    model: Model = Model()
    """What to train."""
    optimizer: Optimizer = component("optimizer", AdamW())
    """How gradients become updates."""
    weight_sparsity: WeightSparsity = component("weight_sparsity", NoSparsity())
    """Which weights exist."""
    train: Train = Train()
    """How long, and with which numerics."""
    population: Population = Population()
    """Members trained at once on the same data; empty: one."""
    mesh: MeshShape = MeshShape()
    """How the work is spread over devices."""
    distributed: Distributed = Distributed()
    """How the processes of a run on several hosts find each other; empty: one process."""
    start_from: StartFrom = StartFrom()
    """What to start from; empty: fresh initial values."""
    validation: Validation = Validation()
    """When and on how much to validate."""
    checkpoint: Checkpoints = Checkpoints()
    """When to save and what to keep."""
    log: LogConfig = LogConfig()
    """What to report, how often and where."""

    def check(self) -> None:
        """See Config.check."""
        self.require(self.name not in ("", ".", "..") and "/" not in self.name, "name", "a directory name")
        self.require(0 <= self.seed < 2**31, "seed", "0 to 2**31 - 1")
        batch, pieces = self.data.batch_size, self.train.microbatches
        sequences = self.group_sequences()
        if batch % (pieces * sequences):
            allowed = (
                f"a multiple of train.microbatches ({pieces}) x group_sequences of the routed layers ({sequences})"
            )
            raise ConfigError("data.batch_size", batch, allowed)
        if self.validation.batch_size % sequences:
            allowed = f"a multiple of group_sequences of the routed layers ({sequences})"
            raise ConfigError("validation.batch_size", self.validation.batch_size, allowed)
        if self.validation.overlap >= self.data.sequence_length:
            allowed = f"below data.sequence_length ({self.data.sequence_length})"
            raise ConfigError("validation.overlap", self.validation.overlap, allowed)
        if self.checkpoint.keep_best and not self.validation.every:
            allowed = "0, because validation.every = 0 gives checkpoints no validation loss to be best in"
            raise ConfigError("checkpoint.keep_best", self.checkpoint.keep_best, allowed)
        if self.population.active and self.model.memory.placement.on_host:
            name = type(self.model.memory.placement).__name__
            raise ConfigError("model.memory.placement", name, "OnDevice in a population, whose members read together")
        self.weight_sparsity.check_start(self.start_from)
        for path, config in children(self.model, "model"):
            if isinstance(config, Projection) and config.learns_order and not self.weight_sparsity.learns_orders:
                raise ConfigError(f"{path}.permutation", "learned", "none or random unless weight_sparsity is packed")
        if not self.optimizer.elementwise:
            for path, config in children(self.model, "model"):
                if isinstance(config, Projection) and config.packed:
                    allowed = f"an elementwise one such as adamw: {path} stores blocks, which an optimizer of whole matrices does not see"
                    raise ConfigError("optimizer", type(self.optimizer).__name__, allowed)
        try:
            self.optimizer.schedule.check_run(self.train.steps)
        except ConfigError as error:
            raise error.within("optimizer.schedule") from None

    def group_sequences(self) -> int:
        """Sequences in one routing group; 1 without routed layers."""
        return self.model.group_sequences()


def save_recipe(recipe: Recipe, run_dir: pathlib.Path) -> None:
    """Writes RUN/config.json; `load_recipe` reads it back equal."""
    text = json.dumps({"schema": SCHEMA, "recipe": to_dict(recipe)}, indent=1)
    write_atomically(run_dir / "config.json", f"{text}\n".encode())


def recipe_from_json(document: dict[str, Any], origin: str) -> Recipe:
    """Rebuilds a recipe from config.json's content.

    Raises:
      ValueError: for another schema version.
    """
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{origin}: schema {document.get('schema')!r}; this version reads schema {SCHEMA}")
    return validate(from_dict(Recipe, document["recipe"]))


def load_recipe(run_dir: pathlib.Path) -> Recipe:
    """Reads RUN/config.json.

    Raises:
      FileNotFoundError: when the directory holds no run.
    """
    path = run_dir / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {run_dir} is not the directory of a run")
    return recipe_from_json(json.loads(path.read_text()), str(path))


def checkpoints_of_run(run: str) -> epath.Path:
    """Returns where the checkpoints of a run are, by its config.json, or RUN/checkpoints where that file is not."""
    run_dir = epath.Path(run)
    config = run_dir / "config.json"
    if not config.exists():
        return checkpoint_directory(run_dir, Checkpoints())
    return checkpoint_directory(run_dir, recipe_from_json(json.loads(config.read_text()), str(config)).checkpoint)


def differences(a: Config, b: Config, path: str = "") -> list[str]:
    """Lists the fields in which two configs differ, as "path: value -> value"."""
    if type(a) is not type(b):
        return [f"{path}: {type(a).__name__} -> {type(b).__name__}"]
    found: list[str] = []
    for field in dataclasses.fields(a):
        where = f"{path}.{field.name}" if path else field.name
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, Config) and isinstance(right, Config):
            found += differences(left, right, where)
        elif left != right:
            found.append(f"{where}: {left!r} -> {right!r}")
    return found
