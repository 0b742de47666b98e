"""Corpora on disk: TFDS directories in array_record format, written and read without TensorFlow.

Every text source becomes a TFDS dataset with the features id, text, domain and license. Directories that were prepared
elsewhere (`Tfds`) are read in place.
"""

import contextlib
import dataclasses
import functools
import io
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from sparse_lm.data import storage
from sparse_lm.data.source import Document, MissingSource, Source, Split, TextSource

VERSION = "1.0.0"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A prepared TFDS directory and how to read documents from it (picklable; opened where it is read).

    Attributes:
      directory: the version directory that holds dataset_info.json.
      splits: TFDS split expression of our train and validation splits.
      text: name of the text feature.
      domain: the domain of every document, or None when the records carry it.
    """

    directory: str
    splits: dict[str, str]
    text: str = "text"
    domain: str | None = None

    def open(self, split: Split) -> "Records":
        """Returns the documents of a split for random access."""
        return Records(self, split)

    def size(self, split: Split) -> tuple[int, int]:
        """Returns (documents, approximate bytes) of a split from the dataset's metadata."""
        info = _builder(self.directory).info.splits[self.splits[split]]
        return int(info.num_examples), int(getattr(info, "num_bytes", 0) or 0)


class Records:
    """Random access to the documents of one split."""

    def __init__(self, corpus: Corpus, split: Split):
        self._corpus = corpus
        self._source = _builder(corpus.directory).as_data_source(split=corpus.splits[split])

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Document:
        record = self._source[index]

        def field(name: str, default: str) -> str:
            value = record.get(name, default)
            return value.decode() if isinstance(value, bytes) else str(value)

        domain = self._corpus.domain or field("domain", "text")
        return Document(field("id", str(index)), field(self._corpus.text, ""), domain, field("license", ""))

    def __iter__(self) -> Iterator[Document]:
        for index in range(len(self)):
            yield self[index]


@functools.cache
def _builder(directory: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(directory)


@functools.cache
def _builder_class() -> Any:
    """Defines the TFDS builder on first use, so that reading token shards needs no tensorflow-datasets."""
    import tensorflow_datasets as tfds

    class SparseLmText(tfds.core.GeneratorBasedBuilder):
        """Documents of one text source of sparse_lm, with domain and licence note."""

        VERSION = tfds.core.Version(VERSION)

        def __init__(self, *, source: TextSource, note: Callable[[str], Any], **keywords: Any):
            self._source, self._note = source, note
            super().__init__(**keywords)

        def _info(self) -> Any:
            features = {name: tfds.features.Text() for name in ("id", "text", "domain", "license")}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {
                split: self._generate_examples(found) for split, found in self._source.documents(self._note).items()
            }

        def _generate_examples(self, documents: Iterator[Document]) -> Iterator[tuple[int, dict[str, str]]]:
            for number, document in enumerate(documents):
                yield (
                    number,
                    {
                        "id": document.key,
                        "text": document.text,
                        "domain": document.domain,
                        "license": document.license,
                    },
                )

    return SparseLmText


def write_corpus(source: TextSource, directory: pathlib.Path, report: Callable[[str], Any] = print) -> Corpus:
    """Writes the documents of a source as a TFDS dataset, or finds it already written.

    Args:
      source: the text source; its fingerprint names the dataset.
      directory: folder of all prepared corpora.
      report: called with lines of text about what is done.

    Returns:
      The corpus, ready to open.

    Raises:
      MissingSource: if the input is not on this machine.
      ImportError: if tensorflow-datasets is missing.
    """
    import tensorflow_datasets as tfds

    key = storage.content_key([source.fingerprint(), VERSION])
    final = directory / "sparse_lm_text" / key / VERSION
    if not (final / "dataset_info.json").exists():
        report(f"corpus: reading {type(source).__name__.lower()} into {final}")
        notes: list[str] = []
        with _quiet_progress():
            builder = _builder_class()(
                source=source,
                note=notes.append,
                data_dir=str(directory),
                config=tfds.core.BuilderConfig(name=key, version=tfds.core.Version(VERSION)),
                file_format="array_record",
            )
            builder.download_and_prepare()
        for line in notes:
            report(f"corpus: {line}")
    return Corpus(str(final), {"train": "train", "validation": "validation"})


@contextlib.contextmanager
def _quiet_progress() -> Iterator[None]:
    """Silences the progress bars, the banner and the remarks that TFDS prints while it writes."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tfds(Source):
    """A TFDS dataset that is already prepared in array_record format, by name (for example c4/en or c4/en:3.1.0)."""

    name: str = "c4/en"
    """Dataset, with config and version if there are several: name[/config][:version]. The newest version is the default."""
    directory: str = "~/tensorflow_datasets"
    """The TFDS data directory that holds the dataset."""
    train_split: str = "train"
    """TFDS split expression for training, for example train or train[:99%]."""
    validation_split: str = "validation"
    """TFDS split expression for validation, for example validation or train[99%:]; must not overlap train_split."""
    text_field: str = "text"
    """The feature that holds the text."""
    domain: str = "text"
    """Domain of every document; empty: read from the records' feature `domain`."""

    def check(self) -> None:
        super().check()
        self.require(
            bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:\d+\.\d+\.\d+)?", self.name)), "name", "name[/config][:1.2.3]"
        )
        self.require(self.train_split != self.validation_split, "validation_split", "a split other than train_split")
        self.require(bool(self.text_field), "text_field", "the name of a text feature")
        for field in ("train_split", "validation_split"):
            pattern = r"\w+(\[-?\d*%?:-?\d*%?\])?"
            self.require(
                bool(re.fullmatch(pattern, getattr(self, field))), field, "a TFDS split such as train or train[:99%]"
            )

    def locate(self) -> pathlib.Path:
        """Returns the version directory.

        Raises:
          MissingSource: naming the folder that was searched and the versions that exist.
        """
        name, _, version = self.name.partition(":")
        root = pathlib.Path(self.directory).expanduser() / name
        versions = sorted(
            (path.parent for path in root.glob("*/dataset_info.json")),
            key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)],
        )
        wanted = [path for path in versions if path.name == version] if version else versions
        if not wanted:
            have = ", ".join(path.name for path in versions) or "none"
            raise MissingSource(
                f"no prepared TFDS dataset {self.name!r} in {root} (versions there: {have}). Prepare it in array_record format "
                "(tfds.builder(name, file_format='array_record').download_and_prepare()) or name its data directory."
            )
        return wanted[-1]

    def fingerprint(self) -> dict[str, Any]:
        path = self.locate()
        content = storage.sha256(path / "dataset_info.json")
        identity = self.identity()
        del identity["directory"]
        return {**identity, "version": path.name, "dataset_info": content}

    def corpus(self) -> Corpus:
        """Returns the prepared directory.

        Raises:
          ValueError: if it is in another format, or lacks the split or the text feature.
        """
        path = self.locate()
        builder = _builder(os.fspath(path))
        file_format = builder.info.file_format.value
        if file_format not in ("array_record", "parquet"):
            raise ValueError(f"{path} is stored as {file_format}; allowed without TensorFlow: array_record")
        if self.text_field not in builder.info.features:
            raise ValueError(
                f"{path} has no feature {self.text_field!r}; it has: {', '.join(sorted(builder.info.features))}"
            )
        splits = {"train": self.train_split, "validation": self.validation_split}
        for split in splits.values():
            if split.partition("[")[0] not in builder.info.splits:
                raise ValueError(f"{path} has no split {split!r}; it has: {', '.join(sorted(builder.info.splits))}")
        return Corpus(os.fspath(path), splits, self.text_field, self.domain or None)
