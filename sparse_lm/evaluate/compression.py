"""What a general compressor makes of the same held-out text: xz -9 from nothing, and xz that has seen the training text.

The second is the honest rival of a model that was trained on that text: xz with a window over all of it finds whole passages again.
"""

import concurrent.futures
import lzma
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from sparse_lm.data.dataset import Dataset

PRIMING_BYTES = 50_000_000
"""Most training text of a domain that primes xz, in bytes: xz reads about 1 MB/s and reads it twice."""

XZ_WINDOW = 1 << 26
"""The window of `xz -9`, in bytes."""


class Text(NamedTuple):
    """Documents of one split and domain, joined.

    Attributes:
      content: UTF-8.
      share: fraction of the split's bytes that it holds; None where the split has no end.
    """

    content: bytes
    share: float | None


def training_text(dataset: Dataset, domain: str, limit: int = PRIMING_BYTES) -> Text:
    """Returns a domain's training documents joined; evenly spaced ones, about `limit` bytes, when there is more."""
    counts = dataset.describe()["domains"].get(domain, {}).get("train", {})
    total = int(counts.get("bytes", 0))
    keep = min(1.0, limit / total) if total else 1.0
    pieces: list[bytes] = []
    size, seen = 0, 0
    for part in dataset.parts:
        for ids in part.documents(domain, "train"):
            seen += 1
            if int(seen * keep) == int((seen - 1) * keep):
                continue  # dropped, so that a share of `keep` stays, evenly spaced
            pieces.append(dataset.tokenizer.decode(ids).encode())
            size += len(pieces[-1])
            if size >= 1.1 * limit:
                break
    return Text(b"".join(pieces), size / total if total else None)


def compressed_size(content: bytes, window: int) -> int:
    """Returns the bytes that xz at preset 9 makes of a text.

    Args:
      content: the text.
      window: how far back xz may look, in bytes; never more than the text, which saves memory (ten times the window).
    """
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": max(1 << 12, min(window, len(content)))}]
    return len(lzma.compress(content, format=lzma.FORMAT_XZ, check=lzma.CHECK_NONE, filters=filters))


class Compression:
    """Compresses the held-out text of domains in threads (lzma lets go of the interpreter) while a model is evaluated.

    Args:
      dataset: the prepared data.
      documents: domain -> its first documents that count, None for all.
      priming_bytes: most training text of a domain that primes xz; 0 leaves priming out.
    """

    def __init__(
        self,
        dataset: Dataset,
        documents: dict[str, int | None],
        *,
        priming_bytes: int = PRIMING_BYTES,
        threads: int = 0,
    ):
        self._pool = concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count() or 1, "xz")
        self._bytes: dict[str, int] = {}
        self._primed_with: dict[str, Text] = {}
        self._sizes: dict[str, Sequence[concurrent.futures.Future[int]]] = {}
        for domain, count in documents.items():
            held_out = "".join(dataset.validation_text(domain)[:count]).encode()
            training = training_text(dataset, domain, priming_bytes) if priming_bytes else Text(b"", None)
            self._bytes[domain], self._primed_with[domain] = len(held_out), training
            jobs = [(held_out, XZ_WINDOW)]
            if training.content:
                both = training.content + held_out
                jobs += [(both, len(both)), (training.content, len(both))]
            self._sizes[domain] = [self._pool.submit(compressed_size, *job) for job in jobs]

    def row(self, domain: str) -> dict[str, Any]:
        """Waits for a domain's numbers.

        Returns:
          {"xz_bits_per_byte", "xz_primed_bits_per_byte", "xz_primed_with_bytes", "xz_primed_share"}: primed is size(training +
          held-out) - size(training) over the held-out bytes; share is how much of the training text primed it. What is not known
          is left out: no held-out text, no training text, a source without end.
        """
        size = self._bytes[domain]
        plain, *primed = [job.result() for job in self._sizes[domain]]
        training, row = self._primed_with[domain], {}
        if size:
            row["xz_bits_per_byte"] = 8 * plain / size
        if size and primed:
            row["xz_primed_bits_per_byte"] = 8 * (primed[0] - primed[1]) / size
            row["xz_primed_with_bytes"] = len(training.content)
        if primed and training.share is not None:
            row["xz_primed_share"] = training.share
        return row

    def __enter__(self) -> "Compression":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
