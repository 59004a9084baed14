"""Exact match and F1 of answers, on cases counted by hand, and against lm-eval's copy of MLQA's script (parity)."""

from __future__ import annotations

import pytest

from gptjax.config import UserError
from gptjax.measures import answers
from gptjax.measures.bootstrap import Bootstrap


@pytest.mark.parametrize(
    ("golds", "guess", "exact", "f1"),
    [
        (["Denver Broncos", "The Denver Broncos!"], "the denver  broncos", 1, 1),  # case, article, mark, space
        (["Saint Bernadette Soubirous"], "Bernadette Soubirous", 0, 4 / 5),
        (["a golden statue of the Virgin Mary"], "the Virgin Mary statue", 0, 2 * 3 / (5 + 3)),
        (["May 21, 2016"], "21 May 2016", 0, 1),  # a bag of words
        (["yes yes no"], "yes no no", 0, 2 * 2 / 6),  # repeated words count as often as both have them
        (["anthem"], "an them", 0, 0),  # articles are whole words
        (["theatre"], "the theatre", 1, 1),
        (["1976"], "", 0, 0),
        (["the"], "a", 1, 0),  # v1.1 gives no F1 to two empty answers
    ],
)
def test_squad_by_hand(golds: list[str], guess: str, exact: float, f1: float):
    assert answers.scores(golds, guess) == pytest.approx((exact, f1))


def test_no_answer_of_version_two():
    assert answers.scores([], "", version=2) == (1.0, 1.0)
    assert answers.scores(["the"], "", version=2) == (1.0, 1.0)
    assert answers.scores([], "something", version=2) == (0.0, 0.0)
    assert answers.scores(["something"], "", version=2) == (0.0, 0.0)
    golds, guesses = [["red"], ["blue sky"], [], []], ["red", "blue", "", "green"]
    results = {m.name: m for m in answers.squad_v2(golds, guesses, bootstrap=Bootstrap(resamples=50))}
    assert results["exact match"].value == 50 and results["F1"].value == pytest.approx(100 * (1 + 2 / 3 + 1 + 0) / 4)
    assert results["F1 with an answer"].value == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert results["F1 without an answer"].value == 50 and results["F1 without an answer"].n == 2
    chances = [0.1, 0.6, 0.9, 0.8]
    at_half = answers.squad_v2(golds, guesses, chances, threshold=0.7)[1].value
    assert at_half == pytest.approx(100 * (1 + 2 / 3 + 1 + 1) / 4)
    best, score = answers.best_threshold(golds, guesses, chances)
    assert best == 0.6 and score == pytest.approx(at_half)
    assert answers.squad_v2(golds, guesses, chances, threshold=best)[1].value == pytest.approx(score)


@pytest.mark.parametrize("chances", [[0.5, 0.5, 0.5], [0.2, 0.5, 0.5], [0.9, 0.1, 0.4]])
def test_the_best_threshold_is_the_best_of_all(chances: list[float]):
    golds, guesses = [["red"], [], ["blue sky"]], ["red", "x", "blue"]
    tried = {t: answers.squad_v2(golds, guesses, chances, t)[1].value for t in (float("-inf"), *chances)}
    threshold, score = answers.best_threshold(golds, guesses, chances)
    assert score == pytest.approx(max(tried.values())) and tried[threshold] == pytest.approx(score)


def test_chinese_by_each_rule():
    gold, guess = ["《北京大学》1898年"], "北京 大学。"
    assert answers.scores(gold, guess, "squad") == (0, 0)  # one word each, and not the same
    # mlqa: 北 京 大 学 1898 年 and 北 京 大 学
    assert answers.scores(gold, guess, "mlqa-zh") == pytest.approx((0, 2 * 4 / 10))
    assert answers.scores(gold, guess, "cmrc") == pytest.approx((0, 2 * 4 / 10))
    # a bag of characters against the longest common run: 大学 within 学大京北
    assert answers.scores(["北京大学"], "大学北京", "mlqa-zh") == (0, 1)
    assert answers.scores(["北京大学"], "大学北京", "cmrc") == (0, 0.5)
    assert answers.scores(["“iPhone 4S”手机"], "iphone 4s手机", "mlqa-zh") == (1, 1)
    assert answers.cmrc_tokens("售价3.5万元,约US$500") == ["售", "价", "3.5", "万", "元", ",", "约", "us", "$", "500"]


def test_squad_gives_points_of_hundred_with_intervals_and_says_how():
    exact, f1 = answers.squad([["a cat"], ["two dogs"]] * 10, ["cat", "dogs"] * 10, bootstrap=Bootstrap(resamples=100))
    assert exact.value == 50 and f1.value == pytest.approx(100 * (1 + 2 / 3) / 2) and f1.low < f1.value < f1.high  # type: ignore[operator]
    assert f1.note == "SQuAD v1.1, normalised as squad"


def test_mistakes_are_named():
    with pytest.raises(UserError, match="question 1 .* has no gold answer; .* squad_v2"):
        answers.squad([["x"], []], ["x", ""])
    with pytest.raises(UserError, match="question 0 are one string"):
        answers.squad(["x"], ["x"])  # type: ignore[list-item]
    with pytest.raises(UserError, match="2 questions, but 1"):
        answers.squad([["x"], ["y"]], ["x"])
    with pytest.raises(UserError, match="normaliser='bert'"):
        answers.squad([["x"]], ["x"], normaliser="bert")


@pytest.mark.parity
def test_mlqa_is_what_its_script_says():
    theirs = pytest.importorskip("lm_eval.tasks.mlqa.utils", reason="lm_eval is not installed")
    texts = ["《北京大学》1898年", "the iPhone 4S，手机", "A cat,  the dog", "约3.5万元", "在 1990 年", "café-bar", ""]
    for language in ("en", "zh"):
        for gold in texts:
            for guess in texts:
                ours = answers.scores([gold], guess, f"mlqa-{language}")
                assert ours[0] == float(theirs.exact_match_score(guess, gold, language)), (gold, guess)
                assert ours[1] == pytest.approx(theirs.f1_score(guess, gold, language)), (gold, guess)
