"""A score over examples with its interval: by resampling examples (B. Efron and R. Tibshirani, An Introduction to the Bootstrap,
1993, chapter 13: percentiles).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from gptjax.measures.bootstrap import draw_counts

RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """`value` of `metric` over the `n` examples of `group`, and where CONFIDENCE of the resamples lie."""

    group: str
    metric: str
    value: float
    low: float
    high: float
    n: int


def mean_score(group: str, metric: str, values: Sequence[float] | np.ndarray) -> Score:
    """The mean of a value [n] of each example."""
    return score_of(group, metric, np.asarray(values, np.float64)[:, None], lambda totals, n: totals[..., 0] / n)


def score_of(group: str, metric: str, rows: np.ndarray, of: Callable[[np.ndarray, int], np.ndarray], seed: int = 0) -> Score:
    """A score that is a function of sums over examples: rows [n, k] and `of`, from (totals [..., k], n) to [...].

    Raises ValueError for no examples.
    """
    n = len(rows)
    if n == 0:
        raise ValueError(f"{group} has no examples.")
    scores = [of(counts @ rows, n) for counts in draw_counts(n, RESAMPLES, seed)]
    low, high = np.quantile(np.concatenate(scores), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Score(group, metric, float(of(rows.sum(axis=0), n)), float(low), float(high), n)


def gap_score(group: str, metric: str, first: np.ndarray, second: np.ndarray) -> Score:
    """Mean of `first` less mean of `second`, both [n], of the same examples."""
    return mean_score(group, metric, np.asarray(first, np.float64) - np.asarray(second, np.float64))


def table(scores: Iterable[Score]) -> str:
    """Lines of group, metric, value, interval and number of examples, in columns."""
    cells = [("group", "metric", "value", f"{CONFIDENCE:.0%} interval", "n")]
    cells += [(s.group, s.metric, f"{s.value:.4f}", f"{s.low:.4f} to {s.high:.4f}", str(s.n)) for s in scores]
    return aligned(cells)


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, the columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)
