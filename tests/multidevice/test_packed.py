"""Packed matrices on a mesh: a step is that of one device, blocks are split, and what cannot be split is refused."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from packed_toy import random_lists, random_state

from sparse_lm.config import ConfigError
from sparse_lm.layers.feed_forward import DenseFeedForward
from sparse_lm.model.attention import Attention
from sparse_lm.parallel.mesh import MeshShape
from sparse_lm.recipe import Recipe
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.routing.top_k import TopKRouter
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.schedule import Constant
from sparse_lm.train.session import open_session
from sparse_lm.train.step import PULSE, Train
from sparse_lm.weight_sparsity.block_sparse import product
from sparse_lm.weight_sparsity.projection import BlockSparseLowRankProjection, BlockSparseProjection

LENGTH = 8
BATCH = tiny.batch(*[(8,), (3, 2), (), (5,), (1, 1, 1), (8,), (4, 4), (7,)], length=LENGTH)
# Two ranges of rows: `tensor` = 2 can split the inputs of `out` and `down`.
BLOCKS = BlockSparseProjection(density=0.5, block=16, row_shards=2)
ADAMW = AdamW(learning_rate=0.01, schedule=Constant(warmup_fraction=0.0), epsilon=1e-3)
DENSE = DenseFeedForward(hidden=64, activation="relu_squared", projection=BLOCKS)
MOE = MoEFeedForward(
    experts=4,
    hidden=32,
    activation="relu_squared",
    router=TopKRouter(k=2),
    projection=BlockSparseLowRankProjection(density=0.5, block=16, rank=2, row_shards=2, permutation="random"),
)
FEED_FORWARDS = {"dense": DENSE, "moe": MOE, "feed_forward": DENSE}
"""Of "dense" also the matrices of attention are packed; "feed_forward" has one matrix of each kind that `tensor` can split."""


def recipe(name: str, feed_forward=None, **mesh: int) -> Recipe:
    attention = Attention(heads=2, head_dim=16, projection=BLOCKS if name == "dense" else Attention().projection)
    base = Recipe(
        model=tiny.model(feed_forward or FEED_FORWARDS[name], layers=1, d_model=32, attention=attention),
        optimizer=ADAMW,
        train=Train(steps=4, clip_norm=0.5),
        mesh=MeshShape(**{"data": 1, **mesh}),
    )
    return dataclasses.replace(base, data=dataclasses.replace(base.data, sequence_length=LENGTH, batch_size=8))


@functools.cache
def result(name: str, **mesh: int):
    """(state after a step, pulse) on the host."""
    session = open_session(recipe(name, **mesh), jax.devices()[: int(np.prod(list(mesh.values()) or [1]))])
    compiled, _ = session.compile_step()
    if name == "feed_forward":
        state = session.place(random_state(session.abstract, session.definition.packed))
    else:
        state = session.create()
    after, metrics = compiled(state, session.put(BATCH))
    for leaf, sharding in zip(jax.tree.leaves(after), jax.tree.leaves(session.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    return jax.device_get(after), dict(zip(PULSE, np.asarray(metrics["pulse"]).tolist()))


CASES = [("feed_forward", {"data": 2, "fsdp": 2, "tensor": 2})]
SLOW = [("dense", {"data": 2, "fsdp": 2, "tensor": 2})]
SLOW += [("dense", {axis: 2}) for axis in ("data", "fsdp", "tensor", "context")]
SLOW += [
    ("moe", {"fsdp": 2, "expert": 2}),
    ("moe", {"fsdp": 2, "expert": 2, "tensor": 2}),
    ("moe", {"fsdp": 4, "tensor": 2}),  # blocks that these do not divide are whole on every device
    ("dense", {"fsdp": 2, "tensor": 2, "context": 2}),
    ("moe", {"data": 2}),
    ("moe", {"expert": 4}),
    ("moe", {"context": 2}),
]


@pytest.mark.parametrize(
    ("name", "mesh"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
    ids=lambda value: value if isinstance(value, str) else "x".join(f"{axis}{size}" for axis, size in value.items()),
)
def test_a_step_on_a_mesh_is_the_step_on_one_device(name: str, mesh: dict[str, int]) -> None:
    expected, expected_pulse = result(name)
    after, pulse = result(name, **mesh)
    for key in ("loss", "grad_norm", "tokens"):
        assert pulse[key] == pytest.approx(expected_pulse[key], rel=1e-5), key
    tiny.assert_close(after.params, expected.params, rtol=1e-5, atol=1e-5)
    tiny.assert_same(after.model_state, expected.model_state)


@pytest.mark.parametrize("dims", [("embed", "ffn"), ("ffn", "embed")], ids=["outputs", "inputs"])
def test_blocks_are_gathered_again_and_not_kept_for_the_backward_pass(dims: tuple[str, str]) -> None:
    """Of 4 blocks a device has one."""
    mesh = MeshShape(data=1, fsdp=2, tensor=2).build(jax.devices()[:4])
    pattern, x, values = BLOCKS.pattern(64, 32), jnp.ones((4, 4, 64)), jnp.ones((4, 16, 16))
    lists = random_lists(pattern, 0, np.random.default_rng(0))

    def total(x, values):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jnp.sum(product(x, values, pattern.from_lists(lists), pattern, dims))

    gathers = [str(jax.make_jaxpr(f)(x, values)).count("= all_gather[") for f in (total, jax.grad(total, (0, 1)))]
    assert gathers == [1, 2]


def test_blocks_of_experts_are_gathered_again() -> None:
    """Over fsdp those of gate and down, over tensor those of down once more: three arrays of blocks forward, the same three backward."""
    session = open_session(recipe("moe", fsdp=2, expert=2, tensor=2))
    state, of = session.abstract, session.definition

    def total(params, model_state, batch):
        return of.objective(params, model_state, batch, of.units(batch), None)[0]

    for function, times in ((total, 1), (jax.grad(total), 2)):
        program = str(jax.make_jaxpr(function)(state.params, state.model_state, BATCH))
        found = sorted(re.findall(r":f32\[2,(\d),16,16\] = all_gather\[", program))
        assert found == times * ["2"] * 2 + times * ["4"], found


def test_blocks_are_split_over_tensor_and_fsdp() -> None:
    session = open_session(recipe("dense", data=2, fsdp=2, tensor=2))
    specs = session.shardings.params["blocks"]["0"]["feed_forward"]["gate"]["values"].spec
    assert specs[0] == ("tensor", "fsdp")
    # 2 block rows x 4 block columns at density 0.5 (one in each half of a column, at least): 8 blocks, 2 a device.
    assert session.abstract.params["blocks"]["0"]["feed_forward"]["gate"]["values"].shape == (8, 16, 16)


@pytest.mark.parametrize(
    ("projection", "field"),
    [
        (dataclasses.replace(BLOCKS, row_shards=1), r"projection\.row_shards = 1 .* multiple of mesh\.tensor \(2\)"),
        (dataclasses.replace(BLOCKS, row_shards=1, fan_in="free"), r"projection\.fan_in = 'free'"),
    ],
    ids=["rows", "free"],
)
def test_what_tensor_cannot_split_is_refused(projection: BlockSparseProjection, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        open_session(recipe("dense", dataclasses.replace(DENSE, projection=projection), data=4, tensor=2))
