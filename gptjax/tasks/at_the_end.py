"""Tasks of a text as a whole: what is wanted is read off the hidden state of its last token (Radford et al., 2018)."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gptjax.config import ModelConfig, TaskConfig
from gptjax.tasks.base import Batch, Encoded, Encoder, Language, Parameter, Task, Values, fields_of, filled
from gptjax.tasks.heads import affine, head_width


class AtTheEnd(Task):
    @abc.abstractmethod
    def wanted(self, knobs: TaskConfig, record: Values) -> Mapping[str, np.ndarray]:
        """{column: what is wanted of the record, [...]}; zeros where nobody has said it."""

    def needs(self, knobs: TaskConfig) -> frozenset[str]:
        return self.given(knobs) | {knobs.label}

    def given(self, knobs: TaskConfig) -> frozenset[str]:
        return fields_of(knobs.text)

    def text(self, knobs: TaskConfig, record: Values) -> str:
        return filled(knobs.text, record)

    def encode(self, knobs: TaskConfig, record: Values, encoder: Encoder) -> list[Encoded]:
        """[bos] text [eos]; a text without a token is one for the end of a text, or the first of the vocabulary."""
        text = encoder(filled(knobs.text, record)).tolist()
        room = max(0, encoder.room - len(encoder.begin) - len(encoder.end))
        tokens = np.asarray([*encoder.begin, *text[:room], *encoder.end] or encoder.nothing, np.int32)
        last = np.zeros(len(tokens), np.int32)
        last[-1:] = 1
        columns = {}
        for name, wanted in self.wanted(knobs, record).items():
            columns[name] = np.zeros((len(tokens), *wanted.shape), wanted.dtype)
            columns[name][-1] = wanted
        return [Encoded(tokens, last, columns, cut=len(text) > room)]

    def head(self, knobs: TaskConfig, model: ModelConfig) -> Mapping[str, Parameter]:
        return {"kernel": Parameter((head_width(model), len(knobs.labels)), ("embed", None))}

    def outputs(self, knobs: TaskConfig, head: Any, hidden_BTD: jax.Array, batch: Batch, language: Language) -> jax.Array:
        return affine(head, hidden_BTD)


def label_text(value: Any) -> str:
    """A label as text: 1, 1.0 and "1" are one."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def in_order(labels: set[str]) -> tuple[str, ...]:
    """Sorted as numbers where all are numbers, else as texts."""

    def number(label: str) -> tuple[float, str]:
        return float(label), label

    try:
        return tuple(sorted(labels, key=number))
    except ValueError:
        return tuple(sorted(labels))
