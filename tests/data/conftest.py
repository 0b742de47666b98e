"""A tiny corpus of two domains, prepared once per test run."""

import json
import pathlib
import random

import pytest

from sparse_lm.data.files import Files
from sparse_lm.data.pipeline import DataConfig, prepare
from sparse_lm.data.tokenizer import BPE

WORDS = (
    "the quick brown fox jumps over a lazy dog while 12 grey wolves sing of snow, rivers and iron — café naïve".split()
)


def write_records(path: pathlib.Path, count: int, seed: int = 0) -> None:
    """Writes JSON lines with domains `even` and `odd` and texts of very different lengths."""
    draw = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            words = [draw.choice(WORDS) for _ in range(draw.choice([1, 5, 40, 200]))]
            record = {"text": f"{number}: " + " ".join(words), "domain": "odd" if number % 2 else "even"}
            file.write(json.dumps(record) + "\n")


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("records") / "tiny.jsonl"
    write_records(path, 120)
    return path


@pytest.fixture(scope="session")
def config(records: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(
        sources=(Files(paths=(str(records),), validation_fraction=0.2),),
        tokenizer=BPE(vocab_size=300),
        sequence_length=48,
        batch_size=4,
        directory=str(tmp_path_factory.mktemp("data")),
    )


@pytest.fixture(scope="session")
def dataset(config: DataConfig):
    return prepare(config, report=lambda line: None)
