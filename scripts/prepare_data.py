"""Prepare a dataset ahead of training: corpus, tokenizer and token shards, in parallel, resumable.

    python scripts/prepare_data.py                                          the packaged corpus and its 8192-token BPE
    python scripts/prepare_data.py --with source=files --sources.0.paths books/ notes.jsonl.gz --tokenizer.vocab-size 32768
    python scripts/prepare_data.py --with source=tfds --sources.0.name c4/en --with tokenizer=huggingface --tokenizer.path t.json
    python scripts/prepare_data.py --from runs/my_run/config.json --processes 16

Finished shards are kept, so a stopped run continues where it was. Training with the same data config then finds them; copied to
another machine with their folder, they are found there too, without the input. --help lists every setting.
"""

import json
import os
import pathlib
import sys

import tyro

from sparse_lm.config import ConfigError, from_dict, swap, validate
from sparse_lm.data.pipeline import DataConfig, prepare
from sparse_lm.data.source import MissingSource


def take(arguments: list[str], flag: str) -> list[str]:
    """Removes every `flag value` and `flag=value` from the arguments and returns the values."""
    values = []
    while (at := next((i for i, a in enumerate(arguments) if a == flag or a.startswith(f"{flag}=")), None)) is not None:
        name, separator, value = arguments.pop(at).partition("=")
        if not separator:
            if at == len(arguments):
                raise SystemExit(f"{name} needs a value")
            value = arguments.pop(at)
        values.append(value)
    return values


def configure(arguments: list[str]) -> tuple[DataConfig, int]:
    """Reads --from, --with and --processes, then the typed flags of the config; returns the config and the processes."""
    arguments = list(arguments)
    files, swaps, processes = take(arguments, "--from"), take(arguments, "--with"), take(arguments, "--processes")
    config = DataConfig()
    for name in files:
        stored = json.loads(pathlib.Path(name).read_text())
        config = from_dict(DataConfig, stored.get("data", stored))
    for assignment in swaps:
        config = swap(config, assignment)
    config = tyro.cli(DataConfig, default=config, args=arguments, description=__doc__)
    count = processes[-1] if processes else str(os.cpu_count() or 1)
    if not count.isdigit() or int(count) < 1:
        raise ConfigError("processes", count, "a positive number")
    return validate(config), int(count)


def main() -> None:
    try:
        config, processes = configure(sys.argv[1:])
        dataset = prepare(config, processes=processes, report=lambda line: print(line, flush=True))
    except (ValueError, MissingSource) as error:
        raise SystemExit(str(error)) from None
    print(f"{dataset.train_tokens:,} unique training tokens")


if __name__ == "__main__":
    main()
