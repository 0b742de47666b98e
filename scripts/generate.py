"""Continues a prompt with a trained model: python scripts/generate.py RUN "prompt" [--tokens 200 --temperature 0.8 --top-p 0.95]."""

import argparse
import pathlib
import sys

from experiments import command_line
from sparse_lm.evaluate.generate import Generator, Sampling, encode_prompt, stable_text
from sparse_lm.evaluate.load import Loaded, open_run
from sparse_lm.recipe import load_recipe
from sparse_lm.train.checkpoint_reader import CheckpointError


def main() -> int:
    """Prints the prompt and what follows as it is generated; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=pathlib.Path, help="directory of the run")
    parser.add_argument("prompt", nargs="?", default="", help="what to continue; empty: a document from its beginning")
    parser.add_argument("--tokens", type=int, default=200, help="most tokens to generate (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the most likely token (default %(default)s)")
    parser.add_argument("--top-k", type=int, help="draw from the k most likely tokens only")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="draw from the most likely mass only (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default %(default)s)")
    parser.add_argument("--samples", type=int, default=1, help="answers, generated together (default %(default)s)")
    parser.add_argument("--step", type=int, help="checkpoint; default: the newest")
    parser.add_argument("--member", type=int, default=0, help="member of a population (default %(default)s)")
    options = parser.parse_args()
    if options.samples < 1:
        parser.error(f"--samples = {options.samples}; allowed: at least 1")

    def opened() -> tuple[Loaded, Sampling]:
        sampling = Sampling(options.temperature, options.top_k, options.top_p)
        command_line.keep_compiled(load_recipe(options.run).data.directory)
        return open_run(options.run, step=options.step).member(options.member), sampling

    loaded, sampling = command_line.or_exit(opened, CheckpointError, FileNotFoundError)
    command_line.or_exit(lambda: answer(loaded, sampling, options))
    return 0


def answer(loaded: Loaded, sampling: Sampling, options: argparse.Namespace) -> None:
    """Generates and prints: one answer as it comes, several one after the other when all are done."""
    encoder = loaded.dataset.tokenizer
    prompt = encode_prompt(encoder, options.prompt)
    trained = loaded.recipe.data.sequence_length
    if len(prompt) + options.tokens > trained:
        print(f"note: {len(prompt) + options.tokens} tokens, but the model was trained on {trained}", file=sys.stderr)
    generator = Generator(loaded.definition, loaded.params, loaded.model_state, encoder.end_of_text)
    pieces = generator.stream([prompt] * options.samples, options.tokens, sampling, seed=options.seed)
    if options.samples == 1:
        shown = ""
        for (row,) in pieces:
            text = stable_text(encoder, row)
            print(text[len(shown) :], end="", flush=True)
            shown = text
        print(encoder.decode(row)[len(shown) :])
        return
    *_, rows = pieces
    for number, row in enumerate(rows):
        print(f"--- {number + 1} of {options.samples}\n{encoder.decode(row)}")


if __name__ == "__main__":
    sys.exit(main())
