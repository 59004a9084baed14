"""Tokens that an objective needs beside the text's: the tokenizer's own where it has them, else ids above its vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gptjax.config import ObjectiveConfig, UserError
from gptjax.config.objective import parts
from gptjax.data.tokenizer_base import Tokenizer, checked

_FILE = "reserved.json"

# The begin of the three parts of a text with a gap, and the end of the middle: how they are spelt, family by family.
GAP_SPELLINGS: tuple[tuple[str, str, str, str | None], ...] = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", None),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", None),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>", None),
    ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"),
    ("<PRE>", "<SUF>", "<MID>", "<EOT>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", None),
)
_OWN_GAP = ("<PRE>", "<SUF>", "<MID>", "<EOT>")
MASKS = ("[MASK]", "<mask>")


class ReservedTokenizer(Tokenizer):
    """Another tokenizer with special tokens of given names after its last id. They stand for no text."""

    kind = "reserved"

    def __init__(self, base: Tokenizer, names: Sequence[str]):
        self.base, self.names = base, tuple(names)
        self.bos_id, self.eos_id = base.bos_id, base.eos_id
        self.vocab_size = base.vocab_size + len(self.names)
        self._ids = {name: base.vocab_size + i for i, name in enumerate(self.names)}

    def encode(self, text: str) -> np.ndarray:
        return self.base.encode(text)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        found = checked(ids, self.vocab_size)
        return self.base.decode(found[found < self.base.vocab_size])

    def token_bytes(self) -> np.ndarray:
        return np.concatenate([self.base.token_bytes(), np.zeros(len(self.names), np.int32)])

    def vocabulary(self) -> Sequence[bytes | None]:
        return [*self.base.vocabulary(), *(None for _ in self.names)]

    def token_id(self, name: str) -> int | None:
        return self._ids.get(name, self.base.token_id(name))

    def special_tokens(self) -> Mapping[str, int]:
        return {**self.base.special_tokens(), **self._ids}

    def token_names(self) -> Mapping[str, str]:
        return self.base.token_names()

    def chat_templates(self) -> Mapping[str, str]:
        return self.base.chat_templates()

    @property
    def adds_bos(self) -> bool | None:
        return self.base.adds_bos

    @property
    def begins_with_bos(self) -> bool:
        return self.base.begins_with_bos

    def files(self) -> dict[str, bytes]:
        return self.base.files() | self._own_file()

    def _encoding_files(self) -> dict[str, bytes]:
        return self.base._encoding_files() | self._own_file()

    def _own_file(self) -> dict[str, bytes]:
        return {_FILE: json.dumps({"kind": self.base.kind, "tokens": list(self.names)}).encode()}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> ReservedTokenizer:
        from gptjax.data.tokenizers import TOKENIZERS

        said = json.loads(files[_FILE])
        theirs = {name: content for name, content in files.items() if name != _FILE}
        return cls(TOKENIZERS[said["kind"]].from_files(theirs), said["tokens"])


def text_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without what `reserve` put after it."""
    return tokenizer.base if isinstance(tokenizer, ReservedTokenizer) else tokenizer


@dataclass(frozen=True)
class SpecialIds:
    """What stands for what: ids of the tokens that an objective uses, None or empty for those it does not."""

    mask: int | None = None
    sentinels: tuple[int, ...] = ()  # of spans, in their order
    paradigms: tuple[int | None, ...] = ()  # before a document of each part of the objective
    gap: tuple[int, int, int, int | None] | None = None  # begin prefix, suffix, middle; end the middle


def num_sentinels(objective: ObjectiveConfig, seq_len: int) -> int:
    """Sentinels of the longest document of a row: one a span, and one behind the last."""
    lengths = np.arange(seq_len + 2)
    most = [num_spans(lengths, p.span_rate, p.span_mean_length)[1].max() for p in parts(objective) if p.method == "span"]
    return int(max(most)) + 1 if most else 0


def num_spans(lengths: np.ndarray, rate: float, mean_length: float) -> tuple[np.ndarray, np.ndarray]:
    """(tokens cut out, spans they are in) of documents of `lengths` tokens: those of T5 (Raffel et al., 2020).

    At least one token goes and one stays; of one token alone none goes.
    """
    cut = np.clip(np.round(lengths * rate).astype(np.int64), 1, np.maximum(lengths - 1, 1))
    spans = np.maximum(np.round(cut / mean_length).astype(np.int64), 1)
    spans = np.minimum(spans, np.maximum(lengths - cut, 1))
    return np.where(lengths < 2, 0, cut), np.where(lengths < 2, 0, spans)


def _names(tokenizer: Tokenizer, objective: ObjectiveConfig, seq_len: int) -> list[str]:
    """How the tokens that the objective needs are spelt by this tokenizer, or will be."""
    methods = {part.method for part in parts(objective)}
    names: list[str] = []
    if "masked" in methods:
        names.append(_first(tokenizer, (tokenizer.token_names().get("mask_token", ""), *MASKS)) or MASKS[0])
    if "infill" in methods and find_gap(tokenizer) is None:
        names += [name for name in _OWN_GAP if name]
    names += [f"<extra_id_{i}>" for i in range(num_sentinels(objective, seq_len))]
    names += [part.token for part in parts(objective) if part.token]
    return list(dict.fromkeys(names))


def _first(tokenizer: Tokenizer, names: Sequence[str]) -> str | None:
    return next((name for name in names if name and tokenizer.token_id(name) is not None), None)


def find_gap(tokenizer: Tokenizer) -> tuple[int, int, int, int | None] | None:
    """The ids that begin prefix, suffix and middle of a text with a gap, and the one that ends the middle, by their usual names;
    None where the tokenizer has none.
    """
    for *names, end in GAP_SPELLINGS:
        prefix, suffix, middle = (tokenizer.token_id(name) for name in names)
        if prefix is not None and suffix is not None and middle is not None:
            return prefix, suffix, middle, tokenizer.token_id(end) if end else None
    return None


def reserve(tokenizer: Tokenizer, objective: ObjectiveConfig, seq_len: int) -> Tokenizer:
    """The tokenizer with ids for what the objective needs and it lacks; itself where it lacks nothing."""
    missing = [name for name in _names(tokenizer, objective, seq_len) if tokenizer.token_id(name) is None]
    return ReservedTokenizer(tokenizer, missing) if missing else tokenizer


def special_ids(tokenizer: Tokenizer, objective: ObjectiveConfig, seq_len: int) -> SpecialIds:
    """The ids of the objective's tokens. Raises `UserError` where the tokenizer lacks one: its model was not trained for it."""
    names = _names(tokenizer, objective, seq_len)
    missing = [name for name in names if tokenizer.token_id(name) is None]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"objective.name={objective.name} needs the tokens {', '.join(missing[:3])}{more}, which the model's tokenizer "
            "lacks: the model was not trained for it."
        )
    ids = {name: tokenizer.token_id(name) for name in names}
    if len(set(ids.values())) < len(ids):
        raise UserError(f"the tokenizer gives two of the tokens of objective.name={objective.name} one id: {ids}.")
    methods = {part.method for part in parts(objective)}
    masks = [tokenizer.token_names().get("mask_token", ""), *MASKS]
    return SpecialIds(
        mask=next(ids[name] for name in masks if name in ids) if "masked" in methods else None,
        sentinels=tuple(i for name, i in ids.items() if name.startswith("<extra_id_") and i is not None),
        paradigms=tuple(ids[part.token] if part.token else None for part in parts(objective)),
        gap=find_gap(tokenizer) if "infill" in methods else None,
    )
