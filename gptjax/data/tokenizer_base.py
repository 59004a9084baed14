"""What every tokenizer is: text to ids and back, and files that define it."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from gptjax.config import UserError

DESCRIPTOR = "descriptor.json"
META_SPACE = "\u2581"  # by which SentencePiece writes a space
# Words, numbers, spaces and scripts that tokenizers of the same pieces may still cut in other ways.
_PROBE = "The quick brown fox isn't 12345.6 years old,\n\tsaid  naïve 中文 readers; don't they've?"


class Tokenizer(ABC):
    """Text to ids. `bos_id` and `eos_id` begin and end a document; None where the tokenizer has none."""

    kind: ClassVar[str]
    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """int32 ids of the text, without begin or end tokens; special tokens spelt out in the text are plain text."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids; special ids stand for nothing, and bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes of the text that each id stands for, 0 for special ids."""

    @abstractmethod
    def vocabulary(self) -> Sequence[bytes | None]:
        """The bytes that each id adds to a text, None for a special id: those of a text's ids, joined, are the text.

        A tokenizer that puts a space before every text takes it off again where the text begins; behind a prompt there is none to
        take off. Raises `UserError` where the bytes of an id depend on its neighbours.
        """

    def offsets(self, text: str) -> np.ndarray | None:
        """int64 [n, 2]: where each token of the text begins and ends, in characters, for a tokenizer that knows it by itself."""
        return None

    def token_id(self, name: str) -> int | None:
        """The id of a piece or special token as the tokenizer's files spell it; None where there is none."""
        return None

    # --- special tokens and templates, where the tokenizer's files name any -----------------------------------------------------

    def special_tokens(self) -> Mapping[str, int]:
        """{how a special token is spelt: its id}."""
        return {}

    def token_names(self) -> Mapping[str, str]:
        """{"bos_token": how it is spelt, ...}, as chat templates call them."""
        return {}

    def chat_templates(self) -> Mapping[str, str]:
        """{name: Jinja source}; the one that is meant where none is named is called default."""
        return {}

    @property
    def adds_bos(self) -> bool | None:
        """Whether the files put the begin-of-text token before every text; None where they don't say."""
        return None

    @property
    def begins_with_bos(self) -> bool:
        """Whether a model that comes with these files was trained on texts that begin with the begin-of-text token."""
        if self.adds_bos is None:  # what transformers' classes for such files do
            return self.kind == "sentencepiece"
        return self.adds_bos

    def encode_special(self, text: str) -> np.ndarray:
        """As `encode`, but special tokens spelt out in the text are those tokens. For text that no stranger wrote."""
        special = self.special_tokens()
        if not special:
            return self.encode(text)
        # Where one spelling begins another the longer is meant.
        pattern = "|".join(re.escape(name) for name in sorted(special, key=len, reverse=True))
        ids: list[int] = []
        for part in re.split(f"({pattern})", text):
            ids += [special[part]] if part in special else self.encode(part).tolist() if part else []
        return np.asarray(ids, np.int32)

    # --- files ------------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """{file name: content} of all that defines the tokenizer."""

    @classmethod
    @abstractmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Tokenizer:
        """The tokenizer that `files` defines."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 hex of all that defines the tokenizer."""
        digest = hashlib.sha256(self.kind.encode())
        for name, content in sorted(self.files().items()):
            digest.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(content).digest())
        return digest.hexdigest()

    @functools.cached_property
    def encoding_fingerprint(self) -> str:
        """sha256 hex of what decides which ids a text becomes: the ends of a text too, chat templates and the like not."""
        digest = hashlib.sha256(f"{self.kind} {self.vocab_size} {self.bos_id} {self.eos_id}".encode())
        for name, content in sorted(self._encoding_files().items()):
            digest.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(content).digest())
        return digest.hexdigest()

    def has_ids_of(self, other: Tokenizer) -> bool:
        """Whether ids mean the same in both, be they of one kind or read from other files."""
        if self.encoding_fingerprint == other.encoding_fingerprint:
            return True
        if (self.vocab_size, self.eos_id) != (other.vocab_size, other.eos_id):
            return False
        try:
            same = list(self.vocabulary()) == list(other.vocabulary())
            return same and bool(np.array_equal(self.encode(_PROBE), other.encode(_PROBE)))
        except UserError:  # no bytes of their own, or a text that one of the two cannot write
            return False

    def _encoding_files(self) -> dict[str, bytes]:
        return self.files()

    def save(self, directory: pathlib.Path) -> None:
        """Writes the files, then the descriptor that names them; an interrupted save leaves no descriptor, or the one before."""
        directory.mkdir(parents=True, exist_ok=True)
        files = self.files()
        descriptor = {"kind": self.kind, "vocab_size": self.vocab_size, "files": sorted(files), "fingerprint": self.fingerprint}
        for name, content in files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            write_atomically(directory / name, content)
        write_atomically(directory / DESCRIPTOR, json.dumps(descriptor, indent=2).encode() + b"\n")


def one_line(error: Exception) -> str:
    """The first line of what a package says, for a sentence of ours to end with."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")


def refuse_half_characters(text: str) -> None:
    """Raises `UserError` where the text holds a lone surrogate: no text has one, and no encoder takes it."""
    if found := re.search("[\ud800-\udfff]", text):
        code = ord(found[0])
        # Python keeps a byte that is not UTF-8, of a file's or an argument's, as U+DC80 to U+DCFF.
        is_byte = 0xDC80 <= code <= 0xDCFF
        what = f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8," if is_byte else f"U+{code:04X}, half a character,"
        raise UserError(f"the text holds {what} at character {found.start()}.")


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that others see whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def checked(ids: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """The ids as int64, all within the vocabulary; a model with more rows than the tokenizer has ids may produce others."""
    array = np.asarray(ids, np.int64).reshape(-1)
    outside = array[(array < 0) | (array >= vocab_size)]
    if outside.size:
        raise ValueError(f"id {outside[0]} is outside the tokenizer's {vocab_size} ids")
    return array


class PieceTokenizer(Tokenizer):
    """A tokenizer whose every id stands for fixed bytes, None for a special id: decoding joins them."""

    pieces: Sequence[bytes | None]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        pieces = self.pieces
        return b"".join(pieces[i] or b"" for i in checked(ids, self.vocab_size)).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.asarray([len(piece or b"") for piece in self.pieces], np.int32)

    def vocabulary(self) -> Sequence[bytes | None]:
        return self.pieces
