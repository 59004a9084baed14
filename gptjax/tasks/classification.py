"""One of several labels for a text, read off the hidden state of its last token (Radford et al., 2018)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig, TaskConfig, UserError
from gptjax.tasks.base import Batch, Encoded, Encoder, Judged, Language, Parameter, Sums, Task, Values, fields_of, filled
from gptjax.tasks.heads import affine, head_width


class Classification(Task):
    def needs(self, knobs: TaskConfig) -> frozenset[str]:
        return fields_of(knobs.text) | {knobs.label}

    def settled(self, knobs: TaskConfig, records: Sequence[Values]) -> TaskConfig:
        labels = knobs.labels or tuple(sorted({str(record[knobs.label]) for record in records}))
        if len(labels) < 2:
            raise UserError(f"task.kind=classification needs two labels at least, and the training records have {len(labels)}.")
        return dataclasses.replace(knobs, labels=labels)

    def check(self, knobs: TaskConfig, record: Values) -> str:
        if knobs.labels and (label := str(record[knobs.label])) not in knobs.labels:
            return f"has the label {label!r}, which is none of {', '.join(knobs.labels)}"
        return ""

    def columns(self, knobs: TaskConfig) -> Mapping[str, np.ndarray]:
        return {"label": np.zeros(0, np.int32)}

    def encode(self, knobs: TaskConfig, record: Values, encoder: Encoder) -> list[Encoded]:
        text = encoder(filled(knobs.text, record)).tolist()
        room = max(0, encoder.room - len(encoder.begin) - len(encoder.end))
        tokens = np.asarray([*encoder.begin, *text[:room], *encoder.end], np.int32)
        last = np.zeros(len(tokens), np.int32)
        last[-1:] = 1
        labels = {label: number for number, label in enumerate(knobs.labels, 1)}
        return [Encoded(tokens, last, {"label": last * labels.get(str(record.get(knobs.label)), 0)}, cut=len(text) > room)]

    def head(self, knobs: TaskConfig, model: ModelConfig) -> Mapping[str, Parameter]:
        return {"kernel": Parameter((head_width(model), len(knobs.labels)), ("embed", None))}

    def loss(self, knobs: TaskConfig, head: Any, hidden_BTD: jax.Array, batch: Batch, language: Language) -> Sums:
        log_p_BTK = jax.nn.log_softmax(affine(head, hidden_BTD))
        weights_BT = (batch["label"] > 0).astype(jnp.float32)
        label_BT1 = jnp.maximum(batch["label"] - 1, 0)[..., None]
        nats_BT = -jnp.take_along_axis(log_p_BTK, label_BT1, axis=-1)[..., 0]
        nats = (nats_BT * weights_BT).sum()
        return Sums(nats, nats, weights_BT.sum())

    def outputs(self, knobs: TaskConfig, head: Any, hidden_BTD: jax.Array, batch: Batch, language: Language) -> jax.Array:
        return affine(head, hidden_BTD)

    def judged(self, knobs: TaskConfig, record: Values, outputs: Sequence[np.ndarray]) -> Judged:
        logits_K = outputs[0][0].astype(np.float64)
        log_p_K = logits_K - np.logaddexp.reduce(logits_K)
        predicted, more = knobs.labels[int(log_p_K.argmax())], {"probabilities": np.exp(log_p_K)}
        if knobs.label not in record:
            return Judged(record, None, predicted, more=more)
        gold = str(record[knobs.label])
        return Judged(record, gold, predicted, -float(log_p_K[knobs.labels.index(gold)]), 1.0, more)

    def measures(self, knobs: TaskConfig, judged: Sequence[Judged]) -> dict[str, float]:
        return {"accuracy": float(np.mean([one.gold == one.predicted for one in judged]))}

    def show(self, knobs: TaskConfig, judged: Judged) -> str:
        sure = judged.more["probabilities"].max()
        right = "" if judged.gold is None else f", right: {judged.gold}"
        return f"{filled(knobs.text, judged.record)}\n-> {judged.predicted} ({sure:.1%}){right}"
