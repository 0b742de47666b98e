"""Growth of packed experts by their gradient on a mesh: parts of an expert's gradient are summed over devices before the norm."""

import dataclasses
import functools
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from packed_toy import random_state
from scripted import pretrain, train_on_one_device

from sparse_lm.config import validate
from sparse_lm.layers.tree_paths import flatten
from sparse_lm.parallel.mesh import MeshShape
from sparse_lm.recipe import Recipe
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.routing.top_k import TopKRouter
from sparse_lm.train.checkpoint_reader import read_checkpoint
from sparse_lm.train.loop import train
from sparse_lm.train.metrics import read_rows
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.schedule import Constant
from sparse_lm.train.session import Session, open_session
from sparse_lm.train.state import TrainState
from sparse_lm.train.step import Train, gradients
from sparse_lm.weight_sparsity.door import Moment
from sparse_lm.weight_sparsity.packed import Packed
from sparse_lm.weight_sparsity.packed_matrix import at, replaced
from sparse_lm.weight_sparsity.projection import BlockSparseLowRankProjection, BlockSparseProjection
from sparse_lm.weight_sparsity.schedules import Periodic
from sparse_lm.weight_sparsity.topology_update import RigLBlocks

BATCH = tiny.batch(*[(8,), (3, 2), (), (5,), (1, 1, 1), (8,), (4, 4), (7,)], length=8)
MOE = MoEFeedForward(
    experts=4,
    hidden=64,
    activation="swiglu",
    router=TopKRouter(k=2),
    projection=BlockSparseProjection(density=0.5, block=16, row_shards=2),
)
MESH = {"data": 2, "fsdp": 2, "expert": 2}
PATHS = tuple(f"blocks.0.feed_forward.{name}" for name in ("gate", "up", "down"))
PACKED = Packed(algorithm=RigLBlocks(slabs=2), schedule=Periodic(every=2, drop=0.75))


def recipe(microbatches: int = 1, **mesh: int) -> Recipe:
    base = Recipe(
        model=tiny.model(MOE, layers=1, d_model=64),
        optimizer=AdamW(learning_rate=0.01, schedule=Constant(warmup_fraction=0.0), epsilon=1e-3),
        train=Train(steps=8, microbatches=microbatches),
        weight_sparsity=PACKED,
        mesh=MeshShape(**{"data": 1, **mesh}),
    )
    return dataclasses.replace(base, data=dataclasses.replace(base.data, sequence_length=8, batch_size=8))


@functools.cache
def opened(microbatches: int = 1, **mesh: int) -> tuple[Session, TrainState]:
    """(session, a state of step 2, whose step changes the topology)."""
    session = open_session(recipe(microbatches, **mesh), jax.devices()[: int(np.prod(list(mesh.values()) or [1]))])
    state = random_state(session.abstract, session.definition.packed)
    masks = session.sparsifier.masks(state.model_state)
    sparsity = {**state.sparsity, **{name: replaced(state.sparsity[name], masks) for name in ("mask", "ever")}}
    return session, session.place(dataclasses.replace(state, step=jnp.int32(2), sparsity=sparsity))


def scores(microbatches: int = 1, **mesh: int) -> dict[str, np.ndarray]:
    """Squared norms of the blocks of every expert's gradient."""
    session, state = opened(microbatches, **mesh)

    def run(state: TrainState, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        def gradient(weights):
            of = session.definition, weights, state.model_state, batch, microbatches, jax.random.key(0)
            return gradients(*of)[1]

        moment = Moment(**dict.fromkeys(Moment._fields))._replace(gradient=gradient)
        return session.sparsifier.gradient_norms(moment, state.params)

    return jax.device_get(tiny.jit(run)(state, session.put(BATCH)))


SPLIT = {"data": 2, "expert": 2, "tensor": 2}
SLOW = ({"context": 2}, {"expert": 8}, {"fsdp": 2}, {"fsdp": 2, "tensor": 2})
MESHES = [MESH, SPLIT, *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in SLOW)]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(f"{axis}{size}" for axis, size in mesh.items()))
def test_norms_are_those_of_the_whole_gradient(mesh: dict[str, int]) -> None:
    """Over eight shards the four experts are whole on each: their rows are then spread over `expert` too."""
    expected, found = scores(), scores(**mesh)
    for path in PATHS:
        assert found[path].shape == (4, 4, 4) and (expected[path] > 0).mean() > 0.5
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-4, err_msg=path)


@pytest.mark.slow
def test_norms_over_microbatches_and_devices() -> None:
    expected, found = scores(), scores(2, **SPLIT)
    for path in PATHS:
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-4, err_msg=path)


@functools.cache
def changed(**mesh: int) -> TrainState:
    session, state = opened(**mesh)
    compiled, _ = session.compile_step(changes=True)
    return jax.device_get(compiled(jax.tree.map(jnp.copy, state), session.put(BATCH))[0])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MESH, SPLIT], ids=["fsdp", "tensor"])
def test_experts_grow_the_same_blocks_as_on_one_device(mesh: dict[str, int]) -> None:
    before, expected, after = opened()[1], changed(), changed(**mesh)
    tiny.assert_same(after.model_state, expected.model_state)
    tiny.assert_same(after.sparsity, expected.sparsity)
    tiny.assert_close(after.params, expected.params, rtol=1e-6, atol=1e-6)
    for path in PATHS:
        old, new = (np.asarray(at(state.sparsity["mask"], path)) for state in (before, after))
        assert (new & ~old).sum() >= 4, path


@pytest.mark.slow
def test_a_run_grows_the_experts_of_one_device_and_resumes_to_the_bit(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight steps of two stacked layers with companions: changes at 2 and 4, once more from the checkpoint after 3."""
    tiny.corpus(tmp_path / "text")
    experts = dataclasses.replace(
        MOE, projection=BlockSparseLowRankProjection(density=0.5, block=16, rank=2, row_shards=2)
    )
    changes = {"validation__every": 0, "data__batch_size": 8, "checkpoint__every": 3, "checkpoint__keep_last": 4}
    run = tiny.recipe(
        tmp_path,
        model=tiny.model(experts, d_model=64, vocab_size=264, execution="scanned"),
        weight_sparsity=PACKED,
        mesh=MeshShape(data=1, fsdp=2, expert=2, tensor=2),
        **changes,
    )
    runs = {name: tmp_path / name for name in ("mesh", "one", "again")}
    pretrain(validate(run), runs["mesh"], monkeypatch)
    train_on_one_device(run, runs["one"], monkeypatch)
    losses, lone_losses = (
        [row["loss"] for row in read_rows(runs[name] / "metrics.jsonl", "train")] for name in ("mesh", "one")
    )
    np.testing.assert_allclose(losses, lone_losses, rtol=1e-5)
    end, lone_end = (read_checkpoint(runs[name] / "checkpoints", 8).state for name in ("mesh", "one"))
    tiny.assert_same(end["model_state"], lone_end["model_state"])
    ever, mask = (flatten(end["sparsity"][name]) for name in ("ever", "mask"))
    assert all((np.asarray(ever[path]) & ~np.asarray(mask[path])).any() for path in mask)  # blocks have gone
    tiny.assert_close(end["params"], lone_end["params"], rtol=1e-4, atol=1e-4)
    shutil.copytree(runs["mesh"], runs["again"])
    for step in (6, 8):
        shutil.rmtree(runs["again"] / "checkpoints" / str(step))
    assert train(validate(run), runs["again"]) == 0
    tiny.assert_same(read_checkpoint(runs["again"] / "checkpoints", 8).state, end)
