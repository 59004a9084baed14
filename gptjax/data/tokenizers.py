"""Text to ids and back. `TOKENIZERS` is the table of kinds; a kind is made of files, which a run keeps beside its checkpoints."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import pathlib
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from gptjax.config import DataConfig, UserError
from gptjax.data.byte_pairs import BytePairEncoder, piece_bytes
from gptjax.data.sources import Source, documents, nearest


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

    def token_id(self, name: str) -> int | None:
        """The id of a piece or special token as the tokenizer's files spell it; None where there is none."""
        return None

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

    def save(self, directory: pathlib.Path) -> None:
        """Writes the files, then the descriptor that names them; an interrupted save leaves no descriptor, or the one before."""
        directory.mkdir(parents=True, exist_ok=True)
        files = self.files()
        descriptor = {"kind": self.kind, "vocab_size": self.vocab_size, "files": sorted(files), "fingerprint": self.fingerprint}
        for name, content in files.items():
            write_atomically(directory / name, content)
        write_atomically(directory / _DESCRIPTOR, json.dumps(descriptor, indent=2).encode() + b"\n")


_DESCRIPTOR = "descriptor.json"


def load_tokenizer(directory: pathlib.Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote. Raises `UserError` where it is missing or damaged."""
    try:
        descriptor = json.loads((directory / _DESCRIPTOR).read_bytes())
        files = {name: (directory / name).read_bytes() for name in descriptor["files"]}
        tokenizer = TOKENIZERS[descriptor["kind"]].from_files(files)
        intact = tokenizer.fingerprint == descriptor["fingerprint"]
    except FileNotFoundError as error:
        raise UserError(f"there is no tokenizer in {directory}: {error.filename} is missing.") from None
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"the tokenizer in {directory} is damaged: {error}.") from error
    if not intact:
        raise UserError(f"the tokenizer in {directory} is damaged: its files are not those that {_DESCRIPTOR} names.")
    return tokenizer


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


# --- bytes and characters ---------------------------------------------------------------------------------------------


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and 256 for begin and end of text."""

    kind = "byte"
    vocab_size = 257
    bos_id = eos_id = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = _checked(ids, self.vocab_size)
        return ids[ids < 256].astype(np.uint8).tobytes().decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        return (np.arange(self.vocab_size) < 256).astype(np.int32)

    def vocabulary(self) -> Sequence[bytes | None]:
        return [*(bytes([byte]) for byte in range(256)), None]

    def files(self) -> dict[str, bytes]:
        return {}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> ByteTokenizer:
        return cls()


class CharTokenizer(Tokenizer):
    """One id a character, in the order of code points (nanoGPT's character tokenizer); no begin or end token.

    `encode` raises `UserError` for a character that is not in the alphabet.
    """

    kind = "char"

    def __init__(self, alphabet: str):
        self.alphabet = "".join(sorted(set(alphabet)))
        self.vocab_size = len(self.alphabet)
        self._codes = _code_points(self.alphabet)

    def encode(self, text: str) -> np.ndarray:
        codes = _code_points(text)
        ids = np.minimum(np.searchsorted(self._codes, codes), self.vocab_size - 1)
        unknown = np.flatnonzero(self._codes[ids] != codes)
        if unknown.size:
            character = text[unknown[0]]
            raise UserError(
                f"the character {character!r} (U+{ord(character):04X}) is not among the tokenizer's {self.vocab_size}."
            )
        return ids.astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._codes[_checked(ids, self.vocab_size)].tobytes().decode("utf-32-le", errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.asarray([len(character.encode()) for character in self.alphabet], np.int32)

    def vocabulary(self) -> Sequence[bytes | None]:
        return [character.encode() for character in self.alphabet]

    def files(self) -> dict[str, bytes]:
        return {"alphabet.json": json.dumps(self.alphabet).encode()}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> CharTokenizer:
        return cls(json.loads(files["alphabet.json"]))


def _code_points(text: str) -> np.ndarray:
    """uint32 code points."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _checked(ids: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """The ids as int64, all within the vocabulary; a model with more rows than the tokenizer has ids may produce others."""
    array = np.asarray(ids, np.int64).reshape(-1)
    outside = array[(array < 0) | (array >= vocab_size)]
    if outside.size:
        raise ValueError(f"id {outside[0]} is outside the tokenizer's {vocab_size} ids")
    return array


# --- subwords ---------------------------------------------------------------------------------------------------------


class PieceTokenizer(Tokenizer):
    """A tokenizer whose every id stands for fixed bytes, None for a special id: decoding joins them."""

    pieces: Sequence[bytes | None]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        pieces = self.pieces
        return b"".join(pieces[i] or b"" for i in _checked(ids, self.vocab_size)).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.asarray([len(piece or b"") for piece in self.pieces], np.int32)

    def vocabulary(self) -> Sequence[bytes | None]:
        return self.pieces


class Gpt2Tokenizer(PieceTokenizer):
    """GPT-2's byte-pair encoding from encoder.json and vocab.bpe; `<|endoftext|>` begins and ends a document."""

    kind = "gpt2"

    def __init__(self, encoder: bytes, merges: bytes):
        self._encoder, self._merges = encoder, merges
        ids: dict[str, int] = json.loads(encoder)
        if sorted(ids.values()) != list(range(len(ids))):
            raise ValueError("the ids of encoder.json are not 0, 1, 2, ...")
        # The first line is a version; a merge is two pieces with one space between.
        pairs = [tuple(line.split(" ")) for line in merges.decode().split("\n")[1:] if line]
        self.vocab_size = len(ids)
        self.bos_id = self.eos_id = ids.get("<|endoftext|>")
        self.pieces = [
            None if i == self.eos_id else piece_bytes(piece) for piece, i in sorted(ids.items(), key=lambda item: item[1])
        ]
        self._ids = ids
        self._encode = BytePairEncoder(ids, [(left, right) for left, right in pairs]).encode

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._encode(text), np.int32)

    def token_id(self, name: str) -> int | None:
        return self._ids.get(name)

    def files(self) -> dict[str, bytes]:
        return {"encoder.json": self._encoder, "vocab.bpe": self._merges}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Gpt2Tokenizer:
        return cls(files["encoder.json"], files["vocab.bpe"])


class SentencePieceTokenizer(PieceTokenizer):
    """A SentencePiece model. One trained by `train_sentencepiece` gives every text back exactly; others normalise as they do."""

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        import sentencepiece

        self._model = model
        self._processor = processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = processor.vocab_size()
        self.bos_id, self.eos_id = (i if i >= 0 else None for i in (processor.bos_id(), processor.eos_id()))
        self.pieces = [self._piece(i) for i in range(self.vocab_size)]
        by_bytes = {int(processor.id_to_piece(i)[1:-1], 16): i for i in range(self.vocab_size) if processor.is_byte(i)}
        # A model without byte fallback, or that puts a space before every text, decodes by rules of its own.
        self._exact = len(by_bytes) == 256 and not processor.encode("a", out_type=str)[0].startswith(_META_SPACE)
        self._escape = [by_bytes[byte] for byte in _META_SPACE.encode()] if self._exact else []

    def _piece(self, i: int) -> bytes | None:
        processor = self._processor
        if processor.is_byte(i):  # written <0x41>
            return bytes([int(processor.id_to_piece(i)[1:-1], 16)])
        if processor.is_control(i) or processor.is_unknown(i):
            return None
        return processor.id_to_piece(i).replace(_META_SPACE, " ").encode()

    def encode(self, text: str) -> np.ndarray:
        if not self._exact or _META_SPACE not in text:
            return np.asarray(self._processor.encode(text), np.int32)
        # SentencePiece writes a space as U+2581, so a U+2581 of the text would come back as a space: it is spelt in bytes.
        first, *rest = text.split(_META_SPACE)
        ids = list(self._processor.encode(first))
        for part in rest:
            ids += self._escape + self._processor.encode(part)
        return np.asarray(ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return super().decode(ids) if self._exact else self._processor.decode(_checked(ids, self.vocab_size).tolist())

    def token_id(self, name: str) -> int | None:
        found = self._processor.piece_to_id(name)  # the unknown token's where there is none
        return found if self._processor.id_to_piece(found) == name else None

    def files(self) -> dict[str, bytes]:
        return {"sentencepiece.model": self._model}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> SentencePieceTokenizer:
        return cls(files["sentencepiece.model"])


_META_SPACE = "\u2581"
_TRAINING_CHARACTERS = (
    4_000_000  # of the source that a SentencePiece model is trained on, spread over all of it: seconds, not minutes
)


def train_sentencepiece(source: Source, vocab_size: int) -> bytes:
    """A SentencePiece model (byte-pair encoding, byte fallback, no normalisation) of `_TRAINING_CHARACTERS` of the source.

    The merges of byte pairs are counted in whole numbers, so the model depends on the text alone, not on threads.
    Raises `UserError` where the source is too small for the vocabulary.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sample_lines(source),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=_LINE_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip()
        raise UserError(
            f"no SentencePiece model with data.tokenizer_vocab_size={vocab_size} can be trained on the source: {reason}"
        ) from error
    return model.getvalue()


_LINE_BYTES = 4000


def _sample_lines(source: Source) -> Iterator[str]:
    """Lines of evenly spaced documents, and of long documents evenly spaced runs, `_TRAINING_CHARACTERS` in all."""
    wanted = min(len(source), 2000)
    each = max(1, _TRAINING_CHARACTERS // wanted)
    left = _TRAINING_CHARACTERS
    for number in range(wanted):
        text = source[number * len(source) // wanted].text
        runs = min(8, 1 + len(text) // each)
        starts = [number * len(text) // runs for number in range(runs)]
        for start in starts if len(text) > each else [0]:
            for line in text[start : start + max(1, each // runs)].split("\n"):
                # A sentence longer than the limit would be dropped whole; a character has at most 4 bytes.
                for begin in range(0, len(line), _LINE_BYTES // 4):
                    yield line[begin : begin + _LINE_BYTES // 4].replace("\0", "")
        left -= min(len(text), each)
        if left <= 0:
            return


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json` (extra: huggingface). Begin and end tokens are found by their usual names."""

    kind = "huggingface"

    def __init__(self, content: bytes):
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                "data.tokenizer=huggingface needs the extra huggingface: pip install 'gptjax[huggingface]'."
            ) from error
        self._content = content
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"not a tokenizer.json: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.bos_id = self._first("<|begin_of_text|>", "<|endoftext|>", "<s>", "<bos>", "[CLS]")
        self.eos_id = self._first("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[SEP]")

    def name_of(self, i: int | None) -> str | None:
        """How the file spells an id; None where it has none such."""
        return None if i is None else self._tokenizer.id_to_token(i)

    def _first(self, *names: str) -> int | None:
        return next((i for name in names if (i := self._tokenizer.token_to_id(name)) is not None), None)

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode(_checked(ids, self.vocab_size).tolist(), skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        """Exact for byte-level and byte-fallback vocabularies; for others the bytes of each id decoded alone."""
        return self._token_bytes.copy()

    @functools.cached_property
    def _token_bytes(self) -> np.ndarray:
        if not self._unjoined():
            return np.asarray([len(piece or b"") for piece in self.vocabulary()], np.int32)
        specials = {token["id"] for token in self._definition.get("added_tokens", []) if token.get("special")}
        sizes = np.zeros(self.vocab_size, np.int32)
        for i in self._tokenizer.get_vocab(with_added_tokens=True).values():
            sizes[i] = 0 if i in specials else len(self._tokenizer.decode([i]).encode())
        return sizes

    @functools.cached_property
    def _definition(self) -> dict[str, Any]:
        return json.loads(self._content)

    def vocabulary(self) -> Sequence[bytes | None]:
        if unjoined := self._unjoined():
            raise UserError(
                f"the tokenizer.json joins its pieces by the decoder {unjoined}, so that no piece has bytes of its own; "
                f"known are {', '.join(sorted(_PIECEWISE))}."
            )
        return self._vocabulary

    def _unjoined(self) -> str | None:
        """The first decoder by which the text of a piece depends on its neighbours."""
        kinds = [part.get("type") for part in _parts(self._definition.get("decoder"))]
        return next((kind or "null" for kind in kinds if kind not in _PIECEWISE), None)

    @functools.cached_property
    def _vocabulary(self) -> list[bytes | None]:
        specials = {token["id"] for token in self._definition.get("added_tokens", []) if token.get("special")}
        decoders = _parts(self._definition.get("decoder"))
        pieces: list[bytes | None] = [None] * self.vocab_size
        for i in set(self._tokenizer.get_vocab(with_added_tokens=True).values()) - specials:
            # Not the vocabulary's own spelling: an added token may be decoded as the normaliser writes it.
            pieces[i] = _decoded(self._tokenizer.id_to_token(i) or "", decoders)
        return pieces

    def token_id(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(name)

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._content}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> HuggingFaceTokenizer:
        return cls(files["tokenizer.json"])


_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")
# Decoders that treat each piece by itself, but for a space or a few at the ends of the whole text.
_PIECEWISE = {"ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"}


def _decoded(piece: str, decoders: list[dict[str, Any]]) -> bytes:
    """The bytes of a piece inside a text, by the decoders in their order."""
    for decoder in decoders:
        kind = decoder["type"]
        if kind == "ByteFallback" and _BYTE_PIECE.fullmatch(piece):
            return bytes([int(piece[3:-1], 16)])
        if kind == "ByteLevel":
            try:
                return piece_bytes(piece)
            except KeyError:  # an added token, which need not be written in those characters
                return piece.encode()
        if kind == "Metaspace":
            piece = piece.replace(decoder.get("replacement", _META_SPACE), " ")
        elif kind == "Replace":
            pattern = decoder["pattern"]
            if "String" not in pattern:
                raise UserError("the tokenizer.json decodes by replacing a regular expression, which only that package reads.")
            piece = piece.replace(pattern["String"], decoder["content"])
    return piece.encode()


def _parts(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A decoder of tokenizer.json, which may be a sequence of decoders, as a list."""
    return (decoder or {}).get("decoders") or [decoder or {}]


TOKENIZERS: dict[str, type[Tokenizer]] = {
    tokenizer.kind: tokenizer
    for tokenizer in (ByteTokenizer, CharTokenizer, SentencePieceTokenizer, Gpt2Tokenizer, HuggingFaceTokenizer)
}


# --- the tokenizer of a config ----------------------------------------------------------------------------------------


def make_tokenizer(config: DataConfig, sources: Mapping[str, Source]) -> Tokenizer:
    """The tokenizer of `config`; `sources` are the cleaned splits, for those that are made from the text.

    Characters are collected over all splits, as nanoGPT does; a SentencePiece model is trained on the training split.
    Raises `UserError`.
    """
    if config.tokenizer == "char":
        return CharTokenizer(
            "".join({character for source in sources.values() for d in documents(source) for character in set(d.text)})
        )
    if config.tokenizer == "sentencepiece" and not config.tokenizer_path:
        return SentencePieceTokenizer(train_sentencepiece(sources["train"], config.tokenizer_vocab_size))
    try:
        return TOKENIZERS[config.tokenizer].from_files(_read_files(config))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"data.tokenizer_path: {config.tokenizer_path} holds no {config.tokenizer} tokenizer: {error}."
        ) from error


def _read_files(config: DataConfig) -> dict[str, bytes]:
    """The files that `config.tokenizer_path` stands for, under the names that the tokenizer gives them."""
    path = pathlib.Path(config.tokenizer_path).expanduser()
    wanted = {
        "byte": {},
        "gpt2": {"encoder.json": path / "encoder.json", "vocab.bpe": path / "vocab.bpe"},
        "sentencepiece": {"sentencepiece.model": path},
        "huggingface": {"tokenizer.json": path / "tokenizer.json" if path.is_dir() else path},
    }[config.tokenizer]
    for file in wanted.values():
        if not file.is_file():
            names = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
            raise UserError(f"data.tokenizer_path: {file} does not exist{nearest(file.name, names)}")
    return {name: file.read_bytes() for name, file in wanted.items()}
