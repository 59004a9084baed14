"""Stop strings: a text ends where one of them is complete, also one that begins or ends inside a token.

All strings are searched for at once by the automaton of Aho and Corasick (1975) over bytes, which tokens move as they do in
`automata.py`. Only what is generated is searched, not the prompt. Which string stopped a text, and where, doesn't depend on how
the text was cut into tokens: it is the string that is complete first, and of several that end at one byte the longest.

Axis letters: B rows, V ids of the model, S states, C distinct columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gptjax.config import UserError
from gptjax.generate.automata import Vocabulary, padded, token_columns

MAX_BYTES = 4096  # of all stop strings together


@dataclass(frozen=True)
class Cut:
    """Where a text was stopped."""

    before: bytes  # the text in front of the stop string
    through: bytes  # the text with the stop string, as Hugging Face's `stop_strings` keeps it
    stop: str


class StopStrings:
    """The strings, and the tables that find them. Raises `UserError` for an empty string, none, and more than `MAX_BYTES`."""

    def __init__(self, strings: Sequence[str]):
        if not strings or "" in strings:
            raise UserError("stop_strings: give one or more strings of at least one character.")
        try:
            self._contents = {string.encode(): string for string in strings}
        except UnicodeEncodeError as error:
            raise UserError(f"stop_strings: {error.object!r} holds a lone surrogate, which no text does.") from None
        size = sum(map(len, self._contents))
        if size > MAX_BYTES:
            raise UserError(f"stop_strings: they have {size} bytes together, more than {MAX_BYTES}.")
        self.strings = tuple(strings)
        self._classes, self._next_state, self._hit = _search_automaton(list(self._contents))

    def find(self, content: bytes) -> Cut | None:
        """The first stop string of a text, None where there is none."""
        found = []
        for string in self._contents:
            start = content.find(string)
            if start >= 0:
                found.append((start + len(string), start, string))
        if not found:
            return None
        end, start, string = min(found)
        return Cut(content[:start], content[:end], self._contents[string])

    def pending(self, content: bytes) -> int:
        """How many bytes at the end of a text could be the beginning of a stop string: a stream holds them back."""
        longest = max(map(len, self._contents)) - 1
        for size in range(min(longest, len(content)), 0, -1):
            if any(len(string) > size and string.startswith(content[-size:]) for string in self._contents):
                return size
        return 0

    def tables(self, vocabulary: Vocabulary, vocab_size: int) -> StopTables:
        """For use inside jit. `vocab_size` is the model's; special ids, and ids that the tokenizer lacks, write nothing."""
        stay = np.arange(len(self._next_state))
        columns_CS, classes_V = token_columns(self._next_state, self._classes, vocabulary, vocab_size, silent=stay)
        next_SC, _ = padded(columns_CS.T)
        return StopTables(classes_V, next_SC, np.array(self._hit, np.int32))


def _search_automaton(strings: list[bytes]) -> tuple[np.ndarray, np.ndarray, int]:
    """(class of each byte [256], next_state [S, classes], the state of having found one, which is never left)."""
    letters = sorted({byte for string in strings for byte in string})
    classes = np.zeros(256, int)  # 0: the bytes that are in no string
    classes[letters] = np.arange(1, len(letters) + 1)
    prefixes = {string[:size] for string in strings for size in range(len(string) + 1)}
    ordered = sorted(prefixes, key=lambda prefix: (len(prefix), prefix))
    number = {prefix: i for i, prefix in enumerate(ordered)}
    hit = len(ordered)
    next_state = np.zeros((hit + 1, len(letters) + 1), np.int32)
    next_state[hit] = hit
    behind = np.zeros(hit + 1, np.int32)  # the state of a prefix without its first letter: its longest suffix that is a prefix
    # Shorter prefixes first: a row is that of the shorter suffix, but for the letters that go deeper.
    for i, prefix in enumerate(ordered):
        next_state[i] = next_state[behind[i]]
        for letter in letters:
            longer = number.get(prefix + bytes([letter]))
            if longer is None:
                continue
            suffix = next_state[behind[i], classes[letter]] if prefix else 0
            behind[longer] = suffix
            is_found = suffix == hit or ordered[longer] in strings
            next_state[i, classes[letter]] = hit if is_found else longer
    return classes, next_state, hit


@struct.dataclass
class StopTables:
    """The search for stop strings inside jit; the state of each row [B] int32 is the caller's to carry."""

    classes_V: jax.Array | np.ndarray
    next_SC: jax.Array | np.ndarray
    hit: jax.Array | np.ndarray

    def begin(self, batch: int) -> jax.Array:
        """[B] int32: the states of rows that have written nothing."""
        return jnp.zeros(batch, jnp.int32)

    def advance(self, state_B: jax.Array, token_B: jax.Array) -> jax.Array:
        """The states behind one more token a row."""
        return jnp.asarray(self.next_SC)[state_B, jnp.asarray(self.classes_V)[token_B]]

    def stopped(self, state_B: jax.Array) -> jax.Array:
        """[B] bool: a stop string is complete in what the row has written."""
        return state_B == self.hit
