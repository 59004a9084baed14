"""Where in a text each of its tokens stands, for any tokenizer."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from gptjax.config import UserError
from gptjax.data.tokenizer_base import Tokenizer


def token_spans(tokenizer: Tokenizer, text: str, ids: np.ndarray) -> np.ndarray:
    """int64 [n, 2]: (begin, end) in characters of what each of `ids`, the text's tokens, stands for, ascending.

    A token that is a part of a character has the whole one; one that stands for nothing in the text (special, unknown) has what
    its neighbours leave. Exact where the tokens' bytes are the text's, but for a blank in front; where a tokenizer writes the
    text in another way first (compatibility forms, lower case), its characters are matched as far as they are the same.
    """
    own = tokenizer.offsets(text)
    if own is not None:
        return own
    vocabulary = tokenizer.vocabulary()
    pieces = [vocabulary[i] or b"" for i in ids]
    joined, plain = b"".join(pieces), text.encode("utf-8", "surrogatepass")
    if joined in (plain, b" " + plain):
        return _by_bytes(text, [len(piece) for piece in pieces], len(joined) - len(plain))
    return _by_characters(text, pieces)


def trimmed(text: str, spans: np.ndarray) -> np.ndarray:
    """The spans without the white space at their ends; those of white space alone are empty."""
    space = np.asarray([character.isspace() for character in text] + [False])
    found = spans.copy()
    for span in found:
        while span[0] < span[1] and space[span[0]]:
            span[0] += 1
        while span[1] > span[0] and space[span[1] - 1]:
            span[1] -= 1
    return found


def _by_bytes(text: str, lengths: Sequence[int], shift: int) -> np.ndarray:
    sizes = [len(character.encode("utf-8", "surrogatepass")) for character in text]
    character_of = np.repeat(np.arange(len(text)), sizes)  # by byte of the text
    ends = np.cumsum([0, *lengths]) - shift
    begin, end = np.maximum(ends[:-1], 0), np.maximum(ends[1:], 0)
    after = np.concatenate([character_of, [len(text)]]).astype(np.int64)
    last = np.concatenate([[0], character_of + 1]).astype(np.int64)  # of the byte before
    return np.stack([after[begin], np.maximum(last[end], after[begin]) * (end > begin) + after[begin] * (end <= begin)], axis=1)


def _by_characters(text: str, pieces: Sequence[bytes]) -> np.ndarray:
    """By the characters of the text and of the pieces in one form; a run that is not in both belongs to the tokens around it."""
    token_of = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    theirs, at = list(_forms(b"".join(pieces).decode("utf-8", "surrogateescape"))), 0
    owners = []  # (first, last token) of each character of the pieces
    for character in b"".join(pieces).decode("utf-8", "surrogateescape"):
        size = len(character.encode("utf-8", "surrogateescape"))
        owners.append((int(token_of[at]), int(token_of[at + size - 1])))
        at += size
    ours = list(_forms(text))
    a, b = "".join(form for form, _ in ours), "".join(form for form, _ in theirs)
    blocks = [(0, 0, len(a))] if a == b else difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    spans = np.full((len(pieces), 2), -1, np.int64)
    for begin, their_begin, size in blocks:
        for step in range(size):
            place = ours[begin + step][1]
            first, last = owners[theirs[their_begin + step][1]]
            for token in range(first, last + 1):
                spans[token] = (place if spans[token, 0] < 0 else min(spans[token, 0], place)), max(spans[token, 1], place + 1)
    return _filled(spans, len(text))


def _forms(text: str) -> Iterator[tuple[str, int]]:
    """(character in a form that tokenizers' normalisation leaves alone, place in the text); white space is left out."""
    for place, character in enumerate(text):
        for form in unicodedata.normalize("NFKC", character).casefold():
            if not form.isspace():
                yield form, place


def _filled(spans: np.ndarray, length: int) -> np.ndarray:
    """The spans of tokens that were not found: from the end of the one before to the begin of the one behind."""
    behind = length
    after = np.empty(len(spans), np.int64)
    for number in range(len(spans) - 1, -1, -1):
        after[number] = behind
        behind = int(spans[number, 0]) if spans[number, 0] >= 0 else behind
    before = 0
    for number, span in enumerate(spans):
        if span[0] < 0:
            span[:] = before, max(before, after[number])
        before = max(before, int(span[1]))
    return spans


def word_tokens(tokenizer: Tokenizer, words: Sequence[str], join: str) -> tuple[np.ndarray, np.ndarray]:
    """(int32 tokens of the words with `join` between them, int64 [words, 2]: first token of each, and the one behind its last).

    Where `join` holds a blank the text is encoded whole; where that leaves a word without a token of its own, or nothing stands
    between words, each is encoded with `join` in front of it. Raises `UserError` for a word of which the tokenizer makes nothing.
    """
    if any(character.isspace() for character in join):
        text, ends = join.join(words), np.cumsum([len(word) + len(join) for word in words])
        ids = tokenizer.encode(text)
        spans, begins = trimmed(text, token_spans(tokenizer, text, ids)), np.concatenate([[0], ends[:-1]])
        real = np.flatnonzero(spans[:, 1] > spans[:, 0])
        first = np.searchsorted(spans[real, 1], begins, side="right")
        behind = np.searchsorted(spans[real, 0], begins + [len(word) for word in words], side="left")
        if (behind > first).all() and (first[1:] >= behind[:-1]).all():
            return ids, np.stack([real[first], real[behind - 1] + 1], axis=1)
    parts = [tokenizer.encode(join * bool(number) + word) for number, word in enumerate(words)]
    for word, part in zip(words, parts, strict=True):
        if not len(part):
            raise UserError(f"the word {word!r} is one of which the tokenizer makes no token")
    ends = np.cumsum([len(part) for part in parts])
    return np.concatenate(parts), np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
