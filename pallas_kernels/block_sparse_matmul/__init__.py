"""Block-sparse matrix products that train: see :func:`block_sparse_matmul`."""

from pallas_kernels.block_sparse_matmul.api import block_sparse_matmul
from pallas_kernels.block_sparse_matmul.dense_form import dense_mask, from_dense, picture, to_dense
from pallas_kernels.block_sparse_matmul.topology import (
    BlockTopology,
    check_topology,
    cost,
    edit_topology,
    topology_from_indices,
    topology_from_mask,
)

__all__ = [
    "BlockTopology",
    "block_sparse_matmul",
    "check_topology",
    "cost",
    "dense_mask",
    "edit_topology",
    "from_dense",
    "picture",
    "to_dense",
    "topology_from_indices",
    "topology_from_mask",
]
