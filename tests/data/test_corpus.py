"""TFDS directories: written whole or not at all, read in order without TensorFlow, found by name."""

import pathlib
import subprocess
import sys

import pytest

from sparse_lm.config import validate
from sparse_lm.data import corpus
from sparse_lm.data.corpus import Tfds, write_corpus
from sparse_lm.data.files import Files
from sparse_lm.data.pipeline import DataConfig, prepare
from sparse_lm.data.source import MissingSource
from sparse_lm.data.tokenizer import Bytes

tfds = pytest.importorskip("tensorflow_datasets")


def quiet(line):
    pass


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    """A TFDS data directory with a prepared dataset little/en 1.2.0 and an older version beside it."""
    root = tmp_path_factory.mktemp("tfds")

    class Little(tfds.core.GeneratorBasedBuilder):
        """A stand-in for a catalogue set."""

        VERSION = tfds.core.Version("1.2.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="en", version="1.2.0")]

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "url": tfds.features.Text()}),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(0, 50), "validation": self._generate_examples(50, 60)}

        def _generate_examples(self, first, last):
            for i in range(first, last):
                yield i, {"text": f"web page number {i}", "url": f"u{i}"}

    Little(data_dir=str(root), file_format="array_record", config="en").download_and_prepare()
    old = root / "little" / "en" / "1.0.0"
    old.mkdir()
    (old / "dataset_info.json").write_text((root / "little" / "en" / "1.2.0" / "dataset_info.json").read_text())
    return root


def test_corpus_keeps_order_and_notes(records, tmp_path):
    source = Files(paths=(str(records),), license="CC0", validation_fraction=0.1)
    lines = []
    written = write_corpus(source, tmp_path, lines.append)
    expected = source.documents(quiet)
    for split in ("train", "validation"):
        assert list(written.open(split)) == list(expected[split])
        assert written.size(split)[0] == len(written.open(split))
    assert written.open("train")[0].license == "CC0"
    assert any("120 documents; 12 for validation" in line for line in lines)
    lines.clear()
    assert write_corpus(source, tmp_path, lines.append) == written and not lines


def test_an_interrupted_corpus_is_not_trusted(records, tmp_path, monkeypatch):
    source = Files(paths=(str(records),))
    real = Files._records

    def stops(self, file):
        for number, record in enumerate(real(self, file)):
            if number == 30:
                raise KeyboardInterrupt
            yield record

    monkeypatch.setattr(Files, "_records", stops)
    with pytest.raises(KeyboardInterrupt):
        write_corpus(source, tmp_path, quiet)
    monkeypatch.setattr(Files, "_records", real)
    written = write_corpus(source, tmp_path, quiet)
    assert len(written.open("train")) + len(written.open("validation")) == 120


def test_a_prepared_dataset_by_name(catalogue, tmp_path):
    source = validate(Tfds(name="little/en", directory=str(catalogue), domain="web"))
    assert source.locate().name == "1.2.0"
    config = DataConfig(sources=(source,), tokenizer=Bytes(), directory=str(tmp_path), sequence_length=64)
    dataset = prepare(config, report=quiet)
    assert dataset.domains == ("web",)
    assert sorted(dataset.training_text("web")) == sorted(f"web page number {i}" for i in range(50))
    assert len(dataset.validation_text("web")) == 10
    assert not (tmp_path / "corpus").exists(), "prepared directories are read in place"


def test_split_expressions(catalogue):
    source = validate(
        Tfds(
            name="little/en",
            directory=str(catalogue),
            train_split="train[:80%]",
            validation_split="train[80%:]",
            domain="w",
        )
    )
    opened = source.corpus()
    assert (opened.size("train")[0], opened.size("validation")[0]) == (40, 10)
    train, held_out = ({d.text for d in opened.open(split)} for split in ("train", "validation"))
    assert len(train | held_out) == 50


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"name": "little/fr"}, MissingSource, r"no prepared TFDS dataset 'little/fr' in .*versions there: none"),
        ({"name": "little/en:9.9.9"}, MissingSource, r"versions there: 1\.0\.0, 1\.2\.0"),
        ({"text_field": "body"}, ValueError, r"no feature 'body'; it has: text, url"),
        ({"validation_split": "test"}, ValueError, r"no split 'test'; it has: train, validation"),
    ],
)
def test_what_is_missing_is_named(catalogue, change, error, message):
    source = Tfds(**{"name": "little/en", "directory": str(catalogue), **change})
    with pytest.raises(error, match=message):
        source.corpus()


def test_other_formats_are_refused(catalogue, tmp_path, monkeypatch):
    class Info:
        file_format = type("F", (), {"value": "tfrecord"})

    monkeypatch.setattr(corpus, "_builder", lambda directory: type("B", (), {"info": Info})())
    with pytest.raises(ValueError, match="stored as tfrecord; allowed without TensorFlow: array_record"):
        Tfds(name="little/en", directory=str(catalogue)).corpus()


def test_training_from_shards_imports_neither_tfds_nor_jax_nor_tensorflow(dataset, config):
    code = f"""
import sys, pathlib
sys.modules["tensorflow_datasets"] = None
from sparse_lm.config import from_dict, to_dict
from sparse_lm.data.pipeline import DataConfig, prepare, windows
import json
config = from_dict(DataConfig, json.loads({__import__("json").dumps(__import__("json").dumps(_as_dict(config)))}))
assert "jax" not in sys.modules
dataset = prepare(config, report=lambda line: None)
assert dataset.hash == {dataset.hash!r}
assert "tensorflow" not in sys.modules and "jax" not in sys.modules
"""
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _as_dict(config):
    from sparse_lm.config import to_dict

    return to_dict(config)
