"""Text to ids and back. `TOKENIZERS` is the table of kinds; a kind is made of files, which a run keeps beside its checkpoints."""

from __future__ import annotations

import io
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from gptjax.config import DataConfig, UserError
from gptjax.data.byte_pairs import BytePairEncoder, piece_bytes
from gptjax.data.huggingface_tokenizer import HuggingFaceTokenizer
from gptjax.data.reserved import ReservedTokenizer
from gptjax.data.sources import Source, documents, nearest
from gptjax.data.special_tokens import SpecialTokens, is_side_file, side_files
from gptjax.data.tokenizer_base import (
    DESCRIPTOR,
    META_SPACE,
    PieceTokenizer,
    Tokenizer,
    checked,
    one_line,
    refuse_half_characters,
    write_atomically,
)

__all__ = [
    "TOKENIZERS",
    "ByteTokenizer",
    "CharTokenizer",
    "Gpt2Tokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "load_tokenizer",
    "make_tokenizer",
    "piece_bytes",
    "tokenizer_of_folder",
    "train_sentencepiece",
    "write_atomically",
]


def load_tokenizer(directory: pathlib.Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote. Raises `UserError` where it is missing or damaged."""
    try:
        descriptor = json.loads((directory / DESCRIPTOR).read_bytes())
        files = {name: (directory / name).read_bytes() for name in descriptor["files"]}
        kinds: dict[str, type[Tokenizer]] = {
            **TOKENIZERS,
            ReservedTokenizer.kind: ReservedTokenizer,
        }  # the latter no config asks for by name
        tokenizer = kinds[descriptor["kind"]].from_files(files)
        intact = tokenizer.fingerprint == descriptor["fingerprint"]
    except FileNotFoundError as error:
        raise UserError(f"there is no tokenizer in {directory}: {error.filename} is missing.") from None
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"the tokenizer in {directory} is damaged: {error}.") from error
    if not intact:
        raise UserError(f"the tokenizer in {directory} is damaged: its files are not those that {DESCRIPTOR} names.")
    return tokenizer


# --- bytes and characters ---------------------------------------------------------------------------------------------


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and 256 for begin and end of text."""

    kind = "byte"
    vocab_size = 257
    bos_id = eos_id = 256

    def encode(self, text: str) -> np.ndarray:
        refuse_half_characters(text)
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = checked(ids, self.vocab_size)
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
        refuse_half_characters(text)
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
        return self._codes[checked(ids, self.vocab_size)].tobytes().decode("utf-32-le", errors="replace")

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


# --- subwords ---------------------------------------------------------------------------------------------------------


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
        self.bos_id = self.eos_id = ids.get(_GPT2_END)
        self.pieces = [
            None if i == self.eos_id else piece_bytes(piece) for piece, i in sorted(ids.items(), key=lambda item: item[1])
        ]
        self._ids = ids
        self._encode = BytePairEncoder(ids, [(left, right) for left, right in pairs]).encode

    def encode(self, text: str) -> np.ndarray:
        refuse_half_characters(text)
        return np.asarray(self._encode(text), np.int32)

    def token_id(self, name: str) -> int | None:
        return self._ids.get(name)

    def special_tokens(self) -> Mapping[str, int]:
        return {} if self.eos_id is None else {_GPT2_END: self.eos_id}

    def token_names(self) -> Mapping[str, str]:
        return {} if self.eos_id is None else {"bos_token": _GPT2_END, "eos_token": _GPT2_END}

    def files(self) -> dict[str, bytes]:
        return {"encoder.json": self._encoder, "vocab.bpe": self._merges}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Gpt2Tokenizer:
        return cls(files["encoder.json"], files["vocab.bpe"])


_GPT2_END = "<|endoftext|>"


class SentencePieceTokenizer(PieceTokenizer):
    """A SentencePiece model. One trained by `train_sentencepiece` gives every text back exactly; others normalise as they do.

    `beside`: the files of a Hugging Face folder beside the model, {name: content}. Special tokens that these add behind the
    model's own are known; raises ValueError for others.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, beside: Mapping[str, bytes] | None = None):
        import sentencepiece

        self._model, self._beside = model, dict(beside or {})
        self._special = SpecialTokens.of(self._beside)
        self._processor = processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = processor.vocab_size()
        self.bos_id, self.eos_id = (i if i >= 0 else None for i in (processor.bos_id(), processor.eos_id()))
        self.pieces = [self._piece(i) for i in range(self.vocab_size)]
        by_bytes = {int(processor.id_to_piece(i)[1:-1], 16): i for i in range(self.vocab_size) if processor.is_byte(i)}
        # A model without byte fallback, or that puts a space before every text, decodes by rules of its own.
        self._exact = len(by_bytes) == 256 and not processor.encode("a", out_type=str)[0].startswith(META_SPACE)
        self._escape = [by_bytes[byte] for byte in META_SPACE.encode()] if self._exact else []
        self._add()

    def _add(self) -> None:
        """Special tokens and ends as the files beside the model state them."""
        own = self.vocab_size
        self._added = {token.content: token.id for token in self._special.added if token.id >= own}
        if self._added:
            odd = [token.content for token in self._special.added if token.id >= own and not token.special]
            if odd:
                raise ValueError(f"the added token {odd[0]!r} is not special, which only a tokenizer.json can hold")
            self.vocab_size = 1 + max(self._added.values())
            self.pieces = [*self.pieces, *[None] * (self.vocab_size - own)]
        names = self._special.names
        if self._special.stated:
            for name, spelling in names.items():
                if name in ("bos_token", "eos_token") and self.token_id(spelling) is None:
                    raise ValueError(f"{name} is {spelling!r}, which is not in the vocabulary")
            self.bos_id, self.eos_id = (self.token_id(names.get(name, "")) for name in ("bos_token", "eos_token"))

    def _piece(self, i: int) -> bytes | None:
        processor = self._processor
        if processor.is_byte(i):  # written <0x41>
            return bytes([int(processor.id_to_piece(i)[1:-1], 16)])
        if processor.is_control(i) or processor.is_unknown(i):
            return None
        return processor.id_to_piece(i).replace(META_SPACE, " ").encode()

    def encode(self, text: str) -> np.ndarray:
        refuse_half_characters(text)
        if not self._exact or META_SPACE not in text:
            return np.asarray(self._processor.encode(text), np.int32)
        # SentencePiece writes a space as U+2581, so a U+2581 of the text would come back as a space: it is spelt in bytes.
        first, *rest = text.split(META_SPACE)
        ids = list(self._processor.encode(first))
        for part in rest:
            ids += self._escape + self._processor.encode(part)
        return np.asarray(ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        if self._exact:
            return super().decode(ids)
        known = checked(ids, self.vocab_size)
        return self._processor.decode(known[known < self._processor.vocab_size()].tolist())

    def token_id(self, name: str) -> int | None:
        if name in self._added:
            return self._added[name]
        found = self._processor.piece_to_id(name)  # the unknown token's where there is none
        return found if self._processor.id_to_piece(found) == name else None

    def special_tokens(self) -> Mapping[str, int]:
        own = range(self._processor.vocab_size())
        return {self._processor.id_to_piece(i): i for i in own if self._processor.is_control(i)} | self._added

    def token_names(self) -> Mapping[str, str]:
        ends = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        spelt = {i: name for name, i in self.special_tokens().items()}
        return {name: spelt[i] for name, i in ends.items() if i in spelt} | dict(self._special.names)

    def chat_templates(self) -> Mapping[str, str]:
        return self._special.templates

    @property
    def adds_bos(self) -> bool | None:
        return self._special.adds_bos

    def files(self) -> dict[str, bytes]:
        return {"sentencepiece.model": self._model} | self._beside

    def _encoding_files(self) -> dict[str, bytes]:
        return {"sentencepiece.model": self._model, "added": json.dumps(sorted(self._added.items())).encode()}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> SentencePieceTokenizer:
        beside = {name: content for name, content in files.items() if is_side_file(name)}
        return cls(files["sentencepiece.model"], beside)


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
    path = pathlib.Path(config.tokenizer_path).expanduser()
    kind, places = _places(config, path)
    for file in places.values():
        if not file.is_file():
            names = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
            raise UserError(f"data.tokenizer_path: {file} does not exist{nearest(file.name, names)}")
    try:
        return _read(kind, places, path)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"data.tokenizer_path: {path} holds no {config.tokenizer} tokenizer: {error}.") from error


# What a Hugging Face folder may hold: the kind of tokenizer, and {its file's name: theirs}. The first that is there is taken.
_IN_FOLDER: list[tuple[str, dict[str, str]]] = [
    ("huggingface", {"tokenizer.json": "tokenizer.json"}),
    ("huggingface", {"vocab.json": "vocab.json", "merges.txt": "merges.txt"}),
    ("sentencepiece", {"sentencepiece.model": "tokenizer.model"}),
    ("sentencepiece", {"sentencepiece.model": "spiece.model"}),
    ("gpt2", {"encoder.json": "encoder.json", "vocab.bpe": "vocab.bpe"}),
]


def _found(folder: pathlib.Path, kinds: Sequence[str]) -> tuple[str, dict[str, pathlib.Path]] | None:
    for kind, names in _IN_FOLDER:
        places = {own: folder / name for own, name in names.items()}
        if kind in kinds and all(place.is_file() for place in places.values()):
            return kind, places
    return None


def _places(config: DataConfig, path: pathlib.Path) -> tuple[str, dict[str, pathlib.Path]]:
    """(kind of tokenizer, {name: file}) that `config.tokenizer_path` stands for; the files need not be there."""
    kind = config.tokenizer
    if kind == "byte":
        return kind, {}
    if kind == "gpt2":
        theirs = {"encoder.json": path / "vocab.json", "vocab.bpe": path / "merges.txt"}
        ours = {"encoder.json": path / "encoder.json", "vocab.bpe": path / "vocab.bpe"}
        return kind, ours if ours["encoder.json"].is_file() or not theirs["encoder.json"].is_file() else theirs
    if path.is_dir():
        found = _found(path, ["sentencepiece"] if kind == "sentencepiece" else ["huggingface", "sentencepiece"])
        return found or (kind, {"": path / ("tokenizer.model" if kind == "sentencepiece" else "tokenizer.json")})
    return kind, {"sentencepiece.model" if kind == "sentencepiece" else "tokenizer.json": path}


def _read(kind: str, places: Mapping[str, pathlib.Path], path: pathlib.Path) -> Tokenizer:
    """The tokenizer of these files; those beside them count where a folder was named, not where one file was."""
    files = {name: place.read_bytes() for name, place in places.items()}
    beside = side_files(path) if path.is_dir() and kind in ("huggingface", "sentencepiece") else {}
    return TOKENIZERS[kind].from_files(files | beside)


def tokenizer_of_folder(folder: pathlib.Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder; None where it holds none. Raises `UserError` where its files are damaged."""
    found = _found(folder, list(TOKENIZERS))
    if found is None:
        return None
    kind, places = found
    try:
        return _read(kind, places, folder)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        names = " and ".join(place.name for place in places.values())
        raise UserError(f"{folder}: {names} hold no tokenizer: {one_line(error)}.") from error


def trained_tokenizer(init_from: str) -> Tokenizer:
    """The tokenizer of a run's folder or a Hugging Face folder. Raises `UserError` where it has none."""
    folder = pathlib.Path(init_from).expanduser()
    found = load_tokenizer(folder / "tokenizer") if (folder / "tokenizer").is_dir() else tokenizer_of_folder(folder)
    if found is None:
        raise UserError(f"init_from={init_from} has no tokenizer; name one by data.tokenizer and data.tokenizer_path.")
    return found
