"""What is read from a compiled program, on modules written by hand, and what a topology's name means."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from sparse_lm.parallel.program import collectives, kernels, placed_collectives, sent
from sparse_lm.parallel.topology import topology

MESH = {"data": 2, "fsdp": 4, "expert": 1, "tensor": 2, "context": 1}

MODULE = """HloModule jit_step, entry_computation_layout={()->f32[]}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %shard = bf16[8,16]{1,0} parameter(0)
  %gathered = bf16[8,64]{1,0} all-gather(%shard), channel_id=1, replica_groups=mesh['data'=2,'fsdp'=4,'expert'=1,'tensor'=2,'context'=1] {'fsdp'}, dimensions={1}, metadata={op_name="jit(step)/while/body/gather"}
  %scattered = bf16[8,16]{1,0} reduce-scatter(%gathered), replica_groups=[4,4]<=[2,4,2]T(0,2,1), dimensions={1}, to_apply=%add
}

%condition (state: (s32[], bf16[8,64])) -> pred[] {
  %bound = s32[]{:T(128)} constant(56)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%all-reduce-scatter.1 (p: f32[64]) -> f32[32] {
  %p = f32[64]{0} parameter(0)
  %summed = f32[64]{0} all-reduce(%p), replica_groups={{0,1},{2,3},{4,5},{6,7},{8,9},{10,11},{12,13},{14,15}}, to_apply=%add
}

ENTRY %main (x: f32[64]) -> f32[] {
  %x = f32[64]{0} parameter(0)
  %y = f32[16]{0} parameter(1)
  %loop = (s32[], bf16[8,64]) while(%tuple), condition=%condition, body=%body
  %fused = f32[32]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %started = (f32[64]{0}, f32[64]{0}) all-reduce-start(%x), replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_0'}, to_apply=%add
  %done = f32[64]{0} all-reduce-done(%started)
  %moved = f32[64]{0} ragged-all-to-all(%x, %y, %a, %b, %c, %d), replica_groups=[2,8]<=[16]
  %kernel = f32[64]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"text":"two
}}, metadata={op_name="kernel"}
  %last = f32[64]{0} all-to-all(%x), replica_groups={{0,8}}
}
"""


def test_collectives_of_a_module_by_hand() -> None:
    found = {(c.kind, c.axes, c.group, c.times): c for c in collectives(MODULE, MESH)}
    assert set(found) == {
        ("all-gather", ("fsdp",), 4, 56),
        # [2,4,2] transposed to (data, tensor, fsdp), rows of 4: fsdp varies
        ("reduce-scatter", ("fsdp",), 4, 56),
        # an all-reduce that keeps a slice; devices 0 and 1 differ in tensor, the last axis of size above 1
        ("reduce-scatter", ("tensor",), 2, 1),
        # the first of 2 x 8: devices 0 and 8, which is data
        ("all-reduce", ("data",), 2, 1),
        ("ragged-all-to-all", ("fsdp", "tensor"), 8, 1),
        # behind a kernel whose description is broken over lines
        ("all-to-all", ("data",), 2, 1),
    }
    gather = found["all-gather", ("fsdp",), 4, 56]
    # a shard of 8 x 16 x 2 bytes goes to three others, 56 times
    assert (gather.result_bytes, gather.sent_bytes, gather.total_bytes) == (1024, 768, 56 * 768)
    assert gather.source == "jit(step)/while/body/gather"
    assert found["reduce-scatter", ("fsdp",), 4, 56].sent_bytes == 1024 * 3 / 4
    assert found["all-reduce", ("data",), 2, 1].sent_bytes == 2 * 256 / 2
    # at most the smaller side, 16 numbers, of which 7 of 8 leave the device
    assert found["ragged-all-to-all", ("fsdp", "tensor"), 8, 1].sent_bytes == 64 * 7 / 8
    assert kernels(MODULE) == {"tpu_custom_call": 1}


def test_bytes_that_a_device_sends() -> None:
    assert [sent(kind, 100.0, 4) for kind in ("all-gather", "all-reduce", "reduce-scatter", "all-to-all")] == [
        300,
        150,
        75,
        75,
    ]
    assert sent("collective-permute", 100.0, 2) == 100


def test_collectives_that_the_model_places_are_read_from_the_traced_program() -> None:
    mesh = AbstractMesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def layer(x, w):
        whole = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
        fast = lambda x: jax.lax.psum(x, "data")  # noqa: E731
        return jax.lax.platform_dependent(x @ whole, cuda=fast, default=lambda x: x), None

    def device(x, w):
        return jax.lax.scan(layer, x, w)[0]

    program = jax.shard_map(
        device, mesh=mesh, in_specs=(P("data"), P(None, "fsdp")), out_specs=P("data"), check_vma=False
    )
    jaxpr = jax.make_jaxpr(program)(jnp.zeros((4, 8)), jnp.zeros((3, 8, 8)))
    sizes = {"data": 2, "fsdp": 4}
    found = {c.kind: c for c in placed_collectives(jaxpr.jaxpr, sizes, "cuda")}
    assert {kind: (c.axes, c.times) for kind, c in found.items()} == {
        "all-gather": (("fsdp",), 3),
        "all-reduce": (("data",), 3),
    }
    assert found["all-gather"].sent_bytes == 2 * 8 * 4 * 3  # a shard [2, 8] to three others
    assert [c.kind for c in placed_collectives(jaxpr.jaxpr, sizes, "tpu")] == ["all-gather"]


def test_topologies_by_name() -> None:
    assert topology("v5p:8x8x8").devices == 512
    assert topology("v6e:4x8").devices == 32
    assert topology("h100:64").devices == 64


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5q:4x4x4", "unknown chip 'v5q'.*Did you mean"),
        ("v5p", "CHIP:SHAPE, such as v5p:4x4x4"),
        ("v5p:4x4", "3 dimensions"),
        ("v5e:4x4x4", "2 dimensions"),
        ("h100:0", "CHIP:SHAPE, such as h100:64"),
    ],
)
def test_a_topology_that_cannot_be_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topology(name)
