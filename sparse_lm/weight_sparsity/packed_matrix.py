"""Which blocks of a packed sparse matrix exist: its pattern as static numbers, its lists as model state, and how they are drawn.

A packed matrix stores only blocks that exist, in the order of its block columns. How many there are never changes, so a pattern
can change inside a compiled step. Where a pattern has constant fan-in, every block column holds equally many blocks, and equally
many in each of `row_shards` ranges of rows: then a mesh can split columns, or such ranges, into equal parts.

Legend: K inputs, N outputs, b block size, R = K / b block rows, C = N / b block columns, J blocks, E experts.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.block_sparse_matmul.topology import BlockTopology, pair_bound, topology_from_indices
from sparse_lm.layers.parameter import RUN_KEY, ModelState

Tree = dict[str, Any]
LISTS = tuple(field.name for field in dataclasses.fields(BlockTopology) if field.type == "jax.Array")


@dataclasses.dataclass(frozen=True)
class BlockPattern:
    """The static part of a pattern.

    Attributes:
      inputs: K.
      outputs: N.
      block: side b of a block.
      blocks: J, blocks that exist.
      constant_fan_in: whether every block column holds J / C of them.
      row_shards: ranges of rows that hold equally many of each column's.
    """

    inputs: int
    outputs: int
    block: int
    blocks: int
    constant_fan_in: bool = True
    row_shards: int = 1

    @property
    def rows(self) -> int:
        """R."""
        return self.inputs // self.block

    @property
    def columns(self) -> int:
        """C."""
        return self.outputs // self.block

    @property
    def density(self) -> float:
        """Fraction of the matrix that exists, exactly."""
        return self.blocks / (self.rows * self.columns)

    @property
    def parameters(self) -> int:
        """Weights that exist."""
        return self.blocks * self.block**2

    @property
    def fan_in(self) -> int:
        """Blocks of a column, where fan-in is constant."""
        assert self.constant_fan_in
        return self.blocks // self.columns

    def grouped(self, a_RC: jax.Array) -> jax.Array:
        """Returns [..., R, C] as [..., groups, places]: the places that share a constant number of blocks."""
        *batch, rows, columns = a_RC.shape
        if not self.constant_fan_in:
            return a_RC.reshape(*batch, 1, rows * columns)
        split = a_RC.reshape(*batch, self.row_shards, rows // self.row_shards, columns)
        return jnp.moveaxis(split, -1, -3).reshape(*batch, columns * self.row_shards, rows // self.row_shards)

    def ungrouped(self, a_GP: jax.Array) -> jax.Array:
        """The inverse of `grouped`."""
        batch = a_GP.shape[:-2]
        if not self.constant_fan_in:
            return a_GP.reshape(*batch, self.rows, self.columns)
        split = a_GP.reshape(*batch, self.columns, self.row_shards, self.rows // self.row_shards)
        return jnp.moveaxis(split, -3, -1).reshape(*batch, self.rows, self.columns)

    def topology(self, mask_RC: jax.Array) -> BlockTopology:
        """Returns the lists of a bool mask [R, C] with exactly J blocks; usable inside jit."""
        column_J, row_J = jnp.nonzero(mask_RC.T, size=self.blocks)
        return topology_from_indices(
            row_J.astype(jnp.int32),
            column_J.astype(jnp.int32),
            features_in=self.inputs,
            features_out=self.outputs,
            block_in=self.block,
            block_out=self.block,
        )[0]

    def list_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each list of a topology."""
        rows, columns, blocks = self.rows, self.columns, self.blocks
        return {
            "row_index": (blocks,),
            "column_start": (columns + 1,),
            "column_index": (blocks,),
            "row_order": (blocks,),
            "row_start": (rows + 1,),
            "column_schedule": (3, columns),
            "row_schedule": (3, rows),
            "pairs": (6, pair_bound(blocks, columns)),
        }

    def from_lists(self, lists: Mapping[str, Any]) -> BlockTopology:
        """Returns the topology of lists, batch dimensions included."""
        sizes = {"features_in": self.inputs, "features_out": self.outputs}
        return BlockTopology(
            **{name: lists[name] for name in LISTS}, **sizes, block_in=self.block, block_out=self.block
        )


def lists_of(topology: BlockTopology) -> Tree:
    """Returns the lists of a topology as a nested dict: what the model state holds."""
    return {name: getattr(topology, name) for name in LISTS}


class TopologyState(nnx.Module):
    """The lists of a matrix, or of one matrix for each expert, as model state."""

    def __init__(self, pattern: BlockPattern, experts: int):
        self.pattern = pattern
        batch, dims = ((experts,), ("experts",)) if experts else ((), ())
        for name, shape in pattern.list_shapes().items():
            zeros = jnp.zeros((*batch, *shape), jnp.int32)
            setattr(self, name, ModelState(zeros, dims=(*dims, *("list",) * len(shape)), initial=0))

    def __call__(self) -> BlockTopology:
        return self.pattern.from_lists({name: getattr(self, name)[...] for name in LISTS})


@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """A packed matrix of a model, as those see it that change its pattern.

    Attributes:
      pattern: of one matrix.
      experts: matrices of a routed layer, each with its own pattern; 0: one without that dimension.
      layers: numbers of the blocks of its stacked run; (): not stacked.
      permuted: whether its inputs are permuted.
      dims: logical dims of the two sides.
      learned: whether their order is learned.
    """

    pattern: BlockPattern
    experts: int
    layers: tuple[int, ...]
    permuted: bool
    dims: tuple[str, str]
    learned: bool = False

    @property
    def batch(self) -> tuple[int, ...]:
        """Leading dimensions of values and lists."""
        return (*((len(self.layers),) if self.layers else ()), *((self.experts,) if self.experts else ()))


def packed_matrices(model: nnx.Module) -> dict[str, PackedMatrix]:
    """Finds the packed matrices of an (abstract) model: modules with a `TopologyState` named topology."""
    found: dict[str, PackedMatrix] = {}
    for path, module in nnx.iter_modules(model):
        topology = getattr(module, "topology", None)
        if not isinstance(topology, TopologyState):
            continue
        match = next((m for part in path if (m := RUN_KEY.match(str(part)))), None)
        layers = tuple(range(int(match[1]), int(match[2]) + 1)) if match else ()
        permuted = getattr(module, "permutation", None) is not None
        learned = getattr(module, "soft", None) is not None
        found[".".join(map(str, path))] = PackedMatrix(
            topology.pattern, module.experts, layers, permuted, module.dims, learned
        )
    return dict(sorted(found.items()))


def at(tree: Tree, path: str) -> Any:
    """Returns what stands at a dotted path of nested dicts."""
    for part in path.split("."):
        tree = tree[part]
    return tree


def replaced(tree: Tree, changes: Mapping[str, Any]) -> Tree:
    """Returns nested dicts with what stands at dotted paths replaced; the others are shared."""
    out = dict(tree)
    below: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        head, _, rest = path.partition(".")
        if rest:
            below.setdefault(head, {})[rest] = value
        else:
            out[head] = value
    for head, inner in below.items():
        out[head] = replaced(tree[head], inner)
    return out


def same_pattern(packed: Mapping[str, PackedMatrix]) -> dict[BlockPattern, list[str]]:
    """Returns the paths of the matrices of each pattern: what is done to them is compiled once."""
    groups: dict[BlockPattern, list[str]] = {}
    for path, matrix in packed.items():
        groups.setdefault(matrix.pattern, []).append(path)
    return groups


def ranks(scores: jax.Array) -> jax.Array:
    """Returns the place of each entry of the last dimension by falling score, ties by index: int32, 0 the largest."""
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1).astype(jnp.int32)


def best_mask(scores_RC: jax.Array, pattern: BlockPattern) -> jax.Array:
    """Returns the pattern of the best blocks by score, as bool [R, C]: the best of each group of places."""
    scores_GP = pattern.grouped(scores_RC)
    return pattern.ungrouped(ranks(scores_GP) < pattern.blocks // scores_GP.shape[-2])


def even_mask(key: jax.Array, pattern: BlockPattern) -> jax.Array:
    """Draws a random pattern with constant fan-in whose block rows hold equally many blocks too, up to one; bool [R, C].

    A row without a block would be an input that nothing reads, and rows of unequal length cost the transposed product its balance.
    Random orders of the rows, one after another, are cut into columns. Where a column begins in one order and ends in the next, the
    rows that it has already come last in that one.
    """
    shards, columns, fan_in = pattern.row_shards, pattern.columns, pattern.fan_in // pattern.row_shards
    rows = pattern.rows // shards
    orders = -(-columns * fan_in // rows)

    def part(key: jax.Array) -> jax.Array:
        order_key, column_key = jax.random.split(key)

        def draw(last_R: jax.Array, turn: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            begun, key = turn
            taken_R = jnp.zeros(rows).at[last_R].set(jnp.arange(rows) >= rows - begun)
            order_R = jnp.argsort(jax.random.uniform(key, (rows,)) + taken_R)
            return order_R, order_R

        begun = jnp.arange(orders) * rows % fan_in
        _, found = jax.lax.scan(draw, jnp.arange(rows), (begun, jax.random.split(order_key, orders)))
        row_CP = found.reshape(-1)[: columns * fan_in].reshape(columns, fan_in)
        mask_CR = jnp.zeros((columns, rows), bool).at[jnp.arange(columns)[:, None], row_CP].set(True)
        return jax.random.permutation(column_key, mask_CR).T

    return jax.vmap(part)(jax.random.split(key, shards)).reshape(pattern.rows, columns)


def matrix_keys(key: jax.Array, path: str, matrix: PackedMatrix) -> jax.Array:
    """Returns a key for each matrix of a stacked run and each of its experts, flat; as if the run were not stacked."""
    parts = path.split(".")
    names = [path]
    if matrix.layers:
        run = next(i for i, part in enumerate(parts) if RUN_KEY.match(part))
        names = [".".join([*parts[:run], str(layer), *parts[run + 1 :]]) for layer in matrix.layers]
    keys = jnp.stack([jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF) for name in names])
    experts = jnp.arange(max(1, matrix.experts))
    return jax.vmap(lambda k: jax.vmap(lambda e: jax.random.fold_in(k, e))(experts))(keys).reshape(-1)


def initial_topologies(key: jax.Array, packed: Mapping[str, PackedMatrix], state: Tree) -> Tree:
    """Returns the model state with a random pattern for every packed matrix, and a random permutation where inputs are permuted for good.

    A pattern depends only on the key and the path, so an added matrix changes no other.
    """
    changes: Tree = {}
    for pattern, paths in same_pattern(packed).items():
        keys = [matrix_keys(key, path, packed[path]) for path in paths]

        def draw(key: jax.Array, pattern: BlockPattern = pattern) -> BlockTopology:
            if pattern.constant_fan_in:
                return pattern.topology(even_mask(key, pattern))
            return pattern.topology(best_mask(jax.random.uniform(key, (pattern.rows, pattern.columns)), pattern))

        lists = lists_of(jax.vmap(draw)(jnp.concatenate(keys)))
        start = 0
        for path, own in zip(paths, keys):
            part = {name: leaf[start : start + own.size] for name, leaf in lists.items()}
            batch = packed[path].batch
            changes[f"{path}.topology"] = {n: leaf.reshape(*batch, *leaf.shape[1:]) for n, leaf in part.items()}
            start += own.size
    for path, matrix in packed.items():
        if matrix.learned:
            own = jnp.arange(matrix.pattern.inputs, dtype=jnp.int32)
            changes[f"{path}.permutation"] = jnp.broadcast_to(own, (*matrix.batch, *own.shape))
        elif matrix.permuted:
            # One for the experts of a layer; what it is folded with is no expert.
            keys_L = matrix_keys(jax.random.fold_in(key, 1 << 20), path, dataclasses.replace(matrix, experts=0))
            drawn = jax.vmap(lambda k, n=matrix.pattern.inputs: jax.random.permutation(k, n))(keys_L)
            changes[f"{path}.permutation"] = drawn.astype(jnp.int32).reshape(
                *((-1,) if matrix.layers else ()), drawn.shape[-1]
            )
    return replaced(state, changes)


def nested(flat: Mapping[str, Any]) -> Tree:
    """Returns the nested dict of {dotted path: anything}."""
    tree: Tree = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree
