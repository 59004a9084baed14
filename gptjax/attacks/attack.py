"""Runs an attack over labelled texts: many searches side by side, so that their queries fill the model's batches."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.attacks.lexicon import Lexicon
from gptjax.attacks.recipes import Recipe
from gptjax.attacks.search import SEARCHES, Asking, Goal, Problem, Tried, rng_of
from gptjax.config import UserError
from gptjax.data.records import Record
from gptjax.data.sources import nearest

PredictProba = Callable[[list[str]], np.ndarray]  # texts [n] to probabilities [n, classes]

LOG_EVERY = 50  # texts


@dataclasses.dataclass(frozen=True)
class Attacked:
    """What became of one text. `outcome`: skipped (the answer was wrong, or the target, before), succeeded or failed.

    changed: (original word, what became of it) in the order of the text, of the perturbed text; `words`: of the original.
    queries: texts put to the model for it, the original itself not counted.
    """

    place: str
    label: str
    original: str
    perturbed: str
    before: str
    after: str
    outcome: str
    queries: int
    words: int
    changed: tuple[tuple[str, str], ...]

    @property
    def changed_share(self) -> float:
        return len(self.changed) / self.words if self.words else 0.0


def run_attack(
    predict_proba: PredictProba,
    labels: Sequence[str],
    records: Sequence[Record],
    recipe: Recipe,
    *,
    text_field: str = "text",
    label_field: str = "label",
    target: str | None = None,
    seed: int = 0,
    max_examples: int | None = None,
    max_queries: int = 0,
    batch_size: int = 64,
    side_by_side: int = 16,
    lexicon: Lexicon | None = None,
    log: Callable[[str], None] | None = None,
) -> list[Attacked]:
    """Attacks each record's text, or `max_examples` of them drawn by `seed`, in their order.

    predict_proba gives the probabilities of `labels`, in their order, for at most `batch_size` texts at a time.
    target: the class that the attack wants; by default, any but the record's label. A text whose answer is wrong before, or
    which is or is taken for the target, is skipped. max_queries: of one text; 0 is no limit.
    What becomes of a text depends on its words, the seed and the recipe, not on the texts beside it nor on `side_by_side`.

    Raises `UserError` for a text or label that is none, an unknown target, or a recipe that lacks its lexicon.
    """
    if recipe.needs_lexicon and not lexicon:
        raise UserError("this recipe replaces words by synonyms, so it needs a lexicon: a list of synonyms, or word vectors.")
    if target is not None and target not in labels:
        raise UserError(f"target={target!r} is none of the labels {', '.join(labels)}{nearest(target, list(labels))}")
    if min(batch_size, side_by_side) < 1 or max_queries < 0:
        raise ValueError(f"batch_size={batch_size} and side_by_side={side_by_side} must be at least 1, max_queries at least 0.")
    chosen = _draw(records, max_examples, seed)
    texts, truth = _texts_and_labels(chosen, labels, text_field, label_field)
    model = _Batches(predict_proba, len(labels), batch_size)
    start = model(texts)
    problems = [
        Problem(
            text, Goal(label, None if target is None else labels.index(target)), row, recipe, seed, lexicon or {}, max_queries
        )
        for text, label, row in zip(texts, truth, start, strict=True)
    ]
    skipped = [problem.start.predicted != problem.goal.label or problem.start.reached for problem in problems]
    open_problems = [problem for problem, skip in zip(problems, skipped, strict=True) if not skip]
    ends = iter(_search_all(open_problems, model, side_by_side, log))
    return [
        _attacked(record, problem, problem.start if skip else next(ends), skip, labels)
        for record, problem, skip in zip(chosen, problems, skipped, strict=True)
    ]


def _draw(records: Sequence[Record], count: int | None, seed: int) -> list[Record]:
    if count is None or count >= len(records):
        return list(records)
    picks = rng_of(seed, "examples").sample(range(len(records)), count)
    return [records[index] for index in sorted(picks)]


def _texts_and_labels(
    records: Sequence[Record], labels: Sequence[str], text_field: str, label_field: str
) -> tuple[list[str], list[int]]:
    numbers = {label: number for number, label in enumerate(labels)}
    texts, truth = [], []
    for record in records:
        text, label = record.values.get(text_field), str(record.values.get(label_field))
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{record.place} has no text as its field {text_field!r}.")
        if label not in numbers:
            raise UserError(f"{record.place} has the label {label!r}, none of {', '.join(labels)}{nearest(label, list(labels))}")
        texts.append(text)
        truth.append(numbers[label])
    if not texts:
        raise UserError("there is no text to attack.")
    return texts, truth


class _Batches:
    """The model, asked in batches; holds that it answers with a probability of every class for every text."""

    def __init__(self, predict_proba: PredictProba, classes: int, batch_size: int):
        self._predict_proba, self._classes, self._batch_size = predict_proba, classes, batch_size

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """[n, classes] for texts [n]."""
        parts = [self._batch(list(batch)) for batch in _batched(texts, self._batch_size)]
        return np.concatenate(parts) if parts else np.zeros((0, self._classes))

    def _batch(self, texts: list[str]) -> np.ndarray:
        found = np.asarray(self._predict_proba(texts), np.float64)
        if found.shape != (len(texts), self._classes):
            raise ValueError(f"predict_proba gave {found.shape} for {len(texts)} texts and {self._classes} classes.")
        if not np.isfinite(found).all():
            raise ValueError("predict_proba gave a probability that is not finite.")
        return found


def _batched(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (texts[start : start + size] for start in range(0, len(texts), size))


@dataclasses.dataclass
class _Running:
    number: int
    search: Asking
    texts: list[str]


def _search_all(
    problems: Sequence[Problem], model: _Batches, side_by_side: int, log: Callable[[str], None] | None
) -> list[Tried]:
    """How each search ends. Some searches run side by side; what they ask goes to the model together."""
    ends: dict[int, Tried] = {}
    waiting = iter(range(len(problems)))
    running: list[_Running] = []
    while True:
        for number in itertools.islice(waiting, side_by_side - len(running)):
            search = SEARCHES[problems[number].recipe.search](problems[number])
            running += _go_on(_Running(number, search, []), None, ends)
        if not running:
            if len(ends) == len(problems):
                return [ends[number] for number in range(len(problems))]
            continue  # these needed no model
        answers = model(list(itertools.chain.from_iterable(one.texts for one in running)))
        at, still, before = 0, [], len(ends)
        for one in running:
            still += _go_on(one, answers[at : at + len(one.texts)], ends)
            at += len(one.texts)
        running = still
        if log and len(ends) // LOG_EVERY > before // LOG_EVERY:
            reached = sum(end.reached for end in ends.values())
            log(f"attacked {len(ends)} of {len(problems)} texts: {reached} with success")


def _go_on(one: _Running, answers: np.ndarray | None, ends: dict[int, Tried]) -> list[_Running]:
    """Sends a search its answers: [the search with its next texts], or [] where it has ended."""
    try:
        texts = next(one.search) if answers is None else one.search.send(answers)
    except StopIteration as stop:
        ends[one.number] = stop.value
        return []
    return [_Running(one.number, one.search, texts)]


def _attacked(record: Record, problem: Problem, end: Tried, skip: bool, labels: Sequence[str]) -> Attacked:
    return Attacked(
        place=record.place,
        label=labels[problem.goal.label],
        original=problem.text,
        perturbed=problem.words.replaced(end.changes) if end.reached and not skip else problem.text,
        before=labels[problem.start.predicted],
        after=labels[(end if end.reached else problem.start).predicted],
        outcome="skipped" if skip else "succeeded" if end.reached else "failed",
        queries=problem.queries,
        words=len(problem.words),
        changed=_changed(problem, end.changes) if end.reached and not skip else (),
    )


def _changed(problem: Problem, changes: Mapping[int, str]) -> tuple[tuple[str, str], ...]:
    return tuple((problem.words.words[index], changes[index]) for index in sorted(changes))


def as_json(result: Attacked) -> dict[str, Any]:
    """One line of the file of examples."""
    return dataclasses.asdict(result) | {
        "changed": [list(pair) for pair in result.changed],
        "changed_share": result.changed_share,
    }
