"""Kernels whose time falls with density, for JAX on GPU, TPU and CPU.

Each operation is one package (``api``, ``reference``, ``xla`` and one module per kernel language). Importing this
package needs nothing but jax: a kernel language is imported when one of its kernels is first traced.
"""

from pallas_kernels.backend import (
    BACKEND_NAMES,
    assume_device_kind,
    backend_report,
    require_kernels,
)

__all__ = ["BACKEND_NAMES", "assume_device_kind", "backend_report", "require_kernels"]
