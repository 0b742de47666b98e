"""Changing the topology of packed matrices while they train: the sparsifier of models whose projections store blocks.

Values, moments and averages of a changed matrix follow their blocks; the lists in the model state are replaced. Steps that change
the topology have a program of their own (`Sparsifier.apart`): the others neither hold the pass that growth needs nor wait for a
condition. In a step that is not finite every block stays where it is.

Where a projection learns the order of its inputs, soft orders are made doubly stochastic again after every step and hardened when the
time comes (`learned_permutation`).

State: {"mask", "ever": {path: bool [..., R, C], which blocks exist, and have existed},
"counts": {path: what the last change did}, and with learned orders "shuffle": {path: {"penalty", "hard"}}}.

Legend: R, C block rows and columns, J blocks, K inputs, b block size.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul import dense_mask
from sparse_lm.config import ConfigError, component
from sparse_lm.layers.tree_paths import flatten, role
from sparse_lm.weight_sparsity import learned_permutation
from sparse_lm.weight_sparsity.door import Change, Moment, Sparsifier, Tree, WeightSparsity
from sparse_lm.weight_sparsity.gradient_probe import slab_norms
from sparse_lm.weight_sparsity.learned_permutation import Shuffle
from sparse_lm.weight_sparsity.packed_matrix import (
    PackedMatrix,
    at,
    lists_of,
    matrix_keys,
    nested,
    replaced,
    same_pattern,
)
from sparse_lm.weight_sparsity.packing import unrolled
from sparse_lm.weight_sparsity.schedules import Periodic
from sparse_lm.weight_sparsity.telemetry import measure
from sparse_lm.weight_sparsity.topology_update import (
    BlockAlgorithm,
    StaticBlocks,
    change_topology,
    companion_norms,
    moved,
    square_norms,
)

if TYPE_CHECKING:  # rooms above this one
    from sparse_lm.model.definition import Definition
    from sparse_lm.train.optimizer import Optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed(WeightSparsity):
    """Which blocks of the model's block-sparse projections exist, and when that changes."""

    algorithm: BlockAlgorithm = component("block_algorithm", StaticBlocks())
    """How blocks are dropped and grown."""
    schedule: Periodic = Periodic()
    """When, and which share of the blocks."""
    shuffle: Shuffle = Shuffle()
    """How the order of inputs is learned where a projection says so."""

    learns_orders: ClassVar[bool] = True

    def build(
        self, definition: "Definition", optimizer: "Optimizer", steps: int, microbatches: int
    ) -> "PackedSparsifier":
        """See WeightSparsity.build."""
        name = type(self.algorithm).__name__
        if not definition.packed:
            allowed = "none or masked in a model whose projections are all dense (see --with projection=block_sparse)"
            raise ConfigError("", "packed", allowed)
        for path, matrix in definition.packed.items():
            if self.algorithm.reads == "companion" and "out" not in at(definition.shapes, path):
                raise ConfigError("algorithm", name, f"one that needs no companion: {path} has none")
            if self.algorithm.reads == "companion" and matrix.learned:
                raise ConfigError(
                    "algorithm", name, f"set, rigl or static where the order of inputs is learned ({path})"
                )
        return PackedSparsifier(self, definition, steps, microbatches)


class PackedSparsifier(Sparsifier):
    """The pure functions of a `Packed` config for one model."""

    accounted = True

    def __init__(self, config: Packed, definition: "Definition", steps: int, microbatches: int):
        self.algorithm, self.schedule, self.steps = config.algorithm, config.schedule, steps
        self.microbatches, self.packed, self.dims = microbatches, definition.packed, flatten(definition.dims)
        self.shuffle, self.learned = config.shuffle, {p: m for p, m in definition.packed.items() if m.learned}
        self.on_mesh = definition.on_mesh

    def masks(self, model_state: Tree) -> dict[str, jax.Array]:
        """Returns which blocks exist in every matrix, bool [..., R, C]."""
        found = {}
        for path, matrix in self.packed.items():
            mask = dense_mask
            for _ in matrix.batch:
                mask = jax.vmap(mask)
            found[path] = mask(matrix.pattern.from_lists(at(model_state, f"{path}.topology")))
        return found

    def init(self, params: Tree, model_state: Tree, key: jax.Array) -> tuple[Tree, Tree, Tree]:
        """See Sparsifier.init."""
        masks = self.masks(model_state)
        counts = {path: measure(mask, mask, mask) for path, mask in masks.items()}
        sparsity: Tree = {"mask": nested(masks), "ever": nested(masks), "counts": nested(counts)}
        if self.learned:
            begun = {}
            for path, matrix in self.learned.items():
                soft = at(params, f"{path}.soft")
                uniform = jax.vmap(lambda k, s=soft.shape[-2:]: jax.random.uniform(k, s))
                drawn = learned_permutation.first_soft(uniform(matrix_keys(key, path, matrix))).reshape(soft.shape)
                # One that came from elsewhere stays.
                begun[f"{path}.soft"] = jnp.where(jnp.any(soft != 0.0), soft, drawn)
            params = replaced(params, begun)
            sparsity["shuffle"] = self._shuffle_numbers(params, model_state)
        return params, model_state, sparsity

    def _shuffle_numbers(self, params: Tree, model_state: Tree) -> Tree:
        """Returns {path: {"penalty", "hard"}} of the learned orders."""
        found = {}
        for path in self.learned:
            soft, hard = at(params, f"{path}.soft"), at(model_state, f"{path}.hard")
            found[path] = {"penalty": learned_permutation.penalty(soft), "hard": hard}
        return nested(found)

    def optimizer_grads(self, grads: Tree, params: Tree, sparsity: Tree, step: jax.Array) -> Tree:
        """See Sparsifier.optimizer_grads: the gradient of the penalty is added to that of soft orders."""
        changes = {}
        for path in self.learned:
            soft = at(params, f"{path}.soft")
            is_soft = (at(sparsity["shuffle"], path)["hard"] == 0.0)[..., None, None]
            own = self.shuffle.penalty * learned_permutation.penalty_gradient(soft)
            changes[f"{path}.soft"] = at(grads, f"{path}.soft") + jnp.where(is_soft, own, 0.0)
        return replaced(grads, changes)

    def state_dims(self, state: Tree) -> Tree:
        """See Sparsifier.state_dims."""
        out = {}
        for path in flatten(state):
            part, _, rest = path.partition(".")
            matrix = next(p for p in self.packed if rest == p or rest.startswith(f"{p}."))
            batch = self.dims[f"{matrix}.values"][:-3]
            own = ("list", "list") if part in ("mask", "ever") else ("list",) if rest.endswith(".fan_in") else ()
            out[path] = (*batch, *own)
        return nested(out)

    def due(self, step: Any) -> Any:
        """Says whether the topology changes in this step."""
        return self.schedule.due(step, self.steps) if self.algorithm.changes else False

    def replaces(self, step: jax.Array) -> jax.Array | bool:
        """See Sparsifier.replaces."""
        return self.due(step) if self.algorithm.replaces_step else False

    def apart(self, step: int) -> bool:
        """See Sparsifier.apart."""
        return bool(self.due(step)) or bool(self.learned and self.shuffle.due(step, self.steps))

    def update(self, moment: Moment) -> Change:
        """See Sparsifier.update."""
        if not self.learned:
            return self._topology(moment)
        shuffled = self._shuffled(moment)
        change = self._topology(shuffled)
        numbers = self._shuffle_numbers(shuffled.params, shuffled.model_state)
        return change._replace(sparsity={**change.sparsity, "shuffle": numbers})

    def _shuffled(self, moment: Moment) -> Moment:
        """Returns the moment with soft orders that are doubly stochastic, and in some steps with some of them hardened."""
        params: Tree = {}
        model_state: Tree = {}
        look = moment.finite & self.shuffle.due(moment.step, self.steps)
        now = look & (moment.step >= self.shuffle.last(self.steps))
        threshold = jnp.where(look, self.shuffle.threshold, -1.0)
        for path in self.learned:
            order, hard = (at(moment.model_state, f"{path}.{name}") for name in ("permutation", "hard"))
            before, soft = (at(tree, f"{path}.soft") for tree in (moment.before, moment.params))
            soft = learned_permutation.after_step(before, soft, hard, moment.finite)
            if moment.changes:
                size = soft.shape[-1]
                # One after the other: a condition over all at once would choose an assignment for each.
                with self.on_mesh():
                    found = jax.lax.map(
                        lambda one: learned_permutation.harden(one[0], one[1], one[2], now, threshold),
                        (soft.reshape(-1, size, size), order.reshape(-1, size), hard.reshape(-1)),
                    )
                new_soft, new_order, new_hard = found
                soft, order = new_soft.reshape(soft.shape), new_order.reshape(order.shape)
                model_state |= {f"{path}.permutation": order, f"{path}.hard": new_hard.reshape(hard.shape)}
            params[f"{path}.soft"] = soft
        return moment._replace(
            params=replaced(moment.params, params), model_state=replaced(moment.model_state, model_state)
        )

    def _topology(self, moment: Moment) -> Change:
        """Returns the change of the blocks."""
        if not self.algorithm.changes or not moment.changes:
            return Change(moment.params, moment.opt_state, moment.model_state, moment.sparsity, moment.ema)
        # Values, and whatever else has one number a weight.
        parts = {"params": moment.params, "opt_state": moment.opt_state, "ema": moment.ema}
        follow = {
            (part, leaf): path
            for part, tree in parts.items()
            for leaf in flatten(tree)
            for path in self.packed
            if f".{leaf}".endswith(f".{path}.values")
        }
        topology = {path: at(moment.model_state, f"{path}.topology") for path in self.packed}
        values = {path: at(moment.params, f"{path}.values") for path in self.packed}
        changing = moment.finite & self.due(moment.step)
        share = self.schedule.drop_fraction(moment.step, self.steps)
        kept = {name: moment.sparsity[name] for name in ("mask", "ever", "counts")}
        new, source, sparsity = self.changed(topology, values, self.scores(moment), share, moment.sparsity)
        new, sparsity = jax.tree.map(lambda n, o: jnp.where(changing, n, o), (new, sparsity), (topology, kept))
        stay = {path: jnp.broadcast_to(jnp.arange(s.shape[-1], dtype=s.dtype), s.shape) for path, s in source.items()}
        source = {path: jnp.where(changing, s, stay[path]) for path, s in source.items()}
        after = {
            part: replaced(
                tree, {leaf: moved(at(tree, leaf), source[follow[part, leaf]]) for w, leaf in follow if w == part}
            )
            for part, tree in parts.items()
        }
        model_state = replaced(moment.model_state, {f"{path}.topology": lists for path, lists in new.items()})
        return Change(after["params"], after["opt_state"], model_state, sparsity, after["ema"])

    def changed(
        self,
        topology: dict[str, Tree],
        values: dict[str, jax.Array],
        scores: dict[str, jax.Array],
        fraction: jax.Array,
        sparsity: Tree,
    ) -> tuple[dict[str, Tree], dict[str, jax.Array], Tree]:
        """Drops and grows blocks in every matrix; matrices of one pattern together.

        Args:
          topology: lists of every matrix.
          values: its blocks.
          scores: how much each of its blocks wants to grow, [..., R, C].
          fraction: share of the blocks to drop; their number is rounded to the nearest.
          sparsity: state of the sparsifier.

        Returns:
          (lists of every matrix, where its blocks come from, state of the sparsifier).
        """
        lists: dict[str, Tree] = {}
        source: dict[str, jax.Array] = {}
        mask, ever, counts = {}, {}, {}
        for pattern, paths in same_pattern(self.packed).items():

            def flat(a: jax.Array, batch: tuple[int, ...]) -> jax.Array:
                return a.reshape(-1, *a.shape[len(batch) :])

            def joined(tree_of: Any, paths: list[str] = paths, flat: Any = flat) -> Any:
                trees = [jax.tree.map(lambda a, p=p: flat(a, self.packed[p].batch), tree_of(p)) for p in paths]
                return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)

            count = jnp.round(fraction * pattern.blocks).astype(jnp.int32)
            found = jax.vmap(lambda t, n, s, p=pattern, c=count: change_topology(p.from_lists(t), n, s, c, p))(
                joined(lambda p: topology[p]), joined(lambda p: square_norms(values[p])), joined(lambda p: scores[p])
            )
            start = 0
            for path in paths:
                batch = self.packed[path].batch
                size = math.prod(batch)
                own = jax.tree.map(lambda a, s=start, n=size, b=batch: a[s : s + n].reshape(*b, *a.shape[1:]), found)
                new, source[path], before, after = own
                lists[path] = lists_of(new)
                existed = at(sparsity["ever"], path)
                counts[path] = measure(before, after, existed)
                mask[path], ever[path] = after, existed | after
                start += size
        return lists, source, {"mask": nested(mask), "ever": nested(ever), "counts": nested(counts)}

    def scores(self, moment: Moment) -> dict[str, jax.Array]:
        """Returns how much each block of every matrix wants to grow, float32 [..., R, C]."""
        if self.algorithm.reads == "gradient":
            return self.gradient_norms(moment, moment.before)
        if self.algorithm.reads == "companion":
            return {path: self.companion(moment.params, moment.model_state, path, m) for path, m in self.packed.items()}
        found = {}
        for path, matrix in self.packed.items():
            shape = (matrix.pattern.rows, matrix.pattern.columns)
            keys = matrix_keys(moment.key, path, matrix)
            found[path] = jax.vmap(lambda k, s=shape: jax.random.uniform(k, s))(keys).reshape(*matrix.batch, *shape)
        return found

    def companion(self, params: Tree, model_state: Tree, path: str, matrix: PackedMatrix) -> jax.Array:
        """Returns the squared norm of every block of a matrix's companion, its inputs in the order of the blocks' rows."""
        into, out = (at(params, f"{path}.{name}") for name in ("into", "out"))
        if matrix.permuted:
            order = at(model_state, f"{path}.permutation")[
                (..., *[None] * (into.ndim - 2 - bool(matrix.layers)), slice(None))
            ]
            into = jnp.take_along_axis(into, order[..., None], axis=-2)
        norms = lambda a, b: companion_norms(a, b, matrix.pattern.block)  # noqa: E731
        for _ in matrix.batch:
            norms = jax.vmap(norms)
        return norms(into, out)

    def gradient_norms(self, moment: Moment, params: Tree) -> dict[str, jax.Array]:
        """Returns the squared norm of every block of the batch's gradient.

        With one microbatch the backward pass reduces it to norms at once. With several, slabs of the dense gradient are summed over
        microbatches first, in as many passes as there are slabs.
        """
        if self.microbatches == 1:
            asked = {
                f"{p}.probe": jnp.zeros((*m.batch, m.pattern.rows, m.pattern.columns)) for p, m in self.packed.items()
            }
            grads = moment.gradient(replaced(params, asked))
            return {path: at(grads, f"{path}.probe") for path in self.packed}
        slabs = self.algorithm.slabs  # type: ignore[attr-defined]
        width = {path: -(-matrix.pattern.columns // slabs) for path, matrix in self.packed.items()}

        def first(path: str, slab: Any) -> Any:
            return jnp.minimum(slab * width[path], self.packed[path].pattern.columns - width[path])

        def norms(slab: jax.Array) -> dict[str, jax.Array]:
            asked = {}
            for path, matrix in self.packed.items():
                pattern = matrix.pattern
                asked[f"{path}.probe"] = jnp.zeros((*matrix.batch, pattern.inputs, width[path] * pattern.block))
                layers = (len(matrix.layers),) if matrix.layers else ()
                asked[f"{path}.slab"] = jnp.full(layers, first(path, slab), jnp.float32)
            grads = moment.gradient(replaced(params, asked))
            return {path: slab_norms(at(grads, f"{path}.probe"), m.pattern.block) for path, m in self.packed.items()}

        found = jax.lax.map(norms, jnp.arange(slabs))
        whole = {}
        for path, matrix in self.packed.items():
            score = jnp.zeros((*matrix.batch, matrix.pattern.rows, matrix.pattern.columns), jnp.float32)
            for slab in range(slabs):
                start = first(path, slab)
                score = jax.lax.dynamic_update_slice_in_dim(score, found[path][slab], start, axis=-1)
            whole[path] = score
        return whole

    # What is shown.

    def numbers(self, sparsity: Tree) -> Tree:
        """See Sparsifier.numbers; inputs, outputs and fan-in are counted in blocks."""
        found: Tree = {}
        for path, matrix in self.packed.items():
            pattern, weights = matrix.pattern, float(matrix.pattern.block**2)
            counts = dict(at(sparsity["counts"], path))
            # Blocks times a power of two: exact in float32.
            counts |= {name: weights * counts[name] for name in ("active", "kept", "grown", "regrown", "never")}
            sizes = {"weights": weights * pattern.rows * pattern.columns, "requested": weights * pattern.blocks}
            sizes |= {"inputs": float(pattern.rows), "outputs": float(pattern.columns), "mean_density": pattern.density}
            full = {name: jnp.full(matrix.batch, size, jnp.float32) for name, size in sizes.items()}
            found[path] = counts | full
            if path in self.learned:
                shuffle = at(sparsity["shuffle"], path)
                found[path] |= {"soft": shuffle["penalty"], "hard": shuffle["hard"], "orders": jnp.ones(matrix.batch)}
        return found

    def pictures(self, sparsity: Tree) -> Tree:
        """See Sparsifier.pictures; experts averaged."""
        found = {}
        for path in self.packed:
            mask = at(sparsity["mask"], path)
            lead = 1 if self.packed[path].layers else 0
            found[path] = jnp.mean(mask.astype(jnp.float32), axis=tuple(range(lead, mask.ndim - 2)))
        return found

    def description(self) -> dict[str, Any]:
        """See Sparsifier.description."""
        rows = []
        for path, matrix in unrolled(self.packed).items():
            pattern, matrices = matrix.pattern, max(1, matrix.experts)
            row = {"path": path, "shape": [pattern.inputs, pattern.outputs], "matrices": matrices}
            rows.append(row | {"kept": matrices * pattern.parameters, "block": pattern.block})
        owners = tuple(f"{path}." for path in self.packed)
        dense = {path: role(dims) for path, dims in self.dims.items() if not path.startswith(owners)}
        return {"matrices": rows, "dense": dense, "algorithm": type(self.algorithm).__name__}
