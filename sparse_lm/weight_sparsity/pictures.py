"""Pictures of masks on disk: RUN/sparsity/STEP.npz at every checkpoint, for the block maps of the report."""

import pathlib
from typing import Any

import jax
import numpy as np

from sparse_lm.layers.parameter import RUN_KEY
from sparse_lm.layers.tree_paths import flatten
from sparse_lm.weight_sparsity.door import Sparsifier


class MaskPictures:
    """Writes coarse densities of every sparse matrix of a run; of a population, those of its first member."""

    def __init__(self, sparsifier: Sparsifier, run_dir: pathlib.Path, *, population: bool):
        self.directory, self.active = run_dir / "sparsity", bool(sparsifier.description())

        def draw(sparsity: Any) -> Any:
            return sparsifier.pictures(jax.tree.map(lambda leaf: leaf[0], sparsity) if population else sparsity)

        self._draw = jax.jit(draw)

    def __call__(self, step: int, sparsity: Any) -> None:
        """Writes the masks after `step` steps."""
        if not self.active:
            return
        found = unstacked(jax.device_get(self._draw(sparsity)))
        if jax.process_index():
            return
        self.directory.mkdir(exist_ok=True)
        part = self.directory / f"{step}.part.npz"
        np.savez_compressed(part, **{path: cells.astype(np.float16) for path, cells in found.items()})
        part.replace(self.directory / f"{step}.npz")


def unstacked(pictures: Any) -> dict[str, np.ndarray]:
    """Returns {unrolled path: density of cells [rows, columns]}."""
    out: dict[str, np.ndarray] = {}
    for path, cells in flatten(pictures).items():
        parts = path.split(".")
        run = next((i for i, part in enumerate(parts) if RUN_KEY.match(part)), None)
        if run is None:
            out[path] = cells
            continue
        first = int(parts[run].partition("_")[0])
        for n, own in enumerate(cells):
            out[".".join([*parts[:run], str(first + n), *parts[run + 1 :]])] = own
    return out


def read_pictures(run_dir: pathlib.Path) -> dict[int, dict[str, np.ndarray]]:
    """Returns {step: {unrolled path: density of cells}} of a run, ascending."""
    paths = sorted((run_dir / "sparsity").glob("*.npz"), key=lambda path: path.stem.zfill(12))
    out = {}
    for path in paths:
        if path.stem.isdigit():
            with np.load(path) as arrays:
                out[int(path.stem)] = {name: arrays[name].astype(np.float32) for name in arrays.files}
    return out
