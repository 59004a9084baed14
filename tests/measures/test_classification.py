"""Labels and numbers, against scikit-learn and scipy on the same data, resamples included."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from gptjax.config import UserError
from gptjax.measures import calibration, classification, regression
from gptjax.measures.bootstrap import Bootstrap, draw_counts

RNG = np.random.default_rng(0)
NAMES = ["ham", "maybe", "spam", "work"]
GOLD = [NAMES[i] for i in RNG.choice(4, 120, p=[0.5, 0.05, 0.25, 0.2])]
GUESS = [g if RNG.random() < 0.7 else NAMES[RNG.integers(4)] for g in GOLD]
SETS = [{name for name in NAMES if RNG.random() < 0.3} for _ in range(60)]
SET_GUESS = [{name for name in NAMES if (name in row) != (RNG.random() < 0.2)} for row in SETS]


@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
def test_f1_is_scikit_learns_on_the_sample_and_on_every_resample(average: str):
    measured = classification.f1(GOLD, GUESS, average)
    assert measured.value == pytest.approx(metrics.f1_score(GOLD, GUESS, average=average, zero_division=0))
    counts = np.concatenate(list(draw_counts(len(GOLD), 20, seed=1)))
    assert measured.statistic is not None
    for row, score in zip(counts.astype(int), measured.statistic.resampled(counts), strict=True):
        gold, guess = (np.repeat(values, row) for values in (GOLD, GUESS))
        assert score == pytest.approx(metrics.f1_score(gold, guess, average=average, zero_division=0))


def test_accuracy_and_one_class_and_every_class():
    assert classification.accuracy(GOLD, GUESS).value == metrics.accuracy_score(GOLD, GUESS)
    theirs = metrics.f1_score(GOLD, GUESS, average=None, zero_division=0)
    assert [result.value for result in classification.per_class(GOLD, GUESS)] == pytest.approx(theirs)
    spam = classification.f1_of(GOLD, GUESS, "spam", Bootstrap(resamples=200))
    assert spam.value == pytest.approx(theirs[2]) and spam.low < spam.value < spam.high and spam.n == 120  # type: ignore[operator]
    assert spam == classification.f1_of(GOLD, GUESS, "spam", Bootstrap(resamples=200))
    assert spam != classification.f1_of(GOLD, GUESS, "spam", Bootstrap(resamples=200, seed=1))


def test_reports_are_scikit_learns_own():
    report = classification.report(GOLD, GUESS, digits=2)
    assert report.text == metrics.classification_report(GOLD, GUESS, zero_division=0)
    assert report.numbers["spam"]["support"] == GOLD.count("spam")
    labels, matrix = classification.confusion(GOLD, GUESS)
    assert labels == NAMES and (matrix == metrics.confusion_matrix(GOLD, GUESS)).all()


def test_several_labels():
    truth, guess = (np.array([[name in row for name in NAMES] for row in rows]) for rows in (SETS, SET_GUESS))
    for average in ("macro", "micro", "weighted"):
        theirs = metrics.f1_score(truth, guess, average=average)
        assert classification.multilabel_f1(SETS, SET_GUESS, average).value == pytest.approx(theirs)
    assert classification.exact_match(SETS, SET_GUESS).value == metrics.accuracy_score(truth, guess)
    assert classification.hamming_loss(SETS, SET_GUESS).value == pytest.approx(metrics.hamming_loss(truth, guess))
    theirs = metrics.classification_report(truth, guess, target_names=NAMES, zero_division=0, digits=4)
    assert classification.multilabel_report(SETS, SET_GUESS).text == theirs


def test_mistakes_are_named():
    with pytest.raises(UserError, match="120 gold labels, but 119 predictions"):
        classification.accuracy(GOLD, GUESS[1:])
    with pytest.raises(UserError, match="no examples"):
        classification.f1([], [])
    with pytest.raises(UserError, match="no label 'eggs'"):
        classification.f1_of(GOLD, GUESS, "eggs")
    with pytest.raises(UserError, match="strings or numbers, not both"):
        classification.f1(["1", "2"], [1, 2])
    with pytest.raises(UserError, match="label 'work' is none of"):
        classification.confusion(["work"], ["ham"], labels=["ham", "spam"])
    with pytest.raises(UserError, match="average='mean'"):
        classification.f1(GOLD, GUESS, "mean")


def test_correlations_are_scipys_on_resamples_with_ties():
    x = RNG.integers(0, 8, 50).astype(float)
    y = x + RNG.normal(0, 3, 50).round()
    counts = np.concatenate(list(draw_counts(50, 10, seed=3)))
    for ours, theirs in ((regression.pearson, stats.pearsonr), (regression.spearman, stats.spearmanr)):
        measured = ours(x, y, Bootstrap(resamples=100))
        assert measured.value == pytest.approx(theirs(x, y)[0]) and measured.low < measured.value < measured.high  # type: ignore[operator]
        assert measured.statistic is not None
        expected = [theirs(np.repeat(x, c), np.repeat(y, c))[0] for c in counts.astype(int)]
        np.testing.assert_allclose(measured.statistic.resampled(counts), expected, rtol=1e-9)
        expected = [theirs(np.delete(x, i), np.delete(y, i))[0] for i in range(50)]
        np.testing.assert_allclose(measured.statistic.left_out(), expected, rtol=1e-9)
    assert regression.mean_squared_error(x, y).value == pytest.approx(metrics.mean_squared_error(x, y))
    assert regression.pearson(x + 1e7, y).value == pytest.approx(stats.pearsonr(x, y)[0], rel=1e-6)
    assert np.isnan(regression.pearson(np.ones(5), np.arange(5.0)).value)
    with pytest.raises(UserError, match="predicted number 1 "):
        regression.pearson([1.0, 2.0], [1.0, np.nan])


def test_calibration_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.35, 0.65], [0.45, 0.55], [1.0, 0.0]])
    gold = [0, 1, 1, 0, 0]
    # bins of 0.2: 0.9, 0.8 -> (0.6, 0.8] holds 0.8 and 0.65; (0.8, 1] holds 0.9 and 1.0; (0.4, 0.6] holds 0.55
    expected = (abs(2 - 1.9) + abs(1 - 1.45) + abs(0 - 0.55)) / 5
    assert calibration.expected_calibration_error(probabilities, gold, bins=5).value == pytest.approx(expected)
    table = calibration.reliability(probabilities, gold, bins=5)
    assert [(b.n, round(b.confidence, 4), b.accuracy) for b in table] == [(1, 0.55, 0.0), (2, 0.725, 0.5), (2, 0.95, 1.0)]
    brier = np.mean([0.02, 1.28, 2 * 0.35**2, 2 * 0.55**2, 0.0])
    assert calibration.brier(probabilities, gold).value == pytest.approx(brier)
    assert calibration.brier(probabilities, gold).value == pytest.approx(2 * metrics.brier_score_loss(gold, probabilities[:, 1]))
    soft = np.clip(probabilities, 0.01, 0.99)
    assert calibration.log_loss(soft, gold).value == pytest.approx(metrics.log_loss(gold, soft))


def test_bins_of_equal_size_have_equal_size_and_calibrated_ones_a_small_error():
    top = np.random.default_rng(4).uniform(0.5, 1, 4000)
    probabilities = np.stack([top, 1 - top], axis=1)
    gold = (np.random.default_rng(5).random(4000) > top).astype(int)
    table = calibration.reliability(probabilities, gold, bins=8, adaptive=True)
    assert {row.n for row in table} == {500}
    for adaptive in (False, True):
        good = calibration.expected_calibration_error(probabilities, gold, adaptive=adaptive, bootstrap=Bootstrap())
        assert good.value < 0.03 and good.low < good.value < good.high  # type: ignore[operator]
        always = calibration.expected_calibration_error(np.stack([top, 1 - top], 1), np.zeros(4000, int), adaptive=adaptive)
        assert always.value == pytest.approx(1 - top.mean())
    with pytest.raises(UserError, match="of example 1 "):
        calibration.brier([[0.5, 0.5], [0.5, 0.6]], [0, 1])
    with pytest.raises(UserError, match="from 0 to 2, but there are 2 columns"):
        calibration.brier([[0.5, 0.5], [0.5, 0.5]], [0, 2])
