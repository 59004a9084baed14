"""GPT-2's byte-level byte-pair encoding (Radford et al. 2019; Sennrich et al. 2016), from its two files alone.

GPT-2 cuts a text into words by the pattern

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

and merges bytes within each word, the earliest-learnt pair first. Python's `re` has no \\p{...}, so the classes are spelt out as
ranges of code points from `unicodedata`: a letter that Unicode gained after this Python was made counts as punctuation here.
"""

from __future__ import annotations

import functools
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
    letters, numbers = _ranges("L"), _ranges("N")
    return re.compile(
        "'s|'t|'re|'ve|'m|'ll|'d"
        f"| ?[{letters}]+| ?[{numbers}]+| ?[^{_SPACE}{letters}{numbers}]+|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
    )


def _ranges(major: str) -> str:
    """The code points whose general category begins with `major`, written as the inside of a character class."""
    majors = "".join(category[0] for category in map(unicodedata.category, map(chr, range(sys.maxunicode + 1))))
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
    """The bytes that a piece of the vocabulary, written in `byte_characters`, stands for. Raises `KeyError` for other characters."""
    table = _character_bytes()
    return bytes(table[character] for character in piece)


class BytePairEncoder:
    """Text to ids, remembering the ids of every word it has seen.

    `ids`: piece to id, pieces written in `byte_characters`. `merges`: pairs of pieces, earliest-learnt first.
    """

    def __init__(self, ids: Mapping[str, int], merges: list[tuple[str, str]]):
        pairs = {(ids[left], ids[right]): (rank, ids[left + right]) for rank, (left, right) in enumerate(merges)}
        byte_ids = [ids[character] for character in byte_characters()]
        self._words = _Words(functools.partial(_merge, byte_ids=byte_ids, pairs=pairs))

    def encode(self, text: str) -> list[int]:
        words, ids = self._words, []
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


def _merge(word: str, byte_ids: list[int], pairs: Mapping[tuple[int, int], tuple[int, int]]) -> tuple[int, ...]:
    """Replaces all occurrences of the earliest-learnt adjacent pair, from left to right, until no pair is known."""
    ids = [byte_ids[byte] for byte in word.encode()]
    while len(ids) > 1:
        best = min(zip(ids, ids[1:], strict=False), key=lambda pair: pairs.get(pair, _UNKNOWN)[0])
        if best not in pairs:
            break
        merged, out, index = pairs[best][1], [], 0
        while index < len(ids):
            if tuple(ids[index : index + 2]) == best:
                out.append(merged)
                index += 2
            else:
                out.append(ids[index])
                index += 1
        ids = out
    return tuple(ids)


_UNKNOWN = (sys.maxsize, -1)
