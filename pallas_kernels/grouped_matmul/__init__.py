"""Grouped matmul (dropless mixture of experts): `grouped_matmul`, `grouped_swiglu`, `grouped_feed_forward`."""

from pallas_kernels.grouped_matmul.api import RowGroups, grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul.feed_forward import grouped_feed_forward

__all__ = ["RowGroups", "grouped_feed_forward", "grouped_matmul", "grouped_swiglu"]
