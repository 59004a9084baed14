"""Intervals by resampling examples, for any metric, in matrix products.

A resample of n examples is how often each was drawn: a row of counts [n]. A metric that is a function of sums over examples
(tp, fp, fn; n-gram matches; summed nats) then costs one product for a thousand resamples (`Sums`), and its jackknife, which BCa
needs, one subtraction. A metric of another kind takes the counts themselves, as Spearman's does.

B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993: chapter 13 (percentile), 14 (BCa).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Protocol

import numpy as np
from scipy import special

_CELLS = 4_000_000  # of counts held at once: 32 MB


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """How an interval is made: `method` is bca (bias-corrected and accelerated) or percentile; a function of `seed`."""

    resamples: int = 1000
    confidence: float = 0.95
    method: str = "bca"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in INTERVALS:
            raise ValueError(f"method={self.method!r} is none of {', '.join(INTERVALS)}.")
        if self.resamples < 2 or not 0 < self.confidence < 1:
            raise ValueError(f"needs at least 2 resamples, not {self.resamples}, and a confidence in (0, 1).")


class Statistic(Protocol):
    """A metric over n examples, as a function of how often each counts."""

    @property
    def n(self) -> int: ...

    def value(self) -> float: ...

    def resampled(self, counts: np.ndarray) -> np.ndarray:
        """The metric [b] of each resample, counts [b, n]."""

    def left_out(self) -> np.ndarray:
        """The metric [n] with each example left out in turn."""


@dataclasses.dataclass(frozen=True)
class Sums:
    """A metric that is a function of sums over examples: rows [n, k], and score from totals [..., k] to [...]."""

    rows: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]

    @property
    def n(self) -> int:
        return len(self.rows)

    def value(self) -> float:
        return float(self.score(self.rows.sum(axis=0)))

    def resampled(self, counts: np.ndarray) -> np.ndarray:
        return self.score(counts @ self.rows)

    def left_out(self) -> np.ndarray:
        return self.score(self.rows.sum(axis=0) - self.rows)

    def grouped(self, groups: Sequence[Hashable]) -> Sums:
        """The same with whole groups resampled, groups [n]: questions of one paragraph, sentences of one document.

        Where examples of a group resemble one another, an interval over single examples is too narrow.
        """
        numbers: dict[Hashable, int] = {}
        index = [numbers.setdefault(group, len(numbers)) for group in groups]
        if len(index) != self.n:
            raise ValueError(f"{len(index)} groups are given for {self.n} examples.")
        rows = np.zeros((len(numbers), self.rows.shape[1]))
        np.add.at(rows, index, self.rows)
        return Sums(rows, self.score)


def ratio(totals: np.ndarray) -> np.ndarray:
    """First total over second, 0 where that is 0: a mean with rows (value, 1)."""
    return np.divide(totals[..., 0], totals[..., 1], out=np.zeros(totals.shape[:-1]), where=totals[..., 1] != 0)


def mean_of(values: Sequence[float] | np.ndarray) -> Sums:
    """The mean of a value [n] of each example."""
    column = np.asarray(values, np.float64)
    return Sums(np.stack([column, np.ones_like(column)], axis=1), ratio)


def draw_counts(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks [b, n] of how often each of n examples is drawn, `resamples` rows in all. The block's size changes no draw."""
    rng = np.random.default_rng(seed)
    block = max(1, _CELLS // n)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        picks = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(picks.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def interval(statistic: Statistic, bootstrap: Bootstrap) -> tuple[float, float, str]:
    """(low, high, remark) of the metric; both NaN with fewer than 2 examples. The remark says where the interval says little."""
    if statistic.n < 2:
        return math.nan, math.nan, "no interval from fewer than 2 examples"
    blocks = draw_counts(statistic.n, bootstrap.resamples, bootstrap.seed)
    scores = np.concatenate([statistic.resampled(counts) for counts in blocks])
    if not np.isfinite(scores).all():
        return math.nan, math.nan, "no interval: the metric is not defined on every resample"
    if np.ptp(scores) == 0:
        return float(scores[0]), float(scores[0]), "all resamples are alike, so that the interval says nothing"
    low, high = INTERVALS[bootstrap.method](statistic, scores, bootstrap.confidence)
    return low, high, ""


def percentile(statistic: Statistic, scores: np.ndarray, confidence: float) -> tuple[float, float]:
    """The quantiles of the metric [resamples] among resamples."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(scores, [tail, 1 - tail])
    return float(low), float(high)


def bca(statistic: Statistic, scores: np.ndarray, confidence: float) -> tuple[float, float]:
    """The quantiles moved by the median bias and by the skew of the jackknife (B. Efron, JASA 1987)."""
    value = statistic.value()
    close = np.isclose(scores, value, rtol=1e-12, atol=0)
    below = np.mean((scores < value) & ~close) + 0.5 * np.mean(close)  # many resamples of a share equal it: each counts half
    outside = 0.5 / len(scores)
    bias = special.ndtri(np.clip(below, outside, 1 - outside))
    left = statistic.left_out()
    deviations = left.mean() - left
    spread = np.sum(deviations**2)
    skew = float(np.sum(deviations**3) / (6 * spread**1.5)) if spread > 0 else 0.0
    z = bias + special.ndtri([(1 - confidence) / 2, (1 + confidence) / 2])
    shares = special.ndtr(bias + z / np.maximum(1 - skew * z, 1e-9))  # past the pole the quantile is the last one
    low, high = np.quantile(scores, shares)
    return float(low), float(high)


INTERVALS = {"bca": bca, "percentile": percentile}


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high) of a share of n (E. B. Wilson, JASA 1927): says something at 0 and 1 too, and in small slices."""
    if n == 0:
        return 0.0, 1.0
    z = float(special.ndtri((1 + confidence) / 2))
    share, denominator = successes / n, 1 + z**2 / n
    middle = (share + z**2 / (2 * n)) / denominator
    reach = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / denominator
    return max(0.0, middle - reach), min(1.0, middle + reach)
