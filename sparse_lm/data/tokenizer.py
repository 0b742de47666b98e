"""Tokenizers: raw bytes, a byte-level BPE trained on the training split, or a Hugging Face tokenizer.json.

A tokenizer config says what to build; `build` writes one JSON file, `load` reads it back as an `Encoder`. The SHA-256 of that
file identifies the tokenizer everywhere (token shards, checkpoints, reports).
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sparse_lm.config import Config
from sparse_lm.data import storage

END_OF_TEXT = "<|endoftext|>"


class Encoder:
    """Text to token ids and back.

    Attributes:
      vocab_size: number of ids.
      end_of_text: the id that begins every stored document.
      token_bytes_V: int32, UTF-8 bytes each id stands for; 0 for special ids.
      hash: SHA-256 of the tokenizer file.
    """

    vocab_size: int
    end_of_text: int
    token_bytes_V: np.ndarray
    hash: str

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text as int64 arrays, without end_of_text; special strings inside a text are plain text."""
        raise NotImplementedError

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of one text."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; special ids are skipped, broken UTF-8 is replaced."""
        raise NotImplementedError

    def token_names(self) -> list[str]:
        """Returns a name of every id that no other id has."""
        return [f"<{i}>" for i in range(self.vocab_size)]

    def ids_of(self, symbols: Sequence[str]) -> np.ndarray | None:
        """Returns the id of each planted symbol, or None when symbols are not single tokens of this vocabulary."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer(Config):
    """Base of tokenizer configs."""

    def fingerprint(self) -> dict[str, Any]:
        """Returns what identifies the tokenizer apart from its training text."""
        return {"tokenizer": type(self).__name__, **dataclasses.asdict(self)}

    @property
    def trained(self) -> bool:
        """Whether `build` uses the sources (and the tokenizer file therefore depends on them)."""
        return False

    def build(self, path: pathlib.Path, texts: Iterable[str], symbols: Sequence[str]) -> None:
        """Writes the tokenizer file atomically.

        Args:
          path: the file to write.
          texts: training documents; iterated only when `trained`.
          symbols: the words of planted sources.
        """
        raise NotImplementedError

    def load(self, path: pathlib.Path) -> Encoder:
        """Reads the file that `build` wrote."""
        raise NotImplementedError


class ByteEncoder(Encoder):
    """UTF-8 bytes as ids 0..255 and end_of_text as 256."""

    vocab_size = 257
    end_of_text = 256

    def __init__(self, file_hash: str):
        self.token_bytes_V = np.append(np.ones(256, np.int32), np.int32(0))
        self.hash = file_hash

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes(Tokenizer):
    """Raw UTF-8 bytes: 256 ids and end_of_text."""

    def build(self, path: pathlib.Path, texts: Iterable[str], symbols: Sequence[str]) -> None:
        storage.write_atomically(path, json.dumps({"tokenizer": "bytes", "version": 1}).encode())

    def load(self, path: pathlib.Path) -> Encoder:
        return ByteEncoder(storage.sha256(path))


class SubwordEncoder(Encoder):
    """A tokenizer.json read by the `tokenizers` library."""

    def __init__(self, path: pathlib.Path, end_of_text: str):
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # A document may spell a special token (tokenizer source code does): it must stay ordinary text.
        self._tokenizer.encode_special_tokens = True
        self.hash = storage.sha256(path)
        added = self._tokenizer.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        found = self._tokenizer.token_to_id(end_of_text)
        if found is None:
            names = sorted(added[i].content for i in special)
            raise ValueError(f"{path} has no token {end_of_text!r} to end documents with; its special tokens: {names}")
        self.end_of_text = found
        # Ids may have gaps, and added tokens may lie past the model's own vocabulary.
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        alphabet = _byte_alphabet()
        byte_level = "ByteLevel" in json.dumps(json.loads(self._tokenizer.to_str())["decoder"])
        self._bytes: list[bytes] | None = [b""] * self.vocab_size if byte_level else None
        self.token_bytes_V = np.zeros(self.vocab_size, np.int32)
        for token, i in vocabulary.items():
            if i in special:
                continue
            if i in added:
                piece = added[i].content.encode()
            elif byte_level:
                piece = bytes(alphabet[character] for character in token)
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                piece = b"x"
            else:
                piece = token.replace("\u2581", " ").encode()
            self.token_bytes_V[i] = len(piece)
            if self._bytes is not None:
                self._bytes[i] = piece

    def token_names(self) -> list[str]:
        names = (self._tokenizer.id_to_token(i) for i in range(self.vocab_size))
        return [f"<{i}>" if name is None else name for i, name in enumerate(names)]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        if self._bytes is None:
            return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        table = self._bytes
        return b"".join([table[i] for i in (ids.tolist() if isinstance(ids, np.ndarray) else ids)]).decode(
            errors="replace"
        )


def _byte_alphabet() -> dict[str, int]:
    """Returns GPT-2's printable stand-in for every byte: character -> byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {**{chr(b): b for b in printable}, **{chr(256 + n): b for n, b in enumerate(others)}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BPE(Tokenizer):
    """Byte-level byte-pair encoding, trained on the training split only; digits are single tokens."""

    vocab_size: int = 8192
    """Ids in all, with 256 bytes and end_of_text; a small corpus may yield fewer."""
    training_bytes: int = 200_000_000
    """At most this many bytes of training text are read (evenly spaced documents) to learn the merges."""

    def check(self) -> None:
        self.require(257 <= self.vocab_size <= 1_000_000, "vocab_size", "257 (256 bytes and end_of_text) to 1000000")
        self.require(self.training_bytes > 0, "training_bytes", "a positive number of bytes")

    @property
    def trained(self) -> bool:
        return True

    def build(self, path: pathlib.Path, texts: Iterable[str], symbols: Sequence[str]) -> None:
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, pre_tokenizers, trainers

        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        library.train_from_iterator(texts, trainer)
        storage.write_atomically(path, library.to_str().encode())

    def load(self, path: pathlib.Path) -> Encoder:
        return SubwordEncoder(path, END_OF_TEXT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFace(Tokenizer):
    """A tokenizer.json of the Hugging Face `tokenizers` format."""

    path: str = ""
    """Path of the tokenizer.json; it is copied beside the token shards."""
    end_of_text: str = END_OF_TEXT
    """The token that begins and ends documents, for example <|endoftext|> or </s>."""

    def check(self) -> None:
        self.require(pathlib.Path(self.path).expanduser().is_file(), "path", "an existing tokenizer.json file")
        self.require(bool(self.end_of_text), "end_of_text", "a token of the vocabulary")

    def fingerprint(self) -> dict[str, Any]:
        content = pathlib.Path(self.path).expanduser().read_bytes()
        return {
            "tokenizer": "HuggingFace",
            "sha256": hashlib.sha256(content).hexdigest(),
            "end_of_text": self.end_of_text,
        }

    def build(self, path: pathlib.Path, texts: Iterable[str], symbols: Sequence[str]) -> None:
        storage.write_atomically(path, pathlib.Path(self.path).expanduser().read_bytes())

    def load(self, path: pathlib.Path) -> Encoder:
        return SubwordEncoder(path, self.end_of_text)
