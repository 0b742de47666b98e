"""The one door for starting from something: load a checkpoint, transform its tree, put it over a fresh state.

A transform is a function from a nested dict of arrays (unrolled names) to another. `StartFrom` covers the common ones; recipes
written in Python may pass any list to `initialize`.
"""

import dataclasses
import fnmatch
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.config import Config
from sparse_lm.layers.parameter import RUN_KEY, map_leaves
from sparse_lm.memory.host_array import HostArray
from sparse_lm.model.definition import Definition
from sparse_lm.train.checkpoint import mismatches
from sparse_lm.train.checkpoint_reader import CheckpointError
from sparse_lm.train.state import TrainState, is_empty, rolled, unrolled
from sparse_lm.weight_sparsity.packing import convert, patterns_of
from sparse_lm.weight_sparsity.packing import unrolled as unrolled_matrices

Tree = dict[str, Any]
Transform = Callable[[Tree], Tree]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartFrom(Config):
    """What a run starts from."""

    run: str | None = None
    """Directory of another run; None: fresh initial values."""
    step: int | None = None
    """Its checkpoint; None: the newest."""
    keep: Literal["parameters", "everything"] = "parameters"
    """Take the parameters and begin at step 0, or continue with step, optimizer, router state and random key (a branch of a schedule)."""
    rewind: int | None = None
    """Choose masks by the parameters of `step`, then go back to those of this earlier checkpoint of the same run (lottery tickets);
    -1: to fresh initial values."""
    include: tuple[str, ...] = ("*",)
    """Globs over parameter paths to load; others keep fresh values."""
    exclude: tuple[str, ...] = ()
    """Globs over parameter paths that keep fresh values, such as `head`."""
    rename: tuple[str, ...] = ()
    """Regular expressions old=new applied to the source's parameter paths, in order."""
    convert: bool = False
    """Store matrices as this run's model does: dense or masked ones become blocks by magnitude, blocks of another pattern others, and
    blocks dense ones."""
    upcycle: bool = False
    """Copy the dense feed-forward of each block to every expert where this run has experts (Komatsuzaki et al. 2022, arXiv 2212.05055)."""
    upcycle_noise: float = 0.0
    """Deviation of the noise that makes the copies differ, relative to that of the weights; 0: equal copies."""

    def check(self) -> None:
        """See Config.check."""
        self.require(self.step is None or self.step >= 0, "step", "None or 0 and above")
        if self.run is None:
            for field in dataclasses.fields(self):
                self.require(
                    getattr(self, field.name) == field.default, field.name, f"{field.default!r} unless run is given"
                )
        self.require(self.rewind is None or self.rewind >= -1, "rewind", "None, -1, or a step")
        self.require(self.rewind is None or self.keep == "parameters", "rewind", "None unless keep is parameters")
        for entry in self.rename:
            self.require(entry.count("=") == 1, "rename", "entries of the form old=new")
            try:
                re.compile(entry.partition("=")[0])
            except re.error as error:
                self.require(False, "rename", f"valid regular expressions ({error})")
        self.require(self.upcycle_noise >= 0, "upcycle_noise", "0 or above")
        self.require(self.upcycle or not self.upcycle_noise, "upcycle_noise", "0 unless upcycle is on")
        self.require(not (self.convert and self.keep == "everything"), "keep", "parameters, when convert is on")
        self.require(not (self.upcycle and self.keep == "everything"), "keep", "parameters, when upcycle is on")
        partial = self.include != ("*",) or self.exclude
        self.require(
            not (self.keep == "everything" and partial), "keep", "parameters, when include or exclude select some"
        )


def flatten(tree: Tree) -> dict[str, Any]:
    """Returns {dotted path: leaf}."""
    flat: dict[str, Any] = {}
    map_leaves(lambda path, leaf: flat.__setitem__(path, leaf), tree)
    return flat


def unflatten(flat: dict[str, Any]) -> Tree:
    """The inverse of `flatten`."""
    tree: Tree = {}
    for path, leaf in flat.items():
        node = tree
        *parents, last = path.split(".")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def rename(pattern: str, replacement: str) -> Transform:
    """Returns the transform that renames parameter paths by a regular expression."""

    def transform(tree: Tree) -> Tree:
        flat = {re.sub(pattern, replacement, path): leaf for path, leaf in flatten(tree["params"]).items()}
        return {**tree, "params": unflatten(flat)}

    return transform


def select(include: Sequence[str], exclude: Sequence[str]) -> Transform:
    """Returns the transform that keeps the parameters whose path matches a glob of `include` and none of `exclude`."""

    def wanted(path: str) -> bool:
        return any(fnmatch.fnmatch(path, g) for g in include) and not any(fnmatch.fnmatch(path, g) for g in exclude)

    def transform(tree: Tree) -> Tree:
        return {**tree, "params": unflatten({p: leaf for p, leaf in flatten(tree["params"]).items() if wanted(p)})}

    return transform


def upcycle(experts: Mapping[int, int], noise: float, seed: int) -> Transform:
    """Returns the transform that copies dense feed-forward matrices to experts (sparse upcycling, arXiv 2212.05055).

    With equal copies and weights that sum to 1 the model computes what it did before. Routers start fresh.

    Args:
      experts: experts of each routed block, by its number.
      noise: deviation of normal noise on the copies, relative to the deviation of the matrix.
      seed: of the noise.
    """

    def transform(tree: Tree) -> Tree:
        flat, copied = flatten(tree["params"]), 0
        for path, leaf in flat.items():
            match = re.fullmatch(r"blocks\.(\d+)\.feed_forward\.(gate|up|down)\..*", path)
            if match is None or int(match[1]) not in experts or np.ndim(leaf) != 2:
                continue
            weight = np.asarray(leaf, np.float32)
            copies = np.repeat(weight[None], experts[int(match[1])], axis=0)
            if noise:
                draw = np.random.default_rng((seed, zlib.crc32(path.encode())))
                copies = copies + noise * weight.std() * draw.standard_normal(copies.shape, np.float32)
            flat[path] = copies
            copied += 1
        if not copied:
            raise CheckpointError("start_from.upcycle: no block is dense in the source and has experts in this recipe")
        return {**tree, "params": unflatten(flat)}

    return transform


def parameters_only(tree: Tree) -> Tree:
    """The transform that drops all but the parameters, patterns of sparse ones and the rows of tables: a fresh optimizer, step 0."""
    tables = tree.get("tables", {})
    rows = {"tables": {name: part for name, part in tables.items() if name != "slots"}} if tables else {}
    patterns = patterns_of(tree)
    return {"params": tree["params"], **({"model_state": patterns} if patterns else {}), **rows}


def converted(definition: Definition) -> Transform:
    """Returns the transform that stores matrices as a model does; see `packing.convert`."""
    packed = unrolled_matrices(definition.packed)
    ranks: dict[str, int] = {}
    sides: dict[str, tuple[int, int]] = {}
    for path, shape in flatten(unstacked_shapes(definition.shapes)).items():
        owner, _, name = path.rpartition(".")
        if name == "into" and owner in packed:
            ranks[owner] = shape[-1]
        if name == "weight" and len(shape) >= 2:
            sides[owner] = (shape[-2], shape[-1])
    return lambda tree: convert(tree, packed, ranks, sides)


def unstacked_shapes(shapes: Tree) -> Tree:
    """Returns a tree of shapes with unrolled names."""
    out: Tree = {}
    for key, value in shapes.items():
        if match := RUN_KEY.match(key):
            inner = map_leaves(lambda _, shape: shape[1:], value)
            out.update({str(n): inner for n in range(int(match[1]), int(match[2]) + 1)})
        else:
            out[key] = unstacked_shapes(value) if isinstance(value, dict) else value
    return out


def transforms_of(
    config: StartFrom,
    experts: Mapping[int, int] | None = None,
    seed: int = 0,
    definition: Definition | None = None,
) -> list[Transform]:
    """Returns the transforms that a config asks for, in order.

    Args:
      config: the config.
      experts: experts of each routed block of the run, for upcycling.
      seed: of the run.
      definition: the run's model, to convert to its storage.
    """
    transforms = [rename(*entry.split("=")) for entry in config.rename]
    if config.include != ("*",) or config.exclude:
        transforms.append(select(config.include, config.exclude))
    if config.upcycle:
        transforms.append(upcycle(experts or {}, config.upcycle_noise, seed))
    if config.convert:
        assert definition is not None
        transforms.append(converted(definition))
    if config.keep == "parameters":
        transforms.append(parameters_only)
    return transforms


def initialize(fresh: TrainState, source: Tree, transforms: Sequence[Transform], *, partial: bool) -> TrainState:
    """Puts a source's transformed tree over a fresh state of one member.

    Args:
      fresh: the run's own initial state.
      source: state as nested dicts with unrolled names, from `checkpoint_reader.read_checkpoint`.
      transforms: applied to the source in order.
      partial: whether parameters that the source lacks may keep their fresh values.

    Raises:
      CheckpointError: listing leaves that are unexpected, reshaped, or (unless partial) missing.
    """
    for transform in transforms:
        source = transform(source)
    target = unrolled(fresh)
    loaded = {name: part for name, part in source.items() if name == "params" or not is_empty(part)}
    if partial and not fresh.tables:
        loaded.pop("tables", None)
    # A whole state must fill every part of the fresh one; an average that was not kept starts from the parameters.
    whole = "step" in loaded
    wanted = {name: part for name, part in target.items() if name in loaded or (whole and name != "ema")}
    if not whole and "model_state" in loaded:
        wanted["model_state"] = patterns_of(target)
    if "slots" not in loaded.get("tables", {"slots": {}}):
        wanted["tables"] = {name: part for name, part in target.get("tables", {}).items() if name != "slots"}
    problems = mismatches(wanted, loaded)
    if partial:
        problems = [line for line in problems if not line.startswith("  missing")]
    if problems:
        raise CheckpointError("the source does not fit this recipe:\n" + "\n".join(problems))
    flat = flatten({name: target[name] for name in loaded})
    flat.update(flatten(loaded))
    merged = {**target, **unflatten(flat)}
    if fresh.ema and "ema" not in loaded:
        merged["ema"] = merged["params"]

    def like(new: Any, old: Any) -> Any:
        if isinstance(old, HostArray):
            return old.with_rows(np.asarray(new, old.dtype))
        return jnp.asarray(new, old.dtype)

    return jax.tree.map(like, rolled(merged, fresh), fresh)


def is_partial(config: StartFrom) -> bool:
    """Says whether parameters that the source lacks may keep fresh values."""
    return config.include != ("*",) or bool(config.exclude) or bool(config.rename) or config.upcycle
