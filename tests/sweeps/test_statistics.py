"""The error rates that the comparison promises, on simulated runs; power and correction against published numbers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from gptjax.sweeps.statistics import (
    MIN_BOOTSTRAP_PAIRS,
    holm,
    mean_and_band,
    paired,
    pairs_needed,
    power,
    student,
    studentised_bootstrap,
)

PAIRS = 1000
SEEDS = (3, 5, 8, 10)


def simulated_losses(seeds: int, difference: float, rng: np.random.Generator) -> np.ndarray:
    """[PAIRS, seeds] differences of two groups' losses around 1.85: what the seed does to both of them cancels."""
    shared = rng.normal(0, 0.02, (PAIRS, seeds))
    a, b = (1.85 + shared + rng.normal(0, 0.01, (PAIRS, seeds)) for _ in range(2))
    return b + difference - a


@pytest.mark.parametrize("seeds", SEEDS)
def test_with_no_difference_at_most_six_in_a_hundred_are_called_different(seeds):
    differences = simulated_losses(seeds, 0.0, np.random.default_rng((0, seeds)))
    low, high, p = student(differences)
    assert np.mean(p < 0.05) <= 0.06
    assert np.array_equal(p < 0.05, (low > 0) | (high < 0)), "p and interval agree"
    for row in (int(np.argmin(p)), int(np.argmax(p))):
        found = paired(differences[row])
        assert found.p == pytest.approx(p[row]) and found.interval == pytest.approx((low[row], high[row]))


@pytest.mark.parametrize("seeds", SEEDS)
def test_a_known_difference_is_covered_as_often_as_promised(seeds):
    difference = 0.005
    differences = simulated_losses(seeds, difference, np.random.default_rng((1, seeds)))
    low, high, _ = student(differences)
    assert 0.93 <= np.mean((low <= difference) & (difference <= high)) <= 0.97
    if seeds >= MIN_BOOTSTRAP_PAIRS:
        low, high = studentised_bootstrap(differences)
        assert 0.93 <= np.mean((low <= difference) & (difference <= high)) <= 0.97


def test_student_is_scipys_paired_t_test():
    rng = np.random.default_rng(2)
    a, b = rng.normal(0, 1, (2, 6))
    expected = stats.ttest_rel(b, a)
    result = paired(b - a)
    assert result.p == pytest.approx(expected.pvalue, rel=1e-12)
    interval = expected.confidence_interval(0.95)
    assert result.interval == pytest.approx((interval.low, interval.high), rel=1e-12)


def test_the_bootstrap_is_that_of_a_loop():
    rng = np.random.default_rng(3)
    d = rng.exponential(1, 7)
    picks = np.random.default_rng(11).integers(0, 7, (4000, 7))
    ts = []
    for pick in picks:
        x = d[pick]
        sd = x.std(ddof=1) if len(set(pick)) > 1 else 0.0
        ts.append((x.mean() - d.mean()) / (sd / np.sqrt(7)) if sd else np.sign(x.mean() - d.mean()) * np.inf)
    low, high = np.quantile(ts, [0.025, 0.975], method="nearest")
    error = d.std(ddof=1) / np.sqrt(7)
    made = studentised_bootstrap(d[None], seed=11)
    assert (made[0][0], made[1][0]) == pytest.approx((d.mean() - high * error, d.mean() - low * error), rel=1e-9)


# G*Power 3.1, "difference between two dependent means", two-sided, alpha 0.05, power 0.8
@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_the_seeds_needed_are_those_of_published_tables(effect, pairs):
    assert pairs_needed(effect) == pairs
    assert power(effect, pairs) >= 0.8 > power(effect, pairs - 1)


def test_power_is_how_often_a_simulated_difference_is_found():
    differences = np.random.default_rng(4).normal(0.9, 1, (20_000, 10))
    assert power(0.9, 10) == pytest.approx(np.mean(student(differences)[2] < 0.05), abs=0.01)
    assert power(0.0, 10) == pytest.approx(0.05, abs=1e-9)
    assert pairs_needed(0.01) is None and pairs_needed(np.inf) == 3
    assert pairs_needed(0.8, alpha=0.01) > pairs_needed(0.8)


def test_holm():
    # Worked by hand: 4 * 0.005, 3 * 0.01, then 2 * 0.03 and 0.04, which may not fall below it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_differences_that_are_all_alike():
    same = paired([0.0] * 5)
    assert (same.p, same.interval, same.bootstrap, same.effect) == (1.0, (0.0, 0.0), (0.0, 0.0), 0.0)
    assert not same.excludes_zero
    certain = paired([0.5] * 5)
    assert (certain.p, certain.interval, certain.effect) == (0.0, (0.5, 0.5), np.inf) and certain.excludes_zero


@pytest.mark.parametrize("wrong", [[1.0, 2.0], [1.0, 2.0, np.nan]])
def test_too_few_or_not_finite(wrong):
    with pytest.raises(ValueError, match="at least 3 finite differences"):
        paired(wrong)


def test_the_effect_has_no_bias():
    differences = np.random.default_rng(5).normal(0.7, 1, (4000, 6))
    effects = differences.mean(1) / differences.std(1, ddof=1)
    corrected = np.mean([paired(row).effect for row in differences[:1]]) / effects[0] * effects.mean()
    assert corrected == pytest.approx(0.7, abs=0.03) and effects.mean() > 0.77


def test_bands():
    values = np.array([[1.0, 2.0], [2.0, 2.0], [3.0, 2.0]])
    mean, low, high = mean_and_band(values)
    reach = stats.t.ppf(0.975, 2) / np.sqrt(3)
    assert np.allclose(mean, [2, 2]) and np.allclose(low, [2 - reach, 2]) and np.allclose(high, [2 + reach, 2])
    assert np.isnan(mean_and_band(values[:1])[1]).all()
