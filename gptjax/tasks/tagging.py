"""A tag for each word, such as its part in a named entity: read off the hidden state of one of the word's tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig, TaskConfig, UserError
from gptjax.data.alignment import word_tokens
from gptjax.measures import packages, tagging
from gptjax.measures.baselines import most_frequent_tag, outside
from gptjax.measures.bootstrap import Bootstrap
from gptjax.measures.measured import Measured
from gptjax.tasks import tags as tags_lib
from gptjax.tasks.base import Batch, Encoded, Encoder, Judged, Language, Parameter, Sums, Task, Values, said_by
from gptjax.tasks.heads import affine, head_width, label_nats


def _trained(knobs: TaskConfig) -> str:
    return knobs.scheme if knobs.train_scheme == "same" else knobs.train_scheme


class Tagging(Task):
    def needs(self, knobs: TaskConfig) -> frozenset[str]:
        return frozenset({knobs.words, knobs.tags})

    def given(self, knobs: TaskConfig) -> frozenset[str]:
        return frozenset({knobs.words})

    def record(self, knobs: TaskConfig, text: Any) -> Values:
        """A list of words, or a record; a text is cut at blanks, or where `task.join` is empty into its characters."""
        if isinstance(text, str):
            text = text.split() if knobs.join.isspace() else text.split(knobs.join) if knobs.join else list(text)
        return {knobs.words: [str(word) for word in text]} if not isinstance(text, Mapping) else super().record(knobs, text)

    def text(self, knobs: TaskConfig, record: Values) -> str:
        return knobs.join.join(record[knobs.words])

    def settled(self, knobs: TaskConfig, records: Sequence[Values]) -> TaskConfig:
        every = {tag for record in records for tag in record[knobs.tags]}
        if knobs.scheme == "none":
            labels = knobs.labels or tuple(sorted(every))
        else:
            packages.load("seqeval.metrics")  # asked for before anything is compiled, not at the first evaluation
            labels = knobs.labels or tags_lib.all_tags((tag.partition("-")[2] for tag in every - {"O"}), _trained(knobs))
        if len(labels) < 2:
            raise UserError(
                f"task.kind=tagging needs two tags at least, and the training records have {', '.join(labels) or 'none'}."
            )
        return dataclasses.replace(knobs, labels=tuple(labels))

    def remarks(self, knobs: TaskConfig, records: Sequence[Values]) -> list[str]:
        said = {tag for record in records for tag in self._gold(knobs, record) or []}
        unseen = [tag for tag in knobs.labels if tag not in said]
        repaired = 0
        if knobs.scheme != "none":
            repaired = sum(bool(tags_lib.fault(record[knobs.tags], knobs.scheme)) for record in records)
        found = [f"task.labels: no training record has {', '.join(unseen)}."] if unseen else []
        return found + ([f"{repaired} sentences are not of task.scheme={knobs.scheme} and were repaired."] if repaired else [])

    def check(self, knobs: TaskConfig, record: Values) -> str:
        words, tags = record[knobs.words], record.get(knobs.tags)
        if not isinstance(words, list) or not words or not all(isinstance(word, str) and word.strip() for word in words):
            return f"has no list of words in {knobs.words!r}"
        if tags is None:
            return ""
        if not isinstance(tags, list) or len(tags) != len(words) or not all(isinstance(tag, str) for tag in tags):
            return f"has {len(words)} words, and not as many tags in {knobs.tags!r}"
        if knobs.scheme != "none":
            fault = tags_lib.unknown_tag if knobs.malformed == "repair" else tags_lib.fault
            if reason := fault(tags, knobs.scheme):
                return reason
        for tag in self._gold(knobs, record) or []:
            if knobs.labels and tag not in knobs.labels:
                return f"has the tag {tag!r}, which is none of {', '.join(knobs.labels)}"
        return ""

    def _gold(self, knobs: TaskConfig, record: Values, scheme: str = "") -> list[str] | None:
        """The record's tags in `scheme`, by default the one that is trained."""
        tags, scheme = record.get(knobs.tags), scheme or _trained(knobs)
        return tags if tags is None or scheme == "none" else tags_lib.converted(tags, scheme)

    def columns(self, knobs: TaskConfig) -> Mapping[str, np.ndarray]:
        return {"tag": np.zeros(0, np.int32)}

    def encode(self, knobs: TaskConfig, record: Values, encoder: Encoder) -> list[Encoded]:
        """[bos] words [eos]. Of a sentence that is longer than a row, windows of whole words: each is new in one of them, where
        `read` is 1, and up to `task.overlap` of the row is words that came before. Only a word longer than a row is cut.
        """
        ids, spans = word_tokens(encoder.tokenizer, record[knobs.words], knobs.join)
        tags = self._gold(knobs, record) or [""] * len(spans)
        numbers = np.asarray([1 + knobs.labels.index(tag) if tag else 0 for tag in tags], np.int32)
        room = max(1, encoder.room - len(encoder.begin) - len(encoder.end))
        begins = np.concatenate([[0], spans[:-1, 1]])  # of a word with what stands before it
        found, new = [], 0
        while new < len(spans):
            budget = 0 if new == 0 else min(int(room * knobs.overlap), max(0, room - int(spans[new, 1] - begins[new])))
            first = int(np.searchsorted(begins[: new + 1], begins[new] - budget))
            behind = max(new + 1, int(np.searchsorted(spans[:, 1], begins[first] + room, side="right")))
            words = slice(first, behind)
            found.append(self._window(knobs, encoder, ids, spans[words], numbers[words], int(begins[first]), new - first))
            new = behind
        return found

    def _window(
        self, knobs: TaskConfig, encoder: Encoder, ids: np.ndarray, spans: np.ndarray, numbers: np.ndarray, start: int, known: int
    ) -> Encoded:
        """The words at `spans`, of which the first `known` are there to be seen only; the window's tokens begin at `start`."""
        room = max(1, encoder.room - len(encoder.begin) - len(encoder.end))
        text, cut = ids[start : spans[-1, 1]][:room], int(spans[-1, 1]) - start > room
        tokens = np.concatenate([encoder.begin, text, encoder.end]).astype(np.int32)
        read, tag = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.int32)
        for (first, behind), number in zip(spans[known:], numbers[known:], strict=True):
            a, b = (min(int(place) - start, len(text) - 1) + len(encoder.begin) for place in (first, behind - 1))
            read[a if knobs.word_token == "first" else b] = 1
            tag[{"first": slice(a, a + 1), "last": slice(b, b + 1), "all": slice(a, b + 1)}[knobs.word_token]] = number
        return Encoded(tokens, read, {"tag": tag}, cut)

    def head(self, knobs: TaskConfig, model: ModelConfig) -> Mapping[str, Parameter]:
        count = len(knobs.labels)
        return {
            "kernel": Parameter((head_width(model), count), ("embed", None)),
            "bias": Parameter((count,), (None,), zeros=True),
        }

    def loss(self, knobs: TaskConfig, head: Any, hidden_BTD: jax.Array, batch: Batch, language: Language) -> Sums:
        """Cross-entropy of the tags; a token that has one counts 1."""
        nats = label_nats(affine(head, hidden_BTD), batch["tag"]).sum()
        return Sums(nats, nats, (batch["tag"] > 0).astype(jnp.float32).sum())

    def outputs(self, knobs: TaskConfig, head: Any, hidden_BTD: jax.Array, batch: Batch, language: Language) -> jax.Array:
        return affine(head, hidden_BTD)

    def judged(self, knobs: TaskConfig, record: Values, outputs: Sequence[np.ndarray]) -> Judged:
        """Tags in the files' scheme; a word counts 1, whatever `task.word_token` is."""
        logits_WK = np.concatenate(outputs).astype(np.float64)
        log_p_WK = logits_WK - np.logaddexp.reduce(logits_WK, axis=-1, keepdims=True)
        said = [knobs.labels[number] for number in log_p_WK.argmax(axis=-1)]
        if _trained(knobs) != knobs.scheme:
            said = tags_lib.converted(said, knobs.scheme)
        gold, more = self._gold(knobs, record), {"probabilities": np.exp(log_p_WK)}
        if gold is None:
            return Judged(record, None, said, more=more)
        nats = -sum(float(log_p_K[knobs.labels.index(tag)]) for log_p_K, tag in zip(log_p_WK, gold, strict=True))
        return Judged(record, self._gold(knobs, record, knobs.scheme), said, nats, len(gold), more)

    def measured(self, knobs: TaskConfig, judged: Sequence[Judged], bootstrap: Bootstrap | None = None) -> list[Measured]:
        gold, said = [one.gold for one in judged], [one.predicted for one in judged]
        accuracy = tagging.token_accuracy(gold, said, bootstrap)
        if knobs.scheme == "none":
            return [accuracy]
        return [*tagging.entity_scores(gold, said, scheme=knobs.scheme, bootstrap=bootstrap), accuracy]

    def report(self, knobs: TaskConfig, judged: Sequence[Judged]) -> str:
        gold, said = [one.gold for one in judged], [one.predicted for one in judged]
        if knobs.scheme == "none" or not any(tag != "O" for row in (*gold, *said) for tag in row):
            return ""
        return tagging.report(gold, said, scheme=knobs.scheme).text

    def baselines(self, knobs: TaskConfig, train: Sequence[Values], new: Sequence[Judged]) -> dict[str, list[Judged]]:
        words, tags = [record[knobs.words] for record in train], [record[knobs.tags] for record in train]
        wanted = [one.record[knobs.words] for one in new]
        found = {"most_frequent_tag": most_frequent_tag(words, tags, wanted)}
        if knobs.scheme != "none":
            found["outside"] = outside(words, tags, wanted)
        return {name: said_by(new, tags) for name, tags in found.items()}

    def row(self, knobs: TaskConfig, judged: Judged) -> dict[str, Any]:
        """Tags with blanks between them; the score is the share of words that are right."""
        row: dict[str, Any] = {"predicted": " ".join(judged.predicted)}
        if judged.gold is None:
            return row
        right = np.mean([a == b for a, b in zip(judged.gold, judged.predicted, strict=True)])
        return row | {"gold": " ".join(judged.gold), "score": float(right)}

    def show(self, knobs: TaskConfig, judged: Judged) -> str:
        columns = [judged.record[knobs.words], judged.predicted, *([] if judged.gold is None else [judged.gold])]
        return "\n".join(" ".join(row) for row in zip(*columns, strict=True))
