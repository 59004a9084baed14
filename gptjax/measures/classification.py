"""Metrics of labels: one label a text, or several. Labels are strings or integers; scikit-learn's report is its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.measures import packages
from gptjax.measures.bootstrap import Bootstrap, Sums, mean_of
from gptjax.measures.measured import Measured, measure

Label = str | int


@dataclasses.dataclass(frozen=True)
class Report:
    """scikit-learn's classification report: its text unchanged, and its numbers."""

    text: str
    numbers: dict[str, Any]


def accuracy(gold: Sequence[Label], predicted: Sequence[Label], bootstrap: Bootstrap | None = None) -> Measured:
    """Share of right labels; 0 to 1. Raises `UserError` where gold and predicted are not of one length, as all here do."""
    _check(gold, predicted)
    return measure("accuracy", mean_of([g == p for g, p in zip(gold, predicted, strict=True)]), bootstrap)


def labels_of(*sequences: Sequence[Label]) -> list[Label]:
    """All labels, sorted. Raises `UserError` where strings and numbers are mixed, of which "1" and 1 are not one label."""
    found = {label for sequence in sequences for label in sequence}
    if len({isinstance(label, str) for label in found}) > 1:
        raise UserError(f"labels are strings or numbers, not both, as in {sorted(map(repr, found))[:6]}.")
    return sorted(found)


def f1_of(gold: Sequence[Label], predicted: Sequence[Label], label: Label, bootstrap: Bootstrap | None = None) -> Measured:
    """F1 of one class; 0 where it is neither in gold nor predicted. Raises `UserError` for a label in neither."""
    _check(gold, predicted)
    if label not in set(gold) | set(predicted):
        raise UserError(f"there is no label {label!r}; there are {labels_of(gold, predicted)[:20]}.")
    return measure(f"F1 of {label}", Sums(_counts(gold, predicted, [label]), _f1_micro), bootstrap)


def per_class(gold: Sequence[Label], predicted: Sequence[Label], bootstrap: Bootstrap | None = None) -> list[Measured]:
    """F1 of every class, in sorted order."""
    return [f1_of(gold, predicted, label, bootstrap) for label in labels_of(gold, predicted)]


def f1(gold: Sequence[Label], predicted: Sequence[Label], average: str = "macro", bootstrap: Bootstrap | None = None) -> Measured:
    """F1 averaged over classes: macro (each class alike), micro (of counts: with one label a text, the accuracy), weighted."""
    _check(gold, predicted)
    rows = _counts(gold, predicted, labels_of(gold, predicted))
    return measure(f"{average} F1", Sums(rows, _average(average)), bootstrap)


def report(gold: Sequence[Label], predicted: Sequence[Label], digits: int = 4) -> Report:
    """scikit-learn's classification report; what divides by zero is 0."""
    _check(gold, predicted)
    metrics = packages.load("sklearn.metrics")
    options = {"zero_division": 0, "digits": digits}
    text = metrics.classification_report(list(gold), list(predicted), **options)
    return Report(text, metrics.classification_report(list(gold), list(predicted), output_dict=True, **options))


def confusion(
    gold: Sequence[Label], predicted: Sequence[Label], labels: Sequence[Label] | None = None
) -> tuple[list[Label], np.ndarray]:
    """(labels, counts [gold, predicted]). Raises `UserError` where a label is not among those given."""
    _check(gold, predicted)
    names = list(labels) if labels is not None else labels_of(gold, predicted)
    index = {label: number for number, label in enumerate(names)}
    matrix = np.zeros((len(names), len(names)), np.int64)
    for pair in zip(gold, predicted, strict=True):
        for label in pair:
            if label not in index:
                raise UserError(f"label {label!r} is none of {names[:20]}.")
        matrix[index[pair[0]], index[pair[1]]] += 1
    return names, matrix


# --- several labels a text ---


def exact_match(
    gold: Sequence[Collection[Label]], predicted: Sequence[Collection[Label]], bootstrap: Bootstrap | None = None
) -> Measured:
    """Share of texts whose set of labels is right as a whole (subset accuracy); 0 to 1."""
    _check(gold, predicted)
    right = [set(g) == set(p) for g, p in zip(gold, predicted, strict=True)]
    return measure("exact match", mean_of(right), bootstrap, "of the whole set of labels")


def hamming_loss(
    gold: Sequence[Collection[Label]], predicted: Sequence[Collection[Label]], bootstrap: Bootstrap | None = None
) -> Measured:
    """Share of (text, label) decisions that are wrong, over the labels in gold or predicted; lower is better."""
    _check(gold, predicted)
    names = labels_of(*map(list, gold), *map(list, predicted))
    wrong = [len(set(g) ^ set(p)) / max(len(names), 1) for g, p in zip(gold, predicted, strict=True)]
    return measure("Hamming loss", mean_of(wrong), bootstrap, f"over {len(names)} labels")


def multilabel_f1(
    gold: Sequence[Collection[Label]],
    predicted: Sequence[Collection[Label]],
    average: str = "macro",
    bootstrap: Bootstrap | None = None,
) -> Measured:
    """F1 over labels, each a decision of its own: macro, micro or weighted; 0 to 1."""
    _check(gold, predicted)
    rows = _set_counts(gold, predicted, labels_of(*map(list, gold), *map(list, predicted)))
    return measure(f"{average} F1", Sums(rows, _average(average)), bootstrap, "several labels a text")


def multilabel_report(gold: Sequence[Collection[Label]], predicted: Sequence[Collection[Label]], digits: int = 4) -> Report:
    """scikit-learn's report with a row a label; what divides by zero is 0."""
    _check(gold, predicted)
    metrics = packages.load("sklearn.metrics")
    names = labels_of(*map(list, gold), *map(list, predicted))
    truth, guess = (np.array([[label in row for label in names] for row in rows], int) for rows in (gold, predicted))
    options = {"zero_division": 0, "digits": digits, "target_names": [str(name) for name in names]}
    text = metrics.classification_report(truth, guess, **options)
    return Report(text, metrics.classification_report(truth, guess, output_dict=True, **options))


# --- counts and what is made of them ---


def _check(gold: Sequence[Any], predicted: Sequence[Any]) -> None:
    if len(gold) != len(predicted):
        raise UserError(f"there are {len(gold)} gold labels, but {len(predicted)} predictions.")
    if not len(gold):
        raise UserError("there are no examples to measure.")


def _counts(gold: Sequence[Label], predicted: Sequence[Label], labels: Sequence[Label]) -> np.ndarray:
    """[n, 3 * labels]: right, predicted, gold for each label in turn."""
    index = {label: number for number, label in enumerate(labels)}
    rows = np.zeros((len(gold), len(labels), 3))
    for i, (truth, guess) in enumerate(zip(gold, predicted, strict=True)):
        if truth in index:
            rows[i, index[truth], 2] = 1
            rows[i, index[truth], 0] = truth == guess
        if guess in index:
            rows[i, index[guess], 1] = 1
    return rows.reshape(len(gold), -1)


def _set_counts(gold: Sequence[Collection[Label]], predicted: Sequence[Collection[Label]], labels: Sequence[Label]) -> np.ndarray:
    truth, guess = (np.array([[label in set(row) for label in labels] for row in rows], float) for rows in (gold, predicted))
    return np.stack([truth * guess, guess, truth], axis=-1).reshape(len(gold), -1)


def f1_from(right: np.ndarray, predicted: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """2 right / (predicted + gold), 0 where that divides by zero; any shapes alike."""
    below = predicted + gold
    return np.divide(2 * right, below, out=np.zeros(np.shape(below)), where=below > 0)


def _f1_micro(totals: np.ndarray) -> np.ndarray:
    right, predicted, gold = (totals[..., kind::3].sum(axis=-1) for kind in range(3))
    return f1_from(right, predicted, gold)


def _f1_macro(totals: np.ndarray) -> np.ndarray:
    """A class that a resample lacks altogether does not count in it, as it would not in a sample."""
    right, predicted, gold = (totals[..., kind::3] for kind in range(3))
    present = predicted + gold > 0
    return f1_from(right, predicted, gold).sum(axis=-1) / np.maximum(present.sum(axis=-1), 1)


def _f1_weighted(totals: np.ndarray) -> np.ndarray:
    right, predicted, gold = (totals[..., kind::3] for kind in range(3))
    return (f1_from(right, predicted, gold) * gold).sum(axis=-1) / np.maximum(gold.sum(axis=-1), 1)


AVERAGES = {"macro": _f1_macro, "micro": _f1_micro, "weighted": _f1_weighted}


def _average(name: str) -> Any:
    if name not in AVERAGES:
        raise UserError(f"average={name!r} is none of {', '.join(AVERAGES)}.")
    return AVERAGES[name]
