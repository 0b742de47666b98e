"""Evaluates a run on its held-out text: python scripts/evaluate.py RUN [--step N] [--member I] [--domain NAME ...]."""

import argparse
import pathlib
import sys
from typing import Any

from experiments import command_line
from sparse_lm.evaluate import finish, memory
from sparse_lm.evaluate.compression import PRIMING_BYTES
from sparse_lm.evaluate.load import open_run
from sparse_lm.evaluate.perplexity import chosen_domains
from sparse_lm.recipe import load_recipe
from sparse_lm.train.checkpoint_reader import CheckpointError


def main() -> int:
    """Prints the table, writes RUN/evaluation.json and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=pathlib.Path, help="directory of the run")
    parser.add_argument("--step", type=int, help="checkpoint; default: the newest")
    parser.add_argument("--member", type=int, help="one member of a population; default: all at once, mean and spread")
    parser.add_argument("--domain", action="append", default=[], help="one domain, may be repeated; default: all")
    parser.add_argument("--max-tokens", type=int, help="stop each domain after so many tokens; default: all documents")
    parser.add_argument(
        "--batch-size", type=int, help="sequences in a batch; default: the recipe's validation.batch_size"
    )
    parser.add_argument(
        "--priming-mb",
        type=float,
        default=PRIMING_BYTES / 1e6,
        help="most training text of a domain, in MB, that primes xz (default %(default)g; 0: leave primed xz out)",
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="instead: loss with the memory's rows and with zeros, by n-gram frequency, and how full its tables are",
    )
    options = parser.parse_args()
    for name in ("max_tokens", "batch_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} = {value}; allowed: at least 1")

    def run() -> dict[str, Any]:
        command_line.keep_compiled(load_recipe(options.run).data.directory)
        loaded = open_run(options.run, step=options.step)
        if options.member is not None:
            loaded = loaded.member(options.member)
        if options.memory:
            names = chosen_domains(loaded, options.domain)
            size = options.batch_size or loaded.recipe.validation.batch_size
            return memory.evaluate_memory(loaded, names, batch_size=size, max_tokens=options.max_tokens)
        return finish.evaluate(
            loaded,
            options.domain,
            batch_size=options.batch_size,
            max_tokens=options.max_tokens,
            priming_bytes=int(options.priming_mb * 1e6),
        )

    evaluation = command_line.or_exit(run, CheckpointError, FileNotFoundError)
    if options.memory:
        finish.write_json(options.run / "memory.json", evaluation)
        print("\n".join(memory.summary(evaluation)))
        print(f"Written to {options.run / 'memory.json'}")
        return 0
    finish.write_json(options.run / "evaluation.json", evaluation)
    finish.show(evaluation, finish.output())
    print(f"Written to {options.run / 'evaluation.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
