"""One of several labels for a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import TaskConfig, UserError
from gptjax.measures import classification as measures
from gptjax.measures.baselines import majority, tfidf_logistic
from gptjax.measures.bootstrap import Bootstrap
from gptjax.measures.measured import Measured
from gptjax.tasks.at_the_end import AtTheEnd, in_order, label_text
from gptjax.tasks.base import Batch, Judged, Language, Sums, Values, said_by
from gptjax.tasks.heads import affine, label_nats

_FREE_TEXT = 50  # labels from which on a field that is different in most records is taken for no label


class Classification(AtTheEnd):
    def settled(self, knobs: TaskConfig, records: Sequence[Values]) -> TaskConfig:
        labels = knobs.labels or in_order({label_text(record[knobs.label]) for record in records})
        if len(labels) < 2:
            raise UserError(
                f"task.kind=classification needs two labels at least, and {'task.labels' if knobs.labels else 'the training'}"
                f"{'' if knobs.labels else ' records'} has {len(labels)}."
            )
        if not knobs.labels and len(labels) >= _FREE_TEXT and len(labels) > len(records) / 2:
            raise UserError(
                f"task.label={knobs.label} has {len(labels)} different values in {len(records)} training records, more classes "
                "than can be learnt from them: name the field of the labels, or all of them by task.labels."
            )
        return dataclasses.replace(knobs, labels=tuple(labels))

    def remarks(self, knobs: TaskConfig, records: Sequence[Values]) -> list[str]:
        unseen = sorted(set(knobs.labels) - {label_text(record[knobs.label]) for record in records})
        return [f"task.labels: no training record has {', '.join(map(repr, unseen))}."] if unseen else []

    def check(self, knobs: TaskConfig, record: Values) -> str:
        if knobs.label not in record:
            return ""
        if isinstance(value := record[knobs.label], (list, dict)):
            return f"has the {'list' if isinstance(value, list) else 'object'} {value} for a label in {knobs.label!r}"
        if knobs.labels and (label := label_text(value)) not in knobs.labels:
            return f"has the label {label!r}, which is none of {', '.join(knobs.labels)}"
        return ""

    def columns(self, knobs: TaskConfig) -> Mapping[str, np.ndarray]:
        return {"label": np.zeros(0, np.int32)}

    def wanted(self, knobs: TaskConfig, record: Values) -> Mapping[str, np.ndarray]:
        gold = self._gold(knobs, record)
        return {"label": np.asarray(0 if gold is None else 1 + knobs.labels.index(gold), np.int32)}

    def _gold(self, knobs: TaskConfig, record: Values) -> str | None:
        return label_text(record[knobs.label]) if record.get(knobs.label) is not None else None

    def loss(self, knobs: TaskConfig, head: Any, hidden_BTD: jax.Array, batch: Batch, language: Language) -> Sums:
        """Cross-entropy of the labels; an example counts 1."""
        nats = label_nats(affine(head, hidden_BTD), batch["label"]).sum()
        return Sums(nats, nats, (batch["label"] > 0).astype(jnp.float32).sum())

    def judged(self, knobs: TaskConfig, record: Values, outputs: Sequence[np.ndarray]) -> Judged:
        logits_K = outputs[0][0].astype(np.float64)
        log_p_K = logits_K - np.logaddexp.reduce(logits_K)
        predicted, more = knobs.labels[int(log_p_K.argmax())], {"probabilities": np.exp(log_p_K)}
        gold = self._gold(knobs, record)
        if gold is None:
            return Judged(record, None, predicted, more=more)
        return Judged(record, gold, predicted, -float(log_p_K[knobs.labels.index(gold)]), 1.0, more)

    def measured(self, knobs: TaskConfig, judged: Sequence[Judged], bootstrap: Bootstrap | None = None) -> list[Measured]:
        """Accuracy and macro F1; of a few labels the F1 of each too."""
        gold, predicted = [one.gold for one in judged], [one.predicted for one in judged]
        found = [measures.accuracy(gold, predicted, bootstrap), measures.f1(gold, predicted, "macro", bootstrap)]
        present = [label for label in knobs.labels if label in {*gold, *predicted}]
        few = present if len(knobs.labels) <= 4 else []
        return found + [measures.f1_of(gold, predicted, label, bootstrap) for label in few]

    def report(self, knobs: TaskConfig, judged: Sequence[Judged]) -> str:
        return measures.report([one.gold for one in judged], [one.predicted for one in judged]).text

    def baselines(self, knobs: TaskConfig, train: Sequence[Values], new: Sequence[Judged]) -> dict[str, list[Judged]]:
        texts, labels = [self.text(knobs, record) for record in train], [label_text(record[knobs.label]) for record in train]
        wanted = [self.text(knobs, one.record) for one in new]
        found = {
            name: predict(texts, labels, wanted).labels
            for name, predict in {"majority": majority, "tfidf_logistic": tfidf_logistic}.items()
        }
        return {name: said_by(new, said) for name, said in found.items()}

    def row(self, knobs: TaskConfig, judged: Judged) -> dict[str, Any]:
        probabilities = dict(zip(knobs.labels, judged.more["probabilities"].tolist(), strict=True))
        return super().row(knobs, judged) | {"probabilities": probabilities}

    def show(self, knobs: TaskConfig, judged: Judged) -> str:
        sure = judged.more["probabilities"].max()
        right = "" if judged.gold is None else f", right: {judged.gold}"
        return f"{self.text(knobs, judged.record)}\n-> {judged.predicted} ({sure:.1%}){right}"
