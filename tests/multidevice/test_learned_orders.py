"""Reordered inputs on a mesh: products and gradients, a step that hardens, and a run are those of one device."""

import dataclasses
import functools
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from packed_toy import random_lists, random_state
from scripted import pretrain, train_on_one_device

from sparse_lm.config import validate
from sparse_lm.layers.feed_forward import DenseFeedForward
from sparse_lm.layers.tree_paths import flatten
from sparse_lm.model.attention import Attention
from sparse_lm.parallel.mesh import MeshShape
from sparse_lm.parallel.rules import spec_of
from sparse_lm.recipe import Recipe
from sparse_lm.train.checkpoint_reader import read_checkpoint
from sparse_lm.train.loop import train
from sparse_lm.train.metrics import read_rows
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.schedule import Constant
from sparse_lm.train.session import open_session
from sparse_lm.train.state import TrainState
from sparse_lm.train.step import Train
from sparse_lm.weight_sparsity.block_sparse import product
from sparse_lm.weight_sparsity.learned_permutation import Shuffle, first_soft, permutation_matrix
from sparse_lm.weight_sparsity.mixed_inputs import SOFT_DIMS, mixed
from sparse_lm.weight_sparsity.packed import Packed
from sparse_lm.weight_sparsity.packed_matrix import at, replaced
from sparse_lm.weight_sparsity.packing import unpack
from sparse_lm.weight_sparsity.projection import BlockSparseProjection
from sparse_lm.weight_sparsity.schedules import Periodic
from sparse_lm.weight_sparsity.topology_update import RigLBlocks

# Two ranges of rows: `tensor` = 2 can split the inputs of `out` and `down`.
LEARNED = BlockSparseProjection(density=0.5, block=16, row_shards=2, permutation="learned")
FORWARD = DenseFeedForward(hidden=64, activation="relu_squared", projection=LEARNED)
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
SIDES = {"inputs": ("ffn", "embed"), "outputs": ("embed", "ffn")}
"""Dims of matrices of which `tensor` splits the inputs, or the outputs."""


def spread(mesh: jax.sharding.Mesh, *operands: tuple[np.ndarray, P]) -> list[jax.Array]:
    return [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in operands]


@pytest.mark.parametrize("platform", ["cpu", None], ids=["both computed", "one chosen"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("axes", [MESH, {"fsdp": 3, "tensor": 2}], ids=["rows of M are split", "M is whole"])
def test_mixed_inputs_and_their_gradients_are_dense_products(
    side: str, axes: dict[str, int], platform: str | None
) -> None:
    """x M while the order is soft, x[..., p] when it is hard; 32 rows of M divide into 2 x 2 parts, but not into 3 x 2."""
    mesh = MeshShape(**{"data": 1, **axes}).build(jax.devices()[: int(np.prod(list(axes.values())))])
    draw = np.random.default_rng(0)
    known = mesh.abstract_mesh if platform else AbstractMesh(mesh.axis_sizes, mesh.axis_names, mesh.axis_types)
    pattern, dims = LEARNED.pattern(32, 32), SIDES[side]
    x, dy = (draw.normal(size=(12, 4, 32)).astype(np.float32) for _ in range(2))
    soft, order = draw.random((32, 32)).astype(np.float32), draw.permutation(32).astype(np.int32)
    stored = spec_of(SOFT_DIMS, soft.shape, mesh)
    assert stored == (P(("tensor", "fsdp"), None) if axes is MESH else P(None, None))
    tokens = P(tuple(axis for axis in axes if axis != "tensor"), None, "tensor" if side == "inputs" else None)

    @jax.jit
    def run(x, soft, order, hard, dy):
        with jax.sharding.use_abstract_mesh(known):
            met, pull = jax.vjp(lambda x, soft: mixed(x, soft, order, hard, pattern, dims), x, soft)
            return met, *pull(dy)

    operands = spread(mesh, (x, tokens), (soft, stored), (order, P()))
    cotangent = spread(mesh, (dy, tokens))[0]
    program = str(jax.make_jaxpr(run)(*operands, jnp.float32(0), cotangent))
    # Rows of M, in the backward pass again; where inputs are split those of a list, and what partial sums were scattered from.
    assert program.count("= all_gather[") == 2 * (axes is MESH) + 2 * (side == "inputs")
    met, dx, dsoft = run(*operands, jnp.float32(0), cotangent)
    assert met.sharding.is_equivalent_to(NamedSharding(mesh, tokens), 3)
    np.testing.assert_allclose(met, x @ soft, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(dx, dy @ soft.T, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(dsoft, x.reshape(-1, 32).T @ dy.reshape(-1, 32), rtol=1e-5, atol=1e-4)
    met, dx, dsoft = run(*operands, jnp.float32(1), cotangent)
    np.testing.assert_array_equal(met, x[..., order])
    np.testing.assert_array_equal(dx, dy[..., np.argsort(order)])
    assert not np.asarray(dsoft).any()


def test_a_fixed_order_of_inputs_that_tensor_splits() -> None:
    """Inputs come from every shard to the range of rows that meets them."""
    mesh, draw = MeshShape(**MESH).build(jax.devices()), np.random.default_rng(0)
    pattern, dims = LEARNED.pattern(64, 32), SIDES["inputs"]
    lists = random_lists(pattern, 0, draw)
    x, dy = (draw.normal(size=(4, 4, size)).astype(np.float32) for size in (64, 32))
    values = draw.normal(size=(pattern.blocks, 16, 16)).astype(np.float32)
    order = draw.permutation(64).astype(np.int32)

    @jax.jit
    def run(x, values, dy):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            multiply = functools.partial(product, topology=pattern.from_lists(lists), pattern=pattern, dims=dims)
            y, pull = jax.vjp(lambda x, values: multiply(x, values, permutation_K=order), x, values)
            return y, *pull(dy)

    stored = spec_of(("blocks", "block_in", "block_out"), values.shape, mesh)
    tokens = ("data", "fsdp")
    y, dx, dvalues = run(*spread(mesh, (x, P(tokens, None, "tensor")), (values, stored), (dy, P(tokens))))
    dense = unpack({"values": values}, lists, (64, 32))
    np.testing.assert_allclose(y, x[..., order] @ dense, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(dx, (dy @ dense.T)[..., np.argsort(order)], rtol=1e-5, atol=1e-4)
    of_dense = x[..., order].reshape(-1, 64).T @ dy.reshape(-1, 32)
    np.testing.assert_allclose(
        unpack({"values": np.asarray(dvalues)}, lists, (64, 32)),
        np.where(dense != 0, of_dense, 0),
        rtol=1e-5,
        atol=1e-4,
    )


def step_recipe(**mesh: int) -> Recipe:
    base = Recipe(
        model=tiny.model(FORWARD, layers=1, d_model=32),
        optimizer=AdamW(learning_rate=0.01, schedule=Constant(warmup_fraction=0.0), epsilon=1e-3),
        train=Train(steps=8),
        weight_sparsity=Packed(shuffle=Shuffle(every=2, threshold=0.25)),
        mesh=MeshShape(**{"data": 1, **mesh}),
    )
    return dataclasses.replace(base, data=dataclasses.replace(base.data, sequence_length=8, batch_size=8))


def hardening(**mesh: int) -> TrainState:
    """The state after step 2 of 8, which hardens what is below the threshold: gate is, down is not."""
    session = open_session(step_recipe(**mesh), jax.devices()[: int(np.prod(list(mesh.values()) or [1]))])
    draw = np.random.default_rng(1)
    state = random_state(session.abstract, session.definition.packed)
    near = 0.9 * permutation_matrix(jnp.asarray(draw.permutation(32))) + 0.1 / 32
    far = first_soft(jnp.asarray(draw.random((64, 64)), jnp.float32))
    soft = {"blocks.0.feed_forward.gate.soft": near, "blocks.0.feed_forward.down.soft": far}
    order = {path.replace("soft", "permutation"): jnp.arange(len(m), dtype=jnp.int32) for path, m in soft.items()}
    state = dataclasses.replace(
        state,
        step=jnp.int32(2),
        params=replaced(state.params, soft),
        model_state=replaced(state.model_state, order),
    )
    compiled, _ = session.compile_step(changes=True)
    batch = tiny.batch(*[(8,), (3, 2), (), (5,), (1, 1, 1), (8,), (4, 4), (7,)], length=8)
    after, _ = compiled(session.place(state), session.put(batch))
    for path in soft:
        sharding = at(after.params, path).sharding
        assert sharding.spec[0] == (("tensor", "fsdp") if mesh else None)
    return jax.device_get(after)


def test_a_step_that_hardens_is_the_step_on_one_device() -> None:
    expected, after = hardening(), hardening(**MESH)
    forward = after.model_state["blocks"]["0"]["feed_forward"]
    assert [float(forward[name]["hard"]) for name in ("gate", "down")] == [1, 0]
    assert forward["gate"]["permutation"].tolist() != list(range(32))
    tiny.assert_same(after.model_state, expected.model_state)
    tiny.assert_close(after.params, expected.params, rtol=1e-5, atol=1e-5)
    tiny.assert_close(after.opt_state, expected.opt_state, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_on_a_mesh_learns_the_orders_of_one_device_and_resumes_to_the_bit(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 steps, orders of all packed matrices hardened at 4, 6, 8 and, by force, 12; topology at 3, 6, 9; stopped after 5."""
    tiny.corpus(tmp_path / "text")
    packed = Packed(
        algorithm=RigLBlocks(),
        schedule=Periodic(every=3, drop=0.5),
        shuffle=Shuffle(every=2, end=0.75, threshold=0.3, penalty=1.0),
    )
    model = tiny.model(
        FORWARD,
        d_model=32,
        layers=2,
        vocab_size=264,
        execution="scanned",
        attention=Attention(heads=2, head_dim=16, projection=LEARNED),
    )
    recipe = tiny.recipe(
        tmp_path,
        model=model,
        weight_sparsity=packed,
        validation__every=0,
        data__batch_size=8,
        train__steps=16,
        checkpoint__every=5,
        checkpoint__keep_last=4,
        mesh=MeshShape(**MESH),
    )
    runs = {name: tmp_path / name for name in ("mesh", "one", "again")}
    pretrain(validate(recipe), runs["mesh"], monkeypatch)
    train_on_one_device(recipe, runs["one"], monkeypatch)
    rows, lone_rows = (read_rows(runs[name] / "metrics.jsonl", "train") for name in ("mesh", "one"))
    np.testing.assert_allclose([row["loss"] for row in rows], [row["loss"] for row in lone_rows], rtol=1e-5)
    moments = set()
    for name in (name for name in rows[0] if name.endswith("/hardened")):
        found = np.array([row[name] for row in rows])
        np.testing.assert_array_equal(found, [row[name] for row in lone_rows], err_msg=name)
        moments |= set((1 - found).sum(0).astype(int).tolist())
    assert {4, 6, 8} <= moments, moments
    end, lone_end = (read_checkpoint(runs[name] / "checkpoints", 16).state for name in ("mesh", "one"))
    tiny.assert_same(end["model_state"], lone_end["model_state"])
    tiny.assert_close(end["params"], lone_end["params"], rtol=1e-5, atol=1e-5)
    for path, order in flatten(end["model_state"]).items():
        if path.endswith(".permutation"):
            soft = flatten(end["params"])[path.replace(".permutation", ".soft")]
            np.testing.assert_array_equal(soft, permutation_matrix(jnp.asarray(order)), err_msg=path)

    shutil.copytree(runs["mesh"], runs["again"])
    for step in (10, 15, 16):
        shutil.rmtree(runs["again"] / "checkpoints" / str(step))
    assert train(validate(recipe), runs["again"]) == 0
    tiny.assert_same(read_checkpoint(runs["again"] / "checkpoints", 16).state, end)
