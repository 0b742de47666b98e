"""Every algorithm on a matrix small enough to work out by hand: before, after, and the arithmetic."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from masked_toy import PATH, array, jit, nested, one_step, sparsifier

from sparse_lm.config import ConfigError
from sparse_lm.train.adafactor import Adafactor
from sparse_lm.train.muon import Muon
from sparse_lm.weight_sparsity.algorithms import Magnitude, Static
from sparse_lm.weight_sparsity.allocation import Global
from sparse_lm.weight_sparsity.behind import SRSTE, STE, AbsTopK, Movement, TopKAST
from sparse_lm.weight_sparsity.flow import total_flow
from sparse_lm.weight_sparsity.growth import SET, CHTs, RigL, SRigL, link_scores, path_scores, receptive_field
from sparse_lm.weight_sparsity.masked import Masked
from sparse_lm.weight_sparsity.saliency import SNIP, Wanda
from sparse_lm.weight_sparsity.schedules import ConstantSparsity, LinearSparsity, OneShot, Periodic
from sparse_lm.weight_sparsity.structures import Block, ConstantFanIn

HALF = 0.5
EXCHANGE = Periodic(every=10, end=1.0, drop=0.5, drop_decay="constant")

WEIGHT = [[5.0, -1.0, 0.0, 0.0], [3.0, 2.0, 0.0, 0.0]]
MASK = [[1, 1, 0, 0], [1, 1, 0, 0]]
GRAD = [[0.1, -0.9, 0.2, -0.8], [0.3, 0.4, 0.7, 0.6]]


def same(found: np.ndarray, expected: list) -> None:
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


def test_rigl() -> None:
    # 4 active of 8. Half are exchanged: the 2 largest magnitudes, 5 and 3, survive. The largest gradients elsewhere are 0.9 at
    # (0, 1), just dropped, and 0.8 at (0, 3). The first keeps its value and moments, the second starts from zero with none.
    config = Masked(density=HALF, algorithm=RigL(), schedule=EXCHANGE)
    after = one_step(config, WEIGHT, GRAD, step=10, mask=MASK)
    same(after.mask, [[1, 1, 0, 1], [1, 0, 0, 0]])
    same(after.weight, [[5, -1, 0, 0], [3, 0, 0, 0]])
    same(after.moments, [[1, 1, 0, 0], [1, 0, 0, 0]])
    # what the optimizer sees is masked; the dense gradient is seen by the exchange alone
    same(after.seen, [[0.1, -0.9, 0, 0], [0.3, 0.4, 0, 0]])
    counts = {name: int(np.sum(jax.tree.leaves(tree)[0])) for name, tree in after.sparsity["counts"].items()}
    # (0, 3) had never been active: 8 - 5 never were; columns: 2, 1, 0, 1 inputs: one dead output
    assert counts == {
        "requested": 4,
        "active": 4,
        "kept": 3,
        "grown": 1,
        "regrown": 0,
        "never": 3,
        "dead_outputs": 1,
        "dead_inputs": 0,
        "fan_in": 4,
    }
    sparse = sparsifier(config, (2, 4))
    assert bool(sparse.replaces(jnp.int32(10))) and not bool(sparse.replaces(jnp.int32(11)))


def test_rigl_between_exchanges_and_in_a_step_that_is_not_sound() -> None:
    config = Masked(density=HALF, algorithm=RigL(), schedule=EXCHANGE)
    moved = [[4.0, -2.0, 0.5, 0.0], [3.0, 2.0, 0.0, 0.0]]
    after = one_step(config, WEIGHT, GRAD, step=11, mask=MASK, moved=moved)
    same(after.mask, MASK)
    same(after.weight, [[4, -2, 0, 0], [3, 2, 0, 0]])  # whatever an optimizer does outside the mask is taken back
    skipped = one_step(config, WEIGHT, GRAD, step=10, mask=MASK, finite=False)
    same(skipped.mask, MASK)
    same(skipped.weight, WEIGHT)
    same(skipped.moments, MASK)  # those of masked weights are zero always


def test_rigl_on_blocks() -> None:
    # 2 x 1 blocks: mean magnitudes of weights 4, 1.5, of gradients 0.2, 0.65, 0.45, 0.7. 2 active, 1 is exchanged: column 0 stays,
    # column 3 grows.
    config = Masked(density=HALF, structure=Block(inputs=2, outputs=1), algorithm=RigL(), schedule=EXCHANGE)
    after = one_step(config, WEIGHT, GRAD, step=10, mask=MASK)
    same(after.mask, [[1, 0, 0, 1], [1, 0, 0, 1]])
    same(after.weight, [[5, 0, 0, 0], [3, 0, 0, 0]])


def test_set_grows_at_random_where_nothing_survives() -> None:
    config = Masked(density=HALF, algorithm=SET(), schedule=EXCHANGE, storage="bits")
    after = one_step(config, WEIGHT, GRAD, step=10, mask=MASK, key=3)
    leaf = sparsifier(config, (2, 4)).leaves[PATH]
    score = np.array(leaf.random(jax.random.key(3)))
    score[:, 0] = -1.0  # 5 and 3 survive
    expected = np.zeros(8, bool)
    expected[[0, 4, *np.argsort(-score.reshape(-1))[:2]]] = True
    same(after.mask, expected.reshape(2, 4))
    same(after.weight, np.where(expected.reshape(2, 4), WEIGHT, 0))
    assert not bool(sparsifier(config, (2, 4)).replaces(jnp.int32(10)))


def test_link_scores_by_hand() -> None:
    # inputs 0: outputs {0, 1}; 1: {1, 2}; 2: {3}
    mask = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]], bool)
    found = np.asarray(link_scores(jnp.asarray(mask)))
    # link (0, 2). Inputs that share outputs with 0 and reach 2: input 1, one common neighbour, degree 2: (1 + 1) / max(1, 2 - 1) = 2.
    # Outputs that share inputs with 2 and are reached by 0: output 1, common input 1, degree 2: 2 / 1 = 2. In all 4.
    assert found[0, 2] == 4
    assert found[0, 3] == 0 and found[2, 0] == 0  # no path of length three
    # symmetric in the roles of inputs and outputs
    np.testing.assert_allclose(np.asarray(link_scores(jnp.asarray(mask.T))), found.T)


def test_path_scores_by_hand() -> None:
    # inputs 0: outputs {0, 1}; 1: {1, 2, 3}; 2: {0, 2}; 3: {2}
    mask = np.array([[1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 1, 0], [0, 0, 1, 0]], bool)
    found = np.asarray(path_scores(jnp.asarray(mask)))
    # link (0, 2), over two paths. 0 - output 1 - input 1 - 2: output 1 has inputs {0, 1}, of which 1 also reads into 2: 2 - 1 = 1.
    # Input 1 has {1, 2, 3} and shares {1} with input 0: 3 - 1 = 2. 1 / sqrt(1 * 2).
    # 0 - output 0 - input 2 - 2: output 0 has inputs {0, 2}, shares {2}: 1. Input 2 has {0, 2}, shares {0}: 1. 1 / sqrt(1 * 1).
    assert found[0, 2] == pytest.approx(2**-0.5 + 1.0)
    # link (3, 3), over 3 - output 2 - input 1 - 3 alone: output 2 has inputs {1, 2, 3} and shares {1} with output 3: 2; input 1 has
    # {1, 2, 3} and shares {2} with input 3: 2. 1 / sqrt(2 * 2).
    assert found[3, 3] == pytest.approx(0.5)
    assert found[0, 3] == pytest.approx(0.5**0.5)  # 0 - output 1 (shares 1 of 2: 1) - input 1 (shares 1 of 3: 2) - 3
    absent = ~mask
    turned = np.asarray(
        path_scores(jnp.asarray(np.stack([mask.T, mask.T])))
    )  # symmetric in the roles; two matrices at once
    np.testing.assert_allclose(turned[1].T[absent], found[absent], rtol=1e-6)


def test_path_scores_equal_a_walk_over_all_paths() -> None:
    """The matrix form against the definition: communities of paths collected as sets, links out of them counted."""
    mask = np.random.default_rng(0).random((6, 5)) < 0.4
    found = np.asarray(path_scores(jnp.asarray(mask)))
    of = [set(np.flatnonzero(row)) for row in mask]  # outputs of each input
    into = [set(np.flatnonzero(column)) for column in mask.T]
    for i, j in zip(*np.nonzero(~mask), strict=True):
        paths = [(b, a) for b in of[i] for a in into[j] if mask[a, b]]
        outputs, inputs = {b for b, _ in paths} | {j}, {a for _, a in paths} | {i}
        wanted = sum(((1 + len(into[b] - inputs)) * (1 + len(of[a] - outputs))) ** -0.5 for b, a in paths)
        assert found[i, j] == pytest.approx(wanted, rel=1e-5, abs=1e-6), (i, j)


def test_a_receptive_field_lies_near_its_output() -> None:
    uniform = jax.random.uniform(jax.random.key(0), (8, 8))
    # r near 0: weights (1 + d)^-9 and less reach no further than chance can carry them: each output's own input is drawn first.
    near = np.asarray(receptive_field(uniform, 0.02))
    assert (near.argmax(axis=0) == np.arange(8)).all()
    # the circle closes: input 7 is one step from output 0, input 4 is four
    assert (near[7, 0] > near[4, 0]) and (near[1, 0] > near[4, 0])
    # r = 1: the order of the random numbers themselves
    order = np.argsort(np.asarray(receptive_field(uniform, 1.0)).reshape(-1))
    np.testing.assert_array_equal(order, np.argsort(np.asarray(uniform).reshape(-1)))
    # by hand at r = 1 / 3 (exponent 2), 4 inputs and 2 outputs: distances of input 0 are 0 and 2, weights 1 and 1 / 9
    half = jnp.full((4, 2), 0.5)
    gap = np.asarray(receptive_field(half, 1 / 3))[0]
    assert gap[0] - gap[1] == pytest.approx(2 * np.log(3.0), rel=1e-6)


@pytest.mark.parametrize("links", ["path", pytest.param("node", marks=pytest.mark.slow)])
def test_chts_samples_links_that_paths_lead_to(links: Literal["node", "path"]) -> None:
    # inputs 0: {0, 1}, 1: {1, 2}, 2: {3}, 3: {3}. With sharpening 1000 removal is by magnitude: 0.5 is dropped, its link (1, 2) gone,
    # so that 5 of 6 survive. Paths of length three then lead from input 1 to output 0 alone; all else has score zero.
    weight = [[5, 4, 0, 0], [0, 3, 0.5, 0], [0, 0, 0, 2], [0, 0, 0, 2]]
    mask = np.asarray(weight) != 0
    schedule = dataclasses.replace(EXCHANGE, drop=1 / 6)
    algorithm = CHTs(sharpening=1e4, links=links)
    config = Masked(density=6 / 16, algorithm=algorithm, schedule=schedule)
    after = one_step(config, weight, np.zeros((4, 4)), step=50, mask=mask, key=1)
    expected = mask.copy()
    expected[1, 2], expected[1, 0] = False, True
    same(after.mask, expected)


def test_srigl_ablates_a_neuron_and_shares_its_weights() -> None:
    # 4 inputs, 3 outputs, fan-in 2 of each: 6 weights. Half are exchanged: the 3 largest, 9, 8 (column 0) and 7 (column 1), survive;
    # the 3 largest gradients elsewhere are 0.9, 0.8 (column 1) and 0.7 (column 0). Salient: 3, 3, 0. With salient = 0.5 a column
    # needs max(1, 0.5 * 2) = 1: column 2 is ablated, the others get 6 // 2 = 3 each, survivors first, then by gradient:
    # column 0: 9, 8 and the gradient 0.7; column 1: 7, 0.9, 0.8.
    weight = [[9, 0, 0], [8, 7, 0], [0, 1, 0.5], [0, 0, 0.6]]
    mask = np.asarray(weight) != 0
    grad = [[0, 0.9, 0.1], [0, 0, 0.2], [0.7, 0, 0], [0.3, 0.8, 0]]
    config = Masked(density=HALF, structure=ConstantFanIn(), algorithm=SRigL(salient=0.5), schedule=EXCHANGE)
    after = one_step(config, weight, grad, step=10, mask=mask)
    same(after.mask, [[1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 1, 0]])
    same(after.weight, [[9, 0, 0], [8, 7, 0], [0, 0, 0], [0, 0, 0]])
    # with every output protected none is ablated: fan-in 2
    config = dataclasses.replace(config, algorithm=SRigL(salient=0.5, least=1.0))
    assert one_step(config, weight, grad, step=10, mask=mask).mask.sum(0).tolist() == [2, 2, 2]


def test_magnitude_takes_the_smallest_and_they_stay_zero() -> None:
    # linear over steps 0 .. 100 to density 1/4 of 8: at step 50 half of 6 are gone: 5 stay. |w| 5, 4, 3, 2, 1.5 of 8.
    weight = [[5, -4, 0.1, 0.2], [3, 2, 1.5, -0.3]]
    config = Masked(density=0.25, algorithm=Magnitude(), schedule=LinearSparsity(every=10, end=1.0))
    sparse = sparsifier(config, (2, 4))
    assert float(sparse.schedule.progress(50, 100)) == pytest.approx(50 / 99)  # the last step of the run is number 99
    after = one_step(config, weight, GRAD, step=50)
    same(after.mask, [[1, 1, 0, 0], [1, 1, 1, 0]])
    same(after.weight, [[5, -4, 0, 0], [3, 2, 1.5, 0]])
    again = one_step(config, after.weight, GRAD, step=60, mask=after.mask)  # 8 - round(6 * 60 / 99) = 8 - 4 = 4
    same(again.mask, [[1, 1, 0, 0], [1, 1, 0, 0]])


def test_global_magnitude() -> None:
    # two matrices, density 1/2 of 4 + 4: the 4 largest of all are 5, -4, 3 of a and 2 of b
    shapes = {"blocks.0.a.weight": (2, 2), "blocks.0.b.weight": (2, 2)}
    config = Masked(density=HALF, algorithm=Magnitude(), allocation=Global(normalize=False))
    sparse = sparsifier(config, shapes)
    params = {"blocks.0.a.weight": array([[5, -4], [3, 0.5]]), "blocks.0.b.weight": array([[1, -2], [0.5, 0.1]])}
    params, _, state = jit(lambda p: sparse.init(p, {}, jax.random.key(0)))(nested(params))
    same(params["blocks"]["0"]["a"]["weight"], [[5, -4], [3, 0]])
    same(params["blocks"]["0"]["b"]["weight"], [[0, -2], [0, 0]])


def test_static_keeps_its_random_mask() -> None:
    config = Masked(density=0.25, algorithm=Static())
    after = one_step(config, WEIGHT, GRAD, step=10, moved=np.full((2, 4), 2.0))
    assert after.mask.sum() == 2
    same(after.weight, np.where(after.mask, 2.0, 0.0))
    same(after.seen, np.where(after.mask, np.asarray(GRAD, np.float32), 0.0))


def test_snip() -> None:
    # |w g|: 0.5, 0.9, 0.2 | 0.9, 0.8, 0.7: half of 6 are the 0.9 of (0, 1), the 0.9 of (1, 0) and the 0.8
    weight, grad = [[5, 1, 1], [3, 2, 1]], [[0.1, -0.9, 0.2], [0.3, 0.4, 0.7]]
    config = Masked(density=HALF, algorithm=SNIP(), schedule=OneShot())
    after = one_step(config, weight, grad, step=0)
    same(after.mask, [[0, 1, 0], [1, 1, 0]])
    same(after.weight, [[0, 1, 0], [3, 2, 0]])
    assert bool(sparsifier(config, (2, 3)).replaces(jnp.int32(0)))


def test_wanda() -> None:
    # Norms of the inputs 1 and 3 (the toy's gradient function gives their squares). Each output keeps one of two:
    # |w| x norm: 5 against 9, 4 against 3, 2 against 6
    config = Masked(density=HALF, structure=ConstantFanIn(), algorithm=Wanda(), schedule=OneShot())
    after = one_step(config, [[5, 4, 2], [3, 1, 2]], [[1, 1, 1], [9, 9, 9]], step=0)
    same(after.mask, [[0, 1, 0], [1, 0, 1]])


def test_the_flow_of_a_block_by_hand() -> None:
    # One head of one channel, width 1. x = 1. Attention: q 2, k 3, v 5, out 7; the gain q k = 6 is divided by its mean, held constant:
    # 1. x = 1 + 5 * 7 = 36. Feed-forward: gate 36 * 1 -> 1, up 36 * 2 = 72, down 1/2: x = 36 + 36 = 72, divided by its mean: R = 1.
    names = {"attention.query": 2, "attention.key": 3, "attention.value": 5, "attention.out": 7}
    names |= {"feed_forward.gate": 1, "feed_forward.up": 2, "feed_forward.down": 0.5}
    weights = {f"blocks.0.{name}.weight": array([[value]]) for name, value in names.items()}
    flow, slopes = jax.value_and_grad(total_flow)({k: -w for k, w in weights.items()}, 1, 1)
    assert float(flow) == 1.0
    shares = {path: float((slope * -weights[path]).squeeze()) for path, slope in slopes.items()}
    # w dR/dw: feed-forward 36 / 72 for up, down and gate; attention 35 / 36 of the way through the residual stream and, twice,
    # through the feed-forward (gate and up), so that x dR/dx = 36 + 36 + 36 of 72: 35 / 36 * 1.5 for each of the four
    for name, expected in {"feed_forward": 0.5, "attention": 35 / 36 * 1.5}.items():
        found = [share for path, share in shares.items() if name in path]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_ste_trains_behind_the_mask() -> None:
    # |w| before: 3, 2 of 4 stay. The optimizer sees all gradients; after it the second of each row is larger.
    config = Masked(density=HALF, algorithm=STE(), schedule=ConstantSparsity(every=5))
    after = one_step(
        config, [[3, 1], [2, 1]], [[1, 2], [3, 4]], step=5, mask=[[1, 0], [1, 0]], moved=[[2, 2.5], [1, 1.5]]
    )
    same(after.seen, [[1, 2], [3, 4]])
    same(after.weight, [[2, 2.5], [1, 1.5]])  # nothing is set to zero
    same(after.mask, [[1, 1], [0, 0]])
    same(after.moments, np.ones((2, 2)))
    sparse = sparsifier(config, (2, 2))
    params = nested({PATH: array(after.weight)})
    used = sparse.forward_params(params, after.sparsity, 6)
    same(used["blocks"]["0"]["feed_forward"]["up"]["weight"], [[2, 2.5], [0, 0]])


def test_sr_ste_decays_what_is_masked() -> None:
    config = Masked(density=HALF, algorithm=SRSTE(decay=0.5))
    after = one_step(config, [[3, 1], [2, -1]], [[1, 2], [3, 4]], step=5, mask=[[1, 0], [1, 0]])
    same(after.seen, [[1, 2 + 0.5 * 1], [3, 4 + 0.5 * -1]])


def test_top_k_ast() -> None:
    # 8 weights: A = 2 largest, B = 2 + round(0.25 * 8) = 4. D = 0.25, penalty 0.5: on A + 0.5 w, on B without A + 0.5 w / 0.25 = 2 w.
    weight = [[8, 7, 6, 5], [4, 3, 2, 1]]
    config = Masked(density=0.25, algorithm=TopKAST(extra=0.25, penalty=0.5), schedule=ConstantSparsity(every=5))
    a, b = [[1, 1, 0, 0], [0, 0, 0, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]]
    moved = [[1, 7, 6, 5], [9, 9, 9, 9]]
    after = one_step(config, weight, np.ones((2, 4)), step=5, mask=a, masks={"backward": b}, moved=moved)
    same(after.seen, [[1 + 4, 1 + 3.5, 1 + 12, 1 + 10], [0, 0, 0, 0]])
    same(after.weight, [[1, 7, 6, 5], [4, 3, 2, 1]])  # outside B nothing moves, by decay neither
    found = {n: np.asarray(m[PATH]) for n, m in sparsifier(config, (2, 4)).masks_of(after.sparsity).items()}
    # chosen from the optimizer's weights in B and the old ones outside: 7, 6, 5, 4 | 3, 2, 1, 1
    same(found["mask"], [[0, 1, 1, 0], [0, 0, 0, 0]])
    same(found["backward"], [[0, 1, 1, 1], [1, 0, 0, 0]])


def test_movement() -> None:
    # scores before 0, 0.1, 0, 0; minus gradient x weight adds 3, -2, 2, 4: 3, -1.9, 2, 4. Two of four: the first and the last.
    config = Masked(density=HALF, algorithm=Movement(), schedule=ConstantSparsity(every=5))
    after = one_step(
        config,
        [[3, 1], [-2, -1]],
        [[-1, 2], [1, 4]],
        step=5,
        mask=[[1, 1], [0, 0]],
        slots={"scores": [[0, 0.1], [0, 0]]},
    )
    np.testing.assert_allclose(jax.tree.leaves(after.sparsity["slots"])[0], [[3, -1.9], [2, 4]], rtol=1e-6)
    same(after.mask, [[1, 0], [0, 1]])
    same(after.seen, [[-1, 2], [0, 0]])


def test_abs_top_k_after_every_step() -> None:
    # density 1/3 of 12: 4. With at least one in each of 4 columns: 9, 5, 0.3, 0.2, and no room for 8 and 7.
    weight = [[9, 5, 0.3, 0.1], [8, 1, 0.2, 0.2], [7, 2, 0.1, 0.1]]
    config = Masked(density=1 / 3, algorithm=AbsTopK(least_fan_in=1, clip_rms=None))
    after = one_step(config, weight, np.ones((3, 4)), step=5, mask=np.ones((3, 4)))
    same(after.mask, [[1, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    same(after.weight, [[9, 5, 0.3, 0], [0, 0, 0, 0.2], [0, 0, 0, 0]])
    same(after.seen, np.ones((3, 4)))  # gradients and moments stay dense
    same(after.moments, np.ones((3, 4)))
    config = dataclasses.replace(config, algorithm=AbsTopK(least_fan_in=0, clip_rms=0.5))
    after = one_step(config, weight, np.ones((3, 4)), step=5, mask=np.ones((3, 4)))
    same(after.mask, [[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]])
    same(after.seen, np.full((3, 4), 0.5))  # root mean square 1 is scaled to 0.5
    sparse = sparsifier(config, (3, 4))
    assert float(sparse.rate_multiplier(jnp.int32(5))) == pytest.approx(3**0.5)  # 1 / sqrt(density)


def test_a_dense_tail_gives_all_weights_back() -> None:
    config = Masked(density=HALF, algorithm=RigL(), schedule=dataclasses.replace(EXCHANGE, end=0.8, dense_tail=0.2))
    after = one_step(config, WEIGHT, GRAD, step=80, mask=MASK)
    assert after.mask.all()
    same(after.weight, WEIGHT)
    same(after.moments, MASK)


@pytest.mark.parametrize("optimizer", [Muon(), Adafactor()])
def test_moments_that_weights_share_are_refused_by_name(optimizer) -> None:
    with pytest.raises(ConfigError, match=f"RigL with {type(optimizer).__name__}"):
        sparsifier(Masked(algorithm=RigL(), schedule=EXCHANGE), (4, 4), optimizer=optimizer)
    sparsifier(Masked(algorithm=Magnitude()), (4, 4), optimizer=optimizer)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (Masked(algorithm=SNIP()), "schedule"),
        (Masked(algorithm=Wanda(), schedule=EXCHANGE), "schedule"),
        (Masked(algorithm=SRigL(), schedule=EXCHANGE), "structure"),
        (Masked(algorithm=RigL(), allocation=Global(), schedule=EXCHANGE), "allocation"),
        (Masked(algorithm=Magnitude(), allocation=Global(), structure=ConstantFanIn()), "allocation"),
        (Masked(algorithm=Movement(), structure=Block()), "structure"),
        (Masked(algorithm=CHTs(), structure=Block(), schedule=EXCHANGE), "structure"),
        (Masked(algorithm=AbsTopK(), structure=Block()), "algorithm.least_fan_in"),
        (Masked(density=0.0), "density"),
        (Masked(exclude=("nothing",)), "exclude.0"),
        (Masked(exclude=("*",)), "exclude"),
        (Masked(structure=Block(inputs=5)), "structure.inputs"),
    ],
)
def test_impossible_choices_name_the_field(config: Masked, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sparsifier(config, (4, 4))
    assert caught.value.field == field
