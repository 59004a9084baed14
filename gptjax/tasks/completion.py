"""Text to text by template: what stands in the prompt is given, and the completion alone costs anything.

Prompt and completion are encoded apart, so that no token reaches over the border between them, neither in training nor when the
model is asked: whoever prompts it has no completion to merge with. A model pre-trained with byte pairs has mostly seen a space as
the beginning of the word behind it: let the completion begin with the space, not the prompt end with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gptjax.config import TaskConfig
from gptjax.measures.baselines import lead_3, sentences
from gptjax.measures.bootstrap import Bootstrap
from gptjax.measures.measured import Measured
from gptjax.tasks.base import Batch, Encoded, Encoder, Judged, Language, Request, Sums, Task, Values, fields_of, filled
from gptjax.tasks.heads import next_tokens, one_later
from gptjax.tasks.writing import instead, neighbours, rows


class Completion(Task):
    def needs(self, knobs: TaskConfig) -> frozenset[str]:
        return fields_of(knobs.prompt) | fields_of(knobs.completion)

    def check(self, knobs: TaskConfig, record: Values) -> str:
        lists = [name for name in sorted(fields_of(knobs.completion)) if isinstance(record[name], list)]
        if len(lists) > 1:
            return f"has lists in {' and '.join(lists)}, of which a completion can hold one"
        for name in lists:
            if not record[name]:
                return f"has no text in its list {name!r}"
            if any(not isinstance(_text(item), str) for item in record[name]):
                return f"has something else than texts in its list {name!r}"
        return "" if all(text.strip() for text in completions(knobs, record)) else "has an empty completion"

    def encode(self, knobs: TaskConfig, record: Values, encoder: Encoder) -> list[Encoded]:
        """[bos] prompt completion [eos] of each completion; where there is no room the prompt loses its beginning, then the
        completion its end. `read` is 1 at the tokens of the completion.
        """
        prompt = encoder(filled(knobs.prompt, record)).tolist()
        found = [[*encoder(text).tolist(), *encoder.end] for text in completions(knobs, record)]
        return [written_behind(encoder.begin, prompt, written, encoder.room) for written in found]

    def loss(self, knobs: TaskConfig, head: Any, hidden_BTD: jax.Array, batch: Batch, language: Language) -> Sums:
        targets_BT, weights_BT = next_tokens(batch)
        return language.loss(hidden_BTD, targets_BT, weights_BT)

    def outputs(self, knobs: TaskConfig, head: Any, hidden_BTD: jax.Array, batch: Batch, language: Language) -> jax.Array:
        """[B, T, 2]: nats of each token, at its own place, and whether it counts: a first token, behind nothing, does not."""
        targets_BT, weights_BT = next_tokens(batch)
        return jax.numpy.stack([one_later(language.nll(hidden_BTD, targets_BT) * weights_BT), one_later(weights_BT)], axis=-1)

    def judged(self, knobs: TaskConfig, record: Values, outputs: Sequence[np.ndarray]) -> Judged:
        return judged_by_nats(record, completions(knobs, record), outputs)

    def request(self, knobs: TaskConfig, record: Values, encoder: Encoder) -> Request:
        prompt = filled(knobs.prompt, record)
        ids = asked(encoder.begin, encoder(prompt).tolist(), encoder.room - knobs.max_new_tokens)
        return Request(ids, prompt, tuple(completions(knobs, record)))

    def measures(self, knobs: TaskConfig, judged: Sequence[Judged]) -> dict[str, float]:
        return perplexity(judged)

    def measured(self, knobs: TaskConfig, judged: Sequence[Judged], bootstrap: Bootstrap | None = None) -> list[Measured]:
        return rows(knobs, judged, bootstrap)

    def baselines(self, knobs: TaskConfig, train: Sequence[Values], new: Sequence[Judged]) -> dict[str, list[Judged]]:
        known = [(filled(knobs.prompt, record), completions(knobs, record)[0]) for record in train]
        return neighbours(known, new) | _leads(knobs, new)

    def show(self, knobs: TaskConfig, judged: Judged) -> str:
        return shown(filled(knobs.prompt, judged.record), judged)


def completions(knobs: TaskConfig, record: Values) -> list[str]:
    """The texts that are right, each once; several where a field of the template has a list."""
    many = next((name for name in sorted(fields_of(knobs.completion)) if isinstance(record.get(name), list)), None)
    if many is None:
        return [filled(knobs.completion, record)]
    texts = [filled(knobs.completion, {**record, many: _text(item)}) for item in record[many]]
    return list(dict.fromkeys(texts))


def _leads(knobs: TaskConfig, new: Sequence[Judged]) -> dict[str, list[Judged]]:
    """The first three sentences of the longest text that the prompts show, where most have more: what a summary must beat."""
    asked = [one for one in new if one.written is not None]
    texts = [max((str(one.record[name]) for name in sorted(fields_of(knobs.prompt))), key=len, default="") for one in asked]
    if 2 * sum(len(sentences(text)) > 3 for text in texts) <= len(texts):
        return {}
    return {"lead_3": instead(asked, lead_3(texts))}


def _text(item: Any) -> Any:
    """A text, or that of one of SQuAD's answers."""
    return item.get("text") if isinstance(item, dict) else item


def written_behind(begin: list[int], prompt: list[int], written: list[int], room: int) -> Encoded:
    """An example in which only `written` counts."""
    kept = written[: max(0, room - len(begin))]
    left = room - len(begin) - len(kept)
    given = [*begin, *prompt[max(0, len(prompt) - left) :]][:room]
    read = np.repeat(np.asarray([0, 1], np.int32), [len(given), len(kept)])
    cut = len(prompt) > left or len(kept) < len(written)
    return Encoded(np.asarray([*given, *kept], np.int32), read, {}, cut)


def asked(begin: list[int], prompt: list[int], room: int) -> np.ndarray:
    """int32 ids of a prompt's end, of at most `room` tokens."""
    return np.asarray([*begin, *prompt[max(0, len(prompt) - max(0, room - len(begin))) :]], np.int32)


def judged_by_nats(record: Values, gold: Any, outputs: Sequence[np.ndarray]) -> Judged:
    """What `Completion.outputs` says of the examples of a record."""
    sums = sum((own.astype(np.float64).sum(axis=0) for own in outputs), np.zeros(2))
    return Judged(record, gold, None, float(sums[0]), float(sums[1]))


def perplexity(judged: Sequence[Judged]) -> dict[str, float]:
    nats, tokens = sum(one.nats for one in judged), sum(one.weight for one in judged)
    return {"perplexity": math.exp(min(nats / tokens, 700.0)), "tokens": tokens}


def shown(prompt: str, judged: Judged) -> str:
    """What was given, what the model wrote where it was asked, what is right, and how dear that is to the model."""
    lines = [prompt]
    if judged.predicted is not None:
        lines.append(f"-> {judged.predicted}")
    right = " | ".join(judged.gold)
    return "\n".join([*lines, f"right: {right} ({judged.nats / max(judged.weight, 1):.3f} nats a token)"])
