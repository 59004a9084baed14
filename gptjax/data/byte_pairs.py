"""GPT-2's byte-level byte-pair encoding (Radford et al. 2019; Sennrich et al. 2016), from its two files alone.

GPT-2 cuts a text into words by the pattern

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

and merges bytes within each word, the earliest-learnt pair first. Python's `re` has no \\p{...}, so the classes are spelt out as
ranges of code points from `unicodedata`: a letter that Unicode gained after this Python was made counts as punctuation here.
"""

from __future__ import annotations

import functools
import itertools
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping

# Unicode's White_Space property. `re`'s own \s also takes U+001C to U+001F, which the pattern above does not.
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_CACHED_WORDS = 1 << 20  # about 200 MB of dict; natural text repeats its words long before that


@functools.cache
def word_pattern() -> re.Pattern[str]:
    """GPT-2's pattern, for `findall`; every character of a text is in exactly one match. Takes 0.2 s the first time."""
    majors = "".join(category[0] for category in map(unicodedata.category, map(chr, range(sys.maxunicode + 1))))
    letters, numbers = _ranges(majors, "L"), _ranges(majors, "N")
    return re.compile(
        "'s|'t|'re|'ve|'m|'ll|'d"
        f"| ?[{letters}]+| ?[{numbers}]+| ?[^{_SPACE}{letters}{numbers}]+|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
    )


def _ranges(majors: str, major: str) -> str:
    """The code points at which `majors` holds `major`, written as the inside of a character class."""
    return "".join(f"{chr(run.start())}-{chr(run.end() - 1)}" for run in re.finditer(f"{major}+", majors))


@functools.cache
def byte_characters() -> tuple[str, ...]:
    """The printable character by which GPT-2's files write each of the 256 bytes.

    Bytes that Latin-1 prints stand for themselves; the other 68 take the code points from 256 up, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


@functools.cache
def _character_bytes() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(byte_characters())}


def piece_bytes(piece: str) -> bytes:
    """The bytes that a piece, written in `byte_characters`, stands for. Raises `KeyError` for other characters."""
    table = _character_bytes()
    return bytes(table[character] for character in piece)


class BytePairEncoder:
    """Text to ids, remembering the ids of every word it has seen.

    `ids`: piece to id, pieces written in `byte_characters`. `merges`: pairs of pieces, earliest-learnt first.
    """

    def __init__(self, ids: Mapping[str, int], merges: list[tuple[str, str]]):
        ranks = {(ids[left], ids[right]): rank for rank, (left, right) in enumerate(merges)}
        merged = [ids[left + right] for left, right in merges]
        byte_ids = [ids[character] for character in byte_characters()]
        self._words = _Words(functools.partial(_merge, byte_ids=byte_ids, ranks=ranks, merged=merged))

    def encode(self, text: str) -> list[int]:
        words = self._words
        ids: list[int] = []
        for word in word_pattern().findall(text):
            ids += words[word]
        return ids


class _Words(dict[str, tuple[int, ...]]):
    """word to ids; a word that is not there yet is worked out."""

    def __init__(self, work_out: Callable[[str], tuple[int, ...]]):
        super().__init__()
        self._work_out = work_out

    def __missing__(self, word: str) -> tuple[int, ...]:
        if len(self) >= _CACHED_WORDS:
            self.clear()
        ids = self[word] = self._work_out(word)
        return ids


def _merge(word: str, byte_ids: list[int], ranks: Mapping[tuple[int, int], int], merged: list[int]) -> tuple[int, ...]:
    """Replaces the earliest-learnt adjacent pair, everywhere from left to right, until no pair is known.

    `ranks`: pair to its place among the merges; `merged`: the id it becomes, by place. A pair that has a merged piece in it was
    learnt later than the merge, so a round makes no new work for itself.
    """
    ids = [byte_ids[byte] for byte in word.encode()]
    waiting = [ranks.get(pair, _UNKNOWN) for pair in itertools.pairwise(ids)]  # rank of (ids[i], ids[i + 1])
    while waiting and (lowest := min(waiting)) != _UNKNOWN:
        at = waiting.index(lowest)
        while at >= 0:
            ids[at : at + 2] = [merged[lowest]]
            del waiting[at]
            if at:
                waiting[at - 1] = ranks.get((ids[at - 1], ids[at]), _UNKNOWN)
            if at < len(waiting):
                waiting[at] = ranks.get((ids[at], ids[at + 1]), _UNKNOWN)
            try:
                at = waiting.index(lowest, at)
            except ValueError:
                at = -1
    return tuple(ids)


_UNKNOWN = sys.maxsize
