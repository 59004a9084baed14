"""A text as words that can be replaced, and back: words between blanks, and single characters in Chinese and Japanese."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

INSIDE = "'\u2019-"  # between letters these belong to the word: don't, twenty-one

# Words with little content of their own, which attacks leave alone.
_STOP_WORDS = """
a about above after again against all am an and any are as at be because been before being below between both but by can
could did do does doing down during each few for from further had has have having he her here hers herself him himself
his how i if in into is it its itself just me more most my myself no nor not now of off on once only or other our ours
ourselves out over own same she should so some such than that the their theirs them themselves then there these they
this those through to too under until up very was we were what when where which while who whom why will with would you
your yours yourself yourselves don't doesn't didn't isn't aren't wasn't weren't can't couldn't won't wouldn't shouldn't
haven't hasn't hadn't i'm it's that's
的 了 是 在 和 与 及 或 也 都 就 而 着 把 被 对 这 那 之 其 我 你 他 她 它 不 没 很 吗 呢 吧 啊
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


@dataclass(frozen=True)
class Words:
    """words [n], and between[n + 1]: what stands before, between and after them. Joined in turn they are the text."""

    words: tuple[str, ...]
    between: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.words)

    def replaced(self, changes: Mapping[int, str]) -> str:
        """The text with some words replaced; "" takes a word out, and blanks that would come to stand together or last."""
        parts = [self.between[0]]
        for index, word in enumerate(self.words):
            word = changes.get(index, word)
            after = self.between[index + 1]
            if not word and (not parts[-1] or parts[-1][-1].isspace()):
                after = after.lstrip(" ")
            parts += [word, after] if word else [parts.pop() + after]
        return "".join(parts) if self.between[-1] else "".join(parts).rstrip(" ")


def split(text: str) -> Words:
    """Words of letters, digits and their marks; each Chinese character and each kana is a word."""
    words: list[str] = []
    between = [""]
    joins = False  # the character before this one belongs to a word that this one may go on with
    for position, character in enumerate(text):
        if is_ideograph(character):
            words.append(character)
            between.append("")
            joins = False
        elif _of_word(character) or (joins and character in INSIDE and _of_word(text[position + 1 : position + 2])):
            if joins:
                words[-1] += character
            else:
                words.append(character)
                between.append("")
            joins = True
        else:
            between[-1] += character
            joins = False
    return Words(tuple(words), tuple(between))


def is_ideograph(character: str) -> bool:
    """A Chinese character or a kana, which stands for itself in a text without blanks."""
    code = ord(character)
    return 0x3040 <= code <= 0x30FF or 0x3400 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or 0x20000 <= code <= 0x3FFFF


def _of_word(character: str) -> bool:
    return bool(character) and unicodedata.category(character)[0] in "LNM" and not is_ideograph(character)
