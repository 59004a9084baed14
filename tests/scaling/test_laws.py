"""Planted constants are found again, by every approach and within its interval; the optimum is scipy's own."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import optimize

from gptjax.config import UserError
from gptjax.scaling import approaches, fitting, intervals
from gptjax.scaling.laws import Options, compute_optimal, fit_all
from gptjax.scaling.surfaces import SURFACES
from tests.scaling.simulated import BEST, PUBLISHED, best_size, family, loss

NOISE = 0.002


@pytest.fixture(scope="module")
def noisy():
    """(a family of 9 models at 5 budgets, all that is fitted to it)."""
    observations = family(models=9, budgets=5, noise=NOISE, seed=1)
    return observations, fit_all(observations, Options(resamples=200))


@pytest.mark.parametrize("name", SURFACES)
def test_derivatives_are_those_of_differences(name):
    surface, rng = SURFACES[name], np.random.default_rng(0)
    theta = surface.starts(0.7)[[3, 200, 400]] + rng.normal(0, 0.01, (3, len(surface.low)))
    x, y = rng.normal(size=(2, 7))
    _, slopes = surface.function(theta, x, y)
    for index in range(theta.shape[1]):
        step = np.zeros(theta.shape[1])
        step[index] = 1e-6
        difference = (surface.function(theta + step, x, y)[0] - surface.function(theta - step, x, y)[0]) / 2e-6
        np.testing.assert_allclose(slopes[..., index], difference, atol=1e-7)


def test_laws_are_their_formulas():
    """At N and D of Chinchilla itself: the constants that come out are those that give the loss of the paper's own formula."""
    sizes, tokens = np.array([7e10, 1e9]), np.array([1.4e12, 2e10])
    x, y = np.log(sizes) - 20.0, np.log(tokens) - 22.0
    p = PUBLISHED
    theta = np.array([np.log(p["A"]) - p["alpha"] * 20, p["alpha"], np.log(p["B"]) - p["beta"] * 22, p["beta"], np.log(p["E"])])
    chinchilla = SURFACES["chinchilla"]
    np.testing.assert_allclose(np.exp(chinchilla.function(theta, x, y)[0]), loss(sizes, tokens), rtol=1e-12)
    np.testing.assert_allclose(chinchilla.constants(theta, 20.0, 22.0), [p[name] for name in chinchilla.symbols], rtol=1e-12)
    # Kaplan et al., 2020, table 2: alpha_N = 0.076, alpha_D = 0.103, N_c = 6.4e13, D_c = 1.8e13
    theta = np.array([0.076 * (np.log(6.4e13) - 20), 0.076, 0.103 * (np.log(1.8e13) - 22), 0.103])
    wanted = ((6.4e13 / sizes) ** (0.076 / 0.103) + 1.8e13 / tokens) ** 0.103
    np.testing.assert_allclose(np.exp(SURFACES["kaplan"].function(theta, x, y)[0]), wanted, rtol=1e-12)
    np.testing.assert_allclose(SURFACES["kaplan"].constants(theta, 20.0, 22.0), [6.4e13, 0.076, 1.8e13, 0.103], rtol=1e-9)


def test_without_noise_the_constants_come_back():
    observations = family(noise=0.0)
    fit = fitting.fit(SURFACES["chinchilla"], observations.parameters, observations.tokens, observations.loss)
    for name, value in PUBLISHED.items():
        assert float(fit.constants()[name]) == pytest.approx(value, rel=1e-4), name


def test_the_optimum_is_the_one_scipy_finds_by_another_way(noisy):
    """scipy's trust-region least squares with its own Huber loss, from the truth and from the optimum, gets no lower."""
    observations, fits = noisy
    fit = fits.main.fit
    x, y = np.log(observations.parameters) - fit.centre[0], np.log(observations.tokens) - fit.centre[1]
    target, function = np.log(observations.loss), fit.surface.function
    for start in (fit.theta, fit.theta + [0.05, 0.02, -0.05, -0.02, 0.05]):
        found = optimize.least_squares(
            lambda theta: (function(theta, x, y)[0] - target) / fitting.DELTA,
            start,
            jac=lambda theta: function(theta, x, y)[1] / fitting.DELTA,
            loss="huber",
            xtol=1e-14,
            ftol=1e-14,
            gtol=1e-12,
        )
        assert fit.objective <= found.cost * (1 + 1e-7)
    assert fit.agreeing >= 2


def test_planted_constants_lie_in_the_intervals(noisy):
    _, fits = noisy
    for name, value in PUBLISHED.items():
        found = fits.main.estimates[name]
        assert found.low < value < found.high, (name, str(found))
    alpha = fits.main.estimates["alpha"]
    assert alpha.high - alpha.low < 0.2  # else they would be in any
    assert [approach.name for approach in fits.approaches] == ["envelope", "IsoFLOP profiles", "parametric"]
    for approach in fits.approaches:
        assert not approach.missing, approach.missing
        a, b = approach.estimates["a"], approach.estimates["b"]
        assert a.low < BEST < a.high and b.low < 1 - BEST < b.high, (approach.name, str(a), str(b))
        assert a.high - a.low < 0.35, (approach.name, str(a))


def test_a_larger_run_is_predicted(noisy):
    _, fits = noisy
    sizes, tokens = np.array([3e9]), np.array([1e11])
    (found,) = fits.main.predict(sizes, tokens, fits.options)
    truth = float(loss(sizes, tokens)[0])
    assert found.low < truth < found.high and found.value == pytest.approx(truth, rel=0.02)
    assert found.high / found.low - 1 > 4 * NOISE  # at least a run's own noise


def test_intervals_shrink_with_the_noise_and_widen_with_the_confidence(noisy):
    _, fits = noisy
    law = fits.main
    wide = intervals.estimates(law.fit, law.resampled, 0.95)["alpha"]
    narrow = intervals.estimates(law.fit, law.resampled, 0.5)["alpha"]
    assert wide.low < narrow.low < narrow.high < wide.high
    quiet = family(models=9, budgets=5, noise=NOISE / 10, seed=1)
    fit = fitting.fit(SURFACES["chinchilla"], quiet.parameters, quiet.tokens, quiet.loss, delta=fitting.DELTA / 10)
    resampled = intervals.resample(fit, quiet.parameters, quiet.tokens, 200, 0, fitting.DELTA / 10)
    found = intervals.estimates(fit, resampled, 0.95)["alpha"]
    assert (found.high - found.low) == pytest.approx((wide.high - wide.low) / 10, rel=0.3)


def test_one_wild_run_moves_little():
    """A run that diverged: least squares would follow it, the Huber loss hardly does."""
    observations = family(noise=0.001, seed=3)
    wild = dataclasses.replace(observations, loss=np.where(np.arange(len(observations)) == 5, 1.5, 1.0) * observations.loss)
    found = [
        fitting.fit(SURFACES["chinchilla"], each.parameters, each.tokens, each.loss).log_loss(np.array([3e9]), np.array([1e11]))
        for each in (observations, wild)
    ]
    assert abs(found[0] - found[1]) < 0.005


def test_the_envelope_and_the_profiles_find_the_best_size_without_noise():
    """Against the formula's own minimum, on sizes that straddle it: the law is not asked."""
    observations = family(models=12, budgets=5, span=5.0)
    for make in (approaches.envelope, approaches.isoflop):
        best = make(observations, "total")(np.log(observations.loss)[None])
        found = approaches.power_laws(best)
        assert found["a"][0] == pytest.approx(BEST, abs=0.015), make.__name__
        assert found["b"][0] == pytest.approx(1 - BEST, abs=0.015), make.__name__
        there = np.isfinite(best.flops[0])
        truth = np.log(best_size(np.exp(best.flops[0][there])))
        np.testing.assert_allclose(best.parameters[0][there], truth, atol=0.12)  # log N; neighbours differ by 0.29
        lowest = loss(np.exp(truth), np.exp(best.flops[0][there] - truth) / 6)
        np.testing.assert_allclose(np.exp(best.log_loss[0][there]), lowest, rtol=0.003)


def test_a_curve_that_ends_is_no_corner():
    """Small models have the short runs only: where their curves end the next one takes over, without being the best."""
    observations = family(models=12, budgets=8, span=5.0)
    sizes = np.unique(observations.parameters)
    rank = np.searchsorted(sizes, observations.parameters)
    budget = np.repeat(np.arange(8), 12)
    cut = observations.select(budget <= rank // 2 + 2)
    best = approaches.envelope(cut, "total")(np.log(cut.loss)[None])
    there = np.isfinite(best.flops[0])
    assert there.sum() >= 3
    truth = np.log(best_size(np.exp(best.flops[0][there])))
    np.testing.assert_allclose(best.parameters[0][there], truth, atol=0.1)  # neighbours differ by 0.29


def test_best_sizes_at_the_edge_are_not_taken():
    """All sizes below the best one: the largest always wins, and neither approach may call it the best."""
    observations = family(models=6, budgets=3, span=1.5)
    small = dataclasses.replace(observations, parameters=observations.parameters / 50)
    small = dataclasses.replace(small, tokens=small.flops / 6 / small.parameters)
    small = dataclasses.replace(small, loss=loss(small.parameters, small.tokens))
    for make in (approaches.envelope, approaches.isoflop):
        best = make(small, "total")(np.log(small.loss)[None])
        assert np.isnan(approaches.power_laws(best)["a"]).all(), make.__name__


def test_the_law_s_best_run_for_a_budget_is_its_minimum(noisy):
    _, fits = noisy
    size, tokens = compute_optimal(fits.main, 1e20)
    assert 6 * size * tokens == pytest.approx(1e20)
    around = size * np.array([0.9, 1.0, 1.1])
    losses = fits.main.fit.log_loss(around, 1e20 / 6 / around)
    assert losses.argmin() == 1


def test_too_few_runs_and_runs_of_one_size_are_refused():
    observations = family()
    few = observations.select(np.arange(len(observations)) < 5)
    with pytest.raises(UserError, match="at least 7 runs; there are 5"):
        fit_all(few)
    one = observations.select(observations.parameters <= observations.parameters.min() * 1.001)
    one = dataclasses.replace(one, **{name: np.tile(getattr(one, name), 3) for name in ("parameters", "non_embedding", "tokens")})
    one = dataclasses.replace(one, names=one.names * 3, flops=np.tile(one.flops, 3), loss=np.tile(one.loss, 3))
    with pytest.raises(UserError, match="fewer than 3 different numbers of parameters"):
        fit_all(one)


def test_an_approach_that_lacks_runs_says_so():
    observations = family(noise=NOISE)
    scattered = dataclasses.replace(observations, tokens=observations.tokens * np.linspace(1, 3, len(observations)))
    scattered = dataclasses.replace(
        scattered,
        flops=6 * scattered.parameters * scattered.tokens,
        parameters=observations.parameters * np.linspace(1, 1.1, len(observations)),
    )
    with pytest.raises(approaches.NotEnough, match="0 models have runs of two lengths"):
        approaches.envelope(scattered, "total")
