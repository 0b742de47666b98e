"""Calling Triton kernels from JAX through jax-triton: whether that works here, and how exact float32 products are asked for."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.backend import device_kind

# Devices whose programs may use 160 KiB of shared memory; the others get tiles that fit 99 KiB (compute capability 8.6).
LARGE_SHARED_MEMORY = ("A100", "A800", "H100", "H200", "H800", "H20", "GH200", "B200", "GB200", "B300")
NEEDS_TRITON_3_7 = (0, 4)  # jax-triton from this version on
# Exact float32 without tensor cores; three tf32 products (about 1e-6); one tf32 product (about 1e-3).
FLOAT32_PRODUCTS = {lax.Precision.HIGHEST: "ieee", lax.Precision.HIGH: "tf32x3", lax.Precision.DEFAULT: "tf32"}


@functools.cache
def unavailable() -> str | None:
    """None if Triton kernels can be called from JAX in this process, else the reason."""
    try:
        import jax_triton
        import triton
    except (ImportError, AttributeError) as error:
        return f"needs jax-triton and triton ({error})"
    caller, compiler = _version(jax_triton), _version(triton)
    if caller >= NEEDS_TRITON_3_7 and compiler < (3, 7):
        return f"jax-triton {jax_triton.__version__} needs triton 3.7, found {triton.__version__}"
    return None


def _version(module) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", module.__version__)[:2])


def large_tiles() -> bool:
    """True if the CUDA device has the shared memory for three stages of 128 x 256 tiles."""
    kind = device_kind("cuda") or ""
    return any(name in kind for name in LARGE_SHARED_MEMORY)


@functools.cache
def converts_float8() -> bool:
    """True if the attached CUDA device has an instruction that reads float8: from compute capability 8.9 on."""
    try:
        capability = jax.devices("cuda")[0].compute_capability
    except (RuntimeError, AttributeError):
        return False
    return tuple(int(part) for part in capability.split(".")) >= (8, 9)


def dot_precision(dtype, precision: lax.Precision | None) -> str:
    """The `input_precision` of Triton's dot for operands of `dtype`; 16-bit operands have one only."""
    if jnp.dtype(dtype) != jnp.float32:
        return "ieee"
    return FLOAT32_PRODUCTS[lax.Precision.HIGHEST if precision is None else precision]


def call(kernel, *arguments, out_shape, grid, num_warps: int, num_stages: int, zeroed_outputs=(), **static):
    """Launches `kernel` with arrays as arguments and `static` as compile-time ones; returns its outputs.

    Outputs follow the inputs in the kernel's signature, as pointers.
    """
    import jax_triton

    return jax_triton.triton_call(
        *arguments,
        kernel=kernel,
        out_shape=out_shape,
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages,
        zeroed_outputs=zeroed_outputs,
        **static,
    )
