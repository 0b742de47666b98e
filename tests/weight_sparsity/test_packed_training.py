"""Training packed matrices: growth by the gradient of the whole batch, a change worked out by hand, resume, one model of all parts."""

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

from sparse_lm.accounting import account
from sparse_lm.config import ConfigError, validate
from sparse_lm.layers.feed_forward import DenseFeedForward
from sparse_lm.layers.tree_paths import flatten
from sparse_lm.memory.engram import Engram
from sparse_lm.memory.row_optimizer import RowAdagrad
from sparse_lm.model.definition import define
from sparse_lm.model.transformer import Model
from sparse_lm.recipe import Recipe
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.routing.top_k import TopKRouter
from sparse_lm.train.checkpoint import Checkpointer, Checkpoints
from sparse_lm.train.checkpoint_reader import read_checkpoint
from sparse_lm.train.initialize import StartFrom
from sparse_lm.train.loop import train
from sparse_lm.train.muon import Muon
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.schedule import Constant
from sparse_lm.train.session import open_session, starting_point
from sparse_lm.train.state import TrainState, initial_state, unstack
from sparse_lm.train.step import PULSE, Train, build_step, gradients
from sparse_lm.weight_sparsity.door import Moment
from sparse_lm.weight_sparsity.packed import Packed
from sparse_lm.weight_sparsity.packed_matrix import PackedMatrix, at, nested, replaced
from sparse_lm.weight_sparsity.packing import convert, unpack
from sparse_lm.weight_sparsity.projection import BlockSparseLowRankProjection, BlockSparseProjection
from sparse_lm.weight_sparsity.schedules import Periodic
from sparse_lm.weight_sparsity.topology_update import MagnitudeBlocks, RigLBlocks, SETBlocks

BLOCKS = BlockSparseProjection(density=0.5, block=16)
FEED_FORWARD = DenseFeedForward(hidden=64, activation="relu_squared", projection=BLOCKS)
MODEL = tiny.model(FEED_FORWARD, d_model=48, layers=1)
OPTIMIZER = AdamW(learning_rate=0.01, schedule=Constant(warmup_fraction=0.0), epsilon=1e-3)
BATCH = tiny.batch((10, 6), (9,), (16,), (5, 5, 4))
PATHS = ("blocks.0.feed_forward.down", "blocks.0.feed_forward.gate")
STEPS = 8
# Changes in steps 2 and 4 (before 0.75 x 8 = 6): shares 0.5 / 2 (1 + cos(pi 2 / 6)) = 0.375 and 0.125.
PACKED = Packed(algorithm=RigLBlocks(), schedule=Periodic(every=2, drop=0.5))


@functools.cache
def start() -> TrainState:
    definition = define(MODEL)
    sparsifier = PACKED.build(definition, OPTIMIZER, STEPS, 1)
    transformation = OPTIMIZER.build(definition.dims)
    shapes = jax.eval_shape(lambda: initial_state(definition, transformation, 0, with_ema=True, sparsifier=sparsifier))
    state = random_state(shapes, definition.packed)
    _, _, sparsity = tiny.jit(sparsifier.init)(state.params, state.model_state, jax.random.key(0))
    return dataclasses.replace(state, sparsity=sparsity)


@functools.cache
def step(config: Packed = PACKED):
    definition = define(MODEL)
    train_config = Train(steps=STEPS, ema_decay=0.9)
    return tiny.jit(build_step(definition, OPTIMIZER, train_config, config.build(definition, OPTIMIZER, STEPS, 1)))


@functools.cache
def states() -> list[TrainState]:
    """The states of four steps; the third (number 2) changes the topology."""
    found = [start()]
    for _ in range(4):
        found.append(step()(found[-1], BATCH, jnp.float32(1))[0])
    return found


def only(gradient) -> Moment:
    """A moment of which nothing but the gradient is known."""
    return Moment(**dict.fromkeys(Moment._fields))._replace(gradient=gradient)


@functools.cache
def scores(microbatches: int, slabs: int):
    """The compiled growth scores of a state."""
    definition = define(MODEL)
    sparsifier = Packed(algorithm=RigLBlocks(slabs=slabs)).build(definition, OPTIMIZER, STEPS, microbatches)

    def run(state: TrainState):
        def gradient(weights):
            key = jax.random.key(0)
            return gradients(definition, weights, state.model_state, BATCH, microbatches, key)[1]

        return sparsifier.gradient_norms(only(gradient), state.params)

    return tiny.jit(run)


@functools.cache
def dense_norms() -> dict[str, np.ndarray]:
    """Squared norms of the blocks of the dense twin's gradient."""
    dense = define(
        dataclasses.replace(
            MODEL, pattern=(dataclasses.replace(FEED_FORWARD, projection=DenseFeedForward().projection),)
        )
    )
    state, params = start(), dict(start().params)
    feed_forward = {}
    for name, shape in (("gate", (48, 64)), ("down", (64, 48))):
        path = f"blocks.0.feed_forward.{name}"
        topology = at(state.model_state, f"{path}.topology")
        feed_forward[name] = {"weight": unpack(at(state.params, path), topology, shape)}
    params["blocks"] = {"0": {**params["blocks"]["0"], "feed_forward": feed_forward}}
    run = tiny.jit(lambda params: gradients(dense, params, {}, BATCH, 1, jax.random.key(0))[1])
    grads = run(params)["blocks"]["0"]["feed_forward"]
    blocks = {name: np.asarray(grads[name]["weight"]) for name in ("gate", "down")}
    return {
        f"blocks.0.feed_forward.{name}": (g.reshape(g.shape[0] // 16, 16, g.shape[1] // 16, 16) ** 2).sum((1, 3))
        for name, g in blocks.items()
    }


@pytest.mark.parametrize(
    ("microbatches", "slabs"), [(1, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 2), (4, 1)))]
)
def test_growth_follows_the_gradient_of_the_whole_batch(microbatches: int, slabs: int) -> None:
    """In one microbatch by norms, in several by slabs of the summed gradient: gate has 4 block columns, down has 3 (slabs overlap)."""
    found, expected = scores(microbatches, slabs)(start()), dense_norms()
    assert sorted(found) == list(PATHS)
    for path in PATHS:
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-4, err_msg=path)


def masks(state: TrainState) -> dict[str, np.ndarray]:
    return {path: np.asarray(at(state.sparsity["mask"], path)) for path in PATHS}


@pytest.mark.slow
def test_a_change_replaces_the_step_and_blocks_keep_their_numbers() -> None:
    """In step 2 round(0.375 x blocks) leave: values, both moments and the average follow, and everything else stays."""
    before, after = states()[2], states()[3]
    for path in PATHS:
        mask, new = masks(before)[path], masks(after)[path]
        blocks = mask.sum()
        assert new.sum() == blocks and set(new.sum(0)) == set(mask.sum(0))
        assert (mask & ~new).sum() <= round(0.375 * blocks)
        shape = (mask.shape[0] * 16, mask.shape[1] * 16)

        def dense(tree, state, path=path, shape=shape):
            return unpack(at(tree, path), at(state.model_state, f"{path}.topology"), shape)

        stays = np.repeat(np.repeat(mask & new, 16, 0), 16, 1)
        for part in ("params", "mu", "nu"):
            old, found = ((s.params if part == "params" else s.opt_state[part]) for s in (before, after))
            np.testing.assert_array_equal(dense(found, after), np.where(stays, dense(old, before), 0.0), err_msg=part)
    others = [
        (s.params["embedding"], s.params["blocks"]["0"]["attention"], s.opt_state["count"]) for s in (before, after)
    ]
    tiny.assert_same({"a": others[0][1], "e": others[0][0]}, {"a": others[1][1], "e": others[1][0]})
    assert int(others[0][2]) == int(others[1][2]) == 2 and int(after.step) == 3
    # The average follows too: what is new has no history, what stays has the same.
    path = next(path for path in PATHS if (masks(before)[path] != masks(after)[path]).any())
    shape = tuple(16 * n for n in masks(after)[path].shape)
    old, found = (unpack(at(s.ema, path), at(s.model_state, f"{path}.topology"), shape) for s in (before, after))
    new = np.repeat(np.repeat(masks(after)[path], 16, 0), 16, 1)
    assert not found[~new].any()
    assert np.abs(found - np.where(new, old, 0)).max() < np.abs(old).max()


@pytest.mark.slow
def test_the_dropped_blocks_are_the_smallest_and_the_grown_ones_have_the_largest_gradient() -> None:
    """The whole change against numpy, from the state before it."""
    before, after = states()[2], states()[3]
    growth = scores(1, 1)(before)
    for path in PATHS:
        mask = masks(before)[path]
        values = np.asarray(at(before.params, f"{path}.values"))
        column, row = np.nonzero(mask.T)
        norm = np.full(mask.shape, np.inf)
        norm[row, column] = (values**2).sum((1, 2))
        expected, count = mask.copy(), round(0.375 * int(mask.sum()))
        for place in np.argsort(norm.reshape(-1), kind="stable")[:count]:
            expected.reshape(-1)[place] = False
        score = np.where(expected, -np.inf, np.asarray(growth[path]))
        for c in range(mask.shape[1]):
            for _ in range(int(mask[:, c].sum() - expected[:, c].sum())):
                r = int(np.argmax(score[:, c]))
                expected[r, c], score[r, c] = True, -np.inf
        np.testing.assert_array_equal(masks(after)[path], expected)


def test_a_step_that_is_not_finite_changes_no_topology() -> None:
    """The sparsifier alone, once in a sound step and once in one that is not, with gradients larger where no block is."""
    sparsifier, state = PACKED.build(define(MODEL), OPTIMIZER, STEPS, 1), start()

    def asked(weights):
        """Norms in the place of probes: those of absent blocks are larger."""
        absent = {f"{path}.probe": 1.0 - at(state.sparsity["mask"], path) for path in PATHS}
        return replaced(weights, absent)

    @tiny.jit
    def change(finite, state):
        same = {"before": state.params, "params": state.params, "grads": state.params, "gradient": asked}
        rest = {name: getattr(state, name) for name in ("opt_state", "model_state", "sparsity", "ema")}
        return sparsifier.update(Moment(jnp.int32(2), finite, jax.random.key(0), **same, **rest))

    found = change(jnp.bool_(False), state)
    for name in ("params", "model_state", "sparsity", "ema"):
        tiny.assert_same(getattr(found, name), getattr(state, name))
    moved = change(jnp.bool_(True), state)
    for path in PATHS:  # round(0.375 x blocks) went, and every column grew what it lost elsewhere
        old, new = masks(state)[path], np.asarray(at(moved.sparsity["mask"], path))
        assert 0 < (old & ~new).sum() <= round(0.375 * old.sum()) and (old.sum(0) == new.sum(0)).all()


@pytest.mark.slow
def test_a_whole_step_that_is_not_finite_changes_no_topology() -> None:
    broken = states()[2]
    poisoned = dataclasses.replace(broken, params={**broken.params, "embedding": broken.params["embedding"] * np.nan})
    after, metrics = step()(poisoned, BATCH, jnp.float32(1))
    tiny.assert_same(after.model_state, broken.model_state)
    tiny.assert_same(after.params["blocks"], broken.params["blocks"])
    assert dict(zip(PULSE, np.asarray(metrics["pulse"])))["skipped"] == 1


@pytest.mark.slow
def test_numbers_count_weights_by_blocks() -> None:
    _, metrics = step()(states()[2], BATCH, jnp.float32(1))
    found = {path: {n: np.asarray(a) for n, a in leaf.items()} for path, leaf in metrics["sparsity"].items()}
    for path in PATHS:
        numbers, (old, new) = found[path], (masks(s)[path] for s in states()[2:4])
        assert numbers["active"] == numbers["requested"] == 256 * new.sum()  # blocks of 16 x 16
        assert numbers["grown"] == 256 * (new & ~old).sum() and numbers["kept"] == 256 * (new & old).sum()
        assert numbers["weights"] == 256 * new.size and numbers["mean_density"] == np.float32(new.mean())


COMPANION = BlockSparseLowRankProjection(density=0.5, block=16, rank=2, permutation="random")
PLAIN = tiny.model(
    DenseFeedForward(hidden=32, activation="relu_squared", projection=COMPANION), d_model=32, layers=1, vocab_size=264
)
# One model with all of it: packed experts with a companion and a memory beside them.
ALL = dataclasses.replace(
    PLAIN,
    pattern=(
        MoEFeedForward(
            experts=4,
            hidden=32,
            activation="relu_squared",
            router=TopKRouter(k=2, bias_rate=0.1),
            projection=COMPANION,
        ),
    ),
    memory=Engram(at=(0,), heads=2, width=8, rows=100, optimizer=RowAdagrad()),
)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("model", "lists"),
    [(PLAIN, (2,)), pytest.param(ALL, (4, 2), marks=pytest.mark.slow)],
    ids=["plain", "experts and a memory"],
)
def test_a_packed_model_trains_and_resumes_to_the_bit(
    model: Model, lists: tuple[int, ...], tmp_path: pathlib.Path
) -> None:
    """Eight steps at once, and four of them from the checkpoint after four: changes at 2 and 4, the second after the restart."""
    tiny.corpus(tmp_path / "text")
    packed = Packed(algorithm=MagnitudeBlocks(), schedule=Periodic(every=2, drop=0.5, drop_decay="constant"))
    recipe = validate(tiny.recipe(tmp_path, model=model, weight_sparsity=packed, validation__every=0))
    assert account(recipe.model, 32).parameters == define(recipe.model).parameters()
    train(recipe, tmp_path / "run")
    end = read_checkpoint(tmp_path / "run" / "checkpoints", 8).state
    middle = read_checkpoint(tmp_path / "run" / "checkpoints", 4).state
    found = flatten(middle["model_state"])["blocks.0.feed_forward.gate.topology.row_index"]
    assert found.dtype == np.int32 and found.shape == lists  # experts x blocks
    now, ever = (flatten(middle["sparsity"][name]) for name in ("mask", "ever"))
    assert any((np.asarray(ever[path]) & ~np.asarray(now[path])).any() for path in now)  # blocks have gone
    again = tmp_path / "again"
    (tmp_path / "run").rename(again)
    shutil.rmtree(again / "checkpoints" / "8")
    train(recipe, again)
    tiny.assert_same(read_checkpoint(again / "checkpoints", 8).state, end)


def test_dense_matrices_become_blocks_and_blocks_become_dense() -> None:
    """All blocks and full rank lose nothing: dense -> packed -> dense is the identity, up to the companion's rounding."""
    draw, shapes = np.random.default_rng(0), {"gate": (16, 32), "down": (32, 16)}
    original = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    packed = {name: PackedMatrix(COMPANION.pattern(*shape), 0, (), True, ("a", "b")) for name, shape in shapes.items()}
    tree = {"params": {name: {"weight": weight} for name, weight in original.items()} | {"head": np.ones(3)}}
    blocks = convert(tree, packed, dict.fromkeys(shapes, 16), {})
    for name, weight in original.items():
        parts, state = blocks["params"][name], blocks["model_state"][name]
        assert sorted(parts) == ["into", "out", "values"] and state["permutation"].tolist() == list(
            range(weight.shape[0])
        )
        # The companion takes the best rank-16 approximation of what the kept blocks leave: here all of it.
        dense = unpack(parts, state["topology"], weight.shape, state["permutation"])
        np.testing.assert_allclose(dense, weight, atol=1e-6)
        # Kept are the largest blocks: gate has one block row, so at least that one of each column; down has two, the larger.
        norms = (weight.reshape(weight.shape[0] // 16, 16, weight.shape[1] // 16, 16) ** 2).sum((1, 3))
        assert np.asarray(state["topology"]["row_index"]).tolist() == norms.argmax(0).tolist()
    back = convert(blocks, {}, {}, shapes)
    assert back["params"].keys() == tree["params"].keys() and not back["model_state"]
    tiny.assert_close(back["params"], tree["params"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_dense_checkpoints_become_blocks_and_blocks_become_dense(tmp_path: pathlib.Path) -> None:
    """All blocks and full rank lose nothing: dense -> packed -> dense is the identity, up to the companion's rounding."""
    tiny.corpus(tmp_path / "text")
    dense = tiny.recipe(tmp_path, DenseFeedForward(hidden=32, activation="relu_squared"), model__layers=1)
    session = open_session(dense, jax.devices()[:1])
    source = session.create()
    writer = Checkpointer(
        tmp_path / "dense" / "checkpoints",
        Checkpoints(),
        session.abstract,
        session.dims,
        session.mesh,
        population=False,
    )
    writer.save(2, source, {"windows": 0}, {}, 0.0)
    writer.close()
    original = read_checkpoint(tmp_path / "dense" / "checkpoints").state["params"]["blocks"]["0"]["feed_forward"]

    half = BlockSparseLowRankProjection(density=0.5, block=16, rank=16, permutation="random")

    def from_(run: str, projection) -> TrainState:
        pattern = (DenseFeedForward(hidden=32, activation="relu_squared", projection=projection),)
        recipe = dataclasses.replace(
            dense, model=dataclasses.replace(dense.model, pattern=pattern), start_from=StartFrom(run=run, convert=True)
        )
        return starting_point(open_session(validate(recipe), jax.devices()[:1]))[0]

    packed = from_(str(tmp_path / "dense"), half)
    for name, shape in (("gate", (16, 32)), ("down", (32, 16))):
        path = f"blocks.0.feed_forward.{name}"
        parts, state = at(packed.params, path), at(packed.model_state, path)
        weight = np.asarray(original[name]["weight"])
        # The companion takes the best rank-16 approximation of what the kept blocks leave: here all of it.
        np.testing.assert_allclose(unpack(parts, state["topology"], shape, state["permutation"]), weight, atol=1e-6)
        # Kept are the largest blocks: gate has one block row, so at least that one of each column; down has two, the larger.
        norms = (weight.reshape(shape[0] // 16, 16, shape[1] // 16, 16) ** 2).sum((1, 3))
        assert np.asarray(state["topology"]["row_index"]).tolist() == norms.argmax(0).tolist()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": Muon()}, r"optimizer = 'Muon' .* elementwise .* model\.pattern\.0\.projection stores blocks"),
        ({"model": tiny.model(), "weight_sparsity": PACKED}, r"weight_sparsity\. = 'packed' .* none or masked"),
        (
            {"weight_sparsity": Packed(algorithm=MagnitudeBlocks())},
            r"weight_sparsity\.algorithm = 'MagnitudeBlocks' .* has none",
        ),
    ],
    ids=["optimizer", "dense model", "no companion"],
)
def test_what_cannot_work_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recipe = validate(dataclasses.replace(Recipe(model=MODEL), **changes))
        open_session(recipe, jax.devices()[:1])


@pytest.mark.slow
def test_stacked_layers_start_with_the_topology_of_unrolled_ones() -> None:
    two = dataclasses.replace(MODEL, layers=2)
    unrolled_state = tiny.jit(define(two).initial_state)(jax.random.key(4))
    stacked = tiny.jit(define(dataclasses.replace(two, execution="scanned")).initial_state)(jax.random.key(4))
    tiny.assert_same(unstack(stacked, 0), unrolled_state)


@pytest.mark.slow
def test_set_grows_at_random_and_keeps_counts() -> None:
    config = Packed(algorithm=SETBlocks(), schedule=Periodic(every=2, drop=1.0))
    state = dataclasses.replace(states()[2])
    after, _ = step(config)(state, BATCH, jnp.float32(1))
    for path in PATHS:
        assert masks(after)[path].sum() == masks(state)[path].sum()
    assert any((masks(after)[path] != masks(state)[path]).any() for path in PATHS)
    # SET does not take the place of the optimizer's step.
    assert not np.array_equal(after.params["embedding"], state.params["embedding"])
    assert nested({"a.b": 1}) == {"a": {"b": 1}}
