"""BLEU, chrF and ROUGE against their packages, on resamples too; likelihood and diversity by hand and by brute force."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from gptjax.config import UserError
from gptjax.measures import text
from gptjax.measures.bootstrap import Bootstrap, draw_counts, interval

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "fast", ",", ".", "red", "blue", "eats", "fish"]
RNG = np.random.default_rng(0)


def sentence(least: int = 1, most: int = 12) -> str:
    return " ".join(RNG.choice(WORDS, RNG.integers(least, most)))


REFERENCES = [[sentence() for _ in range(RNG.integers(1, 4))] for _ in range(60)]
GUESSES = [refs[0] if RNG.random() < 0.4 else sentence() for refs in REFERENCES]
GUESSES[3] = ""
COUNTS = np.concatenate(list(draw_counts(60, 12, seed=1)))


def drawn(row: np.ndarray) -> tuple[list[str], list[list[str | None]]]:
    chosen = [i for i, times in enumerate(row.astype(int)) for _ in range(times)]
    references = [REFERENCES[i] for i in chosen]
    return [GUESSES[i] for i in chosen], [[refs[k] if k < len(refs) else None for refs in references] for k in range(3)]


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_corpus_scores_are_sacrebleus_and_resamples_agree(name: str):
    measured = {"bleu": text.bleu, "chrf": text.chrf}[name](REFERENCES, GUESSES, bootstrap=Bootstrap(resamples=50))
    theirs = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[name]
    assert measured.value == theirs(*drawn(np.ones(60))).score and measured.low < measured.value < measured.high  # type: ignore[operator]
    assert measured.statistic is not None and measured.statistic.value() == pytest.approx(measured.value, rel=1e-12)
    expected = [theirs(*drawn(row)).score for row in COUNTS]
    np.testing.assert_allclose(measured.statistic.resampled(COUNTS), expected, rtol=1e-12)
    assert f"version:{sacrebleu.__version__}" in measured.note and "nrefs:var" in measured.note


@pytest.mark.parametrize("guess", ["cat", "the cat", "zebra", "", "the dog sat on a mat fast", "the cat sat on the mat ran ran"])
def test_short_and_wrong_texts_are_smoothed_as_sacrebleu_does(guess: str):
    references = [["the cat sat on the mat"]]
    assert text.bleu(references, [guess]).statistic.value() == pytest.approx(  # type: ignore[union-attr]
        sacrebleu.corpus_bleu([guess], [["the cat sat on the mat"]]).score
    )
    assert text.chrf(references, [guess]).statistic.value() == pytest.approx(  # type: ignore[union-attr]
        sacrebleu.corpus_chrf([guess], [["the cat sat on the mat"]]).score
    )


def test_chinese_bleu_says_how_it_was_cut():
    references, guesses = [["我们喜欢北京大学的猫"]], ["我们喜欢北京的猫"]
    cut = text.bleu(references, guesses, tokenize="zh")
    assert cut.value == sacrebleu.corpus_bleu(guesses, [["我们喜欢北京大学的猫"]], tokenize="zh").score > 50
    assert "tok:zh" in cut.note and "tokenize='zh'" not in cut.note
    assert "tokenize='zh' does" in text.bleu(references, guesses).note


def test_a_thousand_resamples_of_bleu_are_quick():
    rows = np.random.default_rng(2).integers(1, 20, (5000, 10)).astype(float)
    rows[:, :4] = np.minimum(rows[:, :4], rows[:, 4:8])
    start = time.process_time()
    interval(text.Sums(rows, text.bleu_from), Bootstrap(resamples=1000))
    assert time.process_time() - start < 5


def test_rouge_is_rouge_scores_with_the_best_reference():
    references = [[f"{ref} cat" for ref in refs] for refs in REFERENCES]  # a mark alone would leave no token
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    names = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    for (key, name), measured in zip(names.items(), text.rouge(references, GUESSES), strict=True):
        pairs = zip(references, GUESSES, strict=True)
        best = [max(scorer.score(ref, guess)[key].fmeasure for ref in refs) for refs, guess in pairs]
        assert measured.name == name and measured.value == pytest.approx(100 * np.mean(best))


def test_rouge_of_chinese_is_of_characters_or_refused():
    one, two, longest = text.rouge([["我喜欢猫"]], ["我爱猫"], tokenize="mixed")
    # 我 and 猫 of 3 and 4; no pair; the run 我 … 猫 in order
    assert one.value == pytest.approx(100 * 4 / 7) and two.value == 0 and longest.value == pytest.approx(100 * 4 / 7)
    with pytest.raises(UserError, match="text 0 .* use tokenize='mixed'"):
        text.rouge([["我喜欢猫"]], ["我爱猫"])
    with pytest.raises(UserError, match="stemmer=True goes with"):
        text.rouge([["a"]], ["a"], tokenize="mixed", stemmer=True)
    assert text.rouge([["running cats"]], ["run cat"], stemmer=True)[0].value == 100


def test_likelihood_by_hand():
    measured = text.perplexity([2.0, 4.0, 9.0], [2, 4, 4], Bootstrap(resamples=200))
    assert measured.value == pytest.approx(math.exp(1.5)) and measured.low == pytest.approx(math.e, rel=1e-6)
    assert text.bits_per_byte([math.log(2) * 6], [4]).value == pytest.approx(1.5)
    with pytest.raises(UserError, match="at least one of the tokens"):
        text.perplexity([0.0], [0])


def test_distinct_by_hand_and_by_leaving_out():
    texts = [["a", "b", "a"], ["a", "c"], ["d"]]
    assert text.distinct(texts).value == 4 / 6 and text.distinct(texts, 2).value == 3 / 3
    many = [sentence(4, 9).split() for _ in range(30)]
    measured = text.distinct(many, 2, Bootstrap())
    left = np.array([text.distinct(many[:i] + many[i + 1 :], 2).value for i in range(30)])
    reach = 1.959964 * math.sqrt(29 / 30 * ((left - left.mean()) ** 2).sum())
    assert (measured.low, measured.high) == pytest.approx((measured.value - reach, measured.value + reach), rel=1e-6)
    with pytest.raises(UserError, match="no text has 3 tokens"):
        text.distinct(texts[1:], 3)


def test_self_bleu_is_sacrebleu_against_all_others():
    texts = [sentence(1, 12) for _ in range(20)]
    metric = sacrebleu.BLEU(effective_order=True)
    expected = [metric.sentence_score(own, texts[:i] + texts[i + 1 :]).score for i, own in enumerate(texts)]
    assert text.self_bleu(texts).value == pytest.approx(np.mean(expected), rel=1e-12)
    assert text.self_bleu(["the cat sat on a mat"] * 3).value == pytest.approx(100)
    with pytest.raises(UserError, match="1 is too few"):
        text.self_bleu(["x"])


def test_mistakes_are_named():
    with pytest.raises(UserError, match="text 0 .* needs a list"):
        text.bleu(["x"], ["x"])  # type: ignore[list-item]
    with pytest.raises(UserError, match="1 texts with references, but 2"):
        text.chrf([["x"]], ["x", "y"])
    with pytest.raises(UserError, match="tokenize='characters'"):
        text.rouge([["x"]], ["x"], tokenize="characters")
