"""Reading a checkpoint's arrays into place: stacked, cut, converted and in host memory, against the arrays that were written."""

import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore
from etils import epath

from sparse_lm.train import checkpoint_arrays
from sparse_lm.train.checkpoint_arrays import Leaf, read_leaves

DRAW = np.random.default_rng(0)
ARRAYS = {
    **{f"params.blocks.{n}.up": DRAW.normal(size=(2, 6, 4)).astype(np.float32) for n in range(3)},
    **{f"params.blocks.{n}.bias": np.float32(n + 0.5) for n in range(3)},
    "tables.rows.a": DRAW.normal(size=(5, 4)).astype(ml_dtypes.bfloat16),
    "step": np.int32(7),
    "mask": DRAW.random((3, 3)) < 0.5,
    "none": np.zeros((0, 4), np.float32),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> epath.Path:
    directory = epath.Path(tmp_path_factory.mktemp("a place") / "state")
    for name, value in ARRAYS.items():
        spec = checkpoint_arrays._spec(directory, name)
        tensorstore.open(spec, create=True, dtype=value.dtype, shape=value.shape).result().write(value).result()
    return directory


def device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def blocks(name: str) -> tuple[str, ...]:
    return tuple(f"params.blocks.{n}.{name}" for n in range(3))


@pytest.mark.parametrize("least", [1, 1 << 24])  # a leaf at a time, all at once
def test_leaves_are_what_was_written(store: epath.Path, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_arrays, "LEAST_IN_FLIGHT", least)
    float32, bfloat16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
    leaves = [
        Leaf(blocks("up"), 0, (3, 2, 6, 4), float32, device()),
        Leaf(blocks("up"), 1, (2, 3, 6, 4), float32, device()),  # members before layers
        Leaf(blocks("bias"), 0, (3,), float32, device()),
        Leaf(("tables.rows.a",), None, (5, 4), bfloat16, None),
        Leaf(("tables.rows.a",), None, (5, 4), float32, device()),
        Leaf(("step",), None, (), np.dtype(np.int32), device()),
        Leaf(("mask",), None, (3, 3), np.dtype(bool), device()),
        Leaf(("none",), None, (0, 4), float32, device()),
    ]
    up = [ARRAYS[name] for name in blocks("up")]
    expected = [
        np.stack(up),
        np.stack(up, 1),
        np.array([0.5, 1.5, 2.5], np.float32),
        *(ARRAYS["tables.rows.a"].astype(dtype) for dtype in (bfloat16, float32)),
        *(ARRAYS[name] for name in ("step", "mask", "none")),
    ]
    for leaf, found, wanted in zip(leaves, read_leaves(store, leaves), expected, strict=True):
        assert found.shape == leaf.shape and found.dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(found), wanted)
        if leaf.sharding is None:
            assert isinstance(found, np.ndarray) and found.flags.writeable
        else:
            assert isinstance(found, jax.Array) and found.sharding == leaf.sharding


def test_a_missing_array_is_named(store: epath.Path) -> None:
    leaf = Leaf(("params.head",), None, (2,), np.dtype(np.float32), None)
    with pytest.raises(ValueError, match=r"params\.head"):
        read_leaves(store, [leaf])


def test_a_file_that_is_cut_is_an_error(store: epath.Path, tmp_path: pathlib.Path) -> None:
    copy = tmp_path / "state"
    shutil.copytree(store, copy)
    for file in copy.rglob("*"):
        if file.is_file() and "manifest" not in file.name:
            file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(ValueError):
        read_leaves(epath.Path(copy), [Leaf(("mask",), None, (3, 3), np.dtype(bool), None)])
