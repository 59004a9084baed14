"""Parts of the predictions, by length, by label and by pattern, each with its score beside that of the rest."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

from gptjax.analysis.predictions import Prediction
from gptjax.config import UserError
from gptjax.measures.bootstrap import wilson

LENGTHS = 5  # slices by length, of about as many texts each
MOST_LABELS = 40

PATTERNS: dict[str, str] = {
    "a digit": r"\d",
    "a question mark": r"[?？]",
    "an exclamation mark": r"[!！]",
    "a web address": r"https?://|www\.",
    "a word in capitals": r"\b[A-Z]{2,}\b",
    "a negation": r"(?i)\b(?:not|no|never|cannot|nothing|without)\b|n't\b|[不没無无]",
    "a quotation": '["“”«»「」]',
    "Chinese characters": r"[\u4e00-\u9fff]",
    "other than ASCII": r"[^\x00-\x7f]",
}


@dataclasses.dataclass(frozen=True)
class Interval:
    """The mean of n scores with its interval; NaN ends where it has none."""

    n: int
    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Slice:
    """One part, and its score less that of all the rest with the interval of the difference."""

    family: str
    name: str
    part: Interval
    difference: Interval

    @property
    def stands_out(self) -> bool:
        """The interval of the difference excludes 0."""
        return self.difference.low > 0 or self.difference.high < 0


def mean_score(scores: np.ndarray, confidence: float = 0.95) -> Interval:
    """Of scores [n]: Wilson's interval where each is 0 or 1, else Student's, held within 0 and 1."""
    n = len(scores)
    if n == 0:
        return Interval(0, math.nan, math.nan, math.nan)
    mean = float(scores.mean())
    if np.isin(scores, (0, 1)).all():
        return Interval(n, mean, *wilson(float(scores.sum()), n, confidence))
    if n == 1:
        return Interval(n, mean, math.nan, math.nan)
    reach = float(special.stdtrit(n - 1, (1 + confidence) / 2) * scores.std(ddof=1) / math.sqrt(n))
    return Interval(n, mean, max(0.0, mean - reach), min(1.0, mean + reach))


def difference(part: Interval, rest: Interval) -> Interval:
    """part - rest, from the interval of each (G. Zou and A. Donner, Statistics in Medicine 2008).

    Of two shares with Wilson's it is Newcombe's method 10.
    """
    gap = part.value - rest.value
    down = math.hypot(part.value - part.low, rest.high - rest.value)
    up = math.hypot(part.high - part.value, rest.value - rest.low)
    return Interval(part.n, gap, gap - down, gap + up)


def slices(predictions: Sequence[Prediction], patterns: Mapping[str, str] = PATTERNS, with_labels: bool = True) -> list[Slice]:
    """By length in characters, gold label and pattern; parts that are empty or everything are left out.

    Raises `UserError` for a pattern that is no regular expression.
    """
    scores = np.array([prediction.points for prediction in predictions])
    members = [*_by_length(predictions), *(_by_label(predictions) if with_labels else []), *_by_pattern(predictions, patterns)]
    found = []
    for family, name, inside in members:
        if 0 < inside.sum() < len(scores):
            part = mean_score(scores[inside])
            found.append(Slice(family, name, part, difference(part, mean_score(scores[~inside]))))
    return found


def _by_length(predictions: Sequence[Prediction]) -> list[tuple[str, str, np.ndarray]]:
    lengths = np.array([len(prediction.text) for prediction in predictions])
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, LENGTHS + 1), method="nearest"))
    parts = []
    for number, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        inside = (lengths <= high) & ((lengths > low) if number else (lengths >= low))
        if inside.any():
            parts.append(("length", f"{lengths[inside].min()} to {lengths[inside].max()} characters", inside))
    return parts


def _by_label(predictions: Sequence[Prediction]) -> list[tuple[str, str, np.ndarray]]:
    golds = np.array([str(prediction.gold) for prediction in predictions], dtype=object)
    names, counts = np.unique(golds.astype(str), return_counts=True)
    frequent = sorted(names[np.argsort(-counts, kind="stable")][:MOST_LABELS])
    return [("gold label", str(name), golds == name) for name in frequent]


def _by_pattern(predictions: Sequence[Prediction], patterns: Mapping[str, str]) -> list[tuple[str, str, np.ndarray]]:
    parts = []
    for name, pattern in patterns.items():
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise UserError(f"the pattern {name!r}, {pattern!r}, is no regular expression: {error}.") from None
        inside = np.array([compiled.search(prediction.text) is not None for prediction in predictions], bool)
        parts.append(("pattern", name, inside))
    return parts
