"""Tables whose rows are split over the devices that split the tokens: rows travel to the tokens, gradients back to the rows.

Each device sorts its addresses and asks for every row once. Requests go to the devices that own the rows by an all-to-all with a fixed
room for each pair of devices, rows come back the same way, and where a pair has more requests than room, another round follows: no
row is ever wrong or dropped. Gradients, summed by row on each device, travel in rounds too. A row may take one step only, so the
owners must have its gradients of all devices at once: in each round every owner announces the largest row number up to which no
device has more left for it than there is room, and exactly those rows are sent.

Legend: P devices, C room of a pair, R rows of a device, D row width, U unique addresses of a device (A of them with repetitions).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.embedding_lookup import unpack
from sparse_lm.memory.row_optimizer import RowOptimizer, Slots
from sparse_lm.memory.table import TableSpec, sort_addresses, sum_duplicates, update_rows
from sparse_lm.parallel.rules import spec_of, split_tokens

ROOM = 0.75
"""Room of all pairs of a device together, as a share of its addresses: n-grams repeat, so fewer rows than addresses are wanted."""


def row_axes(rows: int, mesh: Mesh | AbstractMesh | None) -> tuple[str, ...]:
    """Returns the mesh axes that so many rows of a table or of a working set are split over; () for none."""
    if mesh is None:
        return ()
    axes = spec_of(("rows",), (rows,), mesh)[0]
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def room(addresses: int, shards: int) -> int:
    """Returns C."""
    return max(1, math.ceil(ROOM * addresses / shards))


def owners(unique_U: jax.Array, rows: int, shards: int) -> tuple[jax.Array, jax.Array]:
    """Returns where the addresses of each owner begin and end, int32 [P] each; shard p owns rows p * R to (p + 1) * R."""
    bounds = jnp.searchsorted(unique_U, jnp.arange(shards + 1, dtype=jnp.int32) * rows).astype(jnp.int32)
    return bounds[:-1], bounds[1:]


def _swap(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.all_to_all(x, axes, 0, 0, tiled=True)


def _collect(rows_RD: jax.Array, address_A: jax.Array, axes: tuple[str, ...], shards: int) -> jax.Array:
    """Returns the rows of one device's addresses, [A, D]."""
    count, own = address_A.shape[0], rows_RD.shape[0]
    unique_U, inverse_A = sort_addresses(address_A, own * shards)
    start_P, end_P = owners(unique_U, own, shards)
    space = room(count, shards)
    needed = jax.lax.pmax(-(-jnp.max(end_P - start_P) // space), axes)
    first_P1 = own * jnp.arange(shards, dtype=jnp.int32)[:, None]

    def one(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        done, found_UD = state
        place_PC = start_P[:, None] + done * space + jnp.arange(space, dtype=jnp.int32)
        wanted_PC = place_PC < end_P[:, None]
        asked_PC = jnp.where(wanted_PC, unique_U.at[place_PC].get(mode="clip") - first_P1, own)
        answer_PCD = rows_RD.at[_swap(asked_PC, axes)].get(mode="fill", fill_value=0)
        came_PCD = _swap(answer_PCD, axes)
        return done + 1, found_UD.at[jnp.where(wanted_PC, place_PC, count)].set(came_PCD, mode="drop")

    empty_UD = jnp.zeros((count, rows_RD.shape[1]), rows_RD.dtype)
    found_UD = jax.lax.while_loop(lambda state: state[0] < needed, one, (jnp.int32(0), empty_UD))[1]
    return found_UD[inverse_A]


def _apply(
    rows_RD: jax.Array,
    slots: Slots,
    address_A: jax.Array,
    grads_AD: jax.Array,
    rate: jax.Array,
    step: jax.Array,
    *,
    optimizer: RowOptimizer,
    axes: tuple[str, ...],
    shards: int,
) -> tuple[jax.Array, Slots]:
    """Returns one device's (rows, slots) after a step on the gradients of all devices."""
    count, own = address_A.shape[0], rows_RD.shape[0]
    unique_U, sums_UD = sum_duplicates(address_A, grads_AD, own * shards)
    start_P, end_P = owners(unique_U, own, shards)
    space = room(count, shards)
    first_P1 = own * jnp.arange(shards, dtype=jnp.int32)[:, None]

    def unfinished(state: Any) -> jax.Array:
        return state[0]

    def one(state: Any) -> Any:
        _, next_P, rows_RD, slots = state
        left_P = next_P + space < end_P
        # The row at which each device's room for an owner is used up; all devices stop at the first of those.
        stop_P = jnp.where(left_P, unique_U.at[next_P + space].get(mode="clip"), own * shards)
        stop_P = jax.lax.pmin(stop_P, axes)
        place_PC = next_P[:, None] + jnp.arange(space, dtype=jnp.int32)
        sent_PC = unique_U.at[place_PC].get(mode="clip")
        goes_PC = (place_PC < end_P[:, None]) & (sent_PC < stop_P[:, None])
        came_PC = _swap(jnp.where(goes_PC, sent_PC - first_P1, own), axes)
        came_PCD = _swap(sums_UD.at[place_PC].get(mode="clip"), axes)
        touched, sums = sum_duplicates(came_PC.reshape(-1), came_PCD.reshape(-1, came_PCD.shape[-1]), own)
        rows_RD, slots = update_rows(rows_RD, slots, touched, sums, optimizer, rate, step)
        next_P = next_P + jnp.sum(goes_PC, axis=1, dtype=jnp.int32)
        return jax.lax.pmax(jnp.any(next_P < end_P), axes), next_P, rows_RD, slots

    state = one((jnp.bool_(True), start_P, rows_RD, slots))
    return jax.lax.while_loop(unfinished, one, state)[2:]


def look_up_sharded(mesh: AbstractMesh, axes: tuple[str, ...], rows_RD: jax.Array, address_BLH: jax.Array) -> jax.Array:
    """Returns what `table.look_up` does, for rows split over mesh axes: [B, L, X] split as the tokens are."""
    shards = math.prod(mesh.shape[axis] for axis in axes)
    tokens = split_tokens(address_BLH.shape[0], address_BLH.shape[1], mesh).spec(None)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(axes, None), tokens),
        out_specs=tokens,
        check_vma=False,
    )
    def collect(rows_RD: jax.Array, address_BLH: jax.Array) -> jax.Array:
        found_AD = _collect(rows_RD, address_BLH.reshape(-1), axes, shards)
        found_AD = unpack(found_AD) if found_AD.dtype == jnp.uint32 else found_AD
        return found_AD.reshape(*address_BLH.shape[:2], -1)

    return collect(rows_RD, address_BLH)


def update_sharded(
    mesh: AbstractMesh,
    axes: tuple[str, ...],
    spec: TableSpec,
    rows_RD: jax.Array,
    slots: Slots,
    address_BLH: jax.Array,
    grads_BLX: jax.Array,
    rate: jax.Array,
    step: jax.Array,
) -> tuple[jax.Array, Slots]:
    """Returns what `table.update` does, for rows split over mesh axes.

    The tokens must be split over all of them, as those of a training batch are: copies would count twice.
    """
    shards = math.prod(mesh.shape[axis] for axis in axes)
    tokens = split_tokens(address_BLH.shape[0], address_BLH.shape[1], mesh).spec(None)
    by_rows = jax.tree.map(lambda slot: P(axes, *[None] * (slot.ndim - 1)), slots)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(axes, None), by_rows, tokens, tokens, P(), P()),
        out_specs=(P(axes, None), by_rows),
        check_vma=False,
    )
    def apply(
        rows_RD: jax.Array,
        slots: Slots,
        address_BLH: jax.Array,
        grads_BLX: jax.Array,
        rate: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, Slots]:
        grads_AD = grads_BLX.astype(jnp.float32).reshape(-1, spec.width)
        rate = rate * spec.optimizer.learning_rate
        return _apply(
            rows_RD,
            slots,
            address_BLH.reshape(-1),
            grads_AD,
            rate,
            step,
            optimizer=spec.optimizer,
            axes=axes,
            shards=shards,
        )

    return apply(rows_RD, slots, address_BLH, grads_BLX, rate, step)
