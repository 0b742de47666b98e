"""The corpus of installed text: found in order, repeated text left out, packages on one side."""

import gzip
import random

import pytest

from sparse_lm.data import installed
from sparse_lm.data.installed import Deduplicator, Installed

PROSE = "The river ran quietly through the valley, and nobody who lived there thought of leaving it for the towns. " * 8


@pytest.fixture
def root(tmp_path):
    site = tmp_path / "lib" / "python3.12" / "site-packages"
    for n in range(60):
        package = site / f"package{n:02d}"
        package.mkdir(parents=True)
        body = "\n\n".join(
            f"def function_{n}_{i}(argument):\n    return argument + {i} * (argument - {n})  # {'x' * 60}"
            for i in range(4)
        )
        (package / "module.py").write_text(body)
        (package / "copy.py").write_text(body)
        (package / "README.md").write_text(f"Package {n}\n\n" + PROSE.replace("river", f"river {n}"))
    (site / "package00-1.0.dist-info").mkdir()
    (site / "package00-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: package00\nVersion: 1.0\nLicense-Expression: MIT\n"
    )
    (site / "package00-1.0.dist-info" / "RECORD").write_text("package00/module.py,,\n")
    (site / "package01" / "data.txt").write_text("1 2 3 4 5 6 7 8 9 0\n" * 50)
    (site / "package01" / "table.rst").write_text("| a | b |\n|---|---|\n" * 40)
    letters = "\n".join("".join(random.Random(line).choices("etaoin shrdlu", k=60)) for line in range(30))
    (site / "package01" / "README.gz").write_bytes(gzip.compress(letters.encode()))
    (site / "package01" / "model.json.gz").write_bytes(gzip.compress(b"{}" * 500))
    (site / "package01" / "binary.py").write_bytes(b"\0" * 500)
    return tmp_path


def read(source):
    lines = []
    return {split: list(found) for split, found in source.documents(lines.append).items()}, lines


def test_what_is_found(root):
    source = Installed(roots=(str(root),), validation_fraction=0.1)
    splits, lines = read(source)
    documents = splits["train"] + splits["validation"]
    names = [document.key.split("site-packages/")[1] for document in documents]
    assert len([name for name in names if name.endswith(".py")]) == 60, "a copy of a document is left out"
    assert "package01/README.gz" in names and "package01/table.rst" in names
    assert not {"package01/data.txt", "package01/binary.py", "package01/model.json.gz"} & set(names)
    domains = {name: document.domain for name, document in zip(names, documents)}
    assert domains["package02/README.md"] == "prose" and domains["package01/table.rst"] == "docs"
    assert {domains[name] for name in names if name.endswith(".py")} == {"code"}
    license = {name: document.license for name, document in zip(names, documents)}
    assert license[next(name for name in names if name.startswith("package00/"))] == "MIT"
    assert any("of repeated text left out" in line for line in lines)


def test_packages_are_on_one_side(root):
    splits, _ = read(Installed(roots=(str(root),), validation_fraction=0.1))
    packages = {
        split: {d.key.split("site-packages/")[1].split("/")[0] for d in documents}
        for split, documents in splits.items()
    }
    assert packages["train"] and packages["validation"] and not packages["train"] & packages["validation"]
    assert 3 <= len(packages["validation"]) <= 15


def test_order_is_fixed(root):
    source = Installed(roots=(str(root),))
    assert read(source)[0] == read(source)[0]
    before = source.fingerprint()
    (root / "new.py").write_text("x = 1  # new\n" * 50)
    assert source.fingerprint() != before


def test_limits(root):
    assert not any(d.domain == "code" for d in read(Installed(roots=(str(root),), code=False))[0]["train"])
    assert {d.domain for d in read(Installed(roots=(str(root),), text=False))[0]["train"]} == {"code"}


@pytest.mark.parametrize(
    "path, package",
    [
        ("lib/python3.12/site-packages/numpy/core/x.py", "numpy"),
        ("python3.11/json/decoder.py", "json"),
        ("json/decoder.py", "json"),
        ("abc.py", "abc"),
        ("dist-packages/six.py", "six"),
        ("numpy-2.0.dist-info/x.txt", "numpy-2"),
        ("libc6/README.gz", "libc6"),
    ],
)
def test_package_names(path, package):
    assert installed.package_of(tuple(path.split("/"))) == package


def test_repeated_blocks_are_left_out():
    header, body = "# licence " * 20, [f"paragraph {i} " * 20 for i in range(6)]
    seen = Deduplicator()
    first = "\n\n".join([header, body[0], body[1]])
    assert seen.novel(first) == first
    assert seen.novel(first) is None
    assert seen.novel(first.replace(" ", "  ")) is None, "white space does not make a document new"
    assert seen.novel("\n\n".join([header, body[2], body[3]])) == "\n\n".join([body[2], body[3]])
    assert seen.novel("\n\n".join([header, body[0], body[1], "tail"])) is None, "too little is left"
    assert (
        seen.repeated == 2 * len(first) + len(first.replace(" ", "  ")) - len(first) + len(header) + 2 + len(first) + 6
    )


@pytest.mark.slow
def test_this_machine(tmp_path):
    source = Installed(megabytes=3)
    splits, lines = read(source)
    assert sum(len(document.text) for document in splits["train"]) >= 3_000_000
    assert lines
