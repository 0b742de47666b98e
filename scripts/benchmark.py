"""Benchmarks: `kernels` times kernels against dense products and other libraries, `tune` finds tilings, `train` times a recipe,
`compare` times the steps of several recipes in turn,
`routing` times a mixture-of-experts layer,
`memory` times tables of several sizes, `checkpoint` saves and restores, `scaling` compares all devices with one.

python scripts/benchmark.py train dense_400m --loop-steps 60 --json docs/benchmarks/training.json
python scripts/benchmark.py compare wide_dense wide_sparse_25 wide_sparse_10 --json docs/benchmarks/wide_sparse_h200.json
python scripts/benchmark.py routing --json docs/benchmarks/routing_h100.json
python scripts/benchmark.py memory quickstart --with memory=engram --with row_optimizer=row_adagrad
python scripts/benchmark.py scaling dense_1b --json docs/benchmarks/scaling.json
python scripts/benchmark.py kernels --op block_sparse --json docs/benchmarks/block_sparse_h100.json --picture docs/benchmarks/block_sparse_h100.png
python scripts/benchmark.py kernels --op grouped --json docs/benchmarks/grouped_h100.json --picture docs/benchmarks/grouped_h100.png
python scripts/benchmark.py tune --op block_sparse
python scripts/benchmark.py checkpoint --gigabytes 2 --stall-steps 300
"""

import argparse
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))


def _beside(path: str | None, name: str, alone: bool) -> str | None:
    """`path`, or where several operations share one: `path` with the operation's name before its ending."""
    if path is None or alone:
        return path
    file = pathlib.Path(path)
    return str(file.with_stem(f"{file.stem}_{name}"))


def _regular_expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None
    return text


def _of_each(operations: list[str], run: Callable[[str], object]) -> None:
    """Runs what --only and --backend ask for; if no operation has any of it, that is an error."""
    from pallas_kernels.benchmark.timing import NoneChosenError

    missing = []
    for operation in operations:
        try:
            run(operation)
        except NoneChosenError as error:
            missing.append(f"error: {operation}: {error}")
    if len(missing) == len(operations):
        print(*missing, sep="\n", file=sys.stderr)
        sys.exit(2)


def kernels(options: argparse.Namespace) -> None:
    """Times the operations named by --op, part after part."""
    from pallas_kernels.benchmark import parts

    alone = options.op != "all"

    def run(operation: str) -> None:
        files = {
            f"{name}_path" if name == "json" else name: _beside(getattr(options, name), operation, alone)
            for name in ("json", "picture")
        }
        parts.run(operation, backend=options.backend, only=options.only, **files)

    every = ["block_sparse", "grouped", "libraries", "fused", "feed_forward", "lookup"]
    _of_each([options.op] if alone else every, run)


def tune(options: argparse.Namespace) -> None:
    """Times every candidate tiling of the operations named by --op."""
    from pallas_kernels.benchmark.timing import has_device_timer
    from pallas_kernels.benchmark.tuning import tune_block_sparse, tune_grouped

    if not has_device_timer():
        sys.exit("benchmark.py tune: needs a CUDA GPU, JAX sees none here")
    tuners, alone = {"block_sparse": tune_block_sparse, "grouped": tune_grouped}, options.op != "all"

    def run(operation: str) -> None:
        tuners[operation](_beside(options.json, operation, alone), options.only)

    _of_each([options.op] if alone else list(tuners), run)


def training(arguments: list[str]) -> None:
    """Times the bare step of a recipe and, with --loop-steps, the whole loop without and with saves."""
    from experiments import command_line
    from sparse_lm.train.benchmark import report, time_loop, time_step

    sys.argv = [f"{sys.argv[0]} train", *arguments]
    description = "Times a recipe on this machine."
    parser = command_line.parser(description)
    parser.add_argument("--repeats", type=int, default=10, help="timed steps")
    parser.add_argument(
        "--loop-steps", type=int, default=0, help="steps of the whole loop with real data; 0: bare step only"
    )
    parser.add_argument("--save-every", type=int, default=0, help="also time the loop with a save every so many steps")
    parser.add_argument("--json", help="write the numbers to this file")
    recipe, options = command_line.read_recipe(description, parser)
    rows: list[dict] = []
    path = pathlib.Path(options.json) if options.json else None
    report(f"{recipe.name}, step", time_step(recipe, repeats=options.repeats), rows, path)
    if options.loop_steps:
        report(f"{recipe.name}, loop", time_loop(recipe, steps=options.loop_steps), rows, path)
    if options.loop_steps and options.save_every:
        saving = time_loop(recipe, steps=options.loop_steps, save_every=options.save_every)
        report(f"{recipe.name}, loop, save every {options.save_every}", saving, rows, path)


def compare(options: argparse.Namespace) -> None:
    """Times the bare steps of recipes in turn in one process; ratios are to the first."""
    import jax

    import experiments
    from experiments.command_line import or_exit
    from experiments.smoke import smoke
    from sparse_lm.train.side_by_side import side_by_side

    recipes = or_exit(lambda: [experiments.load(name) for name in options.recipes])
    recipes = [smoke(recipe) for recipe in recipes] if options.smoke else recipes
    rows = or_exit(lambda: side_by_side(recipes, rounds=options.rounds))
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for row in rows:
        mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}"
        print(
            f"{row['name']:24s} {row['parameters'] / 1e6:8.1f} M parameters  {row['step_ms']:8.2f} ms a step, {row['times_faster']:.2f} "
            f"times as fast{mfu}  parameters and optimizer {row['state_gb']:.3f} GB, {row['state_ratio']:.3f} of the first"
        )
        for name, milliseconds in list(row["kernels_ms"].items())[: options.kernels]:
            print(f"    {milliseconds:8.3f} ms  {name}")
    if options.json:
        about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
        pathlib.Path(options.json).write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def checkpoints(options: argparse.Namespace) -> None:
    """Times saving and restoring a made-up state of --gigabytes, and what saves take from training a small model."""
    import json
    import tempfile

    from sparse_lm.train import checkpoint_benchmark

    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        found = checkpoint_benchmark.benchmark(pathlib.Path(directory), options.gigabytes)
    if options.stall_steps:
        import experiments

        recipe = experiments.load("quickstart")
        found["stall"] = checkpoint_benchmark.stall(recipe, options.stall_steps, options.stall_every)
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        pathlib.Path(options.json).write_text(text + "\n")


def routing(options: argparse.Namespace) -> None:
    """Times a mixture-of-experts layer against a dense one of equal active size, on several libraries' products."""
    from sparse_lm.routing import benchmark

    benchmark.run(only=options.only, seconds=options.seconds, path=options.json)


def scaling(arguments: list[str]) -> int:
    """Times a recipe on one device and over data and fsdp of all devices, and compares steps over every axis with one device."""
    from experiments import command_line
    from sparse_lm.train.scaling import run

    sys.argv = [f"{sys.argv[0]} scaling", *arguments]
    description = "What a mesh costs on this machine."
    parser = command_line.parser(description)
    parser.add_argument("--repeats", type=int, default=10, help="timed steps")
    parser.add_argument("--json", help="write the numbers to this file")
    recipe, options = command_line.read_recipe(description, parser)
    return run(recipe, options.repeats, pathlib.Path(options.json) if options.json else None)


def memory(arguments: list[str]) -> None:
    """Times the step of a recipe with a memory for tables of several sizes, and hashing."""
    from experiments import command_line
    from sparse_lm.train import memory_benchmark

    sys.argv = [f"{sys.argv[0]} memory", *arguments]
    description = "Times a memory on this machine."
    parser = command_line.parser(description)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000], help="rows of a table"
    )
    parser.add_argument("--repeats", type=int, default=60, help="timed steps")
    parser.add_argument(
        "--text",
        choices=list(memory_benchmark.TEXTS),
        default="words",
        help="how tokens repeat: as in text, or drawn one by one",
    )
    parser.add_argument("--generate", action="store_true", help="also time generation, with each size")
    parser.add_argument(
        "--together",
        action="store_true",
        help="hold the tables of all sizes at once and let them take turns, for a machine that others use too",
    )
    parser.add_argument("--json", help="write the numbers to this file")
    recipe, options = command_line.read_recipe(description, parser)
    found = memory_benchmark.measure(
        recipe,
        options.sizes,
        repeats=options.repeats,
        text=options.text,
        generation=options.generate,
        together=options.together,
    )
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs one subcommand; each imports what it needs only then."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    from pallas_kernels.backend import BACKEND_NAMES

    commands = parser.add_subparsers(dest="command", required=True)
    for name, function, operations, what, example in (
        (
            "kernels",
            kernels,
            ["block_sparse", "grouped", "libraries", "norms", "fused", "feed_forward", "lookup", "all"],
            "parts",
            "torch BSR",
        ),
        ("tune", tune, ["block_sparse", "grouped", "all"], "candidates", "8192x8192 0.5 product_transposed"),
    ):
        command = commands.add_parser(name, help=function.__doc__)
        command.add_argument("--op", choices=operations, default="all", help="which operations")
        command.add_argument("--json", help="write the numbers to this file")
        command.add_argument(
            "--only",
            type=_regular_expression,
            default="",
            help=f"only {what} in whose name this regular expression is found, for example '{example}'",
        )
        command.set_defaults(function=function)
        if name == "kernels":
            command.add_argument("--picture", help="draw the speed-ups into this file")
            command.add_argument(
                "--backend",
                choices=BACKEND_NAMES,
                help="time this backend instead of the automatic choice, of operations that have one",
            )
    commands.add_parser("train", help=training.__doc__, add_help=False)
    command = commands.add_parser("compare", help=compare.__doc__)
    command.add_argument("recipes", nargs="+", help="names of recipes; the first is what others are compared with")
    command.add_argument("--smoke", action="store_true", help="tiny variants of the recipes")
    command.add_argument("--rounds", type=int, default=4, help="turns that each recipe gets")
    command.add_argument(
        "--kernels", type=int, default=12, help="print so many kernels of a step, the longest, on a GPU"
    )
    command.add_argument("--json", help="write the numbers to this file")
    command.set_defaults(function=compare)
    command = commands.add_parser("routing", help=routing.__doc__)
    command.add_argument("--seconds", type=float, default=1e9, help="begin no line after so long")
    command.add_argument("--only", nargs="+", default=(), help="names of lines; default all")
    command.add_argument("--json", help="write the numbers to this file")
    command.set_defaults(function=routing)
    command = commands.add_parser("checkpoint", help=checkpoints.__doc__)
    command.add_argument("--gigabytes", type=float, default=2.0, help="size of the state")
    command.add_argument("--directory", help="a folder on the disk to be measured; default: that of temporary files")
    command.add_argument("--stall-steps", type=int, default=0, help="also train the quickstart for so many steps")
    command.add_argument("--stall-every", type=int, default=50, help="steps between two saves of that run")
    command.add_argument("--json", help="write the numbers to this file")
    command.set_defaults(function=checkpoints)
    commands.add_parser("scaling", help=scaling.__doc__, add_help=False)
    commands.add_parser("memory", help=memory.__doc__, add_help=False)
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["scaling"]:
        sys.exit(scaling(arguments[1:]))
    if arguments[:1] == ["train"]:
        return training(arguments[1:])
    if arguments[:1] == ["memory"]:
        return memory(arguments[1:])
    options = parser.parse_args(arguments)
    # PyTorch shares the GPU with JAX here, so JAX must not take most of its memory at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    options.function(options)


if __name__ == "__main__":
    main()
