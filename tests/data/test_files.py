"""Local files: every kind is read, every mistake is named, splits are disjoint and complete."""

import gzip
import json

import pytest

from sparse_lm.config import ConfigError, validate
from sparse_lm.data.files import Files, find


def read(source):
    """Returns split -> [(key, text, domain)] of a source."""
    return {
        split: [(d.key, d.text, d.domain) for d in found]
        for split, found in source.documents(lambda line: None).items()
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "no.txt").write_text("hidden")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "a.txt").write_text("plain text")
    (tmp_path / "sub" / "b.md").write_text("# markdown é", encoding="utf-8")
    with gzip.open(tmp_path / "sub" / "c.rst.gz", "wt") as file:
        file.write("compressed")
    records = [{"text": "one", "domain": "left"}, {"text": "two"}, {"text": "   "}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    with gzip.open(tmp_path / "e.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "three"}))
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["four", "five"], "domain": ["right", None], "n": [1, 2]})
    parquet.write_table(table, tmp_path / "f.parquet")
    return tmp_path


def test_every_kind_is_read(folder):
    source = validate(Files(paths=(str(folder),), domain="mine", validation_fraction=0.3))
    splits = read(source)
    found = {text: domain for documents in splits.values() for _, text, domain in documents}
    assert found == {
        "plain text": "mine", "# markdown é": "mine", "compressed": "mine", "one": "left", "two": "mine", "three": "mine",
        "four": "right", "five": "mine",
    }  # fmt: skip
    assert splits["train"] and splits["validation"]
    keys = [key for documents in splits.values() for key, _, _ in documents]
    assert len(set(keys)) == len(keys) == 8


def test_split_depends_on_names_not_on_the_folders_place(folder, tmp_path_factory):
    import shutil

    other = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(folder, other)
    here, there = Files(paths=(str(folder),)), Files(paths=(str(other),))
    assert read(here) == read(there) and here.fingerprint() == there.fingerprint()
    (other / "a.txt").write_text("changed")
    assert here.fingerprint() != there.fingerprint()


def test_validation_by_name(folder):
    splits = read(validate(Files(paths=(str(folder),), validation=("sub/*",))))
    assert {key for key, _, _ in splits["validation"]} == {"sub/b.md#0", "sub/c.rst.gz#0"}
    assert not any(key.startswith("sub/") for key, _, _ in splits["train"])


def test_a_single_document_is_cut_at_a_line(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "input.txt").write_text(text)
    splits = read(Files(paths=(str(tmp_path / "input.txt"),), validation_fraction=0.1))
    (_, train, _), (_, held_out, _) = splits["train"][0], splits["validation"][0]
    assert train + held_out == text and train.endswith("\n")
    assert 0.09 < len(held_out) / len(text) < 0.11


def test_a_single_document_without_lines_or_length(tmp_path):
    path = tmp_path / "input.txt"
    path.write_text("x" * 100)
    splits = read(Files(paths=(str(path),), validation_fraction=0.1))
    assert len(splits["train"][0][1]) == 90
    path.write_text("x")
    with pytest.raises(ValueError, match="too short to split"):
        read(Files(paths=(str(path),)))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.png", b"", r"paths = '.*x\.png'.*a file of kind text \(\.txt"),
        ("x.parquet.gz", b"", r"paths = '.*x\.parquet\.gz'.*\.parquet; text and \.jsonl also with \.gz"),
    ],
)
def test_wrong_kinds_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        validate(Files(paths=(str(tmp_path / name),)))
    with pytest.raises(ConfigError, match="a folder that holds files of kind"):
        validate(Files(paths=(str(tmp_path),)))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x\.jsonl, line 2 is not JSON"),
        ("x.jsonl", b'{"body": "a"}\n' * 3, r"line 1 has no text field 'text'; it has: body"),
        ("x.jsonl", b"[1]\n" * 3, "it has: list"),
        ("x.txt", b"\xff\xfe", r"x\.txt is not UTF-8 text \(byte 0\)"),
    ],
)
def test_broken_content_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "more.txt").write_text("enough to split")
    with pytest.raises(ValueError, match=message):
        read(Files(paths=(str(tmp_path),)))


def test_parquet_without_the_column(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["a", "b"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="no column 'text'; it has: body"):
        read(Files(paths=(str(tmp_path),)))


def test_find_keeps_a_fixed_order(folder):
    names = [file.name for file in find((str(folder),))]
    assert names == ["a.txt", "d.jsonl", "e.jsonl.gz", "f.parquet", "sub/b.md", "sub/c.rst.gz"]
