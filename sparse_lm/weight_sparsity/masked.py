"""Masked weight sparsity: structure x allocation x schedule x algorithm over dense matrices. Costs dense compute, and says so.

State, nested dicts that end in the paths of the sparse leaves:

    masks    {name: bool [..., I, O], or its bits}    in force; "mask" is what the model computes with
    slots    {name: float32 [..., I, O]}              the algorithm's own
    ever     as a mask                                where a weight has existed (algorithms that grow)
    counts   {name: int32 [...]}                      what was requested and what the last change did (see `telemetry.measure`)
    mean     float32 [...]                            mean density over all steps until now
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.config import ConfigError, component
from sparse_lm.layers.parameter import RUN_KEY, Dims, map_leaves
from sparse_lm.layers.tree_paths import core_dims, flatten, matches, role
from sparse_lm.weight_sparsity import masks as plans
from sparse_lm.weight_sparsity.algorithms import Algorithm, Flat, Leaf, Masks, Now, Static
from sparse_lm.weight_sparsity.allocation import Allocation, Global, Uniform, kept, per_layer
from sparse_lm.weight_sparsity.door import Change, Moment, Sparsifier, Tree, WeightSparsity
from sparse_lm.weight_sparsity.schedules import ConstantSparsity, SparsitySchedule
from sparse_lm.weight_sparsity.selection import share_of
from sparse_lm.weight_sparsity.shared_threshold import counts_by_one_threshold
from sparse_lm.weight_sparsity.structures import Structure, Unstructured
from sparse_lm.weight_sparsity.telemetry import measure

if TYPE_CHECKING:  # rooms above this one
    from sparse_lm.model.definition import Definition
    from sparse_lm.train.optimizer import Optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masked(WeightSparsity):
    """Dense matrices under masks."""

    density: float = 0.1
    """Fraction of the weights of all sparse matrices that exist in the end."""
    structure: Structure = component("sparse_structure", Unstructured())
    """Which weights stand or fall together, and among which the choice is made."""
    allocation: Allocation = component("sparse_allocation", Uniform())
    """How the density is shared out among matrices."""
    schedule: SparsitySchedule = component("sparse_schedule", ConstantSparsity())
    """When masks are chosen, and how sparse they are then."""
    algorithm: Algorithm = component("sparse_algorithm", Static())
    """By what weights are chosen, and what becomes of the others."""
    roles: tuple[Literal["matrix", "embedding", "head", "router"], ...] = ("matrix",)
    """Parameters that are sparse, by their dims; norms and biases never are."""
    exclude: tuple[str, ...] = ()
    """Globs over paths of parameters that stay dense."""
    storage: Literal["bool", "bits"] = "bool"
    """A byte a weight, or an eighth of it."""

    def check(self) -> None:
        """See Config.check."""
        self.require(0.0 < self.density <= 1.0, "density", "a fraction above 0, at most 1")
        self.require(bool(self.roles), "roles", "at least one of matrix, embedding, head, router")
        self.algorithm.check_beside(self)
        if isinstance(self.allocation, Global) and type(self.structure) is not Unstructured:
            raise ConfigError(
                "allocation", self.allocation, "uniform, er, erk or by_hand, unless structure is unstructured"
            )
        if isinstance(self.allocation, Global) and self.algorithm.grows:
            allowed = "uniform, er, erk or by_hand with an algorithm that exchanges weights inside each matrix"
            raise ConfigError("allocation", self.allocation, allowed)

    def build(self, definition: "Definition", optimizer: "Optimizer", steps: int) -> "MaskedSparsifier":
        """See WeightSparsity.build."""
        if self.algorithm.grows and not optimizer.elementwise:
            allowed = "an elementwise one such as adamw: moments of new weights must be reset, which a matrix's shared moments forbid"
            raise ConfigError("algorithm", f"{type(self.algorithm).__name__} with {type(optimizer).__name__}", allowed)
        return MaskedSparsifier(self, definition, optimizer, steps)


def unrolled_paths(path: str, layers: int) -> list[str]:
    """Returns the paths of the layers of a stacked leaf, or the path itself."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if match := RUN_KEY.match(part):
            return [".".join([*parts[:i], str(int(match[1]) + n), *parts[i + 1 :]]) for n in range(layers)]
    return [path]


class MaskedSparsifier(Sparsifier):
    """The pure functions of a `Masked` config for one model.

    Attributes:
      leaves: {path: Leaf} of the sparse parameters.
      dense: {path: why} of the others.
      final: {path: units that a group keeps in the end, one number or one a layer}.
      densities: {unrolled path: density in the end, as allocated}.
    """

    def __init__(self, config: Masked, definition: "Definition", optimizer: "Optimizer", steps: int):
        self.forward_reads = ("masks",) if config.algorithm.behind else ()
        self.config, self.steps, self.elementwise = config, steps, optimizer.elementwise
        self.algorithm, self.schedule = config.algorithm, config.schedule
        self.dims = flatten(definition.dims)
        shapes, frozen = flatten(definition.shapes), flatten(definition.frozen)
        self.dense = {p: why for p, d in self.dims.items() if (why := self.reason(p, d, frozen[p]))}
        sparse = [path for path in self.dims if path not in self.dense]
        if not sparse:
            raise ConfigError("exclude", config.exclude, "globs that leave something sparse")
        for i, pattern in enumerate(config.exclude):
            if not any(matches(pattern, path) for path in self.dims):
                raise ConfigError(
                    f"exclude.{i}", pattern, f"a glob that matches a path, such as {', '.join(sparse[:3])}"
                )
        self.leaves = {path: self._leaf(path, self.dims[path], shapes[path]) for path in sparse}
        weights = sum(math.prod(leaf.layout.shape) for leaf in self.leaves.values())
        if isinstance(config.allocation, Global) and weights >= 2**31:
            raise ConfigError(
                "allocation", config.allocation, f"another one for 2**31 sparse weights or more ({weights})"
            )
        self.algorithm.prepare(self.leaves, definition)
        rolled = {path: unrolled_paths(path, shapes[path][0]) for path in sparse}
        each = {
            name: shapes[path][len(shapes[path]) - len(self.dims[path]) + ("layers" in self.dims[path]) :]
            for path in sparse
            for name in rolled[path]
        }
        try:
            self.densities = config.allocation.densities(each, config.density)
        except ConfigError as error:
            raise error.within("allocation") from None
        self.final = {
            path: per_layer([kept(leaf.layout.group_units, self.densities[name]) for name in rolled[path]])
            for path, leaf in self.leaves.items()
        }

    def reason(self, path: str, dims: Dims, frozen: bool) -> str:
        """Says why a parameter stays dense; empty if it does not."""
        kind = role(dims)
        if frozen:
            return "frozen"
        if kind not in self.config.roles:
            return kind
        if len(core_dims(dims)) != 2:
            return f"dims {dims} are not those of a matrix"
        return "excluded" if any(matches(pattern, path) for pattern in self.config.exclude) else ""

    def _leaf(self, path: str, dims: Dims, shape: tuple[int, ...]) -> Leaf:
        try:
            layout = self.config.structure.layout(path, dims, shape)
        except ConfigError as error:
            raise error.within("structure") from None
        names = [zlib.crc32(name.encode()) & 0x7FFFFFFF for name in unrolled_paths(path, shape[0])]
        return Leaf(path, layout, tuple(names) if dims[0] == "layers" else names[0])

    # Numbers of units.

    def requested(self, step: jax.Array | int) -> Callable[[Flat], Flat]:
        """Returns the function from scores to the units that each group keeps at a step."""
        progress = self.schedule.progress(step, self.steps)
        allocation, density = self.config.allocation, self.config.density
        if isinstance(allocation, Global):
            return lambda scores: counts_by_one_threshold(scores, density, progress, normalize=allocation.normalize)
        counts = self._per_group(step)
        return lambda scores: counts

    def _per_group(self, step: jax.Array | int) -> Flat:
        """Returns the units that a group keeps at a step; under a global threshold what it would keep if all were alike."""
        progress = self.schedule.progress(step, self.steps)

        def of(path: str) -> jax.Array:
            layout = self.leaves[path].layout
            removed = layout.per_layer(layout.group_units - self.final[path]).astype(jnp.int32)
            return layout.group_units - share_of(removed, progress)

        return {path: of(path) for path in self.leaves}

    def due(self, step: jax.Array) -> jax.Array:
        """Says whether masks are chosen at a step."""
        when = self.schedule.turns if self.algorithm.behind else self.schedule.due
        return when(step, self.steps)

    # Trees and flat dictionaries.

    def tree(self, flat: Flat) -> Tree:
        """Returns the nested dict of a flat one."""
        out: Tree = {}
        for path, leaf in flat.items():
            node = out
            *parents, last = path.split(".")
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = leaf
        return out

    def sparse(self, tree: Tree) -> Flat:
        """Returns the sparse leaves of a tree of parameters."""
        flat = flatten(tree)
        return {path: flat[path] for path in self.leaves}

    def stored(self, mask: jax.Array) -> jax.Array:
        """Returns a mask as it is kept in the state."""
        return plans.packed(mask) if self.config.storage == "bits" else mask

    def mask(self, path: str, stored: jax.Array) -> jax.Array:
        """Returns a mask from what is kept."""
        return plans.dense_mask(plans.MaskPlan(stored, self.leaves[path].layout.shape[-1]))

    def masks_of(self, sparsity: Tree) -> Masks:
        """Returns {name: {path: bool}} of a state."""
        return {
            name: {path: self.mask(path, stored) for path, stored in flatten(tree).items()}
            for name, tree in sparsity["masks"].items()
        }

    def _by_name(self, masks: Masks, path: str) -> dict[str, jax.Array]:
        return {name: flat[path] for name, flat in masks.items()}

    # The door.

    def init(self, params: Tree, model_state: Tree, key: jax.Array) -> tuple[Tree, Tree, Tree]:
        """See Sparsifier.init."""
        flat = self.sparse(params)
        scores = self.algorithm.initial(self.leaves, flat, key)
        chosen = self.algorithm.choose_first(self.leaves, scores, self.requested(0))
        masks: Masks = {"mask": chosen, **self.algorithm.more_masks(self.leaves, flat, chosen)}
        sparsity: Tree = {
            "masks": {name: self.tree({p: self.stored(m) for p, m in found.items()}) for name, found in masks.items()},
            "counts": self._counted(chosen, chosen, chosen if self.algorithm.grows else None, 0),
            "mean": self.tree({path: jnp.zeros(leaf.layout.batch, jnp.float32) for path, leaf in self.leaves.items()}),
        }
        if slots := self.algorithm.slots(flat):
            sparsity["slots"] = {name: self.tree(arrays) for name, arrays in slots.items()}
        if self.algorithm.grows:
            sparsity["ever"] = self.tree({path: self.stored(mask) for path, mask in chosen.items()})
        if self.algorithm.behind:
            return params, model_state, sparsity
        return self._masked(params, chosen), model_state, sparsity

    def _masked(self, tree: Tree, mask: Flat) -> Tree:
        return map_leaves(lambda path, leaf: jnp.where(mask[path], leaf, 0.0) if path in mask else leaf, tree)

    def _counted(self, before: Flat, after: Flat, ever: Flat | None, step: jax.Array | int) -> Tree:
        found = {path: measure(before[path], after[path], ever and ever[path]) for path in self.leaves}
        counts = self._per_group(step)
        for path, leaf in self.leaves.items():
            layout = leaf.layout
            asked = counts[path] * (layout.matrix_groups * layout.unit_weights)
            found[path]["requested"] = jnp.broadcast_to(asked.reshape(asked.shape[: len(layout.batch)]), layout.batch)
        names = next(iter(found.values()))
        return {name: self.tree({path: numbers[name] for path, numbers in found.items()}) for name in names}

    def state_dims(self, state: Tree) -> Tree:
        """See Sparsifier.state_dims."""
        batch = {path: self.dims[path][:-2] for path in self.leaves}

        def of(path: str, _: Any) -> Dims:
            part, _, rest = path.partition(".")
            inner = rest if part in ("mean", "ever") else rest.partition(".")[2]
            if part in ("masks", "slots", "ever"):
                return self.dims[inner]
            return (*batch[inner], "bins") if rest.startswith("fan_in.") else batch[inner]

        return map_leaves(of, state)

    def forward_params(self, params: Tree, sparsity: Tree, step: jax.Array | int) -> Tree:
        """See Sparsifier.forward_params."""
        return self._masked(params, self.masks_of(sparsity)["mask"]) if self.algorithm.behind else params

    def optimizer_grads(self, grads: Tree, params: Tree, sparsity: Tree, step: jax.Array) -> Tree:
        """See Sparsifier.optimizer_grads."""
        masks = self.masks_of(sparsity)

        def of(path: str, grad: jax.Array, weight: jax.Array) -> jax.Array:
            if path not in self.leaves:
                return grad
            return self.algorithm.gradient(grad, weight, self._by_name(masks, path))

        return self.algorithm.scale(map_leaves(of, grads, params))

    def rate_multiplier(self, step: jax.Array) -> jax.Array | float:
        """See Sparsifier.rate_multiplier."""
        progress = self.schedule.progress(step, self.steps)
        return self.algorithm.rate(1.0 - progress * (1.0 - self.config.density))

    def replaces(self, step: jax.Array) -> jax.Array | bool:
        """See Sparsifier.replaces."""
        return self.due(step) if self.algorithm.replaces_step else False

    def update(self, moment: Moment) -> Change:
        """See Sparsifier.update."""
        state = moment.sparsity
        before, params = self.sparse(moment.before), self.sparse(moment.params)
        slots = {name: flatten(tree) for name, tree in state.get("slots", {}).items()}
        if slots:
            rate = jnp.where(moment.finite, moment.rate, 0.0)
            grads = {p: jnp.where(moment.finite, g, 0.0) for p, g in self.sparse(moment.grads).items()}
            slots = self.algorithm.accumulate(slots, before, grads, rate)

        def gradient(weights: Flat) -> Flat:
            tree = map_leaves(lambda path, leaf: weights.get(path, leaf), moment.before)
            return self.sparse(moment.gradient(tree))

        def change(kept_state: Tree) -> Tree:
            masks = self.masks_of(kept_state)
            now = Now(
                moment.key,
                params,
                self.sparse(moment.grads),
                masks,
                slots,
                self.schedule.drop_fraction(moment.step, self.steps),
                self.requested(moment.step),
                gradient,
            )
            chosen = self.algorithm.choose(self.leaves, now)
            chosen = {
                name: {path: jnp.where(moment.finite, mask, masks[name][path]) for path, mask in found.items()}
                for name, found in chosen.items()
            }
            mask = chosen["mask"]
            after = {
                "masks": {n: self.tree({p: self.stored(m) for p, m in found.items()}) for n, found in chosen.items()}
            }
            ever = None
            if "ever" in kept_state:
                ever = {path: self.mask(path, stored) for path, stored in flatten(kept_state["ever"]).items()}
                after["ever"] = self.tree({path: self.stored(ever[path] | mask[path]) for path in mask})
            after["counts"] = self._counted(masks["mask"], mask, ever, moment.step)
            return after

        changing = {name: state[name] for name in ("masks", "ever", "counts") if name in state}
        changed = jax.lax.cond(self.due(moment.step), change, lambda kept_state: kept_state, changing)
        sparsity = {**changed, "mean": self._mean(state, moment.step)}
        if slots:
            sparsity["slots"] = {name: self.tree(arrays) for name, arrays in slots.items()}
        old, new = self.masks_of(state), self.masks_of(sparsity)
        weights = {
            path: self.algorithm.stored(before[path], params[path], self._by_name(old, path), self._by_name(new, path))
            for path in self.leaves
        }
        params_tree = map_leaves(lambda path, leaf: weights.get(path, leaf), moment.params)
        return Change(params_tree, self._moments(moment.opt_state, old, new), moment.model_state, sparsity)

    def _mean(self, state: Tree, step: jax.Array) -> Tree:
        """Returns the mean density with this step, which was computed with the masks before it."""

        def of(path: str, mean: jax.Array, active: jax.Array) -> jax.Array:
            shape = self.leaves[path].layout.shape
            return mean + (active / (shape[-2] * shape[-1]) - mean) / (step + 1)

        return map_leaves(of, state["mean"], state["counts"]["active"])

    def _moments(self, opt_state: Tree, old: Masks, new: Masks) -> Tree:
        """Returns the optimizer state with zeros for what was masked before or is now."""
        if not self.elementwise:
            return opt_state
        survives = {
            path: self.algorithm.survives(self._by_name(old, path), self._by_name(new, path)) for path in self.leaves
        }

        def of(path: str, leaf: jax.Array) -> jax.Array:
            parts = path.split(".")
            for start in range(1, len(parts)):
                where = survives.get(".".join(parts[start:]))
                if where is not None and where.shape == leaf.shape:
                    return jnp.where(where, leaf, jnp.zeros((), leaf.dtype))
            return leaf

        return map_leaves(of, opt_state)

    def average(self, average: Tree, sparsity: Tree) -> Tree:
        """See Sparsifier.average."""
        return average if self.algorithm.behind else self._masked(average, self.masks_of(sparsity)["mask"])

    # What is shown.

    def numbers(self, sparsity: Tree) -> Tree:
        """See Sparsifier.numbers."""
        counts = {name: flatten(tree) for name, tree in sparsity["counts"].items()}
        mean = flatten(sparsity["mean"])
        found: Tree = {}
        for path, leaf in self.leaves.items():
            inputs, outputs = leaf.layout.shape[-2:]
            sizes = {"weights": inputs * outputs, "inputs": inputs, "outputs": outputs}
            found[path] = {
                **{name: flat[path] for name, flat in counts.items()},
                **{name: jnp.full(leaf.layout.batch, size, jnp.int32) for name, size in sizes.items()},
                "mean_density": mean[path],
            }
        return found

    def pictures(self, sparsity: Tree) -> Tree:
        """See Sparsifier.pictures."""
        found: Tree = {}
        for path, mask in self.masks_of(sparsity)["mask"].items():
            cells = plans.picture(plans.plan_of(mask))
            lead = 1 if self.dims[path][0] == "layers" else 0
            found[path] = jnp.mean(cells, axis=tuple(range(lead, cells.ndim - 2)))
        return found

    def description(self) -> dict[str, Any]:
        """See Sparsifier.description."""
        rows = []
        for path, leaf in self.leaves.items():
            shape = leaf.layout.shape
            for name, final in zip(
                names := unrolled_paths(path, shape[0]), np.broadcast_to(self.final[path], len(names)), strict=True
            ):
                layout = leaf.layout
                matrices = math.prod(layout.batch) // len(names)
                weights = int(final) * layout.matrix_groups * layout.unit_weights * matrices
                rows.append(
                    {"path": name, "shape": list(shape[len(shape) - 2 :]), "matrices": matrices, "weights": weights}
                )
        return {"matrices": rows, "dense": self.dense}
