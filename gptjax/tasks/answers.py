"""The part of a text that answers a question: logits for its first and last token (SQuAD; Devlin et al., 2019)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig, TaskConfig
from gptjax.data.alignment import token_spans, trimmed
from gptjax.measures import answers as measures
from gptjax.measures.baselines import overlap_sentence, sliding_window
from gptjax.measures.bootstrap import Bootstrap
from gptjax.measures.measured import Measured
from gptjax.tasks.base import Batch, Encoded, Encoder, Judged, Language, Parameter, Sums, Task, Values, fields_of, filled, said_by
from gptjax.tasks.heads import affine, head_width


class Answers(Task):
    """A window is [bos] question, a part of the context, [eos]; its first token stands for there being no answer in it.

    What a window must know of its context to be read again stands in its columns: `from` and `to`, where each token's text begins
    and ends in it, in characters.
    """

    def needs(self, knobs: TaskConfig) -> frozenset[str]:
        return self.given(knobs) | {"answers"}

    def given(self, knobs: TaskConfig) -> frozenset[str]:
        return fields_of(knobs.question) | {knobs.context}

    def text(self, knobs: TaskConfig, record: Values) -> str:
        return filled(knobs.question, record) + str(record[knobs.context])

    def settled(self, knobs: TaskConfig, records: Sequence[Values]) -> TaskConfig:
        if knobs.unanswerable != "auto":
            return knobs
        none = any(not record["answers"] for record in records)
        return dataclasses.replace(knobs, unanswerable="yes" if none else "no")

    def check(self, knobs: TaskConfig, record: Values) -> str:
        context, given = record[knobs.context], record.get("answers")
        if not isinstance(context, str):
            return f"has no text in {knobs.context!r}"
        if given is None:
            return ""
        if not isinstance(given, list):
            return "has no list of answers"
        for answer in given:
            begin, text = (answer.get("answer_start"), answer.get("text")) if isinstance(answer, dict) else (None, None)
            if not isinstance(text, str) or not text.strip() or type(begin) is not int:
                return "has an answer that is not a text and its answer_start"
            if begin < 0 or context[begin : begin + len(text)] != text:
                return f"has the answer {text!r}, which does not stand at {begin} of its context"
        if not given and knobs.unanswerable == "no":
            return "has no answer, which task.unanswerable=no excludes"
        return ""

    def columns(self, knobs: TaskConfig) -> Mapping[str, np.ndarray]:
        return {name: np.zeros(0, np.int32) for name in ("start", "end", "from", "to")}

    def encode(self, knobs: TaskConfig, record: Values, encoder: Encoder) -> list[Encoded]:
        """A question that would take more than half of the row loses its end. The answer is the first of those given."""
        question, context = encoder(filled(knobs.question, record)), record[knobs.context]
        ids = encoder(context)
        spans = trimmed(context, token_spans(encoder.tokenizer, context, ids))
        kept = question[: encoder.room // 2]
        front = np.concatenate([encoder.begin, kept]).astype(np.int32)
        room = max(1, encoder.room - len(front) - len(encoder.end))
        start = end = -1
        if record.get("answers"):
            begin, text = record["answers"][0]["answer_start"], record["answers"][0]["text"]
            start = int(np.flatnonzero(spans[:, 1] > begin)[0]) if (spans[:, 1] > begin).any() else -1
            real = np.flatnonzero((spans[:, 0] < begin + len(text.rstrip())) & (spans[:, 1] > spans[:, 0]))
            end = int(real[-1]) if len(real) else -1
        found, at = [], 0
        while True:
            found.append(self._window(encoder, front, ids[at : at + room], spans[at : at + room], start - at, end - at, record))
            if at + room >= len(ids):
                break
            at += max(1, room - int(room * knobs.overlap))
        return [dataclasses.replace(window, cut=len(kept) < len(question)) for window in found]

    def _window(
        self, encoder: Encoder, front: np.ndarray, ids: np.ndarray, spans: np.ndarray, start: int, end: int, record: Values
    ) -> Encoded:
        tokens = np.concatenate([front, ids, encoder.end]).astype(np.int32)
        if not len(tokens):
            tokens = np.asarray(encoder.nothing, np.int32)
        columns = {name: np.zeros(len(tokens), np.int32) for name in ("start", "end", "from", "to")}
        inside = slice(len(front), len(front) + len(ids))
        columns["from"][inside] = spans[:, 0]
        columns["to"][inside] = spans[:, 1] * (spans[:, 1] > spans[:, 0])  # 0: no answer begins or ends here
        if record.get("answers") is not None:
            here = 0 <= start <= end < len(ids)
            columns["start"][len(front) + start if here else 0] = 1
            columns["end"][len(front) + end if here else 0] = 1
        return Encoded(tokens, np.ones(len(tokens), np.int32), columns)

    def head(self, knobs: TaskConfig, model: ModelConfig) -> Mapping[str, Parameter]:
        return {"kernel": Parameter((head_width(model), 2), ("embed", None)), "bias": Parameter((2,), (None,), zeros=True)}

    def loss(self, knobs: TaskConfig, head: Any, hidden_BTD: jax.Array, batch: Batch, language: Language) -> Sums:
        """The mean of the cross-entropies of start and end over the window's own tokens; a window counts 1."""
        logits_BT2 = affine(head, hidden_BTD)
        segments_BT = jnp.where(batch["read"] > 0, batch["segment_ids"], 0)
        wanted_BT2 = jnp.stack([batch["start"], batch["end"]], axis=-1).astype(jnp.float32)
        nats_BT2 = (segment_logsumexp(logits_BT2, segments_BT) - logits_BT2) * wanted_BT2
        nats = nats_BT2.sum() / 2
        return Sums(nats, nats, wanted_BT2[..., 0].sum())

    def outputs(self, knobs: TaskConfig, head: Any, hidden_BTD: jax.Array, batch: Batch, language: Language) -> jax.Array:
        """Two logits, then the four columns: whole numbers below 2**24 are exact in float32."""
        columns = [batch[name].astype(jnp.float32)[..., None] for name in ("start", "end", "from", "to")]
        return jnp.concatenate([affine(head, hidden_BTD), *columns], axis=-1)

    def judged(self, knobs: TaskConfig, record: Values, outputs: Sequence[np.ndarray]) -> Judged:
        """The best part of any window, by the sum of its logits; none where the first tokens' sum is that much higher."""
        nats, best, null = 0.0, (-np.inf, 0, 0), np.inf
        for found in outputs:
            start, end, is_start, is_end, begins, ends = found.astype(np.float64).T
            null = min(null, float(start[0] + end[0]))
            best = max(best, _best_part(start, end, begins, ends, knobs.max_answer), key=lambda part: part[0])
            for logits, wanted in ((start, is_start), (end, is_end)):
                nats += float((np.logaddexp.reduce(logits) - logits) @ wanted) / 2
        text = record[knobs.context][best[1] : best[2]]
        if knobs.unanswerable == "yes" and not null - best[0] <= knobs.null_threshold:
            text = ""
        more = {"score": best[0], "null_score": null, "answer_start": best[1] if text else -1}
        if record.get("answers") is None:
            return Judged(record, None, text, more=more)
        return Judged(record, [answer["text"] for answer in record["answers"]], text, nats, len(outputs), more)

    def measured(self, knobs: TaskConfig, judged: Sequence[Judged], bootstrap: Bootstrap | None = None) -> list[Measured]:
        golds, said = [one.gold for one in judged], [one.predicted for one in judged]
        if knobs.unanswerable == "yes":
            return measures.squad_v2(golds, said, normaliser=knobs.normaliser, bootstrap=bootstrap)
        return measures.squad(golds, said, knobs.normaliser, bootstrap)

    def baselines(self, knobs: TaskConfig, train: Sequence[Values], new: Sequence[Judged]) -> dict[str, list[Judged]]:
        questions = [filled(knobs.question, one.record) for one in new]
        contexts = [one.record[knobs.context] for one in new]
        return {
            name: said_by(new, predict(questions, contexts))
            for name, predict in {"overlap_sentence": overlap_sentence, "sliding_window": sliding_window}.items()
        }

    def row(self, knobs: TaskConfig, judged: Judged) -> dict[str, Any]:
        """Any of the gold answers is right; the score is F1."""
        row: dict[str, Any] = {"predicted": judged.predicted, "null_score": judged.more["null_score"] - judged.more["score"]}
        if judged.gold is None:
            return row
        version = 2 if knobs.unanswerable == "yes" else 1
        f1 = measures.scores(judged.gold, judged.predicted, knobs.normaliser, version)[1]
        return row | {"gold": judged.gold or "", "score": f1}

    def show(self, knobs: TaskConfig, judged: Judged) -> str:
        right = "" if judged.gold is None else f", right: {' / '.join(judged.gold) or 'no answer'}"
        return f"{filled(knobs.question, judged.record).strip()}\n-> {judged.predicted or 'no answer'}{right}"


def segment_logsumexp(x_BTK: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """[B, T, K]: at each place the log of the sum of exp(x) over the places of its own segment. What other segments of the row
    hold has no part in it, so that a packed example has the loss that it has alone.
    """
    same_BTS1 = (segments_BT[:, :, None] == segments_BT[:, None, :])[..., None]
    x_BTSK = jnp.where(same_BTS1, x_BTK[:, None], -jnp.inf)
    highest_BTK = jax.lax.stop_gradient(x_BTSK.max(axis=2))
    return jnp.log(jnp.exp(x_BTSK - highest_BTK[:, :, None]).sum(axis=2)) + highest_BTK


def _best_part(start: np.ndarray, end: np.ndarray, begins: np.ndarray, ends: np.ndarray, longest: int) -> tuple[float, int, int]:
    """(score, from, to) of the best part of a window's context of at most so many characters; (-inf, 0, 0) where it has none."""
    real = np.flatnonzero(ends > 0)
    if not len(real):
        return -np.inf, 0, 0
    sizes = ends[real][None, :] - begins[real][:, None]
    possible = (sizes > 0) & (sizes <= longest) & (real[:, None] <= real[None, :])
    scores = np.where(possible, start[real][:, None] + end[real][None, :], -np.inf)
    first, last = np.unravel_index(int(scores.argmax()), scores.shape)
    return (float(scores[first, last]), int(begins[real[first]]), int(ends[real[last]])) if possible.any() else (-np.inf, 0, 0)
