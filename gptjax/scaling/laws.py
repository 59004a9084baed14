"""All that is fitted to a set of runs: Kaplan's laws, and Chinchilla's three approaches, by both counts of parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.scaling import approaches, fitting, intervals
from gptjax.scaling.approaches import Best, NotEnough
from gptjax.scaling.fitting import DELTA, Fit
from gptjax.scaling.intervals import RESAMPLES, Estimate, Resampled
from gptjax.scaling.observations import COUNTS, Observations
from gptjax.scaling.surfaces import SURFACES


@dataclasses.dataclass(frozen=True)
class Options:
    """How intervals are made; `delta` is the Huber loss's, in log loss."""

    confidence: float = 0.95
    resamples: int = RESAMPLES
    seed: int = 0
    delta: float = DELTA


@dataclasses.dataclass(frozen=True)
class Law:
    """A law of the loss, and its resamples."""

    fit: Fit
    resampled: Resampled
    count: str
    estimates: dict[str, Estimate]

    @property
    def name(self) -> str:
        return self.fit.surface.name

    def predict(self, sizes: np.ndarray, tokens: np.ndarray, options: Options) -> list[Estimate]:
        """The losses of runs of N [m], counted as the law's are, and D [m]."""
        return intervals.predicted(self.fit, self.resampled, sizes, tokens, options.confidence, options.seed)


@dataclasses.dataclass(frozen=True)
class Approach:
    """One approach to N_opt ~ C^a and D_opt ~ C^b: its estimates and the points behind them, or `missing`, why there are none.

    `failed`: share of the resamples that had no answer, which the interval leaves out.
    """

    name: str
    count: str
    estimates: dict[str, Estimate]
    best: Best | None = None
    failed: float = 0.0
    missing: str = ""


@dataclasses.dataclass(frozen=True)
class Fits:
    """Laws by (name, count), approaches in order."""

    observations: Observations
    options: Options
    laws: dict[tuple[str, str], Law]
    approaches: list[Approach]

    @property
    def main(self) -> Law:
        """Chinchilla's, which predicts: with embeddings counted, as in its paper."""
        return self.laws["chinchilla", "total"]


def fit_all(observations: Observations, options: Options | None = None) -> Fits:
    """Everything. Raises `UserError` where the runs are too few for the laws; an approach that lacks runs says so itself."""
    options = options or Options()
    counts = [count for count in COUNTS if count == "total" or observations.knows_non_embedding]
    for count in counts:
        _check(observations, count)
    laws = {(name, count): fit_law(observations, name, count, options) for name in SURFACES for count in counts}
    found = [make(observations, laws["chinchilla", count], options) for count in counts for make in APPROACHES.values()]
    return Fits(observations, options, laws, found)


def _check(observations: Observations, count: str) -> None:
    least = max(len(surface.low) for surface in SURFACES.values()) + 2
    if len(observations) < least:
        raise UserError(
            f"the laws have up to {least - 2} constants and need at least {least} runs; there are {len(observations)}."
        )
    for what, values in (("parameters", observations.sizes(count)), ("tokens", observations.tokens)):
        if len(np.unique(np.round(np.log(values), 3))) < 3:
            raise UserError(f"the runs have fewer than 3 different numbers of {what}, which say nothing of its exponent.")


def fit_law(observations: Observations, name: str, count: str, options: Options) -> Law:
    sizes = observations.sizes(count)
    fit = fitting.fit(SURFACES[name], sizes, observations.tokens, observations.loss, options.delta)
    resampled = intervals.resample(fit, sizes, observations.tokens, options.resamples, options.seed, options.delta)
    return Law(fit, resampled, count, intervals.estimates(fit, resampled, options.confidence))


def _envelope(observations: Observations, law: Law, options: Options) -> Approach:
    """Curves have no residuals of their own: resamples are those of the parametric law."""
    try:
        find = approaches.envelope(observations, law.count)
    except NotEnough as reason:
        return Approach("envelope", law.count, {}, missing=str(reason))
    freedom = len(observations) - len(law.fit.theta)
    return _approach("envelope", law.count, find, observations, law.resampled.log_losses, freedom, options)


def _isoflop(observations: Observations, law: Law, options: Options) -> Approach:
    """Resamples are of the residuals about the parabolas."""
    try:
        find = approaches.isoflop(observations, law.count)
    except NotEnough as reason:
        return Approach("IsoFLOP profiles", law.count, {}, missing=str(reason))
    fitted, residuals, constants = approaches.profile_residuals(observations, law.count)
    if len(residuals) <= constants:
        missing = f"{len(residuals)} runs for {constants} constants of parabolas leave no residuals for intervals: add models."
        return Approach("IsoFLOP profiles", law.count, {}, missing=missing)
    rng = np.random.default_rng(options.seed)
    drawn = intervals.draw_residuals(residuals, constants, (options.resamples, len(observations)), rng)
    return _approach("IsoFLOP profiles", law.count, find, observations, fitted + drawn, len(residuals) - constants, options)


def _approach(
    name: str, count: str, find: Any, observations: Observations, log_losses: np.ndarray, freedom: int, options: Options
) -> Approach:
    best = find(np.log(observations.loss)[None])
    values, drawn = approaches.power_laws(best), approaches.power_laws(find(log_losses))
    if not np.isfinite(values["a"]).all():
        missing = f"fewer than {approaches.MIN_POINTS} budgets have their best size inside the sizes that were trained."
        return Approach(name, count, {}, best, missing=missing)
    estimates = {
        key: Estimate(float(value[0]), *intervals.quantiles(drawn[key], options.confidence, freedom))
        for key, value in values.items()
    }
    return Approach(name, count, estimates, best, float(np.mean(~np.isfinite(drawn["a"]))))


def _parametric(observations: Observations, law: Law, options: Options) -> Approach:
    """a = beta / (alpha + beta), b = 1 - a: where the law is lowest with C = 6 N D held (Hoffmann et al., equation 4)."""
    freedom = len(observations) - len(law.fit.theta)
    values, drawn = law.fit.constants(), law.fit.constants(law.resampled.theta)

    def share(constants: dict[str, np.ndarray], of: str) -> np.ndarray:
        return constants[of] / (constants["alpha"] + constants["beta"])

    estimates = {
        name: Estimate(float(share(values, of)), *intervals.quantiles(share(drawn, of), options.confidence, freedom))
        for name, of in (("a", "beta"), ("b", "alpha"))
    }
    return Approach("parametric", law.count, estimates)


APPROACHES = {"envelope": _envelope, "isoflop": _isoflop, "parametric": _parametric}


def compute_optimal(law: Law, flops: float) -> tuple[float, float]:
    """(N, D) at which Chinchilla's law is lowest with 6 N D = C."""
    constants = {name: float(value) for name, value in law.fit.constants().items()}
    alpha, beta = constants["alpha"], constants["beta"]
    factor = (alpha * constants["A"] / (beta * constants["B"])) ** (1 / (alpha + beta))
    size = factor * (flops / 6) ** (beta / (alpha + beta))
    return size, flops / 6 / size
