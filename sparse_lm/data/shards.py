"""Token shards: the stored documents [end_of_text, t1, ..., tn] of a split as flat arrays on disk, and how they are written.

A shard is two files. `train-00000-of-00002.tokens` holds ids as little-endian uint16 (uint32 for vocabularies above 65536).
`train-00000-of-00002.npz` holds, per document: stored length, domain, bytes of text; and the 13-gram results. The second file is
moved into place last, so a shard exists exactly when its index does, and `tokenize` can be stopped and started at will.
The number of shards and their content depend on the corpus alone, never on the number of processes.
"""

import concurrent.futures
import dataclasses
import io
import json
import math
import multiprocessing
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from sparse_lm.data import overlap, storage
from sparse_lm.data.corpus import Corpus
from sparse_lm.data.source import SPLITS, Split
from sparse_lm.data.tokenizer import Encoder, Tokenizer

FORMAT = 1
TEXT_BYTES_PER_SHARD = 32_000_000
_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Job:
    """One shard to write (picklable, so that any process can do it)."""

    corpus: Corpus
    tokenizer: Tokenizer
    tokenizer_path: str
    directory: str
    split: Split
    number: int
    count: int
    first: int
    last: int

    @property
    def stem(self) -> pathlib.Path:
        """Path of the shard's files without their suffix."""
        return pathlib.Path(self.directory) / f"{self.split}-{self.number:05d}-of-{self.count:05d}"


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the narrowest stored type that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def write_shard(job: Job) -> str:
    """Tokenizes one shard's documents and publishes its two files; returns the shard's name.

    Training shards also look up which validation 13-grams (file validation-grams.npy) they contain.
    """
    if job.stem.with_suffix(".npz").exists():
        return job.stem.name
    encoder = job.tokenizer.load(pathlib.Path(job.tokenizer_path))
    records = job.corpus.open(job.split)
    dtype = token_dtype(encoder.vocab_size)
    domains: list[str] = []
    lengths: list[int] = []
    text_bytes: list[int] = []
    domain_numbers: list[int] = []
    grams: list[np.ndarray] = []
    token_bytes = 0
    targets = None
    if job.split == "train":
        targets = np.load(pathlib.Path(job.directory) / "validation-grams.npy")
        found = np.zeros(len(targets), bool)
    path = job.stem.with_suffix(".tokens")
    temporary = storage.beside(path)
    try:
        with open(temporary, "wb") as file:
            for start in range(job.first, job.last, _BATCH):
                documents = [records[i] for i in range(start, min(start + _BATCH, job.last))]
                documents = [document for document in documents if document.text]
                for document, ids in zip(documents, encoder.encode_batch([d.text for d in documents]), strict=True):
                    stored = np.empty(len(ids) + 1, dtype)
                    stored[0] = encoder.end_of_text
                    stored[1:] = ids
                    file.write(stored.tobytes())
                    if document.domain not in domains:
                        domains.append(document.domain)
                    lengths.append(len(stored))
                    domain_numbers.append(domains.index(document.domain))
                    text_bytes.append(len(document.text.encode()))
                    token_bytes += int(encoder.token_bytes_V[ids].sum())
                    hashes = overlap.gram_hashes(document.text)
                    if targets is None:
                        grams.append(hashes)
                    else:
                        found[overlap.hits(hashes, targets)] = True
        arrays = {
            "lengths": np.array(lengths, np.int64),
            "domains": np.array(domain_numbers, np.int16),
            "text_bytes": np.array(text_bytes, np.int64),
            "domain_names": np.array(domains, np.str_),
            "token_bytes": np.array(token_bytes, np.int64),
            "sha256": np.array(storage.sha256(temporary), np.str_),
        }
        if targets is None:
            arrays["grams"] = np.concatenate(grams) if grams else np.zeros(0, np.uint64)
            arrays["gram_counts"] = np.array([len(g) for g in grams], np.int64)
        else:
            arrays["found"] = np.packbits(found)
        storage.publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    storage.write_atomically(job.stem.with_suffix(".npz"), buffer.getvalue())
    return job.stem.name


def plan_jobs(
    corpus: Corpus, tokenizer: Tokenizer, tokenizer_path: pathlib.Path, directory: pathlib.Path
) -> dict[Split, list[Job]]:
    """Cuts each split into shards of about equal numbers of documents, by the corpus's size alone."""
    jobs: dict[Split, list[Job]] = {}
    for split in SPLITS:
        documents, size = corpus.size(split)
        count = max(1, min(documents, math.ceil(size / TEXT_BYTES_PER_SHARD)))
        edges = [documents * i // count for i in range(count + 1)]
        jobs[split] = [
            Job(corpus, tokenizer, str(tokenizer_path), str(directory), split, i, count, edges[i], edges[i + 1])
            for i in range(count)
        ]
    return jobs


def _quiet_child(threads: int) -> None:
    os.environ["RAYON_NUM_THREADS"] = str(threads)


def run_jobs(jobs: list[Job], processes: int, report: Callable[[str], Any]) -> None:
    """Writes the missing shards, here (processes <= 1) or in spawned processes; forking after an encode can hang."""
    missing = [job for job in jobs if not job.stem.with_suffix(".npz").exists()]
    if len(missing) < len(jobs):
        report(f"tokens: {len(jobs) - len(missing)} of {len(jobs)} {jobs[0].split} shards were finished before")
    if processes <= 1 or len(missing) <= 1:
        for job in missing:
            report(f"tokens: {write_shard(job)}")
        return
    threads = max(1, (os.cpu_count() or 1) // processes)
    with concurrent.futures.ProcessPoolExecutor(
        min(processes, len(missing)), multiprocessing.get_context("spawn"), _quiet_child, (threads,)
    ) as pool:
        for name in pool.map(write_shard, missing):
            report(f"tokens: {name}")


def tokenize(
    corpus: Corpus,
    tokenizer: Tokenizer,
    tokenizer_path: pathlib.Path,
    directory: pathlib.Path,
    *,
    processes: int = 1,
    identity: dict[str, Any] | None = None,
    report: Callable[[str], Any] = print,
) -> None:
    """Writes all token shards of a corpus and, last, manifest.json with what they hold.

    Args:
      corpus: prepared documents.
      tokenizer: config that loads the tokenizer file.
      tokenizer_path: the tokenizer file.
      directory: where the shards go; finished shards are kept.
      processes: how many processes work at once (spawned; 1: this one).
      identity: recorded in the manifest, to find the shards where the input is missing.
      report: called with lines of text.
    """
    if (directory / "manifest.json").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    jobs = plan_jobs(corpus, tokenizer, tokenizer_path, directory)
    run_jobs(jobs["validation"], processes, report)
    held_out = [np.load(job.stem.with_suffix(".npz")) for job in jobs["validation"]]
    targets = np.unique(np.concatenate([shard["grams"] for shard in held_out]))
    if not (directory / "validation-grams.npy").exists():
        buffer = io.BytesIO()
        np.save(buffer, targets)
        storage.write_atomically(directory / "validation-grams.npy", buffer.getvalue())
    run_jobs(jobs["train"], processes, report)
    encoder = tokenizer.load(tokenizer_path)
    manifest = _manifest(jobs, encoder, targets)
    manifest["identity"] = identity or {}
    storage.write_atomically(directory / "manifest.json", json.dumps(manifest, indent=1).encode())


def _manifest(jobs: dict[Split, list[Job]], encoder: Encoder, targets: np.ndarray) -> dict[str, Any]:
    """Sums up finished shards: counts per domain and split, 13-gram overlap per domain, hashes."""
    found = np.zeros(len(targets), bool)
    counts: dict[str, dict[str, dict[str, int]]] = {}
    grams: dict[str, list[int]] = {}
    hashes = []
    exact = True
    for job in jobs["train"]:
        with np.load(job.stem.with_suffix(".npz")) as index:
            found |= np.unpackbits(index["found"], count=len(targets)).astype(bool)
    for split in SPLITS:
        for job in jobs[split]:
            with np.load(job.stem.with_suffix(".npz")) as index:
                hashes.append(str(index["sha256"]))
                exact &= int(index["token_bytes"]) == int(index["text_bytes"].sum())
                owner_of_gram = np.repeat(index["domains"], index["gram_counts"]) if split == "validation" else None
                for number, domain in enumerate(index["domain_names"].tolist()):
                    mine = index["domains"] == number
                    entry = counts.setdefault(domain, {s: {"documents": 0, "bytes": 0, "tokens": 0} for s in SPLITS})[
                        split
                    ]
                    entry["documents"] += int(mine.sum())
                    entry["bytes"] += int(index["text_bytes"][mine].sum())
                    entry["tokens"] += int(index["lengths"][mine].sum())
                    if owner_of_gram is not None:
                        own = index["grams"][owner_of_gram == number]
                        seen, total = grams.setdefault(domain, [0, 0])
                        hit = int(found[np.searchsorted(targets, own)].sum())
                        grams[domain] = [seen + hit, total + len(own)]
    return {
        "format": FORMAT,
        "shards": {split: [job.stem.name for job in jobs[split]] for split in SPLITS},
        "dtype": token_dtype(encoder.vocab_size).str,
        "tokenizer_sha256": encoder.hash,
        "end_of_text": encoder.end_of_text,
        "domains": counts,
        "overlap_13gram": {domain: {"found": a, "total": b} for domain, (a, b) in grams.items()},
        "bytes_exact": bool(exact),
        "content_sha256": storage.content_key([encoder.hash, hashes]),
    }


class TokenShards:
    """The documents of one split, memory-mapped.

    Attributes:
      lengths_d: int64, stored length (end_of_text included) per document.
      domains_d: int8, domain number per document (into the dataset's domains).
      text_bytes_d: int64, bytes of text per document.
    """

    def __init__(self, directory: pathlib.Path, manifest: dict[str, Any], split: Split, domains: tuple[str, ...]):
        lengths, domain_numbers, text_bytes, shard_of, starts = [], [], [], [], []
        self._arrays = []
        for number, name in enumerate(manifest["shards"][split]):
            with np.load(directory / f"{name}.npz") as index:
                lengths.append(index["lengths"])
                text_bytes.append(index["text_bytes"])
                renumber = np.array(
                    [domains.index(domain) for domain in index["domain_names"].tolist()] or [0], np.int8
                )
                domain_numbers.append(renumber[index["domains"]])
            starts.append(np.cumsum(lengths[-1]) - lengths[-1])
            shard_of.append(np.full(len(lengths[-1]), number, np.int32))
            path = directory / f"{name}.tokens"
            dtype = np.dtype(manifest["dtype"])
            expected = int(lengths[-1].sum()) * dtype.itemsize
            if path.stat().st_size != expected:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes, its index says {expected}; delete {directory} and prepare again"
                )
            # A plain view: slicing np.memmap itself costs ten times as much.
            self._arrays.append(np.asarray(np.memmap(path, dtype, "r")) if expected else np.zeros(0, dtype))
        self.lengths_d = np.concatenate(lengths)
        self.domains_d = np.concatenate(domain_numbers)
        self.text_bytes_d = np.concatenate(text_bytes)
        self._shard_d = np.concatenate(shard_of)
        self._start_d = np.concatenate(starts)

    def __len__(self) -> int:
        return len(self.lengths_d)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns the stored ids [start, stop) of a document, without copying."""
        base = int(self._start_d[document])
        end = base + (int(self.lengths_d[document]) if stop is None else stop)
        return self._arrays[self._shard_d[document]][base + start : end]
