"""The plan's numbers by hand, under meshes that are not there, and beside what XLA says of the compiled step."""

import dataclasses

import pytest
import tiny

from sparse_lm.accounting import account
from sparse_lm.config import ConfigError
from sparse_lm.layers.feed_forward import DenseFeedForward
from sparse_lm.model.attention import Attention
from sparse_lm.parallel.mesh import MeshShape
from sparse_lm.plan import compile_here, device_count, make_plan
from sparse_lm.recipe import Recipe
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.routing.top_k import TopKRouter
from sparse_lm.weight_sparsity.projection import BlockSparseProjection


def planned(tmp_path, devices=1, feed_forward=tiny.DENSE, mesh=None, **changes):
    recipe = tiny.recipe(tmp_path, feed_forward, **changes)
    return make_plan(dataclasses.replace(recipe, mesh=mesh or MeshShape()), devices)


def test_on_one_device_every_component_has_the_bytes_of_its_line_of_the_account(tmp_path):
    routed = MoEFeedForward(experts=4, hidden=16, shared_hidden=8, router=TopKRouter(k=2, bias_rate=0.1))
    for execution in ("unrolled", "scanned"):
        plan = planned(
            tmp_path, feed_forward=routed, model__leading=(tiny.DENSE,), model__layers=4, model__execution=execution
        )
        for row in plan.account.rows:
            line = plan.bytes.get(row.component, {"params": 0, "gradients": 0, "opt_state": 0})
            # AdamW keeps two averages of each parameter.
            assert (line["params"], line["gradients"], line["opt_state"]) == (row.bytes, row.bytes, 2 * row.bytes)
        # Three routers with a bias each for four experts.
        assert plan.bytes["router"]["model_state"] == 3 * 4 * 4
        assert plan.bytes["other"]["opt_state"] == 4  # Adam's counter
        assert plan.account.parameters * 16 + 48 + 4 == plan.state_bytes


def test_a_mesh_divides_what_its_axes_divide(tmp_path):
    """Four devices that are not here: fsdp 2 splits D, tensor 2 splits heads, hidden units and the vocabulary."""
    whole, split = planned(tmp_path), planned(tmp_path, 4, mesh=MeshShape(data=1, fsdp=2, tensor=2))
    assert split.mesh == {"data": 1, "fsdp": 2, "expert": 1, "tensor": 2, "context": 1}
    for component in ("embedding", "head", "feed_forward"):
        assert split.bytes[component]["params"] * 4 == whole.bytes[component]["params"]
        assert split.bytes[component]["opt_state"] * 4 == whole.bytes[component]["opt_state"]
    # Norms have D alone; of attention, the norms of head dim 8 stay whole: two blocks x 2 x 8 x 4 bytes.
    assert split.bytes["norms"]["params"] * 2 == whole.bytes["norms"]["params"]
    assert (split.bytes["attention"]["params"] - 128) * 4 == whole.bytes["attention"]["params"] - 128
    assert split.activation_bytes * 2 == whole.activation_bytes  # half of the sequences; tensor is not divided out
    assert split.whole == ()


def test_dims_that_an_axis_does_not_divide_are_named_and_stay_whole(tmp_path):
    odd = DenseFeedForward(hidden=33)
    plan = planned(tmp_path, 2, feed_forward=odd, mesh=MeshShape(data=1, tensor=2))
    assert plan.bytes["feed_forward"]["params"] == 2 * 3 * 16 * 33 * 4
    assert any("ffn = 33 is whole on tensor = 2" in line for line in plan.whole)


def test_activations_grow_with_the_batch_and_shrink_with_remat_and_microbatches(tmp_path):
    base = planned(tmp_path).activation_bytes
    # At least the hidden states of both blocks: 4 rows x 32 tokens x 16 wide x 4 bytes each.
    assert base > 2 * 4 * 32 * 16 * 4
    assert planned(tmp_path, data__batch_size=8).activation_bytes == 2 * base
    assert planned(tmp_path, train__microbatches=2).activation_bytes * 2 == base
    assert planned(tmp_path, model__remat="block").activation_bytes < base / 2


def test_operations_of_the_whole_run_and_of_a_population(tmp_path):
    plan = planned(tmp_path, population__seeds=(0, 1, 2))
    lines = account(plan.recipe.model, 32)
    assert (plan.members, plan.tokens_per_step, plan.tokens) == (3, 128, 1024)
    assert plan.training_flops == 3 * 8 * 128 * 3 * lines.forward_flops
    assert plan.bytes["head"]["params"] == 3 * 4 * 16 * 264


def test_devices_of_a_mesh():
    assert device_count(MeshShape(), 2) == 2
    assert device_count(MeshShape(data=2, fsdp=4), 1) == 8
    assert device_count(MeshShape(fsdp=4), 1) == 4
    assert device_count(MeshShape(fsdp=4), 8) == 8


@pytest.mark.parametrize(
    ("devices", "mesh", "field"),
    [
        (4, MeshShape(data=3), "mesh"),
        (8, MeshShape(data=8), "data.batch_size"),
        (3, MeshShape(data=1, context=3), "data.sequence_length"),
    ],
)
def test_a_mesh_that_cannot_be_names_the_field(tmp_path, devices, mesh, field):
    with pytest.raises(ConfigError, match=field):
        planned(tmp_path, devices, mesh=mesh)


def test_the_compiled_step_takes_the_state_that_was_planned(tmp_path):
    changes = {"model__attention": Attention(heads=2, head_dim=8), "data__batch_size": 8}
    recipe = tiny.recipe(tmp_path, **changes)
    plan, compiled = make_plan(recipe, 1), compile_here(recipe)
    state = plan.state_bytes - plan.account.parameters * 4
    batch = 4 * 8 * 32 * 4
    # The step number, the key and the count of skipped steps are the few bytes beside state and batch.
    assert 0 <= compiled.argument_bytes - state - batch <= 64
    assert compiled.alias_bytes >= 0.9 * state
    assert compiled.flops > 0.8 * plan.step_flops


def test_a_packed_model_is_planned_with_the_kernels_that_would_run_it():
    """Blocks of 64 in bfloat16 are what the Hopper kernels take: tracing them needs the lists of a pattern as integers."""
    blocks = BlockSparseProjection(density=0.5, block=64)
    attention = Attention(heads=2, head_dim=64, projection=blocks)
    forward = DenseFeedForward(hidden=128, activation="relu_squared", projection=blocks)
    model = tiny.model(forward, attention=attention, d_model=128, layers=1, compute_dtype="bfloat16")
    recipe = Recipe(model=model)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, sequence_length=64, batch_size=2))
    plan = make_plan(recipe, 1)
    # Two of four blocks of 64 x 64 in each of six matrices, and the norms of queries and keys.
    found = plan.bytes["feed_forward"]["params"] + plan.bytes["attention"]["params"]
    assert found == 4 * (6 * 2 * 64 * 64 + 2 * 64)
