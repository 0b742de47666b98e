"""Executing a plan on a mesh: every device routes its own tokens, and rows travel to the shard of `expert` that owns their expert.

One shard_map over all axes. Tokens are split over data, fsdp, expert and context, experts over `expert`, their hidden units over
`tensor`; weights split over fsdp are gathered inside, for one layer at a time. Rows are sorted by expert, sent (`exchange.py`), sorted
again by the experts of the receiving shard, multiplied, and go the same way back; each token then sums its rows. Weights of the
combination travel with the rows and scale the hidden units, so that the backward pass needs no row that came back.

How large the receiving buffer is: with A assignments of one device, at even load each device receives A rows; `receive_factor` f
makes it ceil(f * A) rows, and what does not fit is dropped and counted; f = 0 makes it P * A for P shards: nothing is ever dropped,
and everything may go to one shard.

Legend: B batch, L length, T tokens of a device, D model, G groups, S tokens of a group, R most assignments of a token, A
assignments of a device, P shards of `expert`, M experts of a shard, Q rows of the receiving buffer, E experts.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from sparse_lm.layers.parameter import map_leaves
from sparse_lm.parallel.collectives import gathering_again, sum_of_copies
from sparse_lm.parallel.rules import spec_of, split_tokens
from sparse_lm.routing.dispatch import Order, dispatch_local, gather_rows, return_rows, sort_by_expert
from sparse_lm.routing.exchange import ROWS, exchange, plan_exchange, starts
from sparse_lm.routing.plan import RoutingPlan


@dataclasses.dataclass(frozen=True)
class Experts:
    """The experts as functions of their weights. Both work on any part of the experts' hidden units, up to a sum over the parts.

    Attributes:
      on_rows: (weights, rows sorted by expert [A, D], group sizes int32, weight of each row float32 [A] or None) -> rows [A, D]; works
        on any contiguous part of the experts.
      weights: nested dict of arrays in the compute dtype.
      dims: the same nested dict of logical dims.
      hidden: units of an expert's hidden side, which `tensor` splits where it divides them.
      on_tokens: (weights, tokens [T, D], order) -> [T, D] in one operation; None where the experts do not offer it.
    """

    on_rows: Callable[[Any, jax.Array, jax.Array, jax.Array | None], jax.Array]
    weights: Any
    dims: Any
    hidden: int
    on_tokens: Callable[[Any, jax.Array, Order], jax.Array] | None = None


def piece_of(plan: RoutingPlan, sequences: int, pieces: int, index: jax.Array) -> RoutingPlan:
    """Returns the plan of one of `pieces` equal pieces of every sequence.

    Args:
      plan: a plan of whole sequences.
      sequences: sequences in a routing group.
      pieces: pieces of a sequence.
      index: which piece.
    """
    groups, tokens, most = plan.slot_GSR.shape
    total = plan.token_GA.shape[1]
    slots = plan.slot_GSR.reshape(groups, sequences, pieces, -1, most)
    slot_GA = jnp.take(slots, index, axis=2).reshape(groups, -1)
    here = slot_GA.shape[1]
    absent_GA = slot_GA == total
    # No piece has more live assignments than the group: where tokens may have very many, the absent ones go last and are cut.
    order_GA = jnp.argsort(absent_GA, axis=1, stable=True)[:, :total] if here > total else None
    nth_GA = jnp.broadcast_to(jnp.arange(here, dtype=jnp.int32), slot_GA.shape)
    if order_GA is not None:
        nth_GA, slot_GA = (jnp.take_along_axis(a, order_GA, axis=1) for a in (nth_GA, slot_GA))
    size = slot_GA.shape[1]
    dead_GA = slot_GA == total
    read_GA = jnp.minimum(slot_GA, total - 1)
    inverse = jnp.full((groups, here), size, jnp.int32)
    row_G1 = jnp.arange(groups)[:, None]
    inverse = inverse.at[row_G1, nth_GA].set(jnp.arange(size, dtype=jnp.int32)[None], unique_indices=True)
    return RoutingPlan(
        token_GA=nth_GA // most,
        expert_GA=jnp.where(dead_GA, plan.experts, jnp.take_along_axis(plan.expert_GA, read_GA, axis=1)),
        weight_GA=jnp.where(dead_GA, 0.0, jnp.take_along_axis(plan.weight_GA, read_GA, axis=1)),
        slot_GSR=jnp.where(absent_GA, size, inverse).reshape(groups, -1, most),
        dropped=plan.dropped,
        experts=plan.experts,
    )


def dispatch_on_mesh(
    mesh: AbstractMesh, x_BLD: jax.Array, plan: RoutingPlan, experts: Experts, receive_factor: float
) -> tuple[jax.Array, jax.Array]:
    """Executes a plan on a mesh.

    Args:
      mesh: the mesh.
      x_BLD: tokens.
      plan: the plan of all tokens, group by group; a group is B / G whole sequences.
      experts: the experts.
      receive_factor: size of the receiving buffer, see above.

    Returns:
      ([B, L, D]: the weighted sum of each token's expert outputs, float32 count of assignments that found the buffer full).
    """
    batch, length, d_model = x_BLD.shape
    groups = plan.slot_GSR.shape[0]
    tokens = split_tokens(groups, length, mesh)
    pieces = mesh.shape[tokens.context] if tokens.context else 1
    specs = map_leaves(lambda _, dims, leaf: spec_of(dims, leaf.shape, mesh), experts.dims, experts.weights)
    leaf_specs = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, P))
    device_kind = mesh.abstract_device
    platform = device_kind.platform if device_kind is not None else None
    shards = mesh.shape["expert"] if any("expert" in spec for spec in leaf_specs) else 1
    partial = spec_of(("ffn",), (experts.hidden,), mesh)[0] is not None

    def gathering(apply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """`apply` on weights that are gathered over fsdp first, in the backward pass once more."""

        def whole(_: str, leaf: jax.Array, spec: P) -> jax.Array:
            dim = _dim_over("fsdp", spec)
            if dim is None:
                return leaf
            return jax.lax.all_gather(leaf, "fsdp", axis=dim, tiled=True)

        def compute(weights: Any, *operands: Any) -> jax.Array:
            return apply(map_leaves(whole, weights, specs), *operands)

        if all(_dim_over("fsdp", spec) is None for spec in leaf_specs):
            return compute
        return gathering_again(compute)

    on_rows = gathering(experts.on_rows)
    on_tokens = None if experts.on_tokens is None else gathering(experts.on_tokens)

    def device(x_BLD: jax.Array, plan: RoutingPlan, weights: Any) -> tuple[jax.Array, jax.Array]:
        if pieces > 1:
            plan = piece_of(plan, batch // groups, pieces, jax.lax.axis_index("context"))
        x_TD = x_BLD.reshape(-1, d_model)
        lost = jnp.zeros((), jnp.float32)
        if shards == 1:
            fused = None if on_tokens is None else functools.partial(on_tokens, weights)
            y_TD = dispatch_local(x_TD, plan, lambda rows, sizes: on_rows(weights, rows, sizes, None), fused)
        else:
            experts_of_shard = functools.partial(on_rows, weights)
            y_TD, lost = _dispatch_to_shards(x_TD, plan, experts_of_shard, shards, receive_factor, platform)
        if partial:
            y_TD = sum_of_copies(y_TD, "tensor")
        return y_TD.reshape(x_BLD.shape), lost[None]

    x_spec, groups_spec = tokens.spec(None), P(tokens.rows)
    plan_spec = dataclasses.replace(
        plan, token_GA=groups_spec, expert_GA=groups_spec, weight_GA=groups_spec, slot_GSR=groups_spec, dropped=P()
    )
    run = jax.shard_map(
        device, mesh=mesh, in_specs=(x_spec, plan_spec, specs), out_specs=(x_spec, P(tokens.axes)), check_vma=False
    )
    y_BLD, lost = run(x_BLD, plan, experts.weights)
    return y_BLD, jax.lax.stop_gradient(jnp.sum(lost))


def _dim_over(axis: str, spec: P) -> int | None:
    """Returns the dimension that a mesh axis splits, alone or as the last of several; None: it splits none."""
    return next(
        (dim for dim, axes in enumerate(spec) if axes == axis or (isinstance(axes, tuple) and axis in axes)), None
    )


def buffer_rows(assignments: int, shards: int, receive_factor: float) -> int:
    """Returns the rows Q of the receiving buffer of a device with so many assignments."""
    worst = shards * assignments
    return worst if receive_factor == 0 else min(worst, math.ceil(receive_factor * assignments))


def _dispatch_to_shards(
    x_TD: jax.Array,
    plan: RoutingPlan,
    compute: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    shards: int,
    receive_factor: float,
    platform: str | None,
) -> tuple[jax.Array, jax.Array]:
    """Executes a device's plan by the experts of all shards; returns ([T, D], assignments that found a buffer full)."""
    order = sort_by_expert(plan)
    total = order.token_A.shape[0]
    buffer = buffer_rows(total, shards, receive_factor)
    route, sizes_PM = plan_exchange(order.sizes_E, shards, buffer, "expert")
    lost = jnp.sum(order.sizes_E) - jnp.sum(route.send_size)

    # From the order of the sending shards to that of this shard's experts and back, by shifting whole ranges.
    sizes_MP = sizes_PM.T
    first_PM = starts(sizes_PM.reshape(-1)).reshape(sizes_PM.shape)
    first_MP = starts(sizes_MP.reshape(-1)).reshape(sizes_MP.shape)
    by_expert_Q = _shifted((first_MP.T - first_PM).reshape(-1), sizes_PM.reshape(-1), buffer)
    by_shard_Q = _shifted((first_PM.T - first_MP).reshape(-1), sizes_MP.reshape(-1), buffer)

    def send(rows: jax.Array) -> jax.Array:
        came = checkpoint_name(exchange(rows, route, buffer, "expert", platform), ROWS)
        return gather_rows(came, by_shard_Q, by_expert_Q[:, None])

    rows_QD = send(gather_rows(x_TD, order.token_A, order.row_TR))
    # Packed [A, 1]: the exchange carries rows.
    weight_Q = send(order.weight_A[:, None])[:, 0]
    y_QD = compute(rows_QD, jnp.sum(sizes_PM, axis=0), weight_Q)
    y_QD = gather_rows(y_QD, by_expert_Q, by_shard_Q[:, None])
    y_AD = exchange(y_QD, route.back(), total, "expert", platform)
    return return_rows(y_AD, order.row_TR, order.token_A), lost.astype(jnp.float32)


def _shifted(shift: jax.Array, sizes: jax.Array, rows: int) -> jax.Array:
    """Returns where each row goes when range i of `sizes[i]` rows moves by shift[i]; rows past the ranges stay."""
    index = jnp.arange(rows, dtype=jnp.int32)
    moved = index + jnp.repeat(shift, sizes, total_repeat_length=rows).astype(jnp.int32)
    return jnp.where(index < jnp.sum(sizes), moved, index)
