"""Declared parameters: values depend on (seed, path, shape) alone, stacked or not."""

import jax
import numpy as np
import pytest

from sparse_lm.layers.parameter import declare, map_leaves, materialize

KEY = jax.random.key(0)


def draw(shapes: dict, inits: str = "normal", scale: float = 0.5, key: jax.Array = KEY) -> dict:
    fill = [map_leaves(lambda *_, v=value: v, shapes) for value in (inits, scale)]
    return materialize(key, shapes, *fill)


def test_a_value_depends_on_its_path_and_the_key_alone() -> None:
    alone = draw({"a": {"w": (4, 3)}})
    beside = draw({"b": {"w": (4, 3)}, "a": {"v": (2,), "w": (4, 3)}})
    np.testing.assert_array_equal(alone["a"]["w"], beside["a"]["w"])
    assert (alone["a"]["w"] != beside["b"]["w"]).all()
    other = draw({"a": {"w": (4, 3)}}, key=jax.random.key(1))
    assert (alone["a"]["w"] != other["a"]["w"]).all()


def test_a_stacked_run_is_the_stack_of_its_blocks() -> None:
    stacked = draw({"blocks": {"1_to_3": {"w": (3, 4, 2)}}})["blocks"]["1_to_3"]["w"]
    single = draw({"blocks": {str(n): {"w": (4, 2)} for n in (1, 2, 3)}})["blocks"]
    np.testing.assert_array_equal(stacked, np.stack([single[str(n)]["w"] for n in (1, 2, 3)]))


def test_deviation_is_as_asked_and_outliers_are_cut() -> None:
    w = np.asarray(draw({"w": (200, 200)}, scale=0.1)["w"])
    assert w.std() == pytest.approx(0.1, rel=0.02)
    assert abs(w.mean()) < 0.1 * 4 / 200
    assert abs(w).max() <= 0.1 * 3 / 0.98658 * (1 + 1e-6)


def test_zeros_and_ones() -> None:
    assert draw({"w": (3,)}, "zeros")["w"].tolist() == [0, 0, 0]
    assert draw({"w": (3,)}, "ones")["w"].tolist() == [1, 1, 1]


def test_dims_must_name_every_dimension() -> None:
    with pytest.raises(AssertionError, match="does not name the dimensions"):
        declare((3, 4), ("embed",))


def test_map_leaves_takes_tuples_as_leaves() -> None:
    seen = map_leaves(lambda path, dims, shape: (path, dims, shape), {"a": {"b": ("x", "y")}}, {"a": {"b": (1, 2)}})
    assert seen == {"a": {"b": ("a.b", ("x", "y"), (1, 2))}}
