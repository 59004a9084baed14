"""What a task is: a record to examples, hidden states to a loss, outputs to predictions, and what these are worth."""

from __future__ import annotations

import abc
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.config import ModelConfig, TaskConfig, UserError
from gptjax.data.tokenizers import Tokenizer
from gptjax.measures.bootstrap import Bootstrap
from gptjax.measures.measured import Measured

Values = Mapping[str, Any]  # a record: what its fields hold
Batch = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Encoded:
    """An example as the model reads it: tokens, and beside each a value of each column. In all columns 0 says nothing."""

    tokens: np.ndarray  # int32 [n]
    read: np.ndarray  # int32 [n], 1 where an output of the model counts
    columns: Mapping[str, np.ndarray]  # [n, ...], what is wanted there
    cut: bool = False  # whether something was left out for want of room
    parts: tuple[int, ...] = ()  # tokens of each of its parts, where it has several, which don't see each other


class Request(NamedTuple):
    """What a model is asked to go on from, in the course of an evaluation."""

    ids: np.ndarray  # int32 [n]
    shown: str
    references: tuple[str, ...]  # texts that are right


class Sums(NamedTuple):
    """What a batch cost: the loss to be differentiated, the bare nats, and the weight that both are divided by, as sums."""

    loss: jax.Array
    nll: jax.Array
    weight: jax.Array


class Parameter(NamedTuple):
    """One of a head's, with the logical names of its axes; drawn from N(0, model.init_std), or zeros."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    zeros: bool = False


@dataclass(frozen=True)
class Judged:
    """An evaluated record: what it holds, and what the model said, in the task's own form; `gold` is None where nobody said.

    The evaluation's loss is the sum of `nats` over the sum of `weight`.
    """

    record: Values
    gold: Any
    predicted: Any
    nats: float = 0.0
    weight: float = 0.0
    more: Mapping[str, Any] = field(default_factory=dict)  # probabilities and the like
    written: Any = None  # `writing.Written` of the first record of each prompt that was asked


def said_by(new: Sequence[Judged], predicted: Sequence[Any]) -> list[Judged]:
    """The records of `new` with what somebody else, such as a baseline, says of them."""
    return [Judged(one.record, one.gold, said) for one, said in zip(new, predicted, strict=True)]


class Encoder:
    """Text to tokens between the ends that the run puts around a text, for at most `room` of them."""

    def __init__(self, tokenizer: Tokenizer, add_bos: bool, add_eos: bool, room: int):
        self.tokenizer, self.room = tokenizer, room
        self.templates: dict[str, Any] = {}  # by the knob that names them: read once
        self.begin = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
        self.end = [tokenizer.eos_id] if add_eos and tokenizer.eos_id is not None else []
        self.nothing = [tokenizer.eos_id or 0]  # what stands for a text without a token

    def __call__(self, text: str) -> np.ndarray:
        """int32 ids of the text alone."""
        return self.tokenizer.encode(text)


class Task(abc.ABC):
    """A kind of task; it holds nothing: `knobs` say which one it is. Arrays of the model are [B, T, ...] of a batch's rows, numpy
    arrays [n, ...] of one example.
    """

    # Whether its column "reference" has, at each token with `read` 1, the first of `outputs` by the run's initial parameters.
    compares = False

    @abc.abstractmethod
    def needs(self, knobs: TaskConfig) -> frozenset[str]:
        """Fields without which a record is a bad row of the training records."""

    def given(self, knobs: TaskConfig) -> frozenset[str]:
        """Those of them without which there is nothing to predict."""
        return self.needs(knobs)

    def record(self, knobs: TaskConfig, text: Any) -> Values:
        """The record of what a person has predicted: a text where that is enough, or a record. Raises `UserError`."""
        fields = self.given(knobs)
        if isinstance(text, str) and len(fields) == 1:
            return {next(iter(fields)): text}
        if not isinstance(text, Mapping) or (missing := sorted(fields - text.keys())):
            found = f"a record without {missing[0]!r}" if isinstance(text, Mapping) else f"a {type(text).__name__}"
            raise UserError(f"task.kind={knobs.kind} predicts records with {', '.join(sorted(fields))}, not {found}.")
        return text

    def text(self, knobs: TaskConfig, record: Values) -> str:
        """What a person would read of the record."""
        return "\n".join(str(record[name]) for name in sorted(self.given(knobs)))

    def settled(self, knobs: TaskConfig, records: Sequence[Values]) -> TaskConfig:
        """The knobs with what the training records say, such as the labels. Raises `UserError`."""
        return knobs

    def remarks(self, knobs: TaskConfig, records: Sequence[Values]) -> list[str]:
        """What a person should know of the training records, in sentences."""
        return []

    def check(self, knobs: TaskConfig, record: Values) -> str:
        """Why a record is a bad row, to go on from its place ("has ..."); "" where it is none."""
        return ""

    @abc.abstractmethod
    def encode(self, knobs: TaskConfig, record: Values, encoder: Encoder) -> list[Encoded]:
        """The examples of a record, each of at most `encoder.room` tokens or marked as cut; targets where the record has them."""

    def columns(self, knobs: TaskConfig) -> Mapping[str, np.ndarray]:
        """{column: an array [0, ...] of its shape and type}."""
        return {}

    def head(self, knobs: TaskConfig, model: ModelConfig) -> Mapping[str, Parameter]:
        """Parameters of the task's own; {}: it has none."""
        return {}

    @abc.abstractmethod
    def loss(self, knobs: TaskConfig, head: Any, hidden_BTD: jax.Array, batch: Batch, language: Language) -> Sums:
        """Of the examples of a batch; `head` has the task's parameters, `language` the decoder's way to logits over tokens."""

    @abc.abstractmethod
    def outputs(self, knobs: TaskConfig, head: Any, hidden_BTD: jax.Array, batch: Batch, language: Language) -> jax.Array:
        """float32 [B, T, K]: what `judged` needs to know of each place with `read` 1."""

    @abc.abstractmethod
    def judged(self, knobs: TaskConfig, record: Values, outputs: Sequence[np.ndarray]) -> Judged:
        """What the model says of a record: `outputs` has [places with `read` 1, K] of each of its examples."""

    def request(self, knobs: TaskConfig, record: Values, encoder: Encoder) -> Request | None:
        """What a model is asked that is to answer a record in writing, in at most `encoder.room` tokens; None: it is not."""
        return None

    def measures(self, knobs: TaskConfig, judged: Sequence[Judged]) -> dict[str, float]:
        """{name: value} over all records that somebody has judged before, of what is finite. A task states this or `measured`."""
        found = self.measured(knobs, judged)
        return {one.name.lower().replace(" ", "_"): one.value for one in found if math.isfinite(one.value)}

    def measured(self, knobs: TaskConfig, judged: Sequence[Judged], bootstrap: Bootstrap | None = None) -> list[Measured]:
        """The same as rows of a table, with intervals where `bootstrap` says how."""
        return [Measured(name, value, n=len(judged)) for name, value in self.measures(knobs, judged).items()]

    def report(self, knobs: TaskConfig, judged: Sequence[Judged]) -> str:
        """What the field's own package reports, its text unchanged; "" where there is none."""
        return ""

    def baselines(self, knobs: TaskConfig, train: Sequence[Values], new: Sequence[Judged]) -> dict[str, list[Judged]]:
        """{name: what a simple predictor says of the records of `new`}, to be measured beside the model."""
        return {}

    def row(self, knobs: TaskConfig, judged: Judged) -> dict[str, Any]:
        """{"predicted", "gold" where known, "probabilities" by label or "score" from 0 to 1} of a line of a predictions file."""
        return {"predicted": judged.predicted} | ({} if judged.gold is None else {"gold": judged.gold})

    @abc.abstractmethod
    def show(self, knobs: TaskConfig, judged: Judged) -> str:
        """A record, what is right and what was said, in a few lines."""


class Language(abc.ABC):
    """The decoder's own way from hidden states to tokens, for tasks that write."""

    @abc.abstractmethod
    def loss(self, hidden_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> Sums:
        """Cross-entropy as in pre-training, smoothing and z-loss included."""

    @abc.abstractmethod
    def nll(self, hidden_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
        """float32 [B, T]: nats of each target; to be differentiated too."""


_FIELD = re.compile(r"\{([^{}]+)\}")


def fields_of(template: str) -> frozenset[str]:
    """{"premise", "hypothesis"} of "{premise} {hypothesis}"."""
    return frozenset(_FIELD.findall(template))


def filled(template: str, record: Values) -> str:
    """The template with each {FIELD} replaced by what the record has there; other text, and what is put in, stays as it is."""
    return _FIELD.sub(lambda match: str(record[match[1]]), template)
