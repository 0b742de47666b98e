"""Prepares the data of a recipe ahead of training: corpus, tokenizer and token shards, in parallel, resumable.

    python scripts/prepare_data.py quickstart
    python scripts/prepare_data.py quickstart --with source=files --data.sources.0.paths books/ notes.jsonl.gz
    python scripts/prepare_data.py dense_400m --processes 16 --with source=tfds --data.sources.0.name c4/en

Finished shards are kept, so a stopped run goes on where it was. Training with the same data config finds them; with the data
directory copied to another machine it finds them there too, without the input and without tensorflow-datasets.
"""

import os
import sys


def main() -> int:
    """Prepares and says what there is; returns the exit code."""
    # Imported here, because every spawned process imports this file and needs none of it.
    from experiments import command_line
    from sparse_lm.data.pipeline import prepare
    from sparse_lm.data.source import MissingSource

    summary = (__doc__ or "").splitlines()[0]
    arguments = command_line.parser(summary)
    arguments.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="processes that tokenize at once")
    recipe, options = command_line.read_recipe(summary, arguments)

    def report(line: str) -> None:
        print(line, flush=True)

    dataset = command_line.or_exit(
        lambda: prepare(recipe.data, processes=options.processes, report=report), MissingSource, ImportError
    )
    print(f"{dataset.train_tokens:,} unique training tokens in {recipe.data.directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
