"""Intervals: what they cover on data whose truth is known, and that sums resample like the examples themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gptjax.measures.bootstrap import Bootstrap, Sums, draw_counts, interval, mean_of, ratio, wilson
from gptjax.measures.measured import Measured, as_json, difference, measure, table
from gptjax.measures.regression import spearman


def f1_score(totals: np.ndarray) -> np.ndarray:
    return 2 * totals[..., 0] / np.maximum(totals[..., 1] + totals[..., 2], 1)


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_intervals_cover_what_they_promise(method: str):
    rng, trials, n = np.random.default_rng(0), 300, 150
    covered = np.zeros(2)
    gold_share, recall, false_alarms = 0.2, 0.7, 0.05
    precision = gold_share * recall / (gold_share * recall + (1 - gold_share) * false_alarms)
    truth = 2 * precision * recall / (precision + recall)
    for trial in range(trials):
        gold = rng.random(n) < gold_share
        guess = np.where(gold, rng.random(n) < recall, rng.random(n) < false_alarms)
        settings = Bootstrap(resamples=400, confidence=0.9, method=method, seed=trial)
        low, high, _ = interval(Sums(np.stack([gold & guess, guess, gold], axis=1).astype(float), f1_score), settings)
        covered[0] += low <= truth <= high
        low, high, _ = interval(mean_of(rng.exponential(size=n)), settings)
        covered[1] += low <= 1.0 <= high
    assert ((covered / trials > 0.85) & (covered / trials < 0.94)).all(), covered / trials


def test_bca_agrees_with_scipy():
    from scipy import stats

    values = np.random.default_rng(1).exponential(size=60)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=40_000, method="BCa", rng=np.random.default_rng(2))
    low, high, _ = interval(mean_of(values), Bootstrap(resamples=40_000))
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)
    plain_low, plain_high, _ = interval(mean_of(values), Bootstrap(resamples=40_000, method="percentile"))
    assert low > plain_low + 0.01 and high > plain_high + 0.01  # to the right, as the values are skewed


def test_a_resample_of_sums_is_the_metric_of_the_examples_drawn():
    rng = np.random.default_rng(3)
    rows = rng.integers(0, 3, (40, 3)).astype(float)
    statistic = Sums(rows, f1_score)
    picks = np.random.default_rng(5).integers(0, 40, (7, 40))
    expected = [f1_score(rows[pick].sum(axis=0)) for pick in picks]
    counts = np.concatenate(list(draw_counts(40, 7, seed=5)))
    np.testing.assert_allclose(statistic.resampled(counts), expected, rtol=1e-12)
    np.testing.assert_allclose(statistic.left_out(), [f1_score(np.delete(rows, i, 0).sum(axis=0)) for i in range(40)])


def test_blocks_change_no_draw(monkeypatch: pytest.MonkeyPatch):
    whole = np.concatenate(list(draw_counts(30, 50, seed=4)))
    monkeypatch.setattr("gptjax.measures.bootstrap._CELLS", 100)
    blocks = list(draw_counts(30, 50, seed=4))
    assert len(blocks) == 17 and (np.concatenate(blocks) == whole).all() and (whole.sum(axis=1) == 30).all()


def test_groups_that_repeat_themselves_widen_the_interval():
    values = np.repeat(np.random.default_rng(6).random(20), 10)
    single = mean_of(values)
    together = single.grouped([f"paragraph {i // 10}" for i in range(200)])
    widths = [high - low for low, high, _ in (interval(s, Bootstrap()) for s in (single, together))]
    assert together.n == 20 and together.value() == pytest.approx(single.value())
    assert widths[1] / widths[0] == pytest.approx(math.sqrt(10), rel=0.15)


def test_a_paired_difference_is_narrower_than_its_parts():
    rng = np.random.default_rng(7)
    hard = rng.random(500)
    first = measure("model", mean_of(hard + 0.03 + 0.01 * rng.standard_normal(500)), Bootstrap())
    second = measure("baseline", mean_of(hard), Bootstrap())
    gap = difference(first, second, Bootstrap())
    assert gap.value == pytest.approx(0.03, abs=0.005) and gap.low is not None and gap.low > 0.02
    assert first.low is not None and second.high is not None and first.low < second.high  # apart they would overlap
    with pytest.raises(ValueError, match="not of the same examples"):
        difference(first, measure("x", mean_of([1.0, 2.0])), Bootstrap())


def test_where_an_interval_says_nothing_the_note_does():
    certain = measure("accuracy", mean_of([True] * 9), Bootstrap())
    assert (certain.low, certain.high) == (1.0, 1.0) and "says nothing" in certain.note
    assert "fewer than 2" in measure("accuracy", mean_of([1.0]), Bootstrap()).note
    constant = spearman([1, 2, 3], [1, 2, 2], Bootstrap())
    assert "not defined on every resample" in constant.note and math.isnan(constant.low or 0)


def test_wilson_is_the_published_interval():
    # R. Newcombe, Statistics in Medicine 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    published = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (hits, n), expected in published.items():
        assert wilson(hits, n) == pytest.approx(expected, abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_table_and_json():
    results = [Measured("accuracy", 0.8125, 0.75, 0.875, 160, "note"), Measured("perplexity", math.inf, n=3)]
    lines = table(results)
    assert lines[1].split() == ["accuracy", "0.8125", "[0.7500,", "0.8750]", "160", "note"]
    assert lines[2].split() == ["perplexity", "inf", "3"]
    empty = {"value": None, "low": None, "high": None, "n": 3, "note": ""}
    assert as_json(results)["perplexity"] == empty and as_json(results)["accuracy"]["low"] == 0.75


def test_a_mean_over_nothing_is_zero_and_wrong_settings_are_refused():
    assert ratio(np.zeros((2, 2))).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="none of bca, percentile"):
        Bootstrap(method="basic")
    with pytest.raises(ValueError, match="confidence in"):
        Bootstrap(confidence=1.0)
