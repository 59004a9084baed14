"""One or several numbers for a text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import TaskConfig, UserError
from gptjax.measures import regression as measures
from gptjax.measures.baselines import mean, tfidf_ridge
from gptjax.measures.bootstrap import Bootstrap
from gptjax.measures.measured import Measured
from gptjax.tasks.at_the_end import AtTheEnd
from gptjax.tasks.base import Batch, Judged, Language, Sums, Values, said_by
from gptjax.tasks.heads import affine


def _fields(knobs: TaskConfig) -> list[str]:
    return [name.strip() for name in knobs.label.split(",")]


def numbers_of(knobs: TaskConfig, record: Values) -> list[float] | None:
    """Of the fields `task.label` names, or of the one list, or text with `task.separator` between them; None where one is absent.

    Raises ValueError, to go on from the record's place, where one is no finite number.
    """
    fields = _fields(knobs)
    if any(record.get(name) is None for name in fields):
        return None
    values: Any = [record[name] for name in fields]
    if len(fields) == 1:
        values = values[0]
        if isinstance(values, str) and knobs.separator:
            values = values.split(knobs.separator)
        values = values if isinstance(values, list) else [values]
    try:
        found = [float(value) for value in values]
    except (TypeError, ValueError):
        found = [math.nan]
    if not found or not all(map(math.isfinite, found)):
        raise ValueError(f"has {values!r} in {knobs.label!r}, where a number should be")
    return found


class Regression(AtTheEnd):
    def needs(self, knobs: TaskConfig) -> frozenset[str]:
        return self.given(knobs) | set(_fields(knobs))

    def settled(self, knobs: TaskConfig, records: Sequence[Values]) -> TaskConfig:
        """`labels` names each number."""
        fields, counts = _fields(knobs), {len(numbers_of(knobs, record) or []) for record in records}
        if len(counts) > 1:
            raise UserError(f"task.label={knobs.label}: training records have {min(counts)} to {max(counts)} numbers.")
        (count,) = counts
        names = knobs.labels or (
            tuple(fields) if len(fields) == count else tuple(f"{fields[0]}_{n}" for n in range(1, count + 1))
        )
        return dataclasses.replace(knobs, labels=names)

    def check(self, knobs: TaskConfig, record: Values) -> str:
        try:
            found = numbers_of(knobs, record)
        except ValueError as error:
            return str(error)
        if found is not None and knobs.labels and len(found) != len(knobs.labels):
            return f"has {len(found)} numbers in {knobs.label!r}, where {len(knobs.labels)} should be"
        return ""

    def columns(self, knobs: TaskConfig) -> Mapping[str, np.ndarray]:
        return {"numbers": np.zeros((0, len(knobs.labels)), np.float32), "known": np.zeros(0, np.int32)}

    def wanted(self, knobs: TaskConfig, record: Values) -> Mapping[str, np.ndarray]:
        gold = numbers_of(knobs, record)
        numbers = np.zeros(len(knobs.labels), np.float32) if gold is None else np.asarray(gold, np.float32)
        return {"numbers": numbers, "known": np.asarray(gold is not None, np.int32)}

    def loss(self, knobs: TaskConfig, head: Any, hidden_BTD: jax.Array, batch: Batch, language: Language) -> Sums:
        """Squared error, the mean over the numbers; an example counts 1."""
        weights_BT = batch["known"].astype(jnp.float32)
        squares_BT = jnp.square(affine(head, hidden_BTD) - batch["numbers"]).mean(axis=-1)
        loss = (squares_BT * weights_BT).sum()
        return Sums(loss, loss, weights_BT.sum())

    def judged(self, knobs: TaskConfig, record: Values, outputs: Sequence[np.ndarray]) -> Judged:
        predicted_K, gold = outputs[0][0].astype(np.float64), numbers_of(knobs, record)
        if gold is None:
            return Judged(record, None, predicted_K.tolist())
        return Judged(record, gold, predicted_K.tolist(), float(np.square(predicted_K - gold).mean()), 1.0)

    def measured(self, knobs: TaskConfig, judged: Sequence[Judged], bootstrap: Bootstrap | None = None) -> list[Measured]:
        found = []
        for number, name in enumerate(knobs.labels):
            pair = [one.gold[number] for one in judged], [one.predicted[number] for one in judged]
            for measure in (measures.mean_squared_error, measures.pearson, measures.spearman):
                one = measure(*pair, bootstrap)
                found.append(one if len(knobs.labels) == 1 else dataclasses.replace(one, name=f"{one.name} of {name}"))
        return found

    def baselines(self, knobs: TaskConfig, train: Sequence[Values], new: Sequence[Judged]) -> dict[str, list[Judged]]:
        texts, numbers = [self.text(knobs, record) for record in train], [numbers_of(knobs, record) or [] for record in train]
        wanted = [self.text(knobs, one.record) for one in new]
        found = {}
        for name, predict in {"mean": mean, "tfidf_ridge": tfidf_ridge}.items():
            columns = [predict(texts, [row[k] for row in numbers], wanted) for k in range(len(knobs.labels))]
            found[name] = said_by(new, [list(numbers) for numbers in zip(*columns, strict=True)])
        return found

    def row(self, knobs: TaskConfig, judged: Judged) -> dict[str, Any]:
        """A number, or several with commas between them."""

        def plain(numbers: Sequence[float]) -> Any:
            return numbers[0] if len(numbers) == 1 else ", ".join(map(str, numbers))

        return {"predicted": plain(judged.predicted)} | ({} if judged.gold is None else {"gold": plain(judged.gold)})

    def show(self, knobs: TaskConfig, judged: Judged) -> str:
        said, right = (", ".join(f"{number:.4g}" for number in numbers or ()) for numbers in (judged.predicted, judged.gold))
        return f"{self.text(knobs, judged.record)}\n-> {said}{f', right: {right}' if right else ''}"
