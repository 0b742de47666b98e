"""Building a dataset once: corpora, then the tokenizer, then token shards, each found again by the hash of what made it.

Under the data directory: corpus/ (TFDS), tokenizers/KEY.json, tokens/KEY/ (shards and manifest.json), datasets/KEY.json (which
shards a config led to, so that a machine without the input, or without tensorflow-datasets, can train from copied shards).
"""

import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from sparse_lm.data import corpus, shards, storage
from sparse_lm.data.corpus import Corpus, Tfds
from sparse_lm.data.dataset import Dataset, Part, StoredPart
from sparse_lm.data.planted import PlantedPart, PlantedSource
from sparse_lm.data.source import MissingSource, Source, TextSource
from sparse_lm.data.tokenizer import BPE, Encoder, Tokenizer

Report = Callable[[str], Any]


def open_corpus(source: Source, directory: pathlib.Path, report: Report) -> Corpus:
    """Returns a text source's corpus, writing it first if it is missing."""
    if isinstance(source, Tfds):
        return source.corpus()
    assert isinstance(source, TextSource)
    return corpus.write_corpus(source, directory / "corpus", report)


def training_texts(corpora: Sequence[Corpus], planted: Sequence[PlantedSource], limit: int) -> Iterator[str]:
    """Yields training documents of all corpora, evenly thinned to about `limit` bytes, and some of each planted source."""
    total = sum(c.size("train")[1] for c in corpora)
    stride = max(1, -(-total // limit))
    for one in corpora:
        records = one.open("train")
        for index in range(0, len(records), stride):
            yield records[index].text
    for source in planted:
        yield from source.texts(source.draw("train", 4096, 0))


def prepare_dataset(
    sources: tuple[Source, ...],
    tokenizer: Tokenizer,
    directory: pathlib.Path,
    *,
    report: Report = print,
    processes: int = 1,
) -> Dataset:
    """Builds what is missing and opens the dataset; see `sparse_lm.data.pipeline.prepare`."""
    request = [[source.identity() for source in sources], tokenizer.fingerprint()]
    record = directory / "datasets" / f"{storage.content_key(request)}.json"
    try:
        fingerprints = [source.fingerprint() for source in sources]
    except MissingSource as missing:
        if not record.exists():
            raise
        found = json.loads(record.read_text())
        report(f"data: {missing}")
        report(f"data: using the token shards that {record} names")
    else:
        found = _build(sources, fingerprints, tokenizer, directory, report, processes)
        storage.write_atomically(record, json.dumps({"request": request, **found}, indent=1).encode())
    dataset = _open(sources, found, tokenizer, directory)
    for line in summary(dataset):
        report(line)
    return dataset


def _build(
    sources: tuple[Source, ...],
    fingerprints: list[dict[str, Any]],
    tokenizer: Tokenizer,
    directory: pathlib.Path,
    report: Report,
    processes: int,
) -> dict[str, Any]:
    """Makes tokenizer and shards exist; returns their names under the data directory."""
    corpora: dict[int, Corpus] = {}

    def corpus_of(number: int) -> Corpus:
        if number not in corpora:
            corpora[number] = open_corpus(sources[number], directory, report)
        return corpora[number]

    learned_from = fingerprints if tokenizer.trained else []
    tokenizer_name = f"tokenizers/{storage.content_key([tokenizer.fingerprint(), learned_from, corpus.VERSION])}.json"
    tokenizer_path = directory / tokenizer_name
    if not tokenizer_path.exists():
        planted = [source for source in sources if isinstance(source, PlantedSource)]
        texts: Iterable[str] = ()
        if isinstance(tokenizer, BPE):
            report(f"tokenizer: training {type(tokenizer).__name__} into {tokenizer_path}")
            stored = [corpus_of(i) for i, source in enumerate(sources) if not isinstance(source, PlantedSource)]
            texts = training_texts(stored, planted, tokenizer.training_bytes)
        tokenizer.build(tokenizer_path, texts, [symbol for source in planted for symbol in source.symbols()])
    encoder_hash = storage.sha256(tokenizer_path)
    parts: list[str | None] = []
    for number, fingerprint in enumerate(fingerprints):
        if isinstance(sources[number], PlantedSource):
            parts.append(None)
            continue
        key = storage.content_key([fingerprint, corpus.VERSION, encoder_hash, shards.FORMAT])
        name = f"tokens/{key}"
        parts.append(name)
        if not (directory / name / "manifest.json").exists():
            shards.tokenize(
                corpus_of(number),
                tokenizer,
                tokenizer_path,
                directory / name,
                processes=processes,
                identity=fingerprint,
                report=report,
            )
    return {"tokenizer": tokenizer_name, "parts": parts}


def _open(sources: tuple[Source, ...], found: dict[str, Any], tokenizer: Tokenizer, directory: pathlib.Path) -> Dataset:
    encoder: Encoder = tokenizer.load(directory / found["tokenizer"])
    names: dict[str, None] = {}
    for source, part in zip(sources, found["parts"], strict=True):
        if isinstance(source, PlantedSource):
            names[source.domain_name] = None
        else:
            names.update(dict.fromkeys(json.loads((directory / part / "manifest.json").read_text())["domains"]))
    domains = tuple(names)
    parts: list[Part] = []
    for source, part in zip(sources, found["parts"], strict=True):
        if isinstance(source, PlantedSource):
            parts.append(PlantedPart(source, encoder, domains.index(source.domain_name)))
        else:
            parts.append(StoredPart(directory / part, domains))
    return Dataset(encoder, tuple(parts), domains)


def summary(dataset: Dataset) -> list[str]:
    """Returns lines that say what a dataset holds: size of each domain and split, 13-gram overlap."""
    facts = dataset.describe()
    lines = [f"data: hash {facts['hash']}, vocabulary {facts['vocab_size']}"]
    for domain, splits in facts["domains"].items():
        sizes = [
            f"{split} {counts['documents']:,} documents {counts['bytes'] / 1e6:.2f} MB {counts['tokens'] / 1e6:.2f} M tokens"
            for split, counts in splits.items()
        ]
        lines.append(f"data: {domain}: {'; '.join(sizes)}")
    for part in facts["parts"]:
        for domain, counts in part.get("overlap_13gram", {}).items():
            lines.append(f"data: {domain}: {100 * counts['share']:.2f}% of validation 13-grams occur in training")
        if not part.get("bytes_exact", True):
            lines.append("data: bytes per token are approximate for this tokenizer: bits per byte are estimates")
        if "optimum" in part:
            known = ", ".join(f"{name} {value:.4g}" for name, value in part["optimum"].items())
            lines.append(f"data: {', '.join(part['domains'])}: generated without end; {known}")
    return lines
