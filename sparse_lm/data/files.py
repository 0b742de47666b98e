"""Local text as a source: files and folders of plain text, JSON lines and parquet, gzip-compressed or not."""

import dataclasses
import fnmatch
import gzip
import json
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

import numpy as np

from sparse_lm.config import ConfigError
from sparse_lm.data import order, storage
from sparse_lm.data.source import Document, Split, TextSource

TEXT_KINDS = (
    ".txt", ".text", ".md", ".rst", ".tex", ".py", ".c", ".h", ".cc", ".cpp", ".cu", ".js", ".ts", ".java", ".go", ".rs", ".sh",
)  # fmt: skip
RECORD_KINDS = (".jsonl", ".parquet")
KINDS = "text ({}), .jsonl, .parquet; text and .jsonl also with .gz".format(" ".join(TEXT_KINDS))


class Found(NamedTuple):
    """A file to read."""

    path: pathlib.Path
    name: str
    """Path below the folder that was named (or the file's own name)."""
    kind: str
    """Suffix without .gz."""


def kind_of(path: pathlib.Path) -> str | None:
    """Returns the suffix that decides how a file is read, or None when it is not an allowed kind."""
    compressed = path.suffix.lower() == ".gz"
    kind = (path.with_suffix("") if compressed else path).suffix.lower()
    if kind in TEXT_KINDS or kind == ".jsonl" or (kind == ".parquet" and not compressed):
        return kind
    return None


def find(paths: tuple[str, ...]) -> list[Found]:
    """Lists the files below paths in a fixed order; hidden files and other kinds in folders are left out.

    Raises:
      ConfigError: for a path that does not exist, a file of another kind, or a folder without files of an allowed kind.
    """
    found = []
    for text in paths:
        path = pathlib.Path(text).expanduser()
        if path.is_file():
            kind = kind_of(path)
            if kind is None:
                raise ConfigError("paths", text, f"a file of kind {KINDS}")
            found.append(Found(path, path.name, kind))
        elif path.is_dir():
            inside = [
                Found(each, each.relative_to(path).as_posix(), kind)
                for each in sorted(path.rglob("*"))
                if each.is_file()
                and not any(part.startswith(".") for part in each.relative_to(path).parts)
                and (kind := kind_of(each)) is not None
            ]
            if not inside:
                raise ConfigError("paths", text, f"a folder that holds files of kind {KINDS}")
            found += inside
        else:
            raise ConfigError("paths", text, "an existing file or folder")
    return found


def _open_bytes(path: pathlib.Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _utf8(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text (byte {error.start}); allowed: UTF-8") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files(TextSource):
    """Text on this machine: each text file is a document, each record of a .jsonl or .parquet file is one."""

    paths: tuple[str, ...] = ()
    """Files and folders (searched to the bottom)."""
    text_field: str = "text"
    """Field of .jsonl and .parquet records that holds the text."""
    domain: str = "text"
    """Domain of documents that do not name one."""
    domain_field: str = "domain"
    """Field of .jsonl and .parquet records that names the document's domain, where present."""
    license: str = "unknown"
    """Licence note kept with every document."""
    validation: tuple[str, ...] = ()
    """Patterns (such as held_out/* or *2024*) of the files that are validation; empty: a fraction of the documents."""
    validation_fraction: float = 0.02
    """Without patterns: the share of documents held out, at least one; of a single document, its last part."""

    def check(self) -> None:
        super().check()
        self.require(len(self.paths) > 0, "paths", f"at least one file or folder; kinds: {KINDS}")
        self.require(0 < self.validation_fraction < 1, "validation_fraction", "between 0 and 1")
        self.require(bool(self.text_field), "text_field", "the name of a field")
        self.require(bool(self.domain), "domain", "a name")
        files = find(self.paths)
        if self.validation:
            held_out = sum(self._named(file) for file in files)
            self.require(
                0 < held_out < len(files),
                "validation",
                f"patterns that match some but not all of the {len(files)} files",
            )

    def _named(self, file: Found) -> bool:
        return any(fnmatch.fnmatch(file.name, pattern) for pattern in self.validation)

    def fingerprint(self) -> dict[str, Any]:
        identity = self.identity()
        del identity["paths"]
        return {**identity, "files": [[file.name, storage.sha256(file.path)] for file in find(self.paths)]}

    def _records(self, file: Found) -> Iterator[tuple[str, str]]:
        """Yields (text, domain) of each record of a file, in order."""
        if file.kind == ".parquet":
            yield from self._parquet(file)
        elif file.kind == ".jsonl":
            with _open_bytes(file.path) as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield self._record(line, f"{file.path}, line {number}")
        else:
            with _open_bytes(file.path) as content:
                yield _utf8(content.read(), str(file.path)), self.domain

    def _record(self, line: bytes, where: str) -> tuple[str, str]:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get(self.text_field), str):
            have = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{where} has no text field {self.text_field!r}; it has: {have}")
        return record[self.text_field], str(record.get(self.domain_field) or self.domain)

    def _parquet(self, file: Found) -> Iterator[tuple[str, str]]:
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(file.path)
        names = table.schema_arrow.names
        if self.text_field not in names:
            raise ValueError(f"{file.path} has no column {self.text_field!r}; it has: {', '.join(names)}")
        columns = [name for name in (self.text_field, self.domain_field) if name in names]
        for batch in table.iter_batches(columns=columns):
            for row in batch.to_pylist():
                yield row[self.text_field] or "", str(row.get(self.domain_field) or self.domain)

    def _count(self, file: Found) -> int:
        if file.kind == ".parquet":
            import pyarrow.parquet

            return int(pyarrow.parquet.ParquetFile(file.path).metadata.num_rows)
        if file.kind == ".jsonl":
            with _open_bytes(file.path) as lines:
                return sum(bool(line.strip()) for line in lines)
        return 1

    def held_out(self, files: list[Found]) -> list[np.ndarray]:
        """Returns, for each file, which of its documents are validation; all False when there is a single document."""
        counts = [self._count(file) for file in files]
        if self.validation:
            return [np.full(count, self._named(file)) for file, count in zip(files, counts, strict=True)]
        total = sum(counts)
        if total <= 1:
            return [np.zeros(count, bool) for count in counts]
        # Ranked by a hash of file name and record number, so the choice does not depend on the order of the paths.
        ranks = np.concatenate(
            [order.draws(count, zlib.crc32(file.name.encode())) for file, count in zip(files, counts, strict=True)]
        )
        chosen = np.zeros(total, bool)
        chosen[np.argsort(ranks, kind="stable")[: max(1, round(total * self.validation_fraction))]] = True
        return np.split(chosen, np.cumsum(counts)[:-1])

    def documents(self, note: Callable[[str], Any]) -> dict[Split, Iterator[Document]]:
        files = find(self.paths)
        masks = self.held_out(files)
        total = sum(len(mask) for mask in masks)
        if total == 1:
            note(f"one document; its last {100 * self.validation_fraction:g}% is validation")
            return self._cut(files)
        names = [file.name for file, mask in zip(files, masks, strict=True) if mask.any()]
        shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
        count = sum(int(mask.sum()) for mask in masks)
        note(f"{len(files)} files, {total} documents; {count} for validation, in: {shown}")

        def generate(split: Split) -> Iterator[Document]:
            for file, mask in zip(files, masks, strict=True):
                if not (mask == (split == "validation")).any():
                    continue
                for number, (text, domain) in enumerate(self._records(file)):
                    if mask[number] == (split == "validation") and text.strip():
                        yield Document(f"{file.name}#{number}", text, domain, self.license)

        return {"train": generate("train"), "validation": generate("validation")}

    def _cut(self, files: list[Found]) -> dict[Split, Iterator[Document]]:
        """Splits a single document: its last part, from the next line start on, is validation."""
        file = next(file for file in files if self._count(file))
        text, domain = next(self._records(file))
        at = text.find("\n", int(len(text) * (1 - self.validation_fraction))) + 1
        if not 0 < at < len(text):
            at = max(1, int(len(text) * (1 - self.validation_fraction)))
        if not text[:at].strip() or not text[at:].strip():
            raise ValueError(f"{file.path} is the only document and too short to split into training and validation")
        parts: dict[Split, str] = {"train": text[:at], "validation": text[at:]}
        return {
            split: iter([Document(f"{file.name}#{split}", part, domain, self.license)]) for split, part in parts.items()
        }
