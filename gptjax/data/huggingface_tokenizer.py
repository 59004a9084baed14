"""Hugging Face's tokenizer files."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.data.byte_pairs import piece_bytes
from gptjax.data.special_tokens import AddedToken, SpecialTokens, is_side_file
from gptjax.data.tokenizer_base import META_SPACE, Tokenizer, checked, refuse_half_characters


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, or a vocab.json and merges.txt, with the files beside it (extra: huggingface).

    Begin and end tokens are those that the files beside it name; where these name neither, they are found by their usual names.
    """

    kind = "huggingface"

    def __init__(self, files: Mapping[str, bytes] | bytes):
        """`files`: {name: content}, or the content of a tokenizer.json alone."""
        files = {"tokenizer.json": files} if isinstance(files, bytes) else files
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                "data.tokenizer=huggingface needs the extra huggingface: pip install 'gptjax[huggingface]'."
            ) from error
        self._files = dict(files)
        self._special = SpecialTokens.of(files)
        try:
            if "tokenizer.json" in files:
                self._tokenizer = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
            else:
                self._tokenizer = _vocabulary_and_merges(tokenizers, files)
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"not a tokenizer.json: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._add(tokenizers)
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.bos_id, self.eos_id = self._ends()
        self._plain = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        self._plain.encode_special_tokens = True  # which means: as text

    def _add(self, package: Any) -> None:
        """The tokens that only the files beside tokenizer.json know, under the ids that these give."""
        known = self._tokenizer.get_added_tokens_decoder()
        numbered = {token.content for token in self._special.added}
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        named = [AddedToken(text, vocabulary[text]) for text in self._special.names.values() if text in vocabulary]
        for token in (*self._special.added, *(token for token in named if token.content not in numbered)):
            if token.id in known and known[token.id].content == token.content and known[token.id].special >= token.special:
                continue
            flags = {name: getattr(token, name) for name in ("special", "lstrip", "rstrip", "single_word", "normalized")}
            self._tokenizer.add_tokens([package.AddedToken(token.content, **flags)])
            if (got := self._tokenizer.token_to_id(token.content)) != token.id:
                raise ValueError(f"the added token {token.content!r} is to have the id {token.id}, but {got} is next")

    def _ends(self) -> tuple[int | None, int | None]:
        """(id that begins a text, id that ends one)."""
        if not self._special.stated:
            begin = self._first("<|begin_of_text|>", "<|endoftext|>", "<s>", "<bos>", "[CLS]")
            return begin, self._first("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[SEP]")
        ends: list[int | None] = []
        for name in ("bos_token", "eos_token"):
            spelling = self._special.names.get(name)
            ends.append(self._tokenizer.token_to_id(spelling) if spelling else None)
            if spelling and ends[-1] is None:
                raise ValueError(f"{name} is {spelling!r}, which is not in the vocabulary")
        return ends[0], ends[1]

    def _first(self, *names: str) -> int | None:
        return next((i for name in names if (i := self._tokenizer.token_to_id(name)) is not None), None)

    def encode(self, text: str) -> np.ndarray:
        return self._encode(self._plain, text)

    def encode_special(self, text: str) -> np.ndarray:
        return self._encode(self._tokenizer, text)

    def _encode(self, tokenizer: Any, text: str) -> np.ndarray:
        refuse_half_characters(text)
        return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def offsets(self, text: str) -> np.ndarray | None:
        if not self._unjoined():
            return None
        return np.asarray(self._plain.encode(text, add_special_tokens=False).offsets, np.int64).reshape(-1, 2)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode(checked(ids, self.vocab_size).tolist(), skip_special_tokens=True)

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
        return json.loads(self._tokenizer.to_str())

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

    def name_of(self, i: int | None) -> str | None:
        """How the file spells an id; None where it has none such."""
        return None if i is None else self._tokenizer.id_to_token(i)

    def special_tokens(self) -> Mapping[str, int]:
        return {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}

    def token_names(self) -> Mapping[str, str]:
        guessed = {"bos_token": self.name_of(self.bos_id), "eos_token": self.name_of(self.eos_id)}
        return {name: text for name, text in guessed.items() if text is not None} | dict(self._special.names)

    def chat_templates(self) -> Mapping[str, str]:
        return self._special.templates

    @property
    def adds_bos(self) -> bool:
        if self.bos_id is None or self._special.adds_bos is not None:
            return bool(self._special.adds_bos) and self.bos_id is not None
        return self._tokenizer.encode("a").ids[:1] == [self.bos_id]

    def files(self) -> dict[str, bytes]:
        return dict(self._files)

    def _encoding_files(self) -> dict[str, bytes]:
        core = {name: content for name, content in self._files.items() if not is_side_file(name)}
        return core | {"special tokens": json.dumps(sorted(self.special_tokens().items())).encode()}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> HuggingFaceTokenizer:
        return cls(files)


def _vocabulary_and_merges(package: Any, files: Mapping[str, bytes]) -> Any:
    """GPT-2's kind of tokenizer from its two files, as Hugging Face folders without a tokenizer.json hold it."""
    merges = files["merges.txt"].decode().split("\n")
    pairs = [tuple(line.split(" ")) for line in merges if line and not line.startswith("#version")]
    made = package.Tokenizer(package.models.BPE(vocab=json.loads(files["vocab.json"]), merges=pairs))
    prefix_space = bool(json.loads(files.get("tokenizer_config.json", b"{}")).get("add_prefix_space", False))
    made.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    made.decoder = package.decoders.ByteLevel()
    return made


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
            piece = piece.replace(decoder.get("replacement", META_SPACE), " ")
        elif kind == "Replace":
            pattern = decoder["pattern"]
            if "String" not in pattern:
                raise UserError("the tokenizer.json decodes by replacing a regular expression, which only that package reads.")
            piece = piece.replace(pattern["String"], decoder["content"])
    return piece.encode()


def _parts(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A decoder of tokenizer.json, which may be a sequence of decoders, as a list."""
    return (decoder or {}).get("decoders") or [decoder or {}]
