"""What masked weight sparsity does in a step: the pure functions that the door asks for, over all sparse leaves of a model.

State, nested dicts that end in the paths of the sparse leaves:

    masks    {name: bool [..., I, O], or its bits}    in force; "mask" is what the model computes with
    slots    {name: float32 [..., I, O]}              the algorithm's own
    ever     as a mask                                where a weight has existed (algorithms that grow)
    counts   {name: int32 [...]}                      what was requested and what the last change did (see `telemetry.measure`)
    mean     float32 [...]                            mean density over all steps until now
"""

import math
import zlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.config import ConfigError
from sparse_lm.layers.parameter import RUN_KEY, Dims, map_leaves
from sparse_lm.layers.tree_paths import core_dims, flatten, matches, role
from sparse_lm.weight_sparsity import masks as plans
from sparse_lm.weight_sparsity.algorithms import Flat, Leaf, Masks, Now, Start
from sparse_lm.weight_sparsity.allocation import ER, ERK, Global, Uniform, kept, per_layer
from sparse_lm.weight_sparsity.door import Change, Moment, Sparsifier, Tree
from sparse_lm.weight_sparsity.selection import share_of
from sparse_lm.weight_sparsity.shared_threshold import counts_by_one_threshold
from sparse_lm.weight_sparsity.telemetry import measure

if TYPE_CHECKING:  # rooms above this one, and the config that is built from here
    from sparse_lm.model.definition import Definition
    from sparse_lm.train.optimizer import Optimizer
    from sparse_lm.weight_sparsity.masked import Masked


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
      each: {unrolled path: (experts, inputs, outputs) of a layer's matrices}.
      densities: {unrolled path: density in the end, as allocated}.
    """

    def __init__(self, config: "Masked", definition: "Definition", optimizer: "Optimizer", steps: int):
        self.forward_reads = ("masks",) if config.algorithm.behind else ()
        self.definition = definition
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
        self.each = {name: shapes[path]["layers" in self.dims[path] :] for path in sparse for name in rolled[path]}
        try:
            self.densities = config.allocation.densities(self.each, config.density)
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

    def requested(self, scores: Flat, progress: jax.Array) -> Flat:
        """Returns the units that each group keeps when this share of the sparsity is reached."""
        allocation = self.config.allocation
        if isinstance(allocation, Global):
            return counts_by_one_threshold(scores, self.config.density, progress, normalize=allocation.normalize)
        return self._per_group(progress)

    def _per_group(self, progress: jax.Array) -> Flat:
        """Returns the units that a group keeps; under a global threshold what it would keep if all matrices were alike."""

        def of(path: str) -> jax.Array:
            layout = self.leaves[path].layout
            removed = layout.per_layer(layout.group_units - self.final[path]).astype(jnp.int32)
            return layout.group_units - share_of(removed, progress)

        return {path: of(path) for path in self.leaves}

    def due(self, step: Any) -> Any:
        """Says whether masks are chosen at a step."""
        when = self.schedule.turns if self.algorithm.steady else self.schedule.due
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
        progress, density = self.schedule.start(self.steps), self.config.density
        start = Start(flatten(params), key, self.requested, progress, density, self.definition)
        chosen = self.algorithm.first(self.leaves, start)
        masks: Masks = {"mask": chosen, **self.algorithm.more_masks(self.leaves, flat, chosen)}
        sparsity: Tree = {
            "masks": {name: self.tree({p: self.stored(m) for p, m in found.items()}) for name, found in masks.items()},
            "counts": self._counted(chosen, chosen, chosen if self.algorithm.grows else None, progress),
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

    def _counted(self, before: Flat, after: Flat, ever: Flat | None, progress: jax.Array) -> Tree:
        found = {path: measure(before[path], after[path], ever and ever[path]) for path in self.leaves}
        counts = self._per_group(progress)
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
        masks, density = self.masks_of(sparsity), self._density(step)

        def of(path: str, grad: jax.Array, weight: jax.Array) -> jax.Array:
            if path not in self.leaves:
                return grad
            return self.algorithm.gradient(grad, weight, self._by_name(masks, path), density)

        return self.algorithm.scale(map_leaves(of, grads, params))

    def rate_multiplier(self, step: jax.Array) -> jax.Array | float:
        """See Sparsifier.rate_multiplier."""
        return self.algorithm.rate(self._density(step))

    def _density(self, step: jax.Array) -> jax.Array:
        """Returns the density of the whole that is asked for at a step."""
        return 1.0 - self.schedule.progress(step, self.steps) * (1.0 - self.config.density)

    def replaces(self, step: jax.Array) -> jax.Array | bool:
        """See Sparsifier.replaces."""
        return self.due(step) if self.algorithm.replaces_step else False

    def apart(self, step: int) -> bool:
        """See Sparsifier.apart."""
        return bool(self.due(step))

    def update(self, moment: Moment) -> Change:
        """See Sparsifier.update."""
        state = moment.sparsity
        before, moved, old = self.sparse(moment.before), self.sparse(moment.params), self.masks_of(state)
        params = {
            path: self.algorithm.proposed(before[path], moved[path], self._by_name(old, path)) for path in self.leaves
        }
        slots = {name: flatten(tree) for name, tree in state.get("slots", {}).items()}
        if slots:
            grads = {p: jnp.where(moment.finite, g, 0.0) for p, g in self.sparse(moment.grads).items()}
            slots = self.algorithm.accumulate(slots, before, grads)

        def gradient(weights: Flat) -> Flat:
            tree = map_leaves(lambda path, leaf: weights.get(path, leaf), moment.before)
            return self.sparse(moment.gradient(tree))

        progress = self.schedule.progress(moment.step, self.steps)

        def change(kept_state: Tree) -> Tree:
            masks = self.masks_of(kept_state)
            now = Now(
                moment.key,
                params,
                self.sparse(moment.grads),
                masks,
                slots,
                self.schedule.drop_fraction(moment.step, self.steps),
                self.schedule.passed(moment.step, self.steps),
                lambda scores: self.requested(scores, progress),
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
            after["counts"] = self._counted(masks["mask"], mask, ever, progress)
            return after

        changing: Tree = {name: state[name] for name in ("masks", "ever", "counts") if name in state}
        if moment.changes:
            changing = jax.lax.cond(self.due(moment.step), change, lambda kept_state: kept_state, changing)
        sparsity = {**changing, "mean": self._mean(state, moment.step)}
        if slots:
            sparsity["slots"] = {name: self.tree(arrays) for name, arrays in slots.items()}
        new = self.masks_of(sparsity)
        weights = {
            path: self.algorithm.stored(before[path], params[path], self._by_name(old, path), self._by_name(new, path))
            for path in self.leaves
        }
        params_tree = map_leaves(lambda path, leaf: weights.get(path, leaf), moment.params)
        return Change(params_tree, self._moments(moment.opt_state, old, new), moment.model_state, sparsity, moment.ema)

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

    def only_existing(self, tree: Tree, sparsity: Tree) -> Tree:
        """See Sparsifier.only_existing."""
        return tree if self.algorithm.behind else self._masked(tree, self.masks_of(sparsity)["mask"])

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

    def notes(self) -> list[str]:
        """See Sparsifier.notes."""
        rows = self.description()["matrices"]
        total = sum(row["matrices"] * math.prod(row["shape"]) for row in rows)
        kept_weights = sum(row["kept"] for row in rows)
        config = self.config
        names = (
            type(part).__name__ for part in (config.algorithm, config.structure, config.allocation, config.schedule)
        )
        named = [f"{path} ({why})" for path, why in self.dense.items() if why != "vector"]
        vectors = len(self.dense) - len(named)
        return [
            f"masked weights ({', '.join(names)}): {kept_weights / 1e6:.2f} M of {total / 1e6:.2f} M in {len(rows)} matrices exist in the end; "
            "compute and memory are those of dense weights",
            f"dense: {', '.join([*named, f'{vectors} norms and biases'])}",
        ]

    def description(self) -> dict[str, Any]:
        """See Sparsifier.description."""
        rows: list[dict[str, Any]] = []
        for path, leaf in self.leaves.items():
            layout = leaf.layout
            names = unrolled_paths(path, layout.shape[0])
            matrices = math.prod(layout.batch) // len(names)
            for name, final in zip(names, np.broadcast_to(self.final[path], len(names)), strict=True):
                kept_weights = int(final) * layout.matrix_groups * layout.unit_weights * matrices
                rows.append({"path": name, "shape": layout.shape[-2:], "matrices": matrices, "kept": kept_weights})
        sizes = {row["path"]: row["matrices"] * math.prod(row["shape"]) for row in rows}
        allocations = {
            name: {
                path: density * sizes[path] for path, density in other.densities(self.each, self.config.density).items()
            }
            for name, other in (("uniform", Uniform()), ("er", ER()), ("erk", ERK()))
        }
        return {"matrices": rows, "dense": self.dense, "allocations": allocations, "masked": True}
