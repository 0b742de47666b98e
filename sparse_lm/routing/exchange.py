"""Sending rows to the shards that own their experts, and back: one operation whose transpose is itself with the routes swapped.

Runs inside shard_map. Where the backend has it (GPU, TPU) the rows travel by `ragged_all_to_all`: each shard sends exactly its rows.
Elsewhere they travel in rounds of an `all_to_all` with fixed buffers, as many as the fullest pair of shards needs; a round moves as
many rows as a shard has, and P rounds (P shards) carry everything to one shard. Both give the same bits.

Legend: P shards of the axis, M experts of a shard, D row width, N rows on the sending side, R rows of the receiving buffer.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

ROWS = "exchanged_rows"
"""Checkpoint name of rows that came from another shard: remat keeps them, so that no exchange is repeated."""
PLAN = "router_plan"
"""Checkpoint name of the integers of a plan, those of an exchange among them."""


class Route(NamedTuple):
    """Who sends how many rows where, as one shard sees it; int32 [P] each.

    Attributes:
      send_start: first of the rows for each shard on the sending side.
      send_size: their number.
      send_target: where they go in the other shard's buffer.
      receive_start: where the rows of each shard begin in this shard's buffer.
      receive_size: their number.
      receive_source: where they lay on the other shard.
    """

    send_start: jax.Array
    send_size: jax.Array
    send_target: jax.Array
    receive_start: jax.Array
    receive_size: jax.Array
    receive_source: jax.Array

    def back(self) -> "Route":
        """The way back."""
        return Route(
            self.receive_start,
            self.receive_size,
            self.receive_source,
            self.send_start,
            self.send_size,
            self.send_target,
        )


def starts(sizes: jax.Array) -> jax.Array:
    """Returns the exclusive sum of a vector of sizes."""
    return jnp.cumsum(sizes, dtype=jnp.int32) - sizes


def plan_exchange(sizes_E: jax.Array, shards: int, buffer: int, axis: str) -> tuple[Route, jax.Array]:
    """Agrees with the other shards on who sends what.

    A buffer fills in the order of the sending shards; what does not fit stays behind.

    Args:
      sizes_E: int32, this shard's rows for each expert of all shards; the rows are sorted by expert.
      shards: P, the size of the axis; shard p owns experts p * M to (p + 1) * M.
      buffer: R, rows that each shard can receive.
      axis: name of the mesh axis.

    Returns:
      (the route, int32 [P, M] of rows that this shard receives from each shard for each of its experts).
    """

    def swap(a: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(a, axis, 0, 0, tiled=True)

    wanted_PM = sizes_E.reshape(shards, -1)
    send_start_P = starts(jnp.sum(wanted_PM, axis=1))
    asked = swap(jnp.concatenate([wanted_PM, send_start_P[:, None]], axis=1))
    asked_PM, receive_source_P = asked[:, :-1], asked[:, -1]
    received_PM = jnp.clip(buffer - starts(asked_PM.reshape(-1)), 0, asked_PM.reshape(-1)).reshape(shards, -1)
    receive_size_P = jnp.sum(received_PM, axis=1)
    receive_start_P = starts(receive_size_P)
    answer = swap(jnp.stack([receive_size_P, receive_start_P], axis=1))
    route = Route(send_start_P, answer[:, 0], answer[:, 1], receive_start_P, receive_size_P, receive_source_P)
    return checkpoint_name((route, received_PM), PLAN)


def _ragged(x_ND: jax.Array, route: Route, rows: int, axis: str) -> jax.Array:
    out_RD = jnp.zeros((rows, *x_ND.shape[1:]), x_ND.dtype)
    return jax.lax.ragged_all_to_all(
        x_ND, out_RD, route.send_start, route.send_size, route.send_target, route.receive_size, axis_name=axis
    )


def _rounds(x_ND: jax.Array, route: Route, rows: int, axis: str) -> jax.Array:
    shards = route.send_size.shape[0]
    piece = -(-min(x_ND.shape[0], rows) // shards)
    needed = jax.lax.pmax(-(-jnp.max(route.send_size) // piece), axis)

    def one(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        done, out_RD = state
        nth_C = done * piece + jnp.arange(piece)
        read_PC = jnp.where(nth_C < route.send_size[:, None], route.send_start[:, None] + nth_C, x_ND.shape[0])
        sent = x_ND.at[read_PC].get(mode="fill", fill_value=0)
        came = jax.lax.all_to_all(sent, axis, 0, 0)
        write_PC = jnp.where(nth_C < route.receive_size[:, None], route.receive_start[:, None] + nth_C, rows)
        return done + 1, out_RD.at[write_PC].set(came, mode="drop")

    empty_RD = jnp.zeros((rows, *x_ND.shape[1:]), x_ND.dtype)
    return jax.lax.while_loop(lambda state: state[0] < needed, one, (jnp.int32(0), empty_RD))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def exchange(x_ND: jax.Array, route: Route, rows: int, axis: str, platform: str | None = None) -> jax.Array:
    """Sends rows along a route.

    Args:
      x_ND: rows in the order of the shards they go to.
      route: from `plan_exchange`, or its `back()`.
      rows: size of the receiving side.
      axis: name of the mesh axis.
      platform: of the mesh, where it is known while tracing. The choice between platforms is otherwise left to the lowering, in a
        conditional that XLA keeps around collectives, and nothing overlaps with them.

    Returns:
      [rows, D]: what came, in the order of the sending shards; the rest is zero.
    """
    ragged, rounds = (functools.partial(way, rows=rows, axis=axis) for way in (_ragged, _rounds))
    if platform is not None:
        return (ragged if platform in ("cuda", "gpu", "tpu") else rounds)(x_ND, route)
    return jax.lax.platform_dependent(x_ND, route, cuda=ragged, tpu=ragged, default=rounds)


def _exchange_forward(x_ND, route, rows, axis, platform):
    return exchange(x_ND, route, rows, axis, platform), (route, x_ND.shape[0])


def _exchange_backward(rows, axis, platform, residuals, dy_RD):
    route, sent = residuals
    return exchange(dy_RD, route.back(), sent, axis, platform), None


exchange.defvjp(_exchange_forward, _exchange_backward)
