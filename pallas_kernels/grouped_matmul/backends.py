"""The backends of the three grouped products, most wanted first, and the door to them."""

from __future__ import annotations

import functools

import jax

from pallas_kernels.backend import Backend, dispatch
from pallas_kernels.grouped_matmul import reference, xla

_OPERANDS = {"product": ("x", "w"), "weight_gradient": ("x", "dy"), "swiglu": ("x", "gate", "up")}


def _always(shapes, dtypes, device_kind):
    """Supported everywhere."""
    del shapes, dtypes, device_kind


def _backends(operation: str, static: dict) -> tuple[Backend, ...]:
    return (
        Backend("xla", None, _always, functools.partial(getattr(xla, operation), **static)),
        Backend(
            "reference", None, _always, functools.partial(getattr(reference, operation), **static), by_default=False
        ),
    )


def run(operation: str, *arguments: jax.Array, backend: str | None = None, **static):
    """Run one grouped product through the backend asked for, or the best one for the platform that is lowered for."""
    names = _OPERANDS[operation]
    shapes = {name: array.shape for name, array in zip(names, arguments)}
    dtypes = {name: array.dtype for name, array in zip(names, arguments)}
    return dispatch(
        f"grouped_{operation}", _backends(operation, static), arguments, shapes=shapes, dtypes=dtypes, backend=backend
    )
