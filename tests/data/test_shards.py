"""Token shards: the same from any number of processes, resumable, never half-made, wide enough for the vocabulary."""

import json

import numpy as np
import pytest

from sparse_lm.data import shards, storage
from sparse_lm.data.corpus import write_corpus
from sparse_lm.data.files import Files
from sparse_lm.data.tokenizer import Bytes


def quiet(line):
    pass


@pytest.fixture(scope="module")
def written(records, tmp_path_factory):
    directory = tmp_path_factory.mktemp("shards")
    corpus = write_corpus(Files(paths=(str(records),), validation_fraction=0.1), directory / "corpus", quiet)
    Bytes().build(directory / "bytes.json", [], [])
    return corpus, directory / "bytes.json"


@pytest.fixture
def many_shards(monkeypatch):
    monkeypatch.setattr(shards, "TEXT_BYTES_PER_SHARD", 9000)


def content(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.suffix == ".tokens"}


def test_stopped_work_is_continued(written, tmp_path, many_shards, monkeypatch):
    corpus, tokenizer = written
    shards.tokenize(corpus, Bytes(), tokenizer, tmp_path / "whole", report=quiet)
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    assert len(manifest["shards"]["train"]) >= 4

    real, calls = shards.overlap.gram_hashes, []

    def stops(text):
        calls.append(text)
        if len(calls) == 60:
            raise KeyboardInterrupt
        return real(text)

    monkeypatch.setattr(shards.overlap, "gram_hashes", stops)
    with pytest.raises(KeyboardInterrupt):
        shards.tokenize(corpus, Bytes(), tokenizer, tmp_path / "stopped", report=quiet)
    left = {path.name for path in (tmp_path / "stopped").iterdir()}
    assert "manifest.json" not in left and not any(name.endswith(".partial") for name in left)
    finished = {name for name in left if name.endswith(".npz")}
    assert finished
    before = {name: (tmp_path / "stopped" / name).stat().st_mtime_ns for name in finished}
    lines = []
    shards.tokenize(corpus, Bytes(), tokenizer, tmp_path / "stopped", report=lines.append)
    assert any("were finished before" in line for line in lines)
    assert before == {name: (tmp_path / "stopped" / name).stat().st_mtime_ns for name in finished}
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")
    assert json.loads((tmp_path / "stopped" / "manifest.json").read_text()) == manifest


@pytest.mark.slow
def test_processes_change_nothing(written, tmp_path, many_shards):
    corpus, tokenizer = written
    shards.tokenize(corpus, Bytes(), tokenizer, tmp_path / "one", report=quiet)
    shards.tokenize(corpus, Bytes(), tokenizer, tmp_path / "two", processes=2, report=quiet)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "two"))
    assert one == two


def test_shards_hold_the_documents_in_order(written, tmp_path, many_shards):
    corpus, tokenizer = written
    shards.tokenize(corpus, Bytes(), tokenizer, tmp_path, report=quiet)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    stored = shards.TokenShards(tmp_path, manifest, "train", tuple(manifest["domains"]))
    records = corpus.open("train")
    assert len(stored) == len(records)
    for number, document in enumerate(records):
        ids = stored.read(number)
        assert ids.dtype == np.uint16 and ids[0] == 256
        assert bytes(ids[1:].astype(np.uint8)) == document.text.encode()
        assert stored.text_bytes_d[number] == len(document.text.encode()) == stored.lengths_d[number] - 1
        assert tuple(manifest["domains"])[stored.domains_d[number]] == document.domain
        assert stored.read(number, 1, 3).tolist() == ids[1:3].tolist()


def test_overlap_is_measured(tmp_path):
    shared = " ".join(f"w{i}" for i in range(30))
    texts = [f"{shared} only in training {i}" for i in range(3)] + [f"{shared} " + " ".join(f"v{i}" for i in range(18))]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    source = Files(paths=(str(tmp_path),), validation=("3.txt",))
    corpus = write_corpus(source, tmp_path / "corpus", quiet)
    Bytes().build(tmp_path / "bytes.json", [], [])
    shards.tokenize(corpus, Bytes(), tmp_path / "bytes.json", tmp_path / "tokens", report=quiet)
    overlap = json.loads((tmp_path / "tokens" / "manifest.json").read_text())["overlap_13gram"]
    assert overlap == {"text": {"found": 30 - 12, "total": 48 - 12}}


def test_damage_is_noticed(written, tmp_path):
    corpus, tokenizer = written
    shards.tokenize(corpus, Bytes(), tokenizer, tmp_path, report=quiet)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    path = tmp_path / f"{manifest['shards']['train'][0]}.tokens"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="its index says"):
        shards.TokenShards(tmp_path, manifest, "train", tuple(manifest["domains"]))


@pytest.mark.parametrize("vocabulary, dtype", [(257, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_width_follows_the_vocabulary(vocabulary, dtype):
    assert shards.token_dtype(vocabulary).str == dtype


def test_atomic_writes(tmp_path, monkeypatch):
    path = tmp_path / "a" / "file"
    storage.write_atomically(path, b"old")
    monkeypatch.setattr(storage.os, "replace", lambda a, b: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError):
        storage.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["file"]
