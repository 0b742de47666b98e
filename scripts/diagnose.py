"""Says what the experts of a run do: python scripts/diagnose.py RUN [--text FILE ...] [--step N] [--member I]."""

import argparse
import pathlib
import sys
from typing import Any

from experiments import command_line
from sparse_lm.evaluate.finish import write_json
from sparse_lm.evaluate.load import open_run
from sparse_lm.evaluate.routing_analysis import Analyst, analyse
from sparse_lm.evaluate.routing_page import write_page
from sparse_lm.recipe import load_recipe
from sparse_lm.train.checkpoint_reader import CheckpointError


def main() -> int:
    """Writes RUN/routing.json and RUN/routing.html, prints a summary and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=pathlib.Path, help="directory of the run")
    parser.add_argument("--step", type=int, help="checkpoint; default: the newest")
    parser.add_argument("--member", type=int, default=0, help="member of a population (default %(default)s)")
    parser.add_argument(
        "--text",
        action="append",
        type=pathlib.Path,
        default=[],
        help="a text file to compare routing on; may be repeated",
    )
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of each domain (default %(default)s)")
    parser.add_argument(
        "--ablation-tokens",
        type=int,
        default=8192,
        help="tokens on which each expert is left out in turn; 0: none (default %(default)s)",
    )
    options = parser.parse_args()
    if options.tokens < 1 or options.ablation_tokens < 0:
        parser.error("--tokens and --ablation-tokens; allowed: at least 1, and 0 or above")

    def run() -> tuple[str, dict[str, Any]]:
        command_line.keep_compiled(load_recipe(options.run).data.directory)
        analyst = Analyst(open_run(options.run, step=options.step).member(options.member))
        other = {path.name: [path.read_text(encoding="utf-8", errors="replace")] for path in options.text}
        found = analyse(analyst, max_tokens=options.tokens, ablation_tokens=options.ablation_tokens, other=other)
        return analyst.loaded.recipe.name, found

    name, found = command_line.or_exit(run, CheckpointError, FileNotFoundError)
    write_json(options.run / "routing.json", found)
    path = write_page(options.run, name, found)
    for layer, numbers in found["layers"].items():
        effects = numbers["ablation"]
        worth = f", leaving one out costs {min(effects):+.4f} to {max(effects):+.4f} nats" if effects else ""
        shift = ", ".join(f"{domain} {value:.4f}" for domain, value in numbers["shift"].items())
        print(f"blocks.{layer}: {numbers['experts']} experts; shift (KL, nats): {shift}{worth}")
    print(f"{found['paths']['distinct']:,} paths explain {found['paths']['explained']:.1%} of the variance of the loss")
    print(f"Written to {path} and {options.run / 'routing.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
