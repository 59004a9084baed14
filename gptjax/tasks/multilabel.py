"""Any number of labels for a text, each a decision of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import TaskConfig, UserError
from gptjax.measures import classification as measures
from gptjax.measures.baselines import majority_set, tfidf_logistic_set
from gptjax.measures.bootstrap import Bootstrap
from gptjax.measures.measured import Measured
from gptjax.tasks.at_the_end import AtTheEnd, in_order, label_text
from gptjax.tasks.base import Batch, Judged, Language, Sums, Values, said_by
from gptjax.tasks.heads import affine


def labels_of(knobs: TaskConfig, value: Any) -> list[str]:
    """The labels of a list, or of a text with `task.separator` between them; none of an empty one."""
    parts = value if isinstance(value, list) else label_text(value).split(knobs.separator)
    return [label for part in parts if (label := label_text(part).strip())]


class Multilabel(AtTheEnd):
    def settled(self, knobs: TaskConfig, records: Sequence[Values]) -> TaskConfig:
        labels = knobs.labels or in_order({label for record in records for label in labels_of(knobs, record[knobs.label])})
        if not labels:
            raise UserError(f"task.kind=multilabel: no training record has a label in {knobs.label!r}.")
        return dataclasses.replace(knobs, labels=tuple(labels))

    def remarks(self, knobs: TaskConfig, records: Sequence[Values]) -> list[str]:
        unseen = sorted(set(knobs.labels) - {label for record in records for label in labels_of(knobs, record[knobs.label])})
        return [f"task.labels: no training record has {', '.join(map(repr, unseen))}."] if unseen else []

    def check(self, knobs: TaskConfig, record: Values) -> str:
        if isinstance(record.get(knobs.label), dict):
            return f"has an object for labels in {knobs.label!r}"
        for label in self._gold(knobs, record) or []:
            if knobs.labels and label not in knobs.labels:
                return f"has the label {label!r}, which is none of {', '.join(knobs.labels)}"
        return ""

    def columns(self, knobs: TaskConfig) -> Mapping[str, np.ndarray]:
        return {"labels": np.zeros((0, len(knobs.labels)), np.float32), "known": np.zeros(0, np.int32)}

    def wanted(self, knobs: TaskConfig, record: Values) -> Mapping[str, np.ndarray]:
        gold = self._gold(knobs, record)
        of = np.asarray([label in (gold or []) for label in knobs.labels], np.float32)
        return {"labels": of, "known": np.asarray(gold is not None, np.int32)}

    def _gold(self, knobs: TaskConfig, record: Values) -> list[str] | None:
        value = record.get(knobs.label)
        return None if value is None else labels_of(knobs, value)

    def loss(self, knobs: TaskConfig, head: Any, hidden_BTD: jax.Array, batch: Batch, language: Language) -> Sums:
        """Binary cross-entropy, the mean over labels; an example counts 1."""
        logits_BTK, weights_BT = affine(head, hidden_BTD), batch["known"].astype(jnp.float32)
        nats_BT = (jax.nn.softplus(logits_BTK) - logits_BTK * batch["labels"]).mean(axis=-1)
        nats = (nats_BT * weights_BT).sum()
        return Sums(nats, nats, weights_BT.sum())

    def judged(self, knobs: TaskConfig, record: Values, outputs: Sequence[np.ndarray]) -> Judged:
        logits_K = outputs[0][0].astype(np.float64)
        probabilities_K = np.exp(-np.logaddexp(0, -logits_K))
        given = [label for label, p in zip(knobs.labels, probabilities_K, strict=True) if p >= knobs.threshold]
        more, gold = {"probabilities": probabilities_K}, self._gold(knobs, record)
        if gold is None:
            return Judged(record, None, given, more=more)
        wanted_K = np.asarray([label in gold for label in knobs.labels], np.float64)
        nats = float((np.logaddexp(0, logits_K) - logits_K * wanted_K).mean())
        return Judged(record, [label for label in knobs.labels if label in gold], given, nats, 1.0, more)

    def measured(self, knobs: TaskConfig, judged: Sequence[Judged], bootstrap: Bootstrap | None = None) -> list[Measured]:
        pair = [one.gold for one in judged], [one.predicted for one in judged]
        return [
            measures.multilabel_f1(*pair, "micro", bootstrap),
            measures.multilabel_f1(*pair, "macro", bootstrap),
            measures.exact_match(*pair, bootstrap),
            measures.hamming_loss(*pair, bootstrap),
        ]

    def report(self, knobs: TaskConfig, judged: Sequence[Judged]) -> str:
        return measures.multilabel_report([one.gold for one in judged], [one.predicted for one in judged]).text

    def baselines(self, knobs: TaskConfig, train: Sequence[Values], new: Sequence[Judged]) -> dict[str, list[Judged]]:
        texts = [self.text(knobs, record) for record in train]
        labels = [self._gold(knobs, record) or [] for record in train]
        wanted = [self.text(knobs, one.record) for one in new]
        return {
            name: said_by(new, predict(texts, labels, wanted))
            for name, predict in {"majority_set": majority_set, "tfidf_logistic_set": tfidf_logistic_set}.items()
        }

    def row(self, knobs: TaskConfig, judged: Judged) -> dict[str, Any]:
        """Labels with commas between them, right where all are; a label's probability does not hang on the others'."""
        row: dict[str, Any] = {"predicted": ", ".join(judged.predicted)}
        row["label_probabilities"] = dict(zip(knobs.labels, judged.more["probabilities"].tolist(), strict=True))
        return row if judged.gold is None else row | {"gold": ", ".join(judged.gold)}

    def show(self, knobs: TaskConfig, judged: Judged) -> str:
        right = "" if judged.gold is None else f", right: {', '.join(judged.gold) or 'none'}"
        return f"{self.text(knobs, judged.record)}\n-> {', '.join(judged.predicted) or 'none'}{right}"
