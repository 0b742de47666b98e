"""The three grouped products as batchable functions: a batch of calls is one call with more groups, so no backend knows about `vmap`.

Legend: P members of the batch, R rows of a stored operand, A rows of the sorted space, O output rows, G groups, W stored weights, K inner dim, N outer dim.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from pallas_kernels.grouped_matmul.backends import run
from pallas_kernels.grouped_matmul.groups import RowGroups


@functools.cache
def batched(operation: str, **static):
    """The operation ("product", "summed_product", "weight_gradient" or "swiglu") with its static options bound and a batching rule.

    Signatures, all arrays: product(x_RK, w_WKN, groups, row_index_A, output_index_A); weight_gradient(x_RK, dy_ON, groups, row_index_A, output_index_A);
    summed_product(x_AK, x2_AK, w_WKN, w2_WKN, groups); swiglu(x_RK, gate_WKN, up_WKN, groups, row_index_A). Indices may be None. The last options of `static` go to the backends.
    """
    function = custom_vmap(functools.partial(run, operation, **static))
    rules = {"product": _product_rule, "summed_product": _summed_product_rule}
    rules |= {"weight_gradient": _weight_gradient_rule, "swiglu": _swiglu_rule}
    function.def_vmap(functools.partial(rules[operation], static))
    return function


def _fold(count, array, is_batched):
    """[P, R, ...] -> [P * R, ...]; an operand without batch is repeated."""
    if not is_batched:
        array = jnp.broadcast_to(array, (count, *array.shape))
    return array.reshape(count * array.shape[1], *array.shape[2:])


def _fold_rows(count, x, is_batched, index_A, index_is_batched):
    """Rows and their index: without an index rows are repeated where needed; with one, a shared operand stays single."""
    if index_A is None:
        return _fold(count, x, is_batched), None
    index_PA = index_A if index_is_batched else jnp.broadcast_to(index_A, (count, *index_A.shape))
    if not is_batched:
        return x, index_PA.reshape(-1)
    return _fold(count, x, True), (index_PA + _steps(count, x.shape[1])).reshape(-1)


def _steps(count, step):
    return (jnp.arange(count, dtype=jnp.int32) * step)[:, None]


def _fold_groups(count, groups, groups_batched, rows, weights_step):
    """Groups of all members, one after another, in a sorted space of P * A rows."""
    start, size, weight = (a if b else jnp.broadcast_to(a, (count, *a.shape)) for a, b in zip(groups, groups_batched))
    return RowGroups(
        (start + _steps(count, rows)).reshape(-1), size.reshape(-1), (weight + _steps(count, weights_step)).reshape(-1)
    )


def _member_rows(x, is_batched, index_A, index_is_batched):
    chosen, chosen_is_batched = (x, is_batched) if index_A is None else (index_A, index_is_batched)
    return chosen.shape[1 if chosen_is_batched else 0]


def _fold_weight(count, w, is_batched):
    """A shared weight stays single: its members differ by a step of 0."""
    return (_fold(count, w, True), w.shape[1]) if is_batched else (w, 0)


def _product_rule(static, count, in_batched, x, w, groups, row_index, output_index):
    x_b, w_b, groups_b, row_b, out_b = in_batched
    rows, output_rows = _member_rows(x, x_b, row_index, row_b), static["output_rows"]
    x, row_index = _fold_rows(count, x, x_b, row_index, row_b)
    w, step = _fold_weight(count, w, w_b)
    groups = _fold_groups(count, groups, groups_b, rows, step)
    if output_index is not None:
        output_index = output_index if out_b else jnp.broadcast_to(output_index, (count, *output_index.shape))
        output_index = (output_index + _steps(count, output_rows)).reshape(-1)
    y = batched("product", **{**static, "output_rows": count * output_rows})(x, w, groups, row_index, output_index)
    return y.reshape(count, output_rows, *y.shape[1:]), True


def _weight_gradient_rule(static, count, in_batched, x, dy, groups, row_index, output_index):
    x_b, dy_b, groups_b, row_b, out_b = in_batched
    rows = _member_rows(x, x_b, row_index, row_b)
    x, row_index = _fold_rows(count, x, x_b, row_index, row_b)
    dy, output_index = _fold_rows(count, dy, dy_b, output_index, out_b)
    dw = batched("weight_gradient", **static)(
        x, dy, _fold_groups(count, groups, groups_b, rows, 0), row_index, output_index
    )
    return dw.reshape(count, -1, *dw.shape[1:]), True


def _fold_weights(count, weights, are_batched):
    """Several weights of the same groups: all stay single, or all are stored once per member."""
    together = any(are_batched)
    folded = [
        _fold_weight(count, w if b == together else jnp.broadcast_to(w, (count, *w.shape)), together)
        for w, b in zip(weights, are_batched, strict=True)
    ]
    return [w for w, _ in folded], folded[0][1]


def _summed_product_rule(static, count, in_batched, x, x2, w, w2, groups):
    x_b, x2_b, w_b, w2_b, groups_b = in_batched
    rows = x.shape[1 if x_b else 0]
    weights, step = _fold_weights(count, (w, w2), (w_b, w2_b))
    operands = _fold(count, x, x_b), _fold(count, x2, x2_b), *weights
    y = batched("summed_product", **static)(*operands, _fold_groups(count, groups, groups_b, rows, step))
    return y.reshape(count, rows, -1), True


def _swiglu_rule(static, count, in_batched, x, gate, up, groups, row_index):
    x_b, gate_b, up_b, groups_b, row_b = in_batched
    rows = _member_rows(x, x_b, row_index, row_b)
    x, row_index = _fold_rows(count, x, x_b, row_index, row_b)
    (gate, up), step = _fold_weights(count, (gate, up), (gate_b, up_b))
    outs = batched("swiglu", **static)(x, gate, up, _fold_groups(count, groups, groups_b, rows, step), row_index)
    return tuple(o.reshape(count, rows, -1) for o in outs), tuple(True for _ in outs)
