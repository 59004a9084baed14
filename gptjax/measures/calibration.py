"""Are probabilities what they say? Calibration error, Brier score, and the table behind a reliability diagram.

Probabilities are [n, C], each row summing to 1; gold [n] are columns of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from gptjax.config import UserError
from gptjax.measures.bootstrap import Bootstrap, Sums, mean_of, wilson
from gptjax.measures.measured import Measured, measure


@dataclasses.dataclass(frozen=True)
class Bin:
    """Predictions of which the confidence lies in (low, high]: their number, mean confidence, and accuracy with interval."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float


def expected_calibration_error(
    probabilities: np.ndarray,
    gold: Sequence[int] | np.ndarray,
    bins: int = 15,
    adaptive: bool = False,
    bootstrap: Bootstrap | None = None,
) -> Measured:
    """Mean of |accuracy - confidence| over bins of the highest probability, weighted by their size; 0 to 1.

    Equal-width bins as in C. Guo et al., On Calibration of Modern Neural Networks, ICML 2017; `adaptive` has bins of equal size
    (K. Nguyen and B. O'Connor, EMNLP 2015), of which the edges stay those of the whole sample when it is resampled.
    """
    confidence, right = _confidence(probabilities, gold)
    edges = _edges(confidence, bins, adaptive)
    member = np.eye(len(edges) - 1)[_bin_of(confidence, edges)]
    rows = np.concatenate([member * (right - confidence)[:, None], np.ones((len(right), 1))], axis=1)
    name = "adaptive calibration error" if adaptive else "expected calibration error"
    note = f"{len(edges) - 1} {'equal-size' if adaptive else 'equal-width'} bins; chance alone makes it positive"
    return measure(name, Sums(rows, _gap), bootstrap, note)


def _gap(totals: np.ndarray) -> np.ndarray:
    return np.abs(totals[..., :-1]).sum(axis=-1) / np.maximum(totals[..., -1], 1)


def brier(probabilities: np.ndarray, gold: Sequence[int] | np.ndarray, bootstrap: Bootstrap | None = None) -> Measured:
    """Mean squared distance of the probabilities from the truth, summed over classes; 0 to 2 (G. Brier, 1950)."""
    checked = check_probabilities(probabilities, gold)
    truth = np.eye(checked.shape[1])[np.asarray(gold)]
    note = "summed over classes: with two, twice scikit-learn's"
    return measure("Brier score", mean_of(((checked - truth) ** 2).sum(axis=1)), bootstrap, note)


def log_loss(probabilities: np.ndarray, gold: Sequence[int] | np.ndarray, bootstrap: Bootstrap | None = None) -> Measured:
    """Mean negative log-probability of the gold class, in nats; infinite where that has probability 0."""
    checked = check_probabilities(probabilities, gold)
    with np.errstate(divide="ignore"):
        return measure("log loss", mean_of(-np.log(checked[np.arange(len(checked)), np.asarray(gold)])), bootstrap, "nats")


def reliability(probabilities: np.ndarray, gold: Sequence[int] | np.ndarray, bins: int = 15, adaptive: bool = False) -> list[Bin]:
    """The bins of the calibration error that hold anything, with Wilson's interval of each accuracy."""
    confidence, right = _confidence(probabilities, gold)
    edges = _edges(confidence, bins, adaptive)
    member = _bin_of(confidence, edges)
    table = []
    for number in np.unique(member):
        inside = member == number
        n, hits = int(inside.sum()), float(right[inside].sum())
        mean = float(confidence[inside].mean())
        table.append(Bin(float(edges[number]), float(edges[number + 1]), n, mean, hits / n, *wilson(hits, n)))
    return table


def check_probabilities(probabilities: np.ndarray, gold: Sequence[int] | np.ndarray) -> np.ndarray:
    """float64 [n, C]. Raises `UserError` where the shapes differ, a row does not sum to 1 within 1e-3, or gold is no column."""
    checked, truth = np.asarray(probabilities, np.float64), np.asarray(gold)
    if checked.ndim != 2 or truth.shape != checked.shape[:1] or not len(truth):
        raise UserError(f"needs probabilities [n, classes] and n gold classes, not {checked.shape} and {truth.shape}.")
    off = np.flatnonzero(~(np.abs(checked.sum(axis=1) - 1) <= 1e-3) | (checked < 0).any(axis=1))
    if off.size:
        raise UserError(f"the probabilities of example {off[0]} (from 0) are negative or sum to {checked[off[0]].sum():.4g}.")
    if truth.min() < 0 or truth.max() >= checked.shape[1]:
        raise UserError(f"gold classes are from {truth.min()} to {truth.max()}, but there are {checked.shape[1]} columns.")
    return checked


def _confidence(probabilities: np.ndarray, gold: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    checked = check_probabilities(probabilities, gold)
    return checked.max(axis=1), (checked.argmax(axis=1) == np.asarray(gold)).astype(np.float64)


def _edges(confidence: np.ndarray, bins: int, adaptive: bool) -> np.ndarray:
    if bins < 1:
        raise UserError(f"bins={bins} must be at least 1.")
    if not adaptive:
        return np.linspace(0, 1, bins + 1)
    inner = np.quantile(confidence, np.arange(1, bins) / bins)
    return np.unique(np.concatenate([[0.0], inner[inner < confidence.max()], [1.0]]))  # equal values stay together


def _bin_of(confidence: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, len(edges) - 2)
