"""Wide models whose matrices are stored as blocks, beside their dense twin: what sparsity gives in time and memory.

D 4096, F 16384, 3 blocks, V 32768, L 2048: 1.07 B parameters if all blocks existed, of which 0.81 B stand in the matrices that are sparse
(query, key, value, out, gate, up, down); embedding and head stay dense. Document masks on, no rematerialisation, blocks of 128, equally
many in every block column. Commands:

    python scripts/pretrain.py wide_sparse_25
    python scripts/benchmark.py train wide_sparse_10

Widening (`wide_sparse_x2` ... `wide_sparse_x16`) multiplies F at a constant number of existing weights, that of F 16384 at density 0.25:
blocks of 64, so that at sixteen times the width every column still has one.
Numbers: docs/benchmarks/wide_sparse.md.
"""

import dataclasses

from experiments.dense import dense_1b
from sparse_lm.data.packaged import Packaged
from sparse_lm.data.tokenizer import BPE
from sparse_lm.layers.feed_forward import DenseFeedForward
from sparse_lm.layers.projection import DenseProjection, Projection
from sparse_lm.recipe import Recipe
from sparse_lm.weight_sparsity.packed import Packed
from sparse_lm.weight_sparsity.projection import BlockSparseLowRankProjection, BlockSparseProjection
from sparse_lm.weight_sparsity.topology_update import RigLBlocks

HIDDEN = 16384


def _wide(name: str, projection: Projection, hidden: int = HIDDEN, batch: int = 16) -> Recipe:
    base = dense_1b()
    attention = dataclasses.replace(base.model.attention, heads=32, head_dim=128, projection=projection)
    forward = DenseFeedForward(hidden=hidden, projection=projection)
    model = dataclasses.replace(base.model, d_model=4096, layers=3, attention=attention, pattern=(forward,))
    data = dataclasses.replace(base.data, batch_size=batch)
    recipe = dataclasses.replace(base, name=name, data=data, model=model)
    if not projection.packed:
        return recipe
    return dataclasses.replace(recipe, weight_sparsity=Packed(algorithm=RigLBlocks()))


def wide_dense() -> Recipe:
    """The dense twin.

    Command: python scripts/pretrain.py wide_dense
    """
    return _wide("wide_dense", DenseProjection())


def wide_sparse_25() -> Recipe:
    """A quarter of the blocks, moved every 100 steps by the norms of their gradients (RigL).

    Command: python scripts/pretrain.py wide_sparse_25
    """
    return _wide("wide_sparse_25", BlockSparseProjection(density=0.25))


def wide_sparse_10() -> Recipe:
    """A tenth of the blocks (3 of 32 a column, and 12 or 13 of 128).

    Command: python scripts/pretrain.py wide_sparse_10
    """
    return _wide("wide_sparse_10", BlockSparseProjection(density=0.10))


def wide_sparse_10_low_rank() -> Recipe:
    """A tenth of the blocks and a companion of rank 64 for every matrix.

    Command: python scripts/pretrain.py wide_sparse_10_low_rank
    """
    return _wide("wide_sparse_10_low_rank", BlockSparseLowRankProjection(density=0.10, rank=64))


def _wider(times: int) -> Recipe:
    projection = BlockSparseProjection(density=0.25, block=64)
    recipe = _wide(f"wide_sparse_x{times}", projection, HIDDEN * times, batch=2)
    narrow = dataclasses.replace(projection, density=0.25 / times)
    forward = DenseFeedForward(hidden=HIDDEN * times, projection=narrow)
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, pattern=(forward,)))


def wide_sparse_x1() -> Recipe:
    """Where widening starts: density 0.25 in blocks of 64.

    Command: python scripts/pretrain.py wide_sparse_x1
    """
    return _wider(1)


def wide_sparse_x2() -> Recipe:
    """F 32768 at density 0.125.

    Command: python scripts/pretrain.py wide_sparse_x2
    """
    return _wider(2)


def wide_sparse_x4() -> Recipe:
    """F 65536 at density 0.0625.

    Command: python scripts/pretrain.py wide_sparse_x4
    """
    return _wider(4)


def wide_sparse_x8() -> Recipe:
    """F 131072 at density 0.03125.

    Command: python scripts/pretrain.py wide_sparse_x8
    """
    return _wider(8)


def wide_sparse_x16() -> Recipe:
    """F 262144 at density 0.015625: 10 B parameters if all blocks existed.

    Command: python scripts/pretrain.py wide_sparse_x16
    """
    return _wider(16)


def _on_cpu(recipe: Recipe) -> Recipe:
    """Returns the recipe at a width for a CPU: D 1024, F 4096, two blocks, V 4096, 8 x 256 tokens, float32, blocks of 64."""
    model = recipe.model
    forward = model.pattern[0]
    assert isinstance(forward, DenseFeedForward)
    projection = forward.projection
    if isinstance(projection, BlockSparseProjection):
        # Columns of 16 blocks would have 2 of them where fan-in is constant: density 0.125.
        projection = dataclasses.replace(projection, block=64, fan_in="free")
    small = dataclasses.replace(
        model,
        d_model=1024,
        layers=2,
        vocab_size=4096,
        attention=dataclasses.replace(model.attention, heads=8, projection=projection),
        pattern=(dataclasses.replace(forward, hidden=4096, projection=projection),),
        compute_dtype="float32",
    )
    data = dataclasses.replace(
        recipe.data, sources=(Packaged(),), tokenizer=BPE(vocab_size=4096), sequence_length=256, batch_size=8
    )
    return dataclasses.replace(recipe, name=f"{recipe.name}_cpu", data=data, model=small)


def wide_dense_cpu() -> Recipe:
    """The dense twin of wide_sparse_10_cpu.

    Command: python scripts/pretrain.py wide_dense_cpu
    """
    return _on_cpu(wide_dense())


def wide_sparse_10_cpu() -> Recipe:
    """A tenth of the blocks of 64 at D 1024, anywhere in a matrix.

    Command: XLA_FLAGS=--xla_force_host_platform_device_count=2 python scripts/pretrain.py wide_sparse_10_cpu
    """
    return _on_cpu(wide_sparse_10())


RECIPES = (
    wide_dense,
    wide_sparse_25,
    wide_sparse_10,
    wide_sparse_10_low_rank,
    wide_sparse_x1,
    wide_sparse_x2,
    wide_sparse_x4,
    wide_sparse_x8,
    wide_sparse_x16,
    wide_dense_cpu,
    wide_sparse_10_cpu,
)
