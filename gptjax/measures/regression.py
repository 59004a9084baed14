"""Metrics of numbers: correlation and error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from gptjax.config import UserError
from gptjax.measures.bootstrap import Bootstrap, Sums, mean_of
from gptjax.measures.measured import Measured, measure

_CELLS = 1_000_000  # of counts at once in the jackknife of ranks


def mean_squared_error(gold: Sequence[float], predicted: Sequence[float], bootstrap: Bootstrap | None = None) -> Measured:
    """In the gold unit squared."""
    x, y = _checked(gold, predicted)
    return measure("MSE", mean_of((x - y) ** 2), bootstrap)


def pearson(gold: Sequence[float], predicted: Sequence[float], bootstrap: Bootstrap | None = None) -> Measured:
    """Linear correlation, -1 to 1; NaN where either does not vary."""
    x, y = _checked(gold, predicted)
    x, y = _standard(x), _standard(y)  # the correlation is the same, and its sums do not cancel
    rows = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)
    return measure("Pearson r", Sums(rows, _correlation), bootstrap)


def spearman(gold: Sequence[float], predicted: Sequence[float], bootstrap: Bootstrap | None = None) -> Measured:
    """Correlation of ranks, ties sharing their mean rank, -1 to 1; NaN where either does not vary."""
    return measure("Spearman rho", _Ranks(*_checked(gold, predicted)), bootstrap)


def _checked(gold: Sequence[float], predicted: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(gold, np.float64), np.asarray(predicted, np.float64)
    if x.shape != y.shape or x.ndim != 1 or not x.size:
        raise UserError(f"needs as many predictions as gold numbers, and at least one, not {y.shape} and {x.shape}.")
    for name, values in (("gold", x), ("predicted", y)):
        if not np.isfinite(values).all():
            raise UserError(f"{name} number {int(np.flatnonzero(~np.isfinite(values))[0])} (from 0) is not finite.")
    return x, y


def _standard(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean()
    spread = float(np.abs(centred).max())
    return centred / spread if spread > 0 else centred


def _correlation(totals: np.ndarray) -> np.ndarray:
    n, x, y, xx, yy, xy = np.moveaxis(totals, -1, 0)
    across, down = xx - x * x / n, yy - y * y / n
    tiny = 1e-12 * n  # of values standardised to at most 1: what rounding leaves of no variation
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((across > tiny) & (down > tiny), (xy - x * y / n) / np.sqrt(across * down), math.nan)


@dataclasses.dataclass(frozen=True)
class _Ranks:
    x: np.ndarray
    y: np.ndarray

    @property
    def n(self) -> int:
        return len(self.x)

    def value(self) -> float:
        return float(self.resampled(np.ones((1, self.n)))[0])

    def resampled(self, counts: np.ndarray) -> np.ndarray:
        """Ranks within the resample: an example drawn twice is two that tie."""
        size = counts.sum(axis=1, keepdims=True)
        across, down = (_ranks(values, counts) / size - 0.5 for values in (self.x, self.y))
        terms = (np.ones_like(across), across, down, across**2, down**2, across * down)
        return _correlation(np.stack([(counts * term).sum(axis=1) for term in terms], axis=-1))

    def left_out(self) -> np.ndarray:
        block = max(1, _CELLS // self.n)
        parts = []
        for start in range(0, self.n, block):
            counts = np.ones((min(block, self.n - start), self.n))
            counts[np.arange(len(counts)), start + np.arange(len(counts))] = 0
            parts.append(self.resampled(counts))
        return np.concatenate(parts)


def _ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean rank [b, n] of each example among `counts` [b, n] copies of all."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(group[order]) > 0])
    sizes = np.add.reduceat(counts[:, order], starts, axis=1)  # [b, distinct values]
    middle = np.cumsum(sizes, axis=1) - sizes + (sizes + 1) / 2
    return middle[:, group]
