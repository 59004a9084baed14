"""Words, perturbations of them, constraints and lexicons: each against what its name promises."""

import functools
import random
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.attacks import letters
from gptjax.attacks.constraints import Constraints, edit_distance
from gptjax.attacks.lexicon import read_synonyms, read_vectors
from gptjax.attacks.perturbations import CONTRACTIONS, EXPANSIONS, PERTURBATIONS
from gptjax.attacks.words import STOP_WORDS, split
from gptjax.config import UserError

TEXT = st.text(st.sampled_from("aZé9' -,.!\n\u2019你好，カ한\u0301_") | st.characters(exclude_categories=["Cs"]), max_size=30)
WORD = st.text(st.characters(categories=["Lu", "Ll"], max_codepoint=0x17F), min_size=1, max_size=8)
LEXICON = {"win": ("gain", "earn"), "free": ("gratis",)}


# --- words ---


@given(TEXT)
def test_words_and_what_is_between_are_the_text(text):
    words = split(text)
    assert words.replaced({}) == text == "".join(a + b for a, b in zip(words.between, (*words.words, ""), strict=True))
    assert all(words.words) and len(words.between) == len(words) + 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't panic, twenty-one pilots' café!", ["Don't", "panic", "twenty-one", "pilots", "café"]),
        ("你好，world世界2024年", ["你", "好", "world", "世", "界", "2024", "年"]),
        ("カタカナ와 한국어", ["カ", "タ", "カ", "ナ", "와", "한국어"]),
        ("-a- 'b' --", ["a", "b"]),
        ("...", []),
    ],
)
def test_words(text, expected):
    assert list(split(text).words) == expected


def test_a_word_that_is_taken_out_leaves_no_second_blank():
    words = split("one two, three  four")
    assert words.replaced({0: ""}) == "two, three  four"
    assert words.replaced({1: ""}) == "one , three  four"
    assert words.replaced({2: ""}) == "one two, four"
    assert words.replaced({3: "", 2: "drei"}) == "one two, drei"
    assert words.replaced({0: "", 1: "", 2: "", 3: ""}) == ","
    assert split("one two. ").replaced({1: ""}) == "one . "
    assert split("你好吗").replaced({1: ""}) == "你吗"


# --- letters ---


@given(WORD, st.integers(0, 99))
def test_changes_of_letters(word, seed):
    def made(change) -> list[str]:
        return list(change(word, random.Random(seed)))

    assert made(letters.swap_letters) == made(letters.swap_letters)
    swapped = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    assert set(made(letters.swap_letters)) == swapped
    assert set(made(letters.delete_letter)) == ({word[:i] + word[i + 1 :] for i in range(len(word))} if len(word) > 1 else set())
    for changed in made(letters.insert_letter):
        assert len(changed) == len(word) + 1 and edit_distance(word, changed) == 1 and changed[0] == word[0]
    for change in (letters.substitute_letter, letters.keyboard_slip, letters.homoglyph):
        for changed in made(change):
            pairs = [(old, new) for old, new in zip(word, changed, strict=True) if old != new]
            assert len(pairs) <= 1  # a letter without a like stays
            for old, new in pairs:
                assert old.isupper() == new.isupper()
                if change is letters.keyboard_slip:
                    assert new.lower() in letters.KEYBOARD[old.lower()]


def test_keys_touch_both_ways():
    assert letters.KEYBOARD["a"] == "qswz" and letters.KEYBOARD["p"] == "lo" and letters.KEYBOARD["g"] == "bfhtvy"
    assert sorted(letters.KEYBOARD) == sorted("abcdefghijklmnopqrstuvwxyz")
    assert all(key in letters.KEYBOARD[near] for key, nears in letters.KEYBOARD.items() for near in nears)


def test_homoglyphs_are_of_another_alphabet_or_chinese():
    for letter, others in letters.HOMOGLYPHS.items():
        assert others and letter not in others and len(set(others)) == len(others), letter
        for other in others:
            if letter.isascii():
                assert unicodedata.name(other).split()[0] in ("CYRILLIC", "GREEK")
                assert letter.isupper() == other.isupper()
            else:
                assert unicodedata.name(other).startswith("CJK UNIFIED") and letter in letters.HOMOGLYPHS[other]


# --- perturbations ---

SAMPLE = ["Do", "not", "Win", "FREE", "你", "未", "don\u2019t", "to"]


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_perturbations_change_the_words_they_name(name):
    some = False
    for index in range(len(SAMPLE)):
        edits = list(PERTURBATIONS[name](SAMPLE, index, random.Random(1), LEXICON))
        again = list(PERTURBATIONS[name](SAMPLE, index, random.Random(1), LEXICON))
        assert edits == again
        for edit in edits:
            assert index in edit and all(0 <= i < len(SAMPLE) for i in edit) and len(edit) <= 2
        some |= any(edit[index] != SAMPLE[index] for edit in edits)
    assert some


@pytest.mark.parametrize(
    ("name", "index", "expected"),
    [
        ("delete_word", 2, [{2: ""}]),
        ("swap_words", 0, [{0: "not", 1: "Do"}]),
        ("swap_words", 7, []),
        ("repeat_word", 0, [{0: "Do Do"}]),
        ("repeat_word", 4, [{4: "你你"}]),
        ("synonym", 2, [{2: "Gain"}, {2: "Earn"}]),
        ("synonym", 3, [{3: "GRATIS"}]),
        ("synonym", 0, []),
        ("homoglyph", 5, [{5: "末"}]),
        ("contraction", 0, [{0: "Don't", 1: ""}]),
        ("contraction", 6, [{6: "do not"}]),
    ],
)
def test_perturbations_of_words(name, index, expected):
    assert list(PERTURBATIONS[name](SAMPLE, index, random.Random(0), LEXICON)) == expected


def test_case_and_contractions():
    made = {edit[0] for edit in PERTURBATIONS["case"](["iPod"], 0, random.Random(0), {})}
    assert made == {"IPOD", "ipod", "Ipod", "IpOD"}
    assert len(CONTRACTIONS) == len(EXPANSIONS) and EXPANSIONS["they've"] == "they have"


# --- constraints ---


@given(st.text("ab你", max_size=6), st.text("ab你", max_size=6))
def test_edit_distance_is_the_recursion(one, other):
    @functools.cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(
            distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (one[i - 1] != other[j - 1])
        )  # fmt: skip

    assert edit_distance(one, other) == distance(len(one), len(other))


def test_what_may_change():
    words = split("The cat is a 2024 ox don\u2019t 海 的 e-mail")

    def open_words(**limits) -> list[str]:
        return [words.words[i] for i in Constraints(**limits).open(words)]

    assert open_words() == ["cat", "ox", "海", "e-mail"]
    assert open_words(min_letters=3) == ["cat", "海", "e-mail"]
    assert open_words(skip_stop_words=False, min_letters=0) == [word for word in words.words if word != "2024"]
    assert {"the", "不", "not"} <= STOP_WORDS


def test_how_much_may_change():
    words = split("alpha beta gamma delta epsilon zeta eta theta iota kappa")
    assert [Constraints(max_share=share).most(words) for share in (0.01, 0.1, 0.29, 0.3, 1.0)] == [1, 1, 2, 3, 10]
    assert Constraints(max_words=2).most(words) == 2 and Constraints(max_words=2, max_share=0.1).most(words) == 1
    assert Constraints(max_share=0.29).most(split("word " * 100)) == 29  # 0.29 * 100 is 28.999999999999996
    two = {0: "alpah", 1: "btea"}
    assert Constraints(max_share=0.2).allow(words, two) and not Constraints(max_share=0.1).allow(words, two)
    assert Constraints(keep_length=True).allow(words, two) and not Constraints(keep_length=True).allow(words, {0: "alph"})
    assert Constraints(keep_ends=True).allow(words, {1: "btea"}) and not Constraints(keep_ends=True).allow(words, {1: ""})
    assert not Constraints(keep_ends=True).allow(words, two)
    assert Constraints(max_edits=4).allow(words, two) and not Constraints(max_edits=3).allow(words, two)
    for wrong in ({"max_share": 0.0}, {"max_share": 1.1}, {"max_words": -1}):
        with pytest.raises(ValueError, match="max_share="):
            Constraints(**wrong)


# --- lexicons ---


def test_synonyms(tmp_path):
    path = tmp_path / "words.tsv"
    path.write_text("\ufeffWin\tgain\tearn\twin\n\nwin\tgain\tobtain\n高兴\t快乐\n", encoding="utf-8")
    assert read_synonyms(path) == {"win": ("gain", "earn", "obtain"), "高兴": ("快乐",)}
    path.write_text("win\tgain\nlose\n")
    with pytest.raises(UserError, match="words.tsv, line 2 is not a word and its substitutes"):
        read_synonyms(path)
    path.write_text("\n")
    with pytest.raises(UserError, match="words.tsv is empty"):
        read_synonyms(path)
    path.write_bytes(b"a\tb\nc\t\xff\n")
    with pytest.raises(UserError, match="words.tsv, line 2 is not UTF-8: byte 0xff"):
        read_synonyms(path)
    with pytest.raises(UserError, match=r"none.tsv cannot be read: No such file"):
        read_synonyms(tmp_path / "none.tsv")


@pytest.mark.parametrize("header", ["", "6 3\n"])
def test_vectors(tmp_path, header, monkeypatch):
    monkeypatch.setattr("gptjax.attacks.lexicon._BLOCK", 4)
    vectors = np.random.default_rng(0).normal(size=(6, 3))
    path = tmp_path / "vectors.txt"
    path.write_text(header + "".join(f"w{i} {' '.join(map(str, row))}\n" for i, row in enumerate(vectors)))
    found = read_vectors(path, neighbours=3, min_cosine=-0.2)
    for i, row in enumerate(vectors):
        cosines = [row @ other / np.linalg.norm(row) / np.linalg.norm(other) for other in vectors]
        near = sorted((j for j in range(6) if j != i and cosines[j] >= -0.2), key=lambda j: -cosines[j])
        assert found[f"w{i}"] == tuple(f"w{j}" for j in near[:3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 1 2\nb 1\n", "line 2 has 1 numbers, not 2 finite ones"),
        ("a 1 2\nb 1 nan\n", "line 2 has 2 numbers, not 2 finite ones"),
        ("a 1 2\nb 1 x\n", "line 2 is not a word and its numbers"),
        ("", "is empty"),
    ],
)
def test_bad_vectors(tmp_path, text, message):
    path = tmp_path / "vectors.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=f"vectors.txt.*{message}"):
        read_vectors(path)
