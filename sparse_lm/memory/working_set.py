"""The working set of a batch: its distinct rows and their slots as a small table, for tables that are in host memory.

Rows are in ascending order and every address becomes a place among them, so lookup and update on a working set are those on the
table itself, sums in the same order included. Its size is fixed, because programs are compiled for it (`placement.OnHost.size`).
On several devices its rows are split over them as those of a table on devices are, so each row travels to one device, which alone
updates it, and `sharded.py` brings rows to the tokens and gradients back. Of several processes each fills the pieces of its own devices
with the rows that it keeps (`owners.py`); all know the whole batch, so they find the same places.

Legend: B batch, L length, H heads, A addresses, U distinct rows of a batch, O owners, S rows that each has in a working set (distinct ones
and padding), C = O * S, D row width.
"""

import concurrent.futures
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparse_lm.memory.hashing import Hash
from sparse_lm.memory.memory import Memory
from sparse_lm.memory.owners import Owners, alone, axes_of_rows
from sparse_lm.memory.placement import OnHost
from sparse_lm.parallel import rules

Tree = dict[str, Any]


class Wanted(NamedTuple):
    """The rows that a batch reads.

    Attributes:
      unique: {table: int32 [U]}, distinct rows that this process keeps, ascending, counted from the first that it keeps.
      places: {table: int32 [B, L, H]}, where each address is in the working set; C is no row.
      sizes: {table: S}.
      full: whether the batch needs the full program.
    """

    unique: dict[str, np.ndarray]
    places: dict[str, np.ndarray]
    sizes: dict[str, int]
    full: bool


def working_shardings(mesh: Mesh | AbstractMesh) -> dict[str, NamedSharding]:
    """Returns the sharding of each part of a working set: places as the tokens, rows and slots by rows."""
    by_rows = NamedSharding(mesh, P(axes_of_rows(mesh)))
    return {"places": rules.batch_sharding(mesh), "rows": by_rows, "slots": by_rows}


def working_set(
    memory: Memory, tables: Tree, batch: int, length: int, full: bool, owners: Owners | None = None
) -> Tree:
    """Returns the abstract working set of a batch [B, L].

    Args:
      memory: the component, with its tables on the host.
      tables: abstract tables.
      batch: B.
      length: L.
      full: with as many rows as addresses (but for those that a table has not).
      owners: of the rows; None: one, of a single piece.
    """
    placement = memory.placement
    assert isinstance(placement, OnHost)
    owners, specs = owners or alone(), memory.tables()
    split = owners.pieces_OM.shape[1], owners.count
    size = {
        n: owners.count * placement.size(spec, batch * length * len(spec.primes), full, *split)
        for n, spec in specs.items()
    }

    def smaller(tree: Any, name: str) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size[name], *leaf.shape[1:]), leaf.dtype), tree)

    places = {n: jax.ShapeDtypeStruct((batch, length, len(spec.primes)), jnp.int32) for n, spec in specs.items()}
    held = {part: {n: smaller(tree, n) for n, tree in tables[part].items()} for part in ("rows", "slots")}
    return {"places": places, **held}


def wanted_rows(
    memory: Memory,
    hashes: dict[str, Hash],
    batch: dict[str, np.ndarray],
    threads: concurrent.futures.ThreadPoolExecutor | None = None,
    owners: Owners | None = None,
) -> Wanted:
    """Returns the rows that a batch reads, from its arrays "tokens_BL", "segments_BL" and "positions_BL" in numpy.

    Args:
      memory: the component, with its tables on the host.
      hashes: of its tables.
      batch: the arrays; of all processes together.
      threads: share the work.
      owners: of the rows; None: one, of a single piece.
    """
    placement = memory.placement
    assert isinstance(placement, OnHost)
    owners = owners or alone()
    split = owners.pieces_OM.shape[1], owners.count
    arrays = batch["tokens_BL"], batch["segments_BL"], batch["positions_BL"]
    specs, address = memory.tables(), memory.addresses_on_host(hashes, *arrays, threads=threads)
    found = {name: distinct(address[name], spec.rows, threads) for name, spec in specs.items()}
    starts = {name: owners.starts(unique, specs[name].rows) for name, (unique, _) in found.items()}

    def sizes(full: bool) -> dict[str, int]:
        return {name: placement.size(spec, address[name].size, full, *split) for name, spec in specs.items()}

    # Every process looks at the rows of all, so all choose the same program.
    full = any(np.diff(starts[name]).max() > size for name, size in sizes(False).items())
    size, own, places = sizes(full), {}, {}
    for name, (unique_U, place_BLH) in found.items():
        if owners.count == 1:
            np.copyto(place_BLH, size[name], where=place_BLH < 0)
            own[name], places[name] = unique_U, place_BLH
            continue
        begin, end = starts[name][owners.own : owners.own + 2]
        own[name] = unique_U[begin:end] - owners.rows(specs[name].rows).start
        places[name] = owners.places(starts[name], size[name])[place_BLH]  # -1 takes the last entry, which is no row
    return Wanted(own, places, size, full)


def distinct(
    address_BLH: np.ndarray, none: int, threads: concurrent.futures.ThreadPoolExecutor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (distinct addresses, ascending; int32 [B, L, H], where each address is among them, -1 for `none`).

    Heads have ranges of rows of their own, one after another, so each is sorted by itself.
    """

    size = math.prod(address_BLH.shape[:2])
    bits = np.int64(max(1, (size - 1).bit_length()))
    number_A = np.arange(size, dtype=np.int64)

    def of_head(head: int) -> tuple[np.ndarray, np.ndarray]:
        # Addresses above their numbers in one integer: numpy sorts integers several times faster than it sorts their order.
        both_A = (address_BLH[..., head].reshape(-1).astype(np.int64) << bits) | number_A
        both_A.sort()
        sorted_A = (both_A >> bits).astype(np.int32)
        first_A = np.ones(size, bool)
        np.not_equal(sorted_A[1:], sorted_A[:-1], out=first_A[1:])
        place_A = np.empty(size, np.int32)
        place_A[both_A & ((np.int64(1) << bits) - 1)] = np.cumsum(first_A, dtype=np.int32) - 1
        unique_U = sorted_A[first_A]
        return unique_U[unique_U < none], place_A.reshape(address_BLH.shape[:2])

    heads = range(address_BLH.shape[-1])
    parts = list(map(of_head, heads) if threads is None else threads.map(of_head, heads))
    places, start = np.empty(address_BLH.shape, np.int32), 0
    for head, (unique_U, place_BL) in enumerate(parts):
        places[..., head] = np.where(place_BL < len(unique_U), place_BL + start, -1)
        start += len(unique_U)
    return np.concatenate([unique_U for unique_U, _ in parts]), places


@functools.partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def forwarded(fetched: Tree, written: Tree, source: dict[str, jax.Array], *, mesh: Mesh) -> Tree:
    """Returns fetched rows and slots, with those that another working set has taken from there.

    On several devices each takes them from a copy of the other working set, brought together for the moment.

    Args:
      fetched: {"rows": {table: [C, D]}, "slots": {table: {name: [C, ...]}}}, by rows.
      written: the same of a step that ran later than the fetch saw, C may differ.
      source: {table: int32 [C]}, where in `written` each row is; its size: nowhere; by rows.
      mesh: of the working sets.
    """
    if not (axes := axes_of_rows(mesh)):
        return _taken(fetched, written, source)

    def on_device(fetched: Tree, written: Tree, source: dict[str, jax.Array]) -> Tree:
        return _taken(fetched, jax.tree.map(lambda a: jax.lax.all_gather(a, axes, tiled=True), written), source)

    return jax.shard_map(on_device, mesh=mesh, in_specs=P(axes), out_specs=P(axes), check_vma=False)(
        fetched, written, source
    )


def _taken(fetched: Tree, written: Tree, source: dict[str, jax.Array]) -> Tree:
    def take(name: str, new: jax.Array, old: jax.Array) -> jax.Array:
        there_C = source[name] < old.shape[0]
        taken = old.at[source[name]].get(mode="clip")
        return jnp.where(there_C.reshape(-1, *[1] * (new.ndim - 1)), taken, new)

    return {
        part: {n: jax.tree.map(functools.partial(take, n), tree, written[part][n]) for n, tree in fetched[part].items()}
        for part in ("rows", "slots")
    }


def places_in(unique_U: np.ndarray, size: int, before: np.ndarray, none: int) -> np.ndarray:
    """Returns where each row of a working set is among the rows before, int32 [C]; `none` where it is not, and for padding."""
    place_U = np.searchsorted(before, unique_U)
    known_U = np.append(before, -1)[place_U] == unique_U
    out_C = np.full(size, none, np.int32)
    out_C[: len(unique_U)] = np.where(known_U, place_U, none)
    return out_C
