"""From a data config to batches: prepare what is missing, then stream packed windows with an exact, portable state.

The order of training is one global sequence of windows, a function of (dataset, seed, sequence length, weights) alone. Global batch n
is windows n*B .. (n+1)*B; each process reads those of its rows that its devices hold. The state is the number of windows consumed, so
a run resumes bitwise on any number of processes.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from sparse_lm.config import Config, component, validate
from sparse_lm.data import packing, storage
from sparse_lm.data.dataset import Dataset
from sparse_lm.data.packaged import Packaged
from sparse_lm.data.planted import PlantedSource
from sparse_lm.data.prepare import prepare_dataset
from sparse_lm.data.source import Source
from sparse_lm.data.synthetic import PlantedVocabulary
from sparse_lm.data.tokenizer import BPE, Tokenizer

Batch = dict[str, np.ndarray]
"""Arrays of shape [rows, sequence_length]; see docs/data.md."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """What to train on and how it is cut into batches."""

    sources: tuple[Source, ...] = component("source", (Packaged(),))
    """Where documents come from; mixed by their weights."""
    tokenizer: Tokenizer = component("tokenizer", BPE())
    """How text becomes token ids; a trained tokenizer learns from the training splits of all text sources."""
    sequence_length: int = 512
    """Tokens in a row of a batch, L."""
    batch_size: int = 16
    """Rows of a global batch, over all processes."""
    directory: str = "data"
    """Prepared corpora, tokenizers and token shards are cached here, named by the hash of what they were made from."""
    workers: int = 0
    """Threads that prepare batches ahead; 0 prepares each batch when it is asked for. The batches are the same."""

    def check(self) -> None:
        self.require(len(self.sources) > 0, "sources", "at least one source")
        self.require(self.sequence_length >= 2, "sequence_length", "at least 2")
        self.require(self.batch_size >= 1, "batch_size", "at least 1")
        self.require(0 <= self.workers <= 256, "workers", "0 to 256 threads")
        self.require(bool(self.directory), "directory", "a folder name")
        planted = [source for source in self.sources if isinstance(source, PlantedSource)]
        if isinstance(self.tokenizer, PlantedVocabulary):
            self.require(len(planted) == len(self.sources), "tokenizer", "a text tokenizer, because a source is text")
            longest = max(source.document_length + 1 for source in planted)
            self.require(
                self.sequence_length >= longest, "sequence_length", f"at least {longest}, a document of the sources"
            )


def prepare(config: DataConfig, *, report: Callable[[str], Any] = print, processes: int = 1) -> Dataset:
    """Builds what is missing of a dataset (corpora, tokenizer, token shards) and opens it.

    Args:
      config: the data config; it is validated first.
      report: called with lines of text about what is built.
      processes: processes that tokenize at once (spawned, so the caller's script needs an `if __name__ == "__main__"`).

    Returns:
      The dataset.

    Raises:
      ConfigError: for an impossible config.
      MissingSource: if input is missing and no finished token shards of the same config are in the directory.
    """
    validate(config)
    return prepare_dataset(
        config.sources,
        config.tokenizer,
        pathlib.Path(config.directory).expanduser(),
        report=report,
        processes=processes,
    )


def stream_identity(dataset: Dataset, config: DataConfig, seed: int) -> str:
    """Returns the hash of all that decides the global order of windows."""
    weights = [source.weight for source in config.sources]
    return storage.content_key([1, dataset.hash, config.sequence_length, weights, seed])


def windows(dataset: Dataset, config: DataConfig, seed: int) -> Any:
    """Returns the endless global sequence of training windows as a grain.MapDataset."""
    import grain

    parts = [
        grain.MapDataset.source(
            part.training_windows(config.sequence_length, dataset.tokenizer.end_of_text, (seed, number))
        )
        for number, part in enumerate(dataset.parts)
    ]
    if len(parts) == 1:
        return parts[0]
    return grain.MapDataset.mix(parts, [source.weight for source in config.sources])


def train_stream(
    dataset: Dataset,
    config: DataConfig,
    *,
    seed: int,
    rows: Sequence[int] | None = None,
    state: dict[str, Any] | None = None,
) -> Iterator[tuple[Batch, dict[str, Any]]]:
    """Returns the endless stream of training batches, or of some rows of each, with the state after it.

    Args:
      dataset: from `prepare`.
      config: its config.
      seed: keys the order of documents and windows.
      rows: which rows of the global batch to read, ascending, as `Session.rows` says for this process; None: all.
      state: a state that this function yielded (for any rows, any batch size): continue after it.

    Returns:
      Iterator of (batch, state). Batch arrays have shape [len(rows), sequence_length]. The state is JSON-ready.

    Raises:
      ValueError: for rows that the batch does not have, or a state of another dataset, seed, sequence length or mixture.
    """
    chosen = np.arange(config.batch_size) if rows is None else np.asarray(rows)
    if not len(chosen) or chosen[0] < 0 or chosen[-1] >= config.batch_size or (np.diff(chosen) < 1).any():
        raise ValueError(f"rows = {chosen.tolist()}; allowed: ascending numbers from 0 to {config.batch_size - 1}")
    identity = stream_identity(dataset, config, seed)
    consumed = 0
    if state is not None:
        if state.get("stream") != identity:
            raise ValueError(
                f"the data state belongs to stream {state.get('stream')!r}, this run's stream is {identity!r}: the dataset, the seed, "
                "sequence_length or the source weights differ; allowed: the ones the state was made with"
            )
        consumed = int(state["windows"])
    return _batches(windows(dataset, config, seed), config, identity, consumed, chosen)


class RowsOfBatches:
    """Random access to chosen rows of consecutive batches of a sequence of windows."""

    def __init__(self, sequence: Any, first: int, batch_size: int, rows: np.ndarray):
        """Args: the windows, the window where the first batch begins, rows of a global batch, and which of them are wanted."""
        self._sequence, self._first, self._batch_size, self._rows = sequence, first, batch_size, rows

    def __len__(self) -> int:
        return (len(self._sequence) - self._first) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> packing.Row:
        batch, row = divmod(int(index), len(self._rows))
        return self._sequence[self._first + batch * self._batch_size + int(self._rows[row])]


def _batches(
    sequence: Any, config: DataConfig, identity: str, consumed: int, rows: np.ndarray
) -> Iterator[tuple[Batch, dict[str, Any]]]:
    import grain

    mine = grain.MapDataset.source(RowsOfBatches(sequence, consumed, config.batch_size, rows))
    options = grain.ReadOptions(num_threads=config.workers, prefetch_buffer_size=2 * config.workers)
    for batch in mine.batch(len(rows), drop_remainder=True).to_iter_dataset(options):
        consumed += config.batch_size
        yield batch, {"stream": identity, "windows": consumed}


def validation_batches(
    dataset: Dataset, config: DataConfig, domain: str, *, batch_size: int, max_tokens: int | None = None, overlap: int = 0
) -> Iterator[Batch]:
    """Yields the validation documents of a domain once, in order, packed like training; the tail is padded with segment 0.

    Args:
      dataset: from `prepare`.
      config: its config.
      domain: one of dataset.domains.
      batch_size: rows of each batch.
      max_tokens: stop after the window that reaches this many counted tokens; None: all.
      overlap: tokens that a window shares with the one before it, counted once (packing.validation_rows).

    Yields:
      Batches of shape [batch_size, sequence_length] with documents_BL beside the training arrays.

    Raises:
      ValueError: for an unknown domain.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}; allowed: at least 1")
    end_of_text = dataset.tokenizer.end_of_text
    rows: list[packing.Row] = []
    fresh = config.sequence_length - overlap
    limit = None if max_tokens is None else max(1, -(-max_tokens // fresh))
    for number, row in enumerate(dataset.validation_rows(domain, config.sequence_length, overlap)):
        if limit is not None and number >= limit:
            break
        rows.append(row)
        if len(rows) == batch_size:
            yield {name: np.stack([row[name] for row in rows]) for name in row}
            rows = []
    if rows:
        empty = packing.row_from_pieces([np.zeros(0, np.int32)], [0], end_of_text, config.sequence_length, end_of_text)
        empty["documents_BL"] = np.full(config.sequence_length, -1, np.int32)
        rows += [empty] * (batch_size - len(rows))
        yield {name: np.stack([row[name] for row in rows]) for name in empty}
