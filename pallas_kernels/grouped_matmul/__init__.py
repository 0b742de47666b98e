"""Grouped matmul (dropless mixture of experts): `grouped_matmul`, `grouped_swiglu`."""

from pallas_kernels.grouped_matmul.api import RowGroups, grouped_matmul, grouped_swiglu

__all__ = ["RowGroups", "grouped_matmul", "grouped_swiglu"]
