"""A fine-tuned model in Python: texts in, labels and probabilities out, in the form that scikit-learn's users know."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptjax.config import HEADED, Config, TaskConfig, UserError, tasks_of
from gptjax.data.records import Record
from gptjax.data.tokenizers import Tokenizer
from gptjax.parallel.mesh import make_mesh
from gptjax.tasks.base import Encoded, Judged, Values
from gptjax.tasks.load import Example, encoder, split_of
from gptjax.tasks.table import TASKS
from gptjax.train.metrics import log_to_stderr
from gptjax.train.restore import TrainedModel, load_run
from gptjax.train.task_evaluation import judge

_SHORTEST = 16  # tokens of the shortest rows


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A model of one task. What it says of a text is a function of that text alone: of no other in the call, and of no order."""

    config: Config
    params: Any
    tokenizer: Tokenizer
    task: str
    batch_size: int = 32  # rows that are computed at once

    @property
    def knobs(self) -> TaskConfig:
        return tasks_of(self.config)[self.task]

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels (tags, or the numbers' names), in the order of `predict_proba`'s columns."""
        return self.knobs.labels

    @property
    def classes_(self) -> np.ndarray:
        """The labels as scikit-learn names them."""
        return np.asarray(self.labels)

    def predict(self, texts: Sequence[Any] | np.ndarray) -> np.ndarray:
        """What the model says of each text: [n] labels (classification), bool [n, labels] (multilabel), float [n] or [n, numbers]
        (regression), or objects [n]: lists of tags (tagging) and texts (answers). Raises `UserError` as `predict_records`.
        """
        judged = self.predict_records(texts)
        said = [one.predicted for one in judged]
        if self.knobs.kind == "classification":
            return np.asarray(said, dtype=str) if said else np.zeros(0, self.classes_.dtype)
        if self.knobs.kind == "multilabel":
            return np.asarray([[label in row for label in self.labels] for row in said], bool).reshape(-1, len(self.labels))
        if self.knobs.kind == "regression":
            numbers = np.asarray(said, np.float64).reshape(-1, len(self.labels))
            return numbers[:, 0] if len(self.labels) == 1 else numbers
        found = np.empty(len(said), object)
        found[:] = said
        return found

    def predict_proba(self, texts: Sequence[Any] | np.ndarray) -> np.ndarray:
        """float64 [n, labels]: the probability of each label; of several labels, each on its own. Raises `UserError`."""
        if self.knobs.kind not in ("classification", "multilabel"):
            raise UserError(f"task.kind={self.knobs.kind} has no probabilities of labels of a text.")
        rows = [one.more["probabilities"] for one in self.predict_records(texts)]
        return np.asarray(rows, np.float64).reshape(-1, len(self.labels))

    def predict_records(self, records: Sequence[Any] | np.ndarray) -> list[Judged]:
        """What the model says of each, with what is right where the record says so. A text is enough where the task reads one.

        What is longer than the model's rows loses its end, or is read in windows; `task.too_long=refuse` refuses it. Raises
        `UserError` for what is no list, and for a record without a field that the task reads.
        """
        if isinstance(records, (str, dict)) or (isinstance(records, np.ndarray) and records.ndim != 1):
            raise UserError("a predictor takes a list of texts or records, not one alone.")
        task, knobs = TASKS[self.knobs.kind], self.knobs
        read: list[Values] = []
        for number, one in enumerate(records):
            read.append(task.record(knobs, str(one) if isinstance(one, str) else one))
            if reason := task.check(knobs, read[-1]):
                raise UserError(f"record {number} (from 0) {reason}.")
        encode = encoder(self.config, self.tokenizer)
        rows: dict[int, list[int]] = {}
        parts: list[list[Encoded]] = []
        for number, record in enumerate(read):
            parts.append(task.encode(knobs, record, encode))
            if knobs.too_long == "refuse" and any(part.cut for part in parts[-1]):
                raise UserError(f"record {number} (from 0) has more than data.seq_len={self.config.data.seq_len} tokens.")
            rows.setdefault(self._row_length(parts[-1]), []).append(number)
        found: dict[int, Judged] = {}
        for length, numbers in rows.items():
            said = self._judge(length, [read[number] for number in numbers], [parts[number] for number in numbers])
            found |= dict(zip(numbers, said, strict=True))
        return [found[number] for number in range(len(read))]

    def _row_length(self, parts: Sequence[Encoded]) -> int:
        """By the record alone: data.seq_len halved as often as its examples leave room for, so that short texts cost little."""
        longest, length = max(len(part.tokens) for part in parts), self.config.data.seq_len
        while length % 2 == 0 and length // 2 >= max(longest, _SHORTEST):
            length //= 2
        return length

    def _judge(self, length: int, read: Sequence[Values], parts: Sequence[Sequence[Encoded]]) -> list[Judged]:
        data = dataclasses.replace(self.config.data, seq_len=length, packing="padded")
        evaluate = dataclasses.replace(self.config.evaluate, batch_size=self.batch_size)
        config = dataclasses.replace(self.config, data=data, evaluate=evaluate)
        found = [(Example(self.task, number, place), part) for number, of in enumerate(parts) for place, part in enumerate(of)]
        split = split_of(config, "predicted", found, [""] * len(found), self.tokenizer)
        records = {self.task: [Record(dict(values), "", number) for number, values in enumerate(read)]}
        examples = [example for example, _ in found]
        return judge(config, self.params, split, examples, records, make_mesh(config.mesh))[self.task]


def predictor_of(model: TrainedModel, task: str = "", batch_size: int = 32) -> Predictor:
    """A model's predictor for its only task, or that of the name `task`. Raises `UserError`."""
    tasks = tasks_of(model.config)
    named = [name for name in tasks if task in ("", name)]
    if len(named) != 1:
        which = "several tasks" if len(named) > 1 else f"no task {task!r}" if task else "no task to predict"
        hint = f"; name one of {', '.join(tasks)}" if tasks else ""
        raise UserError(f"the run has {which}{hint}.")
    if tasks[named[0]].kind not in HEADED:
        raise UserError(f"task.kind={tasks[named[0]].kind} writes its answers: gptjax.generate does that.")
    return Predictor(model.config, model.params, model.tokenizer, named[0], batch_size)


def load_predictor(
    path: str | os.PathLike[str],
    *,
    task: str = "",
    step: int | None = None,
    batch_size: int = 32,
    log: Callable[[str], None] = log_to_stderr,
) -> Predictor:
    """The predictor of a run's folder: its newest intact checkpoint, or that of `step`. Raises `UserError`.

    `batch_size`: rows that are computed at once, which the result does not depend on but for rounding.
    """
    return predictor_of(load_run(pathlib.Path(path), log, step), task, batch_size)
