"""Stop strings against a plain search of the text, however the text is cut into tokens."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import UserError
from gptjax.generate.automata import joined_bytes
from gptjax.generate.stops import MAX_BYTES, StopStrings
from tests.generate.vocabularies import MODEL_VOCAB, VOCABULARY

LENGTH = 24
STRINGS = st.lists(st.text("abé\n中", min_size=1, max_size=4), min_size=1, max_size=4)


@jax.jit
def stopped_after_each(tables, tokens_BT):
    """[B, T] bool."""

    def step(state_B, token_B):
        state_B = tables.advance(state_B, token_B)
        return state_B, tables.stopped(state_B)

    return jax.lax.scan(step, tables.begin(tokens_BT.shape[0]), tokens_BT.T)[1].T


def first_complete(content: bytes, strings: list[str]) -> tuple[int, int, bytes] | None:
    """(end, start, string) of the string that is complete first, the longest of several; end by end."""
    for end in range(1, len(content) + 1):
        ending = [string.encode() for string in strings if content[:end].endswith(string.encode())]
        if ending:
            longest = max(ending, key=len)
            return end, end - len(longest), longest
    return None


# Ids that write parts of the strings above, whole characters, halves of them, and nothing.
IDS = [
    i
    for i, piece in enumerate([*VOCABULARY, None, None])
    if not piece or set(piece) <= set("abcé\n中".encode()) or piece in (b"\xad\xe4", b"a\xc3")
]


@given(STRINGS, st.lists(st.lists(st.sampled_from(IDS), min_size=LENGTH, max_size=LENGTH), min_size=8, max_size=8))
@settings(max_examples=60)
def test_equals_a_search_of_the_text(strings, rows):
    stops = StopStrings(strings)
    tables = stops.tables(VOCABULARY, MODEL_VOCAB)
    found = np.asarray(stopped_after_each(tables, np.array(rows, np.int32)))
    for row, stopped in zip(rows, found, strict=True):
        for length in range(1, LENGTH + 1):
            content = joined_bytes(VOCABULARY, row[:length])
            first = first_complete(content, strings)
            assert stopped[length - 1] == (first is not None)
            cut = stops.find(content)
            assert (cut is None) == (first is None)
            if first:
                end, start, string = first
                assert (cut.before, cut.through, cut.stop.encode()) == (content[:start], content[:end], string)


@pytest.mark.parametrize("strings", [["aab"], ["abab", "bb"], ["aaba", "ab", "b"], ["abaabb", "baa"], ["bbab", "bab", "aaa"]])
def test_every_text_of_two_letters(strings):
    """What has been matched of one string begins another, or itself again: the paths that random texts seldom take."""
    rows = np.array(list(itertools.product(b"ab", repeat=8)), np.int32)  # bytes are their own ids
    found = np.asarray(stopped_after_each(StopStrings(strings).tables(VOCABULARY, MODEL_VOCAB), rows))
    for row, stopped in zip(rows, found, strict=True):
        meant = [any(string.encode() in bytes(row[:length].tolist()) for string in strings) for length in range(1, 9)]
        assert stopped.tolist() == meant, row


@given(STRINGS, st.text("abé\n中", max_size=8))
def test_pending_bytes_are_all_that_may_become_a_stop_string(strings, text):
    stops, content = StopStrings(strings), text.encode()
    held = stops.pending(content)
    # Brute force: the earliest start at which some continuation would complete a string that is not complete yet.
    starts = [
        start
        for start in range(len(content))
        for string in strings
        if string.encode().startswith(content[start:]) and string.encode() != content[start:]
    ]
    assert len(content) - held == min(starts, default=len(content))


def test_a_split_does_not_change_which_string_stops():
    stops = StopStrings(["abcd", "bc", "abc"])
    for pieces in ([b"abcd"], [b"ab", b"cd"], [b"a", b"bcd"], [b"abc", b"d"]):
        cut = stops.find(b"".join(pieces))
        assert (cut.before, cut.stop, cut.through) == (b"", "abc", b"abc")


def test_one_compilation_for_strings_of_like_size():
    before = stopped_after_each._cache_size()
    for strings in (["a"], ["stop", "\n\n"], ["</s>", "User:", "中文"]):
        tables = StopStrings(strings).tables(VOCABULARY, MODEL_VOCAB)
        stopped_after_each(tables, np.zeros((3, 2), np.int32))
    assert stopped_after_each._cache_size() == before + 1


def test_mistakes():
    for strings in ([], [""], ["a", ""]):
        with pytest.raises(UserError, match="at least one character"):
            StopStrings(strings)
    with pytest.raises(UserError, match="lone surrogate"):
        StopStrings(["\ud800"])
    with pytest.raises(UserError, match=f"4098 bytes together, more than {MAX_BYTES}"):
        StopStrings(["é" * 2049])
    StopStrings(["é" * 2048]).tables(VOCABULARY, MODEL_VOCAB)
