"""Benchmarks: `kernels` times the kernels against dense products and other libraries, `tune` finds their tilings.

python scripts/benchmark.py kernels --op block_sparse --json docs/benchmarks/block_sparse_h100.json
python scripts/benchmark.py kernels --op grouped
python scripts/benchmark.py tune --op block_sparse
"""

import argparse
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))


def kernels(options: argparse.Namespace) -> None:
    """Times the operations named by --op."""
    if options.op in ("block_sparse", "norms", "all"):
        from pallas_kernels.benchmark import block_sparse

        cases = [block_sparse.Case(*block_sparse.SQUARE, 128, 1.0)] if options.op == "norms" else None
        block_sparse.run(options.json, options.picture, cases, with_torch=not options.no_torch)
    if options.op in ("grouped", "all"):
        from pallas_kernels.benchmark import grouped

        grouped.main(["table"] + (["--json", f"{options.json}.grouped.json"] if options.json else []))


def tune(options: argparse.Namespace) -> None:
    """Times every candidate tiling of the operations named by --op."""
    if options.op in ("block_sparse", "all"):
        from pallas_kernels.benchmark import block_sparse

        block_sparse.tune(options.json)
    if options.op in ("grouped", "all"):
        from pallas_kernels.benchmark import grouped

        grouped.main(["tune"])


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs one subcommand; each imports what it needs only then."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function, operations in (
        ("kernels", kernels, ["block_sparse", "grouped", "norms", "all"]),
        ("tune", tune, ["block_sparse", "grouped", "all"]),
    ):
        command = commands.add_parser(name, help=function.__doc__)
        command.add_argument("--op", choices=operations, default="all", help="which operations")
        command.add_argument("--json", help="write the numbers to this file")
        command.set_defaults(function=function)
        if name == "kernels":
            command.add_argument("--picture", help="draw speed-up against density into this file")
            command.add_argument("--no-torch", action="store_true", help="leave out PyTorch's BSR linear")
    options = parser.parse_args(arguments)
    # PyTorch shares the GPU with JAX here, so JAX must not take most of its memory at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    options.function(options)


if __name__ == "__main__":
    main()
