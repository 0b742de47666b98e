"""Packing documents into windows, with random access: window i of an endless stream is computed, never searched for.

Stored documents are [end_of_text, t1, ..., tn]. Concatenated, each token's target is the token after it, so the target of tn is the
next document's end_of_text (the stream as a whole is followed by one more): every byte of a document is predicted, from that
document alone. Windows of L inputs tile the stream. An epoch shuffles the documents, concatenates them, tiles, and shuffles the
windows, all by (seed, epoch): each stored token is an input exactly once per epoch. A document cut by a window edge continues in
another window, where its positions restart.

Shapes: L window length, d documents, w windows of an epoch.
"""

import functools
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sparse_lm.data import order
from sparse_lm.data.shards import TokenShards

ENDLESS = 1 << 48
"""Length that endless streams claim; far more windows than any run reads."""

Row = dict[str, np.ndarray]
"""One window: tokens_BL, targets_BL, positions_BL, segments_BL (int32) and domains_BL (int8), each of shape [L]."""


class Stream(NamedTuple):
    """Documents concatenated in some order."""

    order_d: np.ndarray
    """Document at each place."""
    ends_d: np.ndarray
    """Position in the stream after each place's document."""

    @property
    def tokens(self) -> int:
        """Stored tokens in all."""
        return int(self.ends_d[-1]) if len(self.ends_d) else 0


def concatenated(shards: TokenShards, order_d: np.ndarray) -> Stream:
    """Returns the stream of documents in the order given."""
    return Stream(order_d, np.cumsum(shards.lengths_d[order_d]))


def row_from_pieces(
    pieces: list[np.ndarray], domains: list[int], last_target: int, length: int, end_of_text: int
) -> Row:
    """Builds one window from consecutive pieces, one per document.

    Args:
      pieces: ids of each document's part, together at most `length`.
      domains: domain number of each piece.
      last_target: the token after the last piece.
      length: window length L; the rest is padding (segment 0).
      end_of_text: fills padding.

    Returns:
      The row, arrays of shape [L].
    """
    sizes = [len(piece) for piece in pieces]
    used = sum(sizes)
    tokens = np.full(length + 1, end_of_text, np.int32)
    np.concatenate(pieces, out=tokens[:used], casting="same_kind")
    tokens[used] = last_target
    targets = tokens[1:].copy()
    if used < length:
        tokens[used:] = end_of_text
    positions = np.zeros(length, np.int32)
    segments = np.zeros(length, np.int32)
    domains_L = np.zeros(length, np.int8)
    start = 0
    for segment, size in enumerate(sizes):
        stop = start + size
        positions[start:stop] = _counting(length)[:size]
        segments[start:stop] = segment + 1
        domains_L[start:stop] = domains[segment]
        start = stop
    return {
        "tokens_BL": tokens[:length],
        "targets_BL": targets,
        "positions_BL": positions,
        "segments_BL": segments,
        "domains_BL": domains_L,
    }


@functools.cache
def _counting(length: int) -> np.ndarray:
    return np.arange(length, dtype=np.int32)


def window(shards: TokenShards, stream: Stream, start: int, length: int, end_of_text: int) -> tuple[Row, np.ndarray]:
    """Returns the window that begins at position `start` of a stream and the places (indices into order_d) of its segments."""
    stop = min(start + length, stream.tokens)
    first = int(np.searchsorted(stream.ends_d, start, "right"))
    last = int(np.searchsorted(stream.ends_d, stop, "left"))
    places = np.arange(first, last + 1)
    documents = stream.order_d[first : last + 1].tolist()
    ends = stream.ends_d[first : last + 1].tolist()
    pieces = []
    last_target = end_of_text
    for document, end in zip(documents, ends, strict=True):
        begin = end - int(shards.lengths_d[document])
        if end > stop:
            # One more id than the window holds: it is the last target.
            piece = shards.read(document, max(start - begin, 0), stop - begin + 1)
            last_target = int(piece[-1])
            pieces.append(piece[:-1])
        else:
            pieces.append(shards.read(document, max(start - begin, 0), end - begin))
    return row_from_pieces(pieces, shards.domains_d[documents].tolist(), last_target, length, end_of_text), places


class StoredWindows:
    """Endless shuffled windows over the documents of token shards; index i is window i % W of epoch i // W."""

    def __init__(self, shards: TokenShards, length: int, end_of_text: int, key: tuple[int, ...]):
        """Args: the shards, window length L, end_of_text id, and the integers (seed, source number) that key the order."""
        self._shards, self._length, self._end_of_text, self._key = shards, length, end_of_text, key
        tokens = int(shards.lengths_d.sum())
        self.windows_per_epoch = -(-tokens // length)
        self._epochs: dict[int, tuple[Stream, np.ndarray]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return ENDLESS

    def __repr__(self) -> str:
        return f"StoredWindows(length={self._length}, key={self._key}, windows_per_epoch={self.windows_per_epoch})"

    def epoch(self, number: int) -> tuple[Stream, np.ndarray]:
        """Returns the document stream of an epoch and the order_w of its windows; the last two epochs are kept."""
        with self._lock:
            if number not in self._epochs:
                while len(self._epochs) >= 2:
                    del self._epochs[min(self._epochs)]
                stream = concatenated(self._shards, order.permutation(len(self._shards), *self._key, number, 0))
                self._epochs[number] = stream, order.permutation(self.windows_per_epoch, *self._key, number, 1)
            return self._epochs[number]

    def __getitem__(self, index: int) -> Row:
        number, within = divmod(int(index), self.windows_per_epoch)
        stream, order_w = self.epoch(number)
        row, _ = window(self._shards, stream, int(order_w[within]) * self._length, self._length, self._end_of_text)
        return row


def validation_rows(
    shards: TokenShards, documents: np.ndarray, length: int, end_of_text: int, numbers_from: int = 0, overlap: int = 0
) -> Iterator[Row]:
    """Yields the windows of documents in the order given; rows also carry documents_BL, each token's document once.

    With an overlap every window but the first begins with the last tokens of the window before it: they give context to the
    tokens after them and carry document -1, as padding does, because they have been counted.

    Args:
      shards: where the documents are.
      documents: document indices.
      length: window length L.
      end_of_text: fills padding.
      numbers_from: number of the first document in documents_BL.
      overlap: tokens that a window shares with the one before it; below L.
    """
    stream = concatenated(shards, documents)
    for start in range(0, max(stream.tokens - overlap, 1) if stream.tokens else 0, length - overlap):
        row, places = window(shards, stream, start, length, end_of_text)
        numbers = np.append(places + numbers_from, -1).astype(np.int32)
        row["documents_BL"] = numbers[row["segments_BL"] - 1]
        if start:
            row["documents_BL"][:overlap] = -1
        yield row
