"""What a device can do at most, by its data sheet."""

import jax

PEAKS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}


def peak() -> tuple[float, float] | None:
    """bfloat16 FLOP/s and bytes/s of the present device; None where they are not listed."""
    kind = jax.devices()[0].device_kind
    return next((rates for name, rates in PEAKS.items() if name in kind), None)
