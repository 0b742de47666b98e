"""The one table from logical dims to mesh axes."""

import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from sparse_lm.parallel.mesh import AXES
from sparse_lm.parallel.rules import RULES, axes_of, batch_shards, spec_of, undivided


def mesh(**sizes: int) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


@pytest.mark.parametrize(
    ("dims", "shape", "sizes", "spec"),
    [
        (("embed", "ffn"), (16, 32), {"fsdp": 4, "tensor": 2}, P("fsdp", "tensor")),
        (("experts", "embed", "ffn"), (8, 16, 32), {"expert": 2, "tensor": 2}, P("expert", None, "tensor")),
        (("layers", "heads", "embed"), (3, 16, 16), {"fsdp": 2, "tensor": 2}, P(None, "tensor", "fsdp")),
        (("vocab", "embed"), (65, 16), {"tensor": 2, "fsdp": 2}, P(None, "fsdp")),  # 65 is odd: whole
        (("members", "embed"), (4, 16), {"fsdp": 2}, P(None, "fsdp")),
        (("embed", "routes"), (16, 8), {"expert": 8}, P(None, None)),  # the router is whole on every expert shard
        (("embed", "ffn"), (16, 32), {"data": 8}, P(None, None)),
        ((), (), {"fsdp": 8}, P()),
    ],
)
def test_each_dim_goes_to_its_axis_where_the_axis_divides_it(dims, shape, sizes, spec) -> None:
    assert spec_of(dims, shape, mesh(**sizes)) == spec


def test_an_axis_is_used_once() -> None:
    assert spec_of(("ffn", "heads"), (8, 8), mesh(tensor=2)) == P("tensor", None)


def test_dims_that_stay_whole_against_the_table_are_named() -> None:
    dims = {"embedding": ("vocab", "embed"), "norm": ("embed",)}
    shapes = {"embedding": (65, 16), "norm": (16,)}
    assert undivided(dims, shapes, mesh(tensor=2, fsdp=4)) == ["embedding: vocab = 65 is whole on tensor = 2"]


def test_a_batch_is_split_over_data_fsdp_and_expert() -> None:
    assert batch_shards(mesh(data=2, fsdp=3, expert=5, tensor=7)) == 30


def test_every_axis_of_the_table_exists() -> None:
    assert {axis for dim in RULES for axis in axes_of(dim)} <= set(AXES)
