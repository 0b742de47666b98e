"""Tables of rows: looked up outside the gradient, updated where a step touched them; nothing is ever as large as the table.

A state of tables is {"address": {table: Hash as a dict}, "rows": {table: [R, D]}, "slots": {table: {name: [R, ...]}}}. R is rounded
up, so that any usual mesh divides it, and row R itself does not exist: it is the address of padding, reads zero and takes no update.

Rows of float8 are held as words, numbers and scales together (`pallas_kernels/embedding_lookup/float8_rows.py`), so whatever moves rows
moves them as they are. A step unpacks the rows it touches, steps in float32 and rounds stochastically: a step is often smaller than half
the distance of two float8 numbers, and rounding to nearest would lose it every time. The random bits are a hash of step, column and the number
to be rounded itself, so they are the same on any mesh and in either placement.

Legend: B batch, L length, H heads, A addresses of a step, U touched rows (at most A), R rows, D row width, X = H * D.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.embedding_lookup import embedding_lookup, pack, row_words, unpack
from sparse_lm.memory.hashing import Hash
from sparse_lm.memory.row_optimizer import RowOptimizer, Slots

Tree = dict[str, Any]

ROWS_MULTIPLE = 256
"""Rows of a table are rounded up to a multiple of this: shards of any mesh up to this size are equal."""


@dataclasses.dataclass(frozen=True)
class TableSpec:
    """One table.

    Attributes:
      primes: rows of each head, order after order.
      width: row width D.
      dtype: of the rows' numbers; float8_e4m3fn: packed.
      optimizer: of the rows.
      deviation: standard deviation of the initial rows.
    """

    primes: tuple[int, ...]
    width: int
    dtype: Any
    optimizer: RowOptimizer
    deviation: float

    @property
    def addressed(self) -> int:
        """Rows that a hash can reach."""
        return sum(self.primes)

    @property
    def rows(self) -> int:
        """Rows R that are held."""
        return -(-self.addressed // ROWS_MULTIPLE) * ROWS_MULTIPLE

    @property
    def packed(self) -> bool:
        """Whether rows are float8 with scales."""
        return jnp.dtype(self.dtype) == jnp.float8_e4m3fn

    @property
    def stored(self) -> tuple[int, Any]:
        """(length, dtype) of a row as it is held."""
        return (row_words(self.width), jnp.dtype(jnp.uint32)) if self.packed else (self.width, self.dtype)

    @property
    def read_dtype(self) -> Any:
        """Dtype of what is looked up."""
        return jnp.dtype(jnp.bfloat16) if self.packed else self.dtype

    def create(self, key: jax.Array) -> tuple[jax.Array, Slots]:
        """Returns (rows [R, D], or [R, words] of float8, slots) at the start of a run."""
        length, dtype = self.stored
        rows_RD = jnp.zeros((self.rows, length), dtype)
        if self.deviation:
            drawn = jnp.float32 if self.packed else self.dtype
            rows_RD = self.deviation * jax.random.normal(key, (self.rows, self.width), drawn)
            rows_RD = pack(rows_RD) if self.packed else rows_RD
        slots = self.optimizer.slots(self.width)
        return rows_RD, {name: jnp.zeros((self.rows, *s.shape), s.dtype) for name, s in slots.items()}

    def dims(self) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
        """Returns the logical dims of what `create` makes."""
        slots = self.optimizer.slots(self.width)
        return ("rows", "row"), {name: ("rows", *s.dims) for name, s in slots.items()}


def look_up(rows_RD: jax.Array, address_BLH: jax.Array) -> jax.Array:
    """Returns the rows of every position, heads side by side, [B, L, X]; address R reads zeros."""
    return embedding_lookup(rows_RD, address_BLH).reshape(*address_BLH.shape[:2], -1)


def random_bits(x_UD: jax.Array, step: jax.Array) -> jax.Array:
    """Returns uint32 [U, D] bits for rounding float32 numbers at a step: MurmurHash3's finalizer of step, column and number."""
    column_D = jnp.arange(x_UD.shape[-1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B1)
    bits = jax.lax.bitcast_convert_type(x_UD, jnp.uint32) ^ column_D
    bits = bits + jnp.asarray(step).astype(jnp.uint32) * jnp.uint32(0xC2B2AE3D)
    bits = (bits ^ bits >> 16) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ bits >> 13) * jnp.uint32(0xC2B2AE35)
    return bits ^ bits >> 16


class Runs(NamedTuple):
    """Addresses brought together.

    Attributes:
      order_A: int32, the addresses in ascending order; equal ones keep theirs.
      run_A: int32, which distinct address each of those is, from 0.
      first_A: whether it is the first of its kind.
      unique_A: int32, the distinct addresses, ascending; then `absent`.
    """

    order_A: jax.Array
    run_A: jax.Array
    first_A: jax.Array
    unique_A: jax.Array


def runs_of(address_A: jax.Array, absent: int) -> Runs:
    """Sorts addresses, stably; `absent`, larger than any, counts as none."""
    count = address_A.shape[0]
    sorted_A, order_A = jax.lax.sort((address_A, jnp.arange(count, dtype=jnp.int32)), num_keys=1, is_stable=True)
    first_A = jnp.concatenate([jnp.ones((1,), bool), sorted_A[1:] != sorted_A[:-1]])
    run_A = jnp.cumsum(first_A, dtype=jnp.int32) - 1
    # Only the first of a run writes: no two writes meet.
    place_A = jnp.where(first_A, run_A, count + jnp.arange(count, dtype=jnp.int32))
    unique_A = jnp.full((count,), absent, jnp.int32).at[place_A].set(sorted_A, mode="drop", unique_indices=True)
    return Runs(order_A, run_A, first_A, unique_A)


def sort_addresses(address_A: jax.Array, absent: int) -> tuple[jax.Array, jax.Array]:
    """Returns (distinct addresses as `Runs.unique_A`, the place of each address among them), int32 [A] each."""
    runs = runs_of(address_A, absent)
    return runs.unique_A, jnp.zeros_like(address_A).at[runs.order_A].set(runs.run_A, unique_indices=True)


def sum_duplicates(address_A: jax.Array, grads_AD: jax.Array, absent: int) -> tuple[jax.Array, jax.Array]:
    """Sums the gradients of equal addresses, in an order that the addresses alone decide.

    CPU and TPU add in the order of the sort. On CUDA such additions are atomic and come in any order, so there a segmented scan adds.

    Args:
      address_A: int32 addresses.
      grads_AD: float32.
      absent: larger than any address; counts as none.

    Returns:
      (distinct addresses, ascending, then `absent`; float32 [A, D] sums in that order).
    """
    runs = runs_of(address_A, absent)
    sums_AD = jax.lax.platform_dependent(runs, grads_AD[runs.order_A], cuda=_sum_by_scan, default=_sum_in_order)
    return runs.unique_A, sums_AD


def _sum_in_order(runs: Runs, grads_AD: jax.Array) -> jax.Array:
    return jax.ops.segment_sum(grads_AD, runs.run_A, grads_AD.shape[0], indices_are_sorted=True)


def _sum_by_scan(runs: Runs, grads_AD: jax.Array) -> jax.Array:
    count = grads_AD.shape[0]

    def add(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return left[0] | right[0], jnp.where(right[0], right[1], left[1] + right[1])

    _, running_AD = jax.lax.associative_scan(add, (runs.first_A[:, None], grads_AD))
    last_A = jnp.concatenate([runs.first_A[1:], jnp.ones((1,), bool)])
    place_A = jnp.where(last_A, runs.run_A, count + jnp.arange(count, dtype=jnp.int32))
    return jnp.zeros_like(grads_AD).at[place_A].set(running_AD, mode="drop", unique_indices=True)


def update_rows(
    rows_RD: jax.Array,
    slots: Slots,
    address_U: jax.Array,
    grads_UD: jax.Array,
    optimizer: RowOptimizer,
    rate: jax.Array,
    step: jax.Array,
) -> tuple[jax.Array, Slots]:
    """Takes one step on some rows.

    Args:
      rows_RD: the table.
      slots: its slots.
      address_U: int32, ascending, without repetition but for R, which means none.
      grads_UD: float32 gradients of those rows.
      optimizer: of the rows.
      rate: float32 learning rate.
      step: int32 number of this step, counted from 1.

    Returns:
      (table, slots): the same buffers where they are donated.
    """

    def get(table: jax.Array) -> jax.Array:
        return table.at[address_U].get(mode="fill", fill_value=0, indices_are_sorted=True)

    def put(table: jax.Array, new: jax.Array) -> jax.Array:
        return table.at[address_U].set(new.astype(table.dtype), mode="drop", indices_are_sorted=True)

    held = {name: get(slot) for name, slot in slots.items()}
    direction_UD, new_slots = optimizer.direction(grads_UD, held, step)
    packed, rows_UD = rows_RD.dtype == jnp.uint32, get(rows_RD)
    rows_UD = unpack(rows_UD, jnp.float32) if packed else rows_UD.astype(jnp.float32)
    new_UD = rows_UD - rate * direction_UD
    return put(rows_RD, pack(new_UD, random_bits(new_UD, step)) if packed else new_UD), {
        name: put(slots[name], new_slots[name]) for name in slots
    }


def update(
    spec: TableSpec,
    rows_RD: jax.Array,
    slots: Slots,
    address_BLH: jax.Array,
    grads_BLX: jax.Array,
    rate: jax.Array,
    step: jax.Array,
) -> tuple[jax.Array, Slots]:
    """Returns (table, slots) after a step, from the gradient of what `look_up` returned; the table's length is no row."""
    grads_AD = grads_BLX.astype(jnp.float32).reshape(-1, spec.width)
    address_U, grads_UD = sum_duplicates(address_BLH.reshape(-1), grads_AD, rows_RD.shape[0])
    return update_rows(rows_RD, slots, address_U, grads_UD, spec.optimizer, rate * spec.optimizer.learning_rate, step)


def hash_differences(found: Tree, derived: dict[str, Hash]) -> list[str]:
    """Lists the arrays of saved hashes that are not those derived anew from the recipe and its tokenizer.

    Args:
      found: {table: {name: array}}; a population's have a leading members dimension.
      derived: hash by table.
    """
    lines = []
    for table, hashing in derived.items():
        for name, value in hashing._asdict().items():
            saved, own = np.asarray(found[table][name]), np.asarray(value)
            if saved.shape[saved.ndim - own.ndim :] != own.shape or (saved != own).any():
                lines.append(f"{table}.{name}")
    return lines
