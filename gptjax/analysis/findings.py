"""Everything that the page shows, as numbers."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.analysis.near_duplicates import Match, near_duplicates, normalise
from gptjax.analysis.predictions import Prediction, TrainText
from gptjax.analysis.slices import PATTERNS, Interval, Slice, difference, mean_score, slices
from gptjax.measures import calibration, classification
from gptjax.measures.bootstrap import Bootstrap, mean_of
from gptjax.measures.measured import Measured, as_json, measure

MOST_LABELS = 200  # with more, gold and predicted are texts of their own, not labels
MOST_WRONG = 30
MOST_RESAMPLED = 1_000_000  # texts times labels: beyond, the F1 of single labels is given without interval


@dataclasses.dataclass(frozen=True)
class LabelRow:
    """Precision, recall and F1 of one label, each with its interval; `support` is how often it is gold."""

    label: str
    support: int
    precision: Interval
    recall: Interval
    f1: Measured


@dataclasses.dataclass(frozen=True)
class Leak:
    """Test texts that stand in the training texts, or nearly; `matches` by falling similarity, exact copies first."""

    train_texts: int
    threshold: float
    matches: list[Match]
    exact: int
    repeated_in_test: int  # texts that an earlier test text equals
    same_label: int | None  # of the leaked, those whose training text has the gold label; None where train has no labels
    leaked: Interval
    clean: Interval
    gap: Interval
    cut: int  # characters that texts were compared up to, 0 for all


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that is found in predictions; `confusion` and `labels` are empty where gold is not a label."""

    n: int
    scored: bool  # by given scores, not by right or wrong
    summary: list[Measured]
    labels: list[LabelRow]
    confusion: tuple[list[str], np.ndarray]
    slices: list[Slice]
    wrong: int
    worst: list[Prediction]
    bins: list[calibration.Bin]
    leak: Leak | None


def analyse(
    predictions: Sequence[Prediction],
    train: Sequence[TrainText] | None = None,
    patterns: Mapping[str, str] = PATTERNS,
    threshold: float = 0.8,
    bootstrap: Bootstrap | None = None,
) -> Findings:
    """The findings; intervals of the summary by `bootstrap`, of parts by Wilson or Student. Similarity at least `threshold`."""
    bootstrap = bootstrap or Bootstrap()
    points = np.array([prediction.points for prediction in predictions])
    scored = predictions[0].score is not None
    labelled = not scored and all(isinstance(prediction.gold, str) for prediction in predictions)
    golds, guesses = [str(prediction.gold) for prediction in predictions], [prediction.predicted for prediction in predictions]
    labelled = labelled and len({*golds, *guesses}) <= MOST_LABELS
    summary = [measure("mean score" if scored else "accuracy", mean_of(points), bootstrap)]
    if labelled:
        often, count = collections.Counter(golds).most_common(1)[0]
        summary += [
            classification.f1(golds, guesses, "macro", bootstrap),
            Measured(f"accuracy of always {often}", count / len(golds), n=len(golds), note="the most frequent gold label here"),
        ]
    bins: list[calibration.Bin] = []
    if labelled and predictions[0].probabilities is not None:
        columns, matrix, truth = _probabilities(predictions)
        summary += [
            calibration.expected_calibration_error(matrix, truth, bootstrap=bootstrap),
            calibration.brier(matrix, truth, bootstrap),
        ]
        bins = calibration.reliability(matrix, truth, bins=10)
    wrong = [prediction for prediction, score in zip(predictions, points, strict=True) if score < 1]
    return Findings(
        n=len(predictions),
        scored=scored,
        summary=summary,
        labels=_label_rows(golds, guesses, bootstrap) if labelled else [],
        confusion=_confusion(golds, guesses) if labelled else ([], np.zeros((0, 0), np.int64)),
        slices=slices(predictions, patterns, labelled),
        wrong=len(wrong),
        worst=sorted(wrong, key=lambda prediction: (prediction.points, -(prediction.confidence or 0)))[:MOST_WRONG],
        bins=bins,
        leak=find_leak(predictions, train, threshold) if train is not None else None,
    )


def find_leak(predictions: Sequence[Prediction], train: Sequence[TrainText], threshold: float = 0.8) -> Leak:
    """Near-duplicates between train and test, and the score on what leaked and on the rest."""
    found = near_duplicates([prediction.text for prediction in predictions], [text.text for text in train], threshold)
    points = np.array([prediction.points for prediction in predictions])
    inside = np.zeros(len(points), bool)
    inside[[match.test for match in found.matches]] = True
    leaked, clean = mean_score(points[inside]), mean_score(points[~inside])
    labels = any(text.gold is not None for text in train)
    same = sum(train[match.train].gold == predictions[match.test].gold for match in found.matches)
    return Leak(
        train_texts=len(train),
        threshold=threshold,
        matches=sorted(found.matches, key=lambda match: (-match.similarity, match.test)),
        exact=sum(match.similarity == 1.0 for match in found.matches),
        repeated_in_test=len(predictions) - len({normalise(prediction.text) for prediction in predictions}),
        same_label=same if labels else None,
        leaked=leaked,
        clean=clean,
        gap=difference(leaked, clean),
        cut=found.cut,
    )


def _label_rows(golds: list[str], guesses: list[str], bootstrap: Bootstrap) -> list[LabelRow]:
    truth, guess = np.array(golds), np.array(guesses)
    hits = (truth == guess).astype(float)
    labels = classification.labels_of(golds, guesses)
    affordable = bootstrap if len(golds) * len(labels) <= MOST_RESAMPLED else None
    rows = []
    for label in labels:
        precision, recall = mean_score(hits[guess == label]), mean_score(hits[truth == label])
        f1 = classification.f1_of(golds, guesses, label, affordable)
        rows.append(LabelRow(str(label), recall.n, precision, recall, f1))
    return sorted(rows, key=lambda row: -row.support)


def _confusion(golds: list[str], guesses: list[str]) -> tuple[list[str], np.ndarray]:
    names, matrix = classification.confusion(golds, guesses)
    return [str(name) for name in names], matrix


def _probabilities(predictions: Sequence[Prediction]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(labels, probabilities [n, labels], gold columns [n]); a label that a line leaves out has 0."""
    known = {label for prediction in predictions for label in prediction.probabilities or {}}
    names = sorted(known | {str(prediction.gold) for prediction in predictions})
    column = {name: place for place, name in enumerate(names)}
    matrix = np.zeros((len(predictions), len(names)))
    for row, prediction in zip(matrix, predictions, strict=True):
        for label, chance in (prediction.probabilities or {}).items():
            row[column[label]] = chance
    return names, matrix, np.array([column[str(prediction.gold)] for prediction in predictions])


def findings_json(findings: Findings) -> dict[str, Any]:
    """The numbers of the page for `--json`: summary, labels, slices and leak."""
    leak = findings.leak
    return {
        "n": findings.n,
        "wrong": findings.wrong,
        "summary": as_json(findings.summary),
        "labels": {
            row.label: {
                "support": row.support,
                "precision": row.precision.value,
                "recall": row.recall.value,
                "f1": row.f1.value,
            }
            for row in findings.labels
        },
        "slices": [
            {"family": part.family, "name": part.name, "stands_out": part.stands_out}
            | dataclasses.asdict(part.part)
            | {"difference": part.difference.value, "difference_low": part.difference.low}
            | {"difference_high": part.difference.high}
            for part in findings.slices
        ],
        "leak": None
        if leak is None
        else {
            "train_texts": leak.train_texts,
            "threshold": leak.threshold,
            "leaked": len(leak.matches),
            "exact": leak.exact,
            "repeated_in_test": leak.repeated_in_test,
            "same_label": leak.same_label,
            "score_leaked": leak.leaked.value,
            "score_clean": leak.clean.value,
            "pairs": [dataclasses.asdict(match) for match in leak.matches],
        },
    }
