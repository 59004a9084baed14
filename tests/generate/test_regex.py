"""Regular expressions against Python's `re`, and their automata against counts known beforehand."""

import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gptjax.config import UserError
from gptjax.generate import patterns
from gptjax.generate.patterns import (
    Chars,
    Listing,
    Repeat,
    Separated,
    compile_pattern,
    complement,
    intersection,
    literal,
    utf8_ranges,
)
from gptjax.generate.regex import parse_regex, parse_search

# Few characters, so that texts often match; one of each length in UTF-8, and the ends of its lengths.
CHARACTERS = "ab1_- ]\n\x00é\u07ff\u0800中\ud7ff\ue000\uffff\U00010000🦙\U0010ffff"
ATOMS = [
    *("a", "b", "1", "é", "中", "🦙", r"\-", r"\x61", r"\u4e2d", r"\U0001f999", r"\n", r"\]"),
    *(".", r"\d", r"\w", r"\s", r"\D", r"\W", r"\S"),
    *("[ab]", "[^a]", "[é-中]", "[^é-🦙]", r"[\d-]", r"[^\w]", "[]a]", "[^]a]", "[a-]", r"[\x00-\u07ff]", r"[^\S\n]"),
]
EXPRESSIONS = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: (
        st.tuples(inner, inner).map("".join)
        | st.tuples(inner, inner).map("({0[0]}|{0[1]})".format)
        | st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{0,2}?", "{2,}", "{,2}", "{0}", "{0,}"])).map(
            "(?:{0[0]}){0[1]}".format
        )
        | st.tuples(inner).map("(|{0[0]})".format)
    ),
    max_leaves=8,
)
TEXTS = st.lists(st.text(alphabet=CHARACTERS, max_size=6), min_size=10, max_size=40)


def automaton(expression):
    return compile_pattern(parse_regex(expression))


@given(EXPRESSIONS, TEXTS)
@settings(max_examples=400)
def test_equals_fullmatch(expression, texts):
    found = automaton(expression)
    meant = re.compile(expression, re.ASCII)
    for text in texts:
        assert found.accepts(text.encode()) == (meant.fullmatch(text) is not None), text


@given(EXPRESSIONS, EXPRESSIONS, TEXTS)
@settings(max_examples=50)
def test_intersection_is_both(left, right, texts):
    try:
        both = intersection(automaton(left), automaton(right))
    except UserError as error:
        assert str(error) == "no text matches the pattern."
        assume(False)
    for text in texts:
        assert both.accepts(text.encode()) == all(re.fullmatch(one, text, re.ASCII) for one in (left, right)), text


@pytest.mark.parametrize(
    ("expression", "texts"),
    [
        ("^a|b$", {"a": True, "b": True, "ab": False, "": False}),
        ("^$", {"": True, "a": False}),
        (r"\{\"x\"\}", {'{"x"}': True}),
        ("(a|b)*?c", {"abc": True, "c": True, "cc": False}),
        ("a}]", {"a}]": True}),
        (r"[\b\a]", {"\b": True, "\a": True, "b": False}),
    ],
)
def test_meaning(expression, texts):
    for text, accepted in texts.items():
        assert automaton(expression).accepts(text.encode()) == accepted, text


@pytest.mark.parametrize(
    ("expression", "position", "reason"),
    [
        ("x(?=a)", 1, "look-around"),
        ("(?P<n>a)", 0, "names"),
        ("(?i)a", 0, "flags"),
        (r"(a)\1", 3, "back-references"),
        (r"a\b", 1, "escape is not supported"),
        (r"\p{L}", 0, "escape is not supported"),
        ("a**", 2, "repeats a repetition"),
        ("a*+", 2, "repeats a repetition"),
        ("a{2}{3}", 4, "repeats a repetition"),
        ("*a", 0, "nothing for"),
        ("(|+)", 2, "nothing for"),
        ("a{", 1, "no repetition"),
        ("a{,}", 1, "no repetition"),
        ("a{3,2}", 1, "ends below"),
        ("[b-a]", 2, "range"),
        (r"[a-\d]", 2, "range"),
        ("[ab", 0, "class is not closed"),
        ("b(a", 1, "group is not closed"),
        ("a)", 1, "closes no group"),
        ("a$b", 1, "elsewhere"),
        ("a^", 1, "elsewhere"),
        ("(a$|b)", 2, "elsewhere"),
        ("a\\", 1, "backslash"),
        (r"\x6", 0, "2 hexadecimal"),
        (r"a\ud800", 1, "surrogate"),
        ("a\udcff", 1, "surrogate"),
        (r"\U00110000", 0, "beyond"),
        ("(" * 101 + ")" * 101, 100, "nested"),
    ],
)
def test_what_is_not_supported_is_refused_at_its_position(expression, position, reason):
    with pytest.raises(UserError, match=rf", position {position}: .*{reason}"):
        parse_regex(expression)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("((a{1000}){1000}){1000}", "more than 9999 parts"),
        ("(a|b)*a(a|b){20}", "more than 999 states"),
        (r"[^\x00-\U0010ffff]", "no text matches"),
    ],
)
def test_too_large_or_empty(monkeypatch, expression, reason):
    monkeypatch.setattr(patterns, "MAX_PARTS", 9999)
    monkeypatch.setattr(patterns, "MAX_STATES", 999)
    with pytest.raises(UserError, match=reason):
        automaton(expression)


@pytest.mark.parametrize(
    ("expression", "states"),
    [("(a|b)*a(a|b){8}", 2**9), ("a*", 1), ("abc|abd|xbc|xbd", 4), ("a{2000}", 2001), ("(a|aa|aaa)*", 1), ("(ab|ac)?d?", 4)],
)
def test_automata_are_minimal(expression, states):
    assert automaton(expression).num_states == states


def test_utf8_ranges_hold_every_character_once():
    seen = np.zeros(0x110000, int)
    for low, high in ((0, 0x10FFFF),):
        for sequence in utf8_ranges(low, high):
            grid = np.zeros(1, np.int64)
            for number, (first, last) in enumerate(sequence):
                lead = {1: 0x7F, 2: 0x1F, 3: 0x0F, 4: 0x07}[len(sequence)] if number == 0 else 0x3F
                grid = (grid[:, None] * 64 + (np.arange(first, last + 1) & lead)).reshape(-1)
            seen[grid] += 1
    characters = np.ones(0x110000, int)
    characters[0xD800:0xE000] = 0
    np.testing.assert_array_equal(seen, characters)


@given(st.integers(0, 0x10FFFF), st.integers(0, 0x10FFFF), st.integers(0, 0x10FFFF))
def test_ranges_of_characters(low, high, code):
    assume(low <= high and not 0xD800 <= code <= 0xDFFF)
    encoded = chr(code).encode()
    found = sum(
        len(sequence) == len(encoded)
        and all(first <= byte <= last for byte, (first, last) in zip(encoded, sequence, strict=True))
        for sequence in utf8_ranges(low, high)
    )
    assert found == (low <= code <= high)
    inside = any(begin <= code <= end for begin, end in complement(((low, high),)))
    assert inside == (not low <= code <= high)


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.booleans()), max_size=5), st.lists(st.sampled_from("xyz"), max_size=5))
def test_listings_keep_order_and_what_is_required(parts, chosen):
    found = compile_pattern(Listing(tuple((literal(name), required) for name, required in parts), literal(",")))
    meant = set()
    for mask in range(2 ** len(parts)):
        taken = [i for i in range(len(parts)) if mask >> i & 1]
        if all(i in taken for i, (_, required) in enumerate(parts) if required):
            meant.add(",".join(parts[i][0] for i in taken))
    assert all(found.accepts(text.encode()) for text in meant)
    assert found.accepts(",".join(chosen).encode()) == (",".join(chosen) in meant)


def test_separated():
    found = compile_pattern(Separated(Repeat(Chars(((97, 97),)), 1, 2), literal(", ")))
    texts = {"a": True, "aa, a": True, "a, aa, a": True, "": False, "a,a": False, "a, ": False, ", a": False, "aaa": False}
    assert {text: found.accepts(text.encode()) for text in texts} == texts


@given(
    st.tuples(st.sampled_from(["", "^"]), EXPRESSIONS, st.sampled_from(["", "$"])).map("".join), st.text(CHARACTERS, max_size=5)
)
@settings(max_examples=300)
def test_what_parse_search_allows_is_found_by_every_dialect(expression, text):
    """Of JSON Schema's `pattern`: whatever is written must be found by `re.search`, ASCII or Unicode."""
    found = compile_pattern(parse_search(expression)).accepts(text.encode())
    for flags in (re.ASCII, re.UNICODE):
        assert not found or re.search(expression, text, flags)
    if re.search(expression, text, re.ASCII) and not re.search(r"\\[DWSs]|\[\^|\.", expression):
        assert found


def test_search_in_every_character_of_the_sets():
    for expression in (r"^\D$", r"^\W$", r"^\S$", r"^[^\d]$", r"^[^\s]$", r"^\s$", r"^\w$", "^.$"):
        found = compile_pattern(parse_search(expression))
        allowed = [chr(code) for code in range(0x3000) if found.accepts(chr(code).encode())]
        assert len(allowed) >= 6
        for text in allowed:
            assert re.search(expression, text) and re.search(expression, text, re.ASCII), (expression, text)
