"""The backends of the grouped products, most wanted first, and the door to them."""

from __future__ import annotations

import functools

import jax

from pallas_kernels.backend import Backend, dispatch
from pallas_kernels.grouped_matmul import mosaic_gpu, mosaic_tpu, reference, triton, xla

_OPERANDS = {
    "product": ("x", "w", None, "row_index", "output_index"),
    "weight_gradient": ("x", "dy", None, "row_index", "output_index"),
    "summed_product": ("x", "x2", "w", "w2", None),
    "swiglu": ("x", "gate", "up", None, "row_index"),
}


def _always(shapes, dtypes, device_kind):
    """Supported everywhere."""
    del shapes, dtypes, device_kind


def _backends(operation: str, static: dict) -> tuple[Backend, ...]:
    def bound(module):
        return functools.partial(getattr(module, operation), **static)

    transpose = static.get("transpose", False)
    return (
        Backend(
            "mosaic_gpu", ("cuda",), functools.partial(mosaic_gpu.supports, operation, transpose), bound(mosaic_gpu)
        ),
        Backend("triton", ("cuda",), triton.supports, bound(triton)),
        Backend(
            "mosaic_tpu", ("tpu",), functools.partial(mosaic_tpu.supports, operation, transpose), bound(mosaic_tpu)
        ),
        Backend("xla", None, _always, bound(xla)),
        Backend("reference", None, _always, bound(reference), by_default=False),
    )


def run(operation: str, *arguments: jax.Array, backend: str | None = None, **static):
    """Run one grouped product through the backend asked for, or the best one for the platform that is lowered for."""
    named = {name: a for name, a in zip(_OPERANDS[operation], arguments) if name is not None and a is not None}
    shapes, dtypes = ({name: getattr(a, field) for name, a in named.items()} for field in ("shape", "dtype"))
    return dispatch(
        f"grouped_{operation}", _backends(operation, static), arguments, shapes=shapes, dtypes=dtypes, backend=backend
    )
