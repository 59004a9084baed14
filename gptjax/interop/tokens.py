"""Tokenizers of other formats: found in a folder, made from a list of pieces, written for transformers."""

from __future__ import annotations

import json
import pathlib
import struct
from collections.abc import Sequence

from gptjax.config import UserError
from gptjax.data.reserved import ReservedTokenizer
from gptjax.data.tokenizers import (
    Gpt2Tokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    tokenizer_of_folder,
)


def from_folder(folder: pathlib.Path) -> tuple[Tokenizer | None, str]:
    """(the tokenizer of a folder, or None and why there is none). Raises `UserError` where its files are damaged."""
    found = tokenizer_of_folder(folder)
    return found, "" if found else f"{folder} has neither tokenizer.json, nor vocab.json and merges.txt, nor tokenizer.model"


def from_path(path: pathlib.Path) -> tuple[Tokenizer | None, str]:
    """As `from_folder`, of a folder or of one of its files."""
    if path.is_dir():
        return from_folder(path)
    if not path.is_file():
        return None, f"{path} does not exist"
    kind = HuggingFaceTokenizer if path.suffix == ".json" else SentencePieceTokenizer
    name = "tokenizer.json" if path.suffix == ".json" else "sentencepiece.model"
    try:
        return kind.from_files({name: path.read_bytes()}), ""
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} holds no tokenizer: {str(error).splitlines()[0].rstrip('.')}.") from None


def to_folder(folder: pathlib.Path, tokenizer: Tokenizer) -> list[str]:
    """Writes the tokenizer for transformers, where it can be expressed; what is to be said where it cannot."""
    if isinstance(tokenizer, ReservedTokenizer):
        notes = to_folder(folder, tokenizer.base)
        if (folder / "tokenizer_config.json").is_file():
            _add_special(folder / "tokenizer_config.json", tokenizer)
        return notes
    if isinstance(tokenizer, HuggingFaceTokenizer):
        _write(folder, tokenizer.files())
        if "tokenizer_config.json" not in tokenizer.files():
            is_one_file = "tokenizer.json" in tokenizer.files()  # else it is made of vocab.json and merges.txt
            _describe(folder, "PreTrainedTokenizerFast" if is_one_file else "GPT2Tokenizer", dict(tokenizer.token_names()))
    elif isinstance(tokenizer, Gpt2Tokenizer):
        files = tokenizer.files()
        _write(folder, {"vocab.json": files["encoder.json"], "merges.txt": files["vocab.bpe"]})
        _describe(folder, "GPT2Tokenizer", {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk")})
    elif isinstance(tokenizer, SentencePieceTokenizer):
        _write(folder, {"tokenizer.model": tokenizer.files()["sentencepiece.model"]})
        _describe(folder, "LlamaTokenizer", {"legacy": True})
        return ["the SentencePiece model is written as it is; transformers reads it as Llama's, which may set spaces otherwise."]
    else:
        return [f"the run's {tokenizer.kind} tokenizer has no form in Hugging Face's files, so the folder has none."]
    return []


def _add_special(path: pathlib.Path, tokenizer: ReservedTokenizer) -> None:
    """Tokens that an objective added, in the file that transformers adds tokens from."""
    values = json.loads(path.read_bytes())
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False) | {"special": True}
    added = {str(tokenizer.token_id(name)): {"content": name, **flags} for name in tokenizer.names}
    values["added_tokens_decoder"] = {**values.get("added_tokens_decoder", {}), **added}
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write(folder: pathlib.Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _describe(folder: pathlib.Path, name: str, more: dict[str, object]) -> None:
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": name, **more}, indent=2) + "\n", encoding="utf-8"
    )


# --- from lists of pieces -------------------------------------------------------------------------------------------------------


def gpt2_from_lists(pieces: Sequence[str], merges: Sequence[str]) -> Gpt2Tokenizer:
    """GPT-2's tokenizer from its pieces by id and its merges ("left right").

    Raises ValueError or KeyError where they make none.
    """
    encoder = {piece: i for i, piece in enumerate(pieces)}
    return Gpt2Tokenizer(json.dumps(encoder).encode(), ("#version: 0.2\n" + "\n".join(merges) + "\n").encode())


# A piece's type in a SentencePiece model, and in GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def sentencepiece_from_lists(
    pieces: Sequence[bytes], scores: Sequence[float], types: Sequence[int], special: dict[str, int], *, dummy_prefix: bool = True
) -> SentencePieceTokenizer:
    """A byte-pair SentencePiece model with byte fallback, as Llama's, from its pieces by id.

    `special`: {"unk" | "bos" | "eos": id}. Raises RuntimeError where SentencePiece takes it for none. Fields by their numbers
    in sentencepiece_model.proto.
    """
    model = b""
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        entry = _field(1, piece) + _tag(2, 5) + struct.pack("<f", score) + _number(3, kind)
        model += _field(1, entry)
    trainer = _number(3, 2) + _number(4, len(pieces)) + _number(35, 1)  # model_type BPE, vocab_size, byte_fallback
    for number, name in ((40, "unk"), (41, "bos"), (42, "eos"), (43, "pad")):
        trainer += _number(number, special.get(name, -1))
    model += _field(2, trainer)
    # identity; add_dummy_prefix; no remove_extra_whitespaces; escape_whitespaces
    normalizer = _field(1, b"identity") + _number(3, int(dummy_prefix)) + _number(4, 0) + _number(5, 1)
    return SentencePieceTokenizer(model + _field(3, normalizer))


def _varint(value: int) -> bytes:
    value &= 2**64 - 1  # negative numbers take ten bytes
    encoded = b""
    while value >= 128:
        encoded += bytes([value & 127 | 128])
        value >>= 7
    return encoded + bytes([value])


def _tag(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _number(number: int, value: int) -> bytes:
    return _tag(number, 0) + _varint(value)


def _field(number: int, content: bytes) -> bytes:
    return _tag(number, 2) + _varint(len(content)) + content
