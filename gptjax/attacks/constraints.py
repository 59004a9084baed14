"""What a perturbed text may differ in, so that a reader would still give it the label it had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gptjax.attacks.words import STOP_WORDS, Words, is_ideograph


@dataclass(frozen=True)
class Constraints:
    """Limits on the words that differ from the original; a word that an attack has changed is never changed again.

    max_share, max_words: of the text's words, how many may change; at least one may, however short the text is.
    skip_stop_words: words of STOP_WORDS stay as they are. min_letters: so do shorter words, Chinese characters aside.
    keep_ends: a changed word keeps its first and last letter. keep_length: and its length.
    max_edits: letters that are inserted, deleted or replaced, in all (Levenshtein 1966, summed over the words); 0 is no limit.
    """

    max_share: float = 1.0
    max_words: int = 0
    skip_stop_words: bool = True
    min_letters: int = 2
    keep_ends: bool = False
    keep_length: bool = False
    max_edits: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.max_share <= 1 or min(self.max_words, self.min_letters, self.max_edits) < 0:
            raise ValueError(f"max_share={self.max_share} must be above 0 and at most 1, and no limit below 0: {self}.")

    def most(self, words: Words) -> int:
        """How many words may change."""
        most = max(1, int(self.max_share * len(words) + 1e-9))
        return min(most, self.max_words) if self.max_words else most

    def open(self, words: Words) -> list[int]:
        """The words that may change: those that hold a letter, and that the limits on single words let change."""
        return [index for index, word in enumerate(words.words) if self._may_change(word)]

    def _may_change(self, word: str) -> bool:
        if self.skip_stop_words and word.lower().replace("\u2019", "'") in STOP_WORDS:
            return False
        long_enough = len(word) >= self.min_letters or is_ideograph(word[0])
        return long_enough and any(letter.isalpha() for letter in word)

    def allow(self, words: Words, changes: Mapping[int, str]) -> bool:
        """Whether these words may become that together. Which words may change at all, `open` says."""
        if len(changes) > self.most(words):
            return False
        pairs = [(words.words[index], word) for index, word in changes.items()]
        if self.keep_length and any(len(old) != len(new) for old, new in pairs):
            return False
        if self.keep_ends and any(old[:1] != new[:1] or old[-1:] != new[-1:] for old, new in pairs):
            return False
        return not self.max_edits or sum(edit_distance(old, new) for old, new in pairs) <= self.max_edits


def edit_distance(one: str, other: str) -> int:
    """Insertions, deletions and replacements from one text to the other (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, wanted in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != wanted))
    return row[-1]
