"""Near-duplicates, against every pair compared as sets."""

from __future__ import annotations

import numpy as np
import pytest

from gptjax.analysis import near_duplicates
from gptjax.analysis.near_duplicates import SHINGLE, normalise
from gptjax.analysis.near_duplicates import near_duplicates as find

LETTERS = list("abcdefgh  我你他")


def texts_and_changed(seed: int, number: int) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    train = ["".join(rng.choice(LETTERS, rng.integers(3, 60))) for _ in range(number)]
    test = []
    for text in train:
        characters = list(text)
        for _ in range(rng.integers(0, 4)):
            characters[rng.integers(len(characters))] = str(rng.choice(LETTERS))
        test.append("".join(characters))
    return test, train


def brute_force(test: list[str], train: list[str], threshold: float) -> dict[int, tuple[int, float]]:
    def shingles(text: str) -> set[str]:
        return {text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1)}

    best: dict[int, tuple[int, float]] = {}
    for i, a in enumerate(map(normalise, test)):
        for j, b in enumerate(map(normalise, train)):
            both = shingles(a) | shingles(b)
            similarity = 1.0 if a == b and a else len(shingles(a) & shingles(b)) / len(both) if both else 0.0
            if similarity >= threshold and similarity > best.get(i, (0, 0.0))[1]:
                best[i] = (j, similarity)
    return best


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 1.0])
def test_all_pairs_are_found(threshold: float, monkeypatch: pytest.MonkeyPatch):
    test, train = texts_and_changed(seed=1, number=90)
    expected = brute_force(test, train, threshold)
    for most in (4_000_000, 50):  # in one piece, and in many
        monkeypatch.setattr(near_duplicates, "_MOST_PAIRS", most)
        found = find(test, train, threshold)
        assert {match.test: (match.train, pytest.approx(match.similarity)) for match in found.matches} == expected
    assert 5 < len(expected) < 90 and found.cut == 0


def test_case_marks_and_widths_do_not_hide_a_copy():
    found = find(["Hello,   WORLD!", "ＡＢＣ　１２３", "...", "ok"], ["x", "hello world", "abc-123", "!!!", "OK."])
    assert [(match.test, match.train, match.similarity) for match in found.matches] == [(0, 1, 1.0), (1, 2, 1.0), (3, 4, 1.0)]
    assert find([], ["a"]).matches == [] == find(["some text"], []).matches


def test_long_texts_are_cut_and_it_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(near_duplicates, "_MOST_CHARACTERS", 100)
    start = "the same beginning of both texts"
    found = find([start + " and then this and that and more of it"], [start + " followed by other words altogether here"])
    assert found.cut == 50 and found.matches == []
    monkeypatch.setattr(near_duplicates, "_MOST_CHARACTERS", 60)
    assert find([start * 3], [start + "x" * 200]).matches[0].similarity == 1.0
