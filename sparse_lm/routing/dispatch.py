"""Executing a plan where one device owns every expert: sort, gather, compute, gather-sum. No scatter with duplicate indices.

Experts that offer gather, products and gather-sum as one operation are asked for that; it stores the tokens and the products of their
width, never sorted copies of tokens or outputs. Otherwise the steps follow each other here: the backward of the gather is the same
gather-sum as the combine, and the backward of the combine is a gather. Either way a training step is deterministic on every backend.

Legend: T tokens, D model, A assignments in all, R most assignments of one token, E experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_lm.routing.plan import RoutingPlan


@jax.custom_vjp
def gather_rows(x_TD: jax.Array, token_A: jax.Array, row_TR: jax.Array) -> jax.Array:
    """Returns x_TD[token_A]; row_TR, the rows of each token (A where it has none), serves the backward pass."""
    return x_TD[token_A]


def _gather_rows_forward(x_TD, token_A, row_TR):
    return x_TD[token_A], row_TR


def _gather_rows_backward(row_TR, dy_AD):
    return sum_rows(dy_AD, row_TR).astype(dy_AD.dtype), None, None


gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


def sum_rows(y_AD: jax.Array, row_TR: jax.Array, weight_TR: jax.Array | None = None) -> jax.Array:
    """Returns the (weighted) float32 sum of each token's rows; a row index of A counts as zero."""
    total = None
    for r in range(row_TR.shape[1]):
        rows_TD = y_AD.at[row_TR[:, r]].get(mode="fill", fill_value=0).astype(jnp.float32)
        if weight_TR is not None:
            rows_TD = rows_TD * weight_TR[:, r, None]
        total = rows_TD if total is None else total + rows_TD
    return total


@jax.custom_vjp
def combine(
    y_AD: jax.Array, weight_TR: jax.Array, row_TR: jax.Array, token_A: jax.Array, slot_A: jax.Array
) -> jax.Array:
    """Returns the weighted sum of each token's rows, [T, D] in y's dtype, accumulated in float32.

    Args:
      y_AD: expert outputs, sorted by expert.
      weight_TR: float32 weights.
      row_TR: row of each (token, assignment); A where there is none.
      token_A: token of each row.
      slot_A: flat index into weight_TR of each row; T * R for a dead row.
    """
    return sum_rows(y_AD, row_TR, weight_TR).astype(y_AD.dtype)


def _combine_forward(y_AD, weight_TR, row_TR, token_A, slot_A):
    return combine(y_AD, weight_TR, row_TR, token_A, slot_A), (y_AD, weight_TR, row_TR, token_A, slot_A)


def _combine_backward(residuals, dout_TD):
    y_AD, weight_TR, row_TR, token_A, slot_A = residuals
    weight_A = weight_TR.reshape(-1).at[slot_A].get(mode="fill", fill_value=0)
    dy_AD = (dout_TD[token_A].astype(jnp.float32) * weight_A[:, None]).astype(y_AD.dtype)
    dout32_TD = dout_TD.astype(jnp.float32)
    columns = []
    for r in range(row_TR.shape[1]):
        rows_TD = y_AD.at[row_TR[:, r]].get(mode="fill", fill_value=0).astype(jnp.float32)
        columns.append(jnp.sum(rows_TD * dout32_TD, axis=-1))
    return dy_AD, jnp.stack(columns, axis=-1), None, None, None


combine.defvjp(_combine_forward, _combine_backward)


@jax.custom_vjp
def return_rows(y_AD: jax.Array, row_TR: jax.Array, token_A: jax.Array) -> jax.Array:
    """Returns the sum of each token's rows, [T, D] in y's dtype, accumulated in float32: the transpose of `gather_rows`."""
    return sum_rows(y_AD, row_TR).astype(y_AD.dtype)


def _return_rows_forward(y_AD, row_TR, token_A):
    return return_rows(y_AD, row_TR, token_A), token_A


def _return_rows_backward(token_A, dout_TD):
    return dout_TD[token_A], None, None


return_rows.defvjp(_return_rows_forward, _return_rows_backward)


class Order(NamedTuple):
    """A plan merged over its groups and sorted by expert; dead slots come last.

    Attributes:
      token_A: int32, token of each row.
      weight_A: float32, weight of each row.
      row_TR: int32, rows of each token; A where there is none.
      weight_TR: float32, their weights.
      slot_A: int32, flat index into row_TR of each row; T * R for a dead row.
      sizes_E: int32, rows of each expert.
    """

    token_A: jax.Array
    weight_A: jax.Array
    row_TR: jax.Array
    weight_TR: jax.Array
    slot_A: jax.Array
    sizes_E: jax.Array


def sort_by_expert(plan: RoutingPlan) -> Order:
    """Sorts the assignments of a plan by expert, then group, then their order in the group."""
    groups, tokens, most = plan.slot_GSR.shape
    per_group = plan.token_GA.shape[1]
    total = groups * per_group
    group_G1 = jnp.arange(groups, dtype=jnp.int32)[:, None]
    expert_A = plan.expert_GA.reshape(-1)
    order_A = jnp.argsort(expert_A, stable=True).astype(jnp.int32)
    row_of_A = jnp.zeros((total,), jnp.int32).at[order_A].set(jnp.arange(total, dtype=jnp.int32), unique_indices=True)
    weight_A = plan.weight_GA.reshape(-1)

    slot_TR = (plan.slot_GSR + group_G1[..., None] * per_group).reshape(-1, most)
    absent_TR = (plan.slot_GSR == per_group).reshape(-1, most)
    row_TR = jnp.where(absent_TR, total, row_of_A.at[slot_TR].get(mode="clip"))
    # The flat index into row_TR of each sorted row: its inverse.
    index_TR = jnp.arange(groups * tokens * most, dtype=jnp.int32).reshape(-1, most)
    slot_A = jnp.full((total,), index_TR.size, jnp.int32).at[row_TR].set(index_TR, mode="drop", unique_indices=False)
    return Order(
        token_A=(plan.token_GA + group_G1 * tokens).reshape(-1)[order_A],
        weight_A=gather_rows(weight_A[:, None], order_A, row_of_A[:, None])[:, 0],
        row_TR=row_TR,
        weight_TR=jnp.where(absent_TR, 0.0, weight_A.at[slot_TR].get(mode="clip")),
        slot_A=slot_A,
        sizes_E=jnp.zeros((plan.experts,), jnp.int32).at[expert_A].add(1, mode="drop"),
    )


Rows = Callable[[jax.Array, jax.Array], jax.Array]
"""(rows sorted by expert [A, D], group sizes int32 [E]) -> rows [A, D]; rows past the sum of sizes are zero."""
Tokens = Callable[[jax.Array, Order], jax.Array]
"""(tokens [T, D], order) -> [T, D], the weighted sum of each token's expert outputs."""


def dispatch_local(x_TD: jax.Array, plan: RoutingPlan, on_rows: Rows, on_tokens: Tokens | None = None) -> jax.Array:
    """Executes a plan on one device.

    Args:
      x_TD: tokens of all groups, in group order (T = G * S).
      plan: the routing plan.
      on_rows: the experts on sorted rows.
      on_tokens: the same experts from tokens to tokens, where they offer that as one operation.

    Returns:
      [T, D]: the weighted sum of each token's expert outputs; zero for tokens without a live assignment.
    """
    order = sort_by_expert(plan)
    if on_tokens is not None:
        return on_tokens(x_TD, order)
    y_AD = on_rows(gather_rows(x_TD, order.token_A, order.row_TR), order.sizes_E)
    return combine(y_AD, order.weight_TR, order.row_TR, order.token_A, order.slot_A)


def dispatch_reference(x_TD: jax.Array, mask_GSE: jax.Array, on_rows: Rows) -> jax.Array:
    """The oracle: every expert computes every token, weighted by the dense mask.

    Args:
      x_TD: tokens of all groups.
      mask_GSE: `plan.dense_mask`.
      on_rows: as in `dispatch_local`.
    """
    tokens, experts_count = x_TD.shape[0], mask_GSE.shape[-1]
    mask_TE = mask_GSE.reshape(tokens, experts_count)
    sizes_E = jnp.full((experts_count,), tokens, jnp.int32)
    y_ETD = on_rows(jnp.tile(x_TD, (experts_count, 1)), sizes_E).reshape(experts_count, tokens, -1)
    return jnp.einsum("te,etd->td", mask_TE, y_ETD.astype(jnp.float32)).astype(x_TD.dtype)
