"""Files that are either whole or absent, and the hashes that name them."""

import hashlib
import json
import os
import pathlib
import uuid
from typing import Any


def content_key(identity: Any) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of a JSON-ready value."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def sha256(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def beside(path: pathlib.Path) -> pathlib.Path:
    """Returns a fresh temporary path in the same folder, to be moved onto `path` by `publish`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")


def publish(temporary: pathlib.Path, path: pathlib.Path) -> None:
    """Moves a finished temporary file onto its name, after its bytes have reached the disk."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Writes a file so that a reader finds the old content, the new content or nothing, never a part."""
    temporary = beside(path)
    try:
        temporary.write_bytes(content)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
