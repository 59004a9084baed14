"""Bootstrap intervals for what is fitted to n runs.

Residuals are resampled, not runs: the plan fixed N and D, and with 20 or 30 runs a resample of runs may leave a corner of the
plan empty. A resample is the fitted law times the exponentials of n residuals drawn with replacement, each enlarged by sqrt(n /
(n - p)) for the p constants that were fitted. Quantiles are taken at Student's levels with n - p degrees of freedom in place of
the normal ones (Hesterberg, 2015, "What teachers should know about the bootstrap", section 4.3.2). experiments/scaling_coverage
has how often such intervals cover the truth.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import special

from gptjax.scaling.fitting import Fit, refit

RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its interval; `value` lies in it as a rule, not by construction."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


def quantiles(values: np.ndarray, confidence: float, freedom: int) -> tuple[float, float]:
    """(low, high) among values [b]; those that are not finite, resamples without an answer, are left out."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return math.nan, math.nan
    tail = float(special.ndtr(special.stdtrit(freedom, (1 - confidence) / 2)))
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)


def draw_residuals(residuals: np.ndarray, constants: int, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Enlarged residuals [*shape], drawn with replacement from residuals [n]."""
    n = len(residuals)
    return residuals[rng.integers(0, n, shape)] * math.sqrt(n / (n - constants))


@dataclasses.dataclass(frozen=True)
class Resampled:
    """A fit's resamples: log losses [b, n] and the constants refitted to them, theta [b, p]."""

    log_losses: np.ndarray
    theta: np.ndarray


def resample(
    fit: Fit, parameters: np.ndarray, tokens: np.ndarray, resamples: int = RESAMPLES, seed: int = 0, delta: float | None = None
) -> Resampled:
    """A function of the fit and `seed`. `delta` is the one of the fit, by default `fitting.DELTA`."""
    rng = np.random.default_rng(seed)
    x, y = np.log(parameters) - fit.centre[0], np.log(tokens) - fit.centre[1]
    drawn = draw_residuals(fit.residuals, len(fit.theta), (resamples, len(x)), rng)
    log_losses = fit.surface.function(fit.theta, x, y)[0] + drawn
    start = np.tile(fit.theta, (resamples, 1))
    theta, _ = (
        refit(fit.surface, start, x, y, log_losses) if delta is None else refit(fit.surface, start, x, y, log_losses, delta)
    )
    return Resampled(log_losses, theta)


def estimates(fit: Fit, resampled: Resampled, confidence: float) -> dict[str, Estimate]:
    """{symbol: estimate} of the law's constants."""
    freedom = len(fit.residuals) - len(fit.theta)
    values, drawn = fit.constants(), fit.constants(resampled.theta)
    return {name: Estimate(float(values[name]), *quantiles(drawn[name], confidence, freedom)) for name in values}


def predicted(
    fit: Fit, resampled: Resampled, parameters: np.ndarray, tokens: np.ndarray, confidence: float, seed: int = 0
) -> list[Estimate]:
    """The loss that a run of N [m] and D [m] will have: what is not known of the constants, and a run's own residual.

    The interval is the prediction times the exponential of quantiles of (a resample's new run less what the law refitted to that
    resample predicts). That the law holds beyond the data is assumed, and no resampling knows whether it does.
    """
    rng = np.random.default_rng(seed + 1)
    freedom = len(fit.residuals) - len(fit.theta)
    centre = fit.log_loss(parameters, tokens)
    noise = draw_residuals(fit.residuals, len(fit.theta), (len(resampled.theta), len(centre)), rng)
    errors = centre + noise - fit.log_loss(parameters, tokens, resampled.theta)
    found = []
    for middle, error in zip(centre, errors.T, strict=True):
        low, high = quantiles(error, confidence, freedom)
        found.append(Estimate(math.exp(middle), math.exp(middle + low), math.exp(middle + high)))
    return found
