"""Trains a recipe: python scripts/pretrain.py RECIPE [--run-dir DIR] [--smoke] [--with kind=name] [--field.name value ...]."""

import pathlib
import sys

from experiments import command_line
from sparse_lm.evaluate.finish import finish
from sparse_lm.parallel.distributed import join
from sparse_lm.train.checkpoint_reader import CheckpointError
from sparse_lm.train.loop import TrainingDiverged, train


def main() -> int:
    """Trains, evaluates, samples and reports; returns the exit code."""
    arguments = command_line.parser(__doc__)
    arguments.add_argument(
        "--run-dir", help="directory of the run; default runs/NAME; an existing run goes on where it stopped"
    )
    arguments.add_argument(
        "--require-kernels", action="store_true", help="fail if an operation falls back to plain JAX on a GPU or TPU"
    )
    recipe, options = command_line.read_recipe(__doc__, arguments)
    run_dir = pathlib.Path(options.run_dir or f"runs/{recipe.name}")
    command_line.keep_compiled(recipe.data.directory)

    def run() -> tuple[int, bool]:
        with join(recipe.distributed) as cluster:
            return train(recipe, run_dir, cluster=cluster, require_kernels=options.require_kernels), cluster.first

    code, first = command_line.or_exit(run, TrainingDiverged, CheckpointError, FileNotFoundError)
    if code == 0 and first:
        finish(run_dir)
    return code


if __name__ == "__main__":
    sys.exit(main())
