"""Structures, allocations and schedules: what they keep, to the unit."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparse_lm.config import ConfigError
from sparse_lm.layers.parametrization import PathDensity
from sparse_lm.weight_sparsity.allocation import ER, ERK, ByHand, Uniform, kept
from sparse_lm.weight_sparsity.schedules import ConstantSparsity, CubicSparsity, LinearSparsity, OneShot, Periodic
from sparse_lm.weight_sparsity.selection import keep_top
from sparse_lm.weight_sparsity.structures import NM, Block, ConstantFanIn, Neuron, Structure, Unstructured

SHAPE = (2, 8, 12)  # two layers of 8 inputs, 12 outputs
DIMS = ("layers", "embed", "ffn")


def kept_by(structure: Structure, scores: np.ndarray, fraction: float, dims=DIMS) -> np.ndarray:
    layout = structure.layout("p", dims, scores.shape)
    count = jnp.int32(kept(layout.group_units, fraction))
    units = tiny.jit(lambda s: keep_top({"p": layout.keys(s)}, {"p": count}, {"p": layout.axes})["p"])(scores)
    np.testing.assert_array_equal(layout.units(layout.weights(units)), units)
    return np.asarray(layout.weights(units))


@pytest.mark.parametrize("structure", [Unstructured(), ConstantFanIn(), NM(m=4), Block(inputs=2, outputs=3), Neuron()])
def test_every_structure_keeps_its_units_exactly(structure: Structure) -> None:
    scores = np.abs(np.random.default_rng(0).normal(size=SHAPE)).astype(np.float32)
    mask = kept_by(structure, scores, 0.25)
    for layer in mask:
        if isinstance(structure, Unstructured):
            assert layer.sum() == 24
        elif isinstance(structure, ConstantFanIn):
            assert (layer.sum(0) == 2).all()
        elif isinstance(structure, NM):
            assert (layer.reshape(2, 4, 12).sum(1) == 1).all()
        elif isinstance(structure, Block):
            blocks = layer.reshape(4, 2, 4, 3).sum((1, 3))
            assert sorted(blocks.reshape(-1))[-4:] == [6] * 4 and blocks.sum() == 24
        else:
            assert sorted(layer.sum(0)) == [0] * 9 + [8] * 3


def test_blocks_by_hand() -> None:
    scores = np.array([[1, 1, 9, 0], [1, 1, 0, 0], [0, 0, 3, 3], [0, 5, 3, 2]], np.float32)
    # mean magnitudes of the 2 x 2 blocks: 1, 2.25 / 1.25, 2.75: two of four are the last and the upper right one
    mask = kept_by(Block(inputs=2, outputs=2), -scores, 0.5, ("embed", "ffn"))
    np.testing.assert_array_equal(mask, np.kron([[0, 1], [0, 1]], np.ones((2, 2))).astype(bool))


def test_neurons_follow_the_dims() -> None:
    assert Neuron().layout("p", ("embed", "ffn"), (8, 12)).block == (8, 1)
    assert Neuron().layout("p", ("ffn", "embed"), (12, 8)).block == (1, 8)
    assert Neuron(head=4).layout("p", ("embed", "heads"), (8, 12)).block == (8, 4)
    assert Neuron(head=4).layout("p", ("heads", "embed"), (12, 8)).block == (4, 8)
    with pytest.raises(ConfigError, match="head = 5"):
        Neuron(head=5).layout("p", ("heads", "embed"), (12, 8))
    with pytest.raises(ConfigError, match="m = 5.*p is 8 x 12"):
        NM(m=5).layout("p", ("embed", "ffn"), (8, 12))


def test_allocations_by_hand() -> None:
    shapes = {"a": (10, 10), "b": (10, 40), "c": (2, 10, 20)}
    # (I + O) / (I O): a 20/100, b 50/400, c 30/200 of each of two matrices. Sums of weights x share: 20 + 50 + 60 = 130.
    # density 0.26 of 900 is 234, the factor 234 / 130 = 1.8: a 0.36, b 0.225, c 0.27
    assert ER().densities(shapes, 0.26) == pytest.approx({"a": 0.36, "b": 0.225, "c": 0.27})
    # kernel of c: (2 + 10 + 20) / 400 = 0.08. 20 + 50 + 32 = 102; 234 / 102 = 2.294: a 0.459, b 0.287, c 0.184
    found = ERK().densities(shapes, 0.26)
    assert found == pytest.approx({"a": 0.458824, "b": 0.286765, "c": 0.183529}, rel=1e-5)
    # density 0.8: 720 / 130 = 5.54, a would be 1.11: dense. 620 / 110 = 5.64: b 0.705, c 0.845
    found = ER().densities(shapes, 0.8)
    assert found == pytest.approx({"a": 1.0, "b": 0.704545, "c": 0.845455}, rel=1e-5)
    for allocation in (Uniform(), ER(), ERK()):
        for density in (0.1, 0.5, 0.9, 1.0):
            found = allocation.densities(shapes, density)
            assert max(found.values()) <= 1 + 1e-12
            assert sum(d * np.prod(shapes[p]) for p, d in found.items()) == pytest.approx(900 * density)
    by_hand = ByHand(densities_by_path=(PathDensity(path="b*", density=0.5),))
    assert by_hand.densities(shapes, 0.1) == {"a": 0.1, "b": 0.5, "c": 0.1}
    with pytest.raises(ConfigError, match="densities_by_path.0.path"):
        ByHand(densities_by_path=(PathDensity(path="x", density=0.5),)).densities(shapes, 0.1)


def times(schedule, steps: int = 20) -> list[int]:
    return [step for step in range(steps) if bool(schedule.due(step, steps))]


def test_schedules_by_hand() -> None:
    cubic = CubicSparsity(every=5, end=0.75)
    assert times(cubic) == [5, 10, 15]  # the window ends at 0.75 * 20 = 15, where the last choice is
    # 1 - (1 - 5/15)^3 = 19/27, 1 - (1/3)^3 = 26/27, 1
    np.testing.assert_allclose(
        [cubic.progress(s, 20) for s in (0, 5, 10, 15, 19)], [0, 19 / 27, 26 / 27, 1, 1], rtol=1e-6
    )
    linear = LinearSparsity(every=4, begin=0.25, end=0.7)
    assert times(linear) == [8, 12, 14]  # 5 .. 14; 14 is the end
    np.testing.assert_allclose([linear.progress(s, 20) for s in (5, 8, 14)], [0, 1 / 3, 1], rtol=1e-6)
    periodic = Periodic(every=5)
    assert times(periodic) == [5, 10]
    # 0.3 / 2 (1 + cos(pi 5 / 15)) = 0.15 * 1.5; at 15 nothing
    np.testing.assert_allclose([periodic.drop_fraction(s, 20) for s in (5, 15)], [0.225, 0.0], atol=1e-7)
    assert float(periodic.progress(0, 20)) == 1
    once = OneShot(at=0.5)
    assert times(once) == [10] and [float(once.progress(s, 20)) for s in (9, 10)] == [0, 1]
    assert times(OneShot()) == [0]
    assert times(ConstantSparsity()) == []
    tail = dataclasses.replace(periodic, dense_tail=0.2)
    assert times(tail) == [5, 10, 16] and [float(tail.progress(s, 20)) for s in (15, 16)] == [1, 0]
    assert [s for s in range(20) if bool(ConstantSparsity(every=8).turns(s, 20))] == [8, 16]
