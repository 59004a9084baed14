"""Metrics of tagged words: seqeval's entity scores, and token accuracy, which is another thing.

Tags are O or PREFIX-TYPE. `mode` says what an entity is:
- lenient (seqeval's default, and conlleval's): any change of type or B starts one; a stray I starts one too.
- strict: only what the scheme allows is an entity, so that a stray I is none; `scheme` is BIO (seqeval's IOB2), IOB1 or IOBES.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.measures import packages
from gptjax.measures.bootstrap import Bootstrap, Sums, ratio
from gptjax.measures.classification import AVERAGES, Report
from gptjax.measures.measured import Measured, measure

Tags = Sequence[Sequence[str]]

SCHEMES = {"BIO": "IOB2", "IOB1": "IOB1", "IOBES": "IOBES"}
PREFIXES = {"BIO": "BI", "IOB1": "BI", "IOBES": "BIES"}


def entity_scores(
    gold: Tags,
    predicted: Tags,
    mode: str = "lenient",
    scheme: str = "BIO",
    average: str = "micro",
    bootstrap: Bootstrap | None = None,
) -> list[Measured]:
    """Precision, recall and F1 of entities, 0 to 1, by seqeval; an entity is right if type and both ends are.

    Sentences are what is resampled. Raises `UserError` for a tag outside the scheme, or sentences of different lengths.
    """
    check_tags(gold, predicted, scheme)
    if average not in AVERAGES:
        raise UserError(f"average={average!r} is none of {', '.join(AVERAGES)}.")
    options = {**_options(mode, scheme), "average": average}
    metrics = packages.load("seqeval.metrics")
    rows = entity_counts(gold, predicted, mode, scheme)
    note = f"seqeval, {mode} mode, {scheme}, {average} average"
    functions = {"precision": metrics.precision_score, "recall": metrics.recall_score, "F1": metrics.f1_score}
    truth, guess = _lists(gold), _lists(predicted)
    return [
        measure(f"entity {name}", Sums(rows, _Scores(name, average)), bootstrap, note, float(function(truth, guess, **options)))
        for name, function in functions.items()
    ]


def report(gold: Tags, predicted: Tags, mode: str = "lenient", scheme: str = "BIO", digits: int = 4) -> Report:
    """seqeval's report, its own text unchanged, and its numbers."""
    check_tags(gold, predicted, scheme)
    make = packages.load("seqeval.metrics").classification_report
    options = {**_options(mode, scheme), "digits": digits}
    truth, guess = _lists(gold), _lists(predicted)
    if not any(map(any, (entity_counts(gold, predicted, mode, scheme)))):
        raise UserError("there is no entity in gold or predicted, of which seqeval could report.")
    return Report(make(truth, guess, **options), make(truth, guess, output_dict=True, **options))


def token_accuracy(gold: Tags, predicted: Tags, bootstrap: Bootstrap | None = None) -> Measured:
    """Share of words with the right tag. High where most words are O, of which it counts each: entity F1 says more."""
    _check_lengths(gold, predicted)
    rows = [[sum(g == p for g, p in zip(*pair, strict=True)), len(pair[0])] for pair in zip(gold, predicted, strict=True)]
    return measure("token accuracy", Sums(np.array(rows, np.float64), ratio), bootstrap, "of words, O included")


def entity_counts(gold: Tags, predicted: Tags, mode: str = "lenient", scheme: str = "BIO") -> np.ndarray:
    """[sentences, 3 * types]: right, predicted and gold entities of each type in turn."""
    truths, guesses = (entities(tags, mode, scheme) for tags in (gold, predicted))
    types = {name: place for place, name in enumerate(sorted({e[0] for row in (*truths, *guesses) for e in row}))}
    rows = np.zeros((len(truths), max(len(types), 1), 3))
    for row, truth, guess in zip(rows, truths, guesses, strict=True):
        for kind, found in enumerate((truth & guess, guess, truth)):
            for entity in found:
                row[types[entity[0]], kind] += 1
    return rows.reshape(len(truths), -1)


def entities(tags: Tags, mode: str = "lenient", scheme: str = "BIO") -> list[set[tuple[str, int, int]]]:
    """(type, first word, last word) of each sentence's entities, as seqeval finds them."""
    _options(mode, scheme)
    if mode == "strict":
        module = packages.load("seqeval.scheme")
        found = module.Entities(_lists(tags), getattr(module, SCHEMES[scheme])).entities
        return [{(entity.tag, entity.start, entity.end - 1) for entity in row} for row in found]
    module = packages.load("seqeval.metrics.sequence_labeling")
    return [set(module.get_entities(list(row))) for row in tags]


def check_tags(gold: Tags, predicted: Tags, scheme: str = "BIO") -> None:
    """Raises `UserError`, naming sentence and word, where lengths differ or a tag is not of the scheme."""
    _check_lengths(gold, predicted)
    if scheme not in SCHEMES:
        raise UserError(f"scheme={scheme!r} is none of {', '.join(SCHEMES)}.")
    for name, rows in (("gold", gold), ("predicted", predicted)):
        for number, row in enumerate(rows):
            for place, tag in enumerate(row):
                if tag != "O" and not (len(tag) > 2 and tag[0] in PREFIXES[scheme] and tag[1] == "-"):
                    raise UserError(
                        f"the {name} tag {tag!r} of word {place} in sentence {number} (both from 0) is not O or one of "
                        f"{', '.join(f'{prefix}-TYPE' for prefix in PREFIXES[scheme])}, as {scheme} has."
                    )


def _check_lengths(gold: Tags, predicted: Tags) -> None:
    if len(gold) != len(predicted) or not len(gold):
        raise UserError(f"there are {len(gold)} tagged sentences, but {len(predicted)} predicted ones.")
    for number, (truth, guess) in enumerate(zip(gold, predicted, strict=True)):
        if len(truth) != len(guess):
            raise UserError(f"sentence {number} (from 0) has {len(truth)} tags, but {len(guess)} predicted ones.")


def _options(mode: str, scheme: str) -> dict[str, Any]:
    if mode not in ("lenient", "strict"):
        raise UserError(f"mode={mode!r} is neither lenient nor strict.")
    if mode == "lenient":
        return {"zero_division": 0}
    return {"zero_division": 0, "mode": "strict", "scheme": getattr(packages.load("seqeval.scheme"), SCHEMES[scheme])}


def _lists(tags: Tags) -> list[list[str]]:
    return [list(row) for row in tags]


@dataclasses.dataclass(frozen=True)
class _Scores:
    """Precision, recall or F1 of totals [..., 3 * types]."""

    name: str
    average: str

    def __call__(self, totals: np.ndarray) -> np.ndarray:
        if self.name == "F1":
            return AVERAGES[self.average](totals)
        right, predicted, gold = (totals[..., kind::3] for kind in range(3))
        below = predicted if self.name == "precision" else gold
        if self.average == "micro":
            return _share(right.sum(axis=-1), below.sum(axis=-1))
        weights = (predicted + gold > 0) if self.average == "macro" else gold
        return _share((_share(right, below) * weights).sum(axis=-1), weights.sum(axis=-1))


def _share(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros(np.shape(below)), where=below > 0)
