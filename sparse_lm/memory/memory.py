"""The memory door: tables addressed by token ids, whose rows a few layers add to the residual stream.

Legend: B batch, L length, D model, H heads, X width of what is looked up for a token, W remembered positions.
"""

import concurrent.futures
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparse_lm.config import Config
from sparse_lm.memory.compression import TokenClasses
from sparse_lm.memory.hashing import Hash
from sparse_lm.memory.host_array import HostArray
from sparse_lm.memory.owners import Owners, alone
from sparse_lm.memory.placement import OnDevice, Placement
from sparse_lm.memory.sharded import look_up_sharded, row_axes, update_sharded
from sparse_lm.memory.table import TableSpec, look_up, update
from sparse_lm.parallel.mesh import current

Tree = dict[str, Any]


class History(NamedTuple):
    """What decoding remembers of the positions before the next; segment -1 marks what was never written.

    Attributes:
      tokens_BW: int32 token ids.
      segments_BW: int32 document numbers.
      values: {block: [B, W, D]}, what the block's short convolution looks back on.
    """

    tokens_BW: jax.Array
    segments_BW: jax.Array
    values: dict[str, jax.Array]


def remember(past_BW: jax.Array, new_BL: jax.Array, written_B: jax.Array) -> jax.Array:
    """Returns the last W entries before position `written` of what follows the past: [B, W, ...]."""
    index_BW = written_B[:, None] + jnp.arange(past_BW.shape[1])
    both = jnp.concatenate([past_BW, new_BL.astype(past_BW.dtype)], axis=1)
    return both[jnp.arange(both.shape[0])[:, None], index_BW]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory(Config):
    """Base of the memory components; itself no memory."""

    @property
    def placement(self) -> Placement:
        """Where the rows of the tables live; a field of the memories that have some."""
        return OnDevice()

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks, counted from 0, before whose attention a memory layer stands; ascending."""
        return ()

    @property
    def compressed(self) -> bool:
        """Whether n-grams are made of classes of the tokenizer's tokens."""
        return False

    def table_of(self, block: int) -> str:
        """Returns the name of the table that a block reads."""
        return str(block)

    def tables(self) -> dict[str, TableSpec]:
        """Returns the tables by name."""
        return {}

    def hashes(self, vocab_size: int, classes: TokenClasses | None) -> dict[str, Hash]:
        """Derives the hash of every table.

        Args:
          vocab_size: V, ids that the model knows.
          classes: classes of the tokenizer's tokens; None: every id is its own.
        """
        return {}

    def addresses(
        self, hashes: dict[str, Hash], tokens_BL: Any, segments_BL: Any, positions_BL: Any, history: History | None
    ) -> Tree:
        """Returns {table: int32 [B, L, H]}; positions of segment 0 have the address R, which is no row."""
        return {}

    def addresses_on_host(
        self,
        hashes: dict[str, Hash],
        tokens_BL: np.ndarray,
        segments_BL: np.ndarray,
        positions_BL: np.ndarray,
        *,
        threads: concurrent.futures.ThreadPoolExecutor | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns what `addresses` does, in numpy; threads share the work."""
        return {}

    def build(self, block: int, d_model: int, epsilon: float) -> nnx.Module:
        """Builds a module with `__call__(x_BLD, rows_BLX, segments_BL, history) -> (delta_BLD, metrics, values_BLD)`.

        `history` is (values [B, W, D], segments [B, W]) of the positions before these, or None; the values returned are those of
        these positions. metrics are float32 [B, L] by name.
        """
        raise NotImplementedError

    @property
    def history_length(self) -> int:
        """Positions W that decoding looks back."""
        return 0

    def history_width(self, d_model: int) -> int:
        """Returns the width of what a layer's values remember."""
        return 0

    def cost(self, block: int, d_model: int) -> tuple[int, float]:
        """Returns (parameters, forward operations per token) of a block's layer, without its table."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoMemory(Memory):
    """No memory."""


def initial_tables(memory: Memory, hashes: dict[str, Hash], key: jax.Array) -> Tree:
    """Returns the tables of step 0; {} without memory."""
    if not memory.tables():
        return {}
    created = {name: spec.create(jax.random.fold_in(key, i)) for i, (name, spec) in enumerate(memory.tables().items())}
    return {
        "address": {name: jax.tree.map(jnp.asarray, hashing._asdict()) for name, hashing in hashes.items()},
        "rows": {name: rows for name, (rows, _) in created.items()},
        "slots": {name: slots for name, (_, slots) in created.items() if slots},
    }


def host_rows(memory: Memory, key: jax.Array, owners: Owners | None = None) -> Tree:
    """Returns rows and slots of `initial_tables` in host memory: {"rows": {table: HostArray}, "slots"}; the same numbers.

    Of several owners, those that this process keeps; initial values that are drawn are drawn whole for a moment.
    """
    owners, rows = owners or alone(), {}
    for i, (name, spec) in enumerate(memory.tables().items()):
        if spec.deviation:
            with jax.default_device(jax.local_devices(backend="cpu")[0]):
                drawn = jax.jit(lambda key, spec=spec: spec.create(key)[0])(jax.random.fold_in(key, i))
            rows[name] = owners.keep(np.array(drawn)[owners.rows(spec.rows)].copy(), spec.rows)
        else:
            rows[name] = owners.zeros((spec.rows, spec.stored[0]), spec.stored[1])
    slots = {
        name: {slot: owners.zeros((spec.rows, *s.shape), s.dtype) for slot, s in found.items()}
        for name, spec in memory.tables().items()
        if (found := spec.optimizer.slots(spec.width))
    }
    return {"rows": rows, "slots": slots}


def table_dims(memory: Memory) -> Tree:
    """Returns the logical dims of `initial_tables`."""
    if not memory.tables():
        return {}
    address = {"classes_V": ("address",), "pad": (), "multipliers_N2": ("address", "address"), "primes_H": ("address",)}
    dims = {name: spec.dims() for name, spec in memory.tables().items()}
    return {
        "address": dict.fromkeys(dims, address),
        "rows": {name: rows for name, (rows, _) in dims.items()},
        "slots": {name: slots for name, (_, slots) in dims.items() if slots},
    }


def fetch(
    memory: Memory,
    tables: Tree,
    tokens_BL: jax.Array,
    segments_BL: jax.Array,
    positions_BL: jax.Array,
    history: History | None = None,
) -> tuple[Tree, Tree]:
    """Looks up every table.

    A table may lie in the memory of the host (`HostArray.readable`). Steps and validation of training get its working set instead, in
    which "places" stand for addresses (`working_set.py`).

    Returns:
      ({table: rows [B, L, X]}, {table: addresses int32 [B, L, H]}).
    """
    if not tables:
        return {}, {}
    if "places" in tables:
        found = tables["places"]
    else:
        hashes = {name: Hash(**arrays) for name, arrays in tables["address"].items()}
        found = memory.addresses(hashes, tokens_BL, segments_BL, positions_BL, history)
    mesh, rows = current(), {}
    for name in memory.tables():
        table = tables["rows"][name]
        assert not isinstance(table, HostArray), (
            "tables in host memory are read through a working set, or made readable"
        )
        axes = row_axes(table.shape[0], mesh)
        if mesh is None or not axes:
            rows[name] = look_up(table, found[name])
        else:
            rows[name] = look_up_sharded(mesh, axes, table, found[name])
    return rows, found


def update_tables(
    memory: Memory, tables: Tree, address: Tree, grads: Tree, rate: jax.Array, step: jax.Array, keep: jax.Array
) -> Tree:
    """Takes a step on the rows that were looked up.

    Args:
      memory: the component.
      tables: state of the tables, or a working set.
      address: from `fetch`.
      grads: gradients of its rows.
      rate: the optimizer's learning rate at this step.
      step: int32 number of this step, counted from 1.
      keep: whether nothing is to change, because the step is skipped: then every address is none.
    """
    if not tables:
        return tables
    new: Tree = {**tables, "rows": {}, "slots": {}}
    mesh = current()
    for name, spec in memory.tables().items():
        table = tables["rows"][name]
        own = jnp.where(keep, table.shape[0], address[name])
        arguments = (spec, table, tables["slots"].get(name, {}), own, grads[name], rate, step)
        axes = row_axes(table.shape[0], mesh)
        rows, slots = update(*arguments) if mesh is None or not axes else update_sharded(mesh, axes, *arguments)
        new["rows"][name] = rows
        if slots:
            new["slots"][name] = slots
    return new
