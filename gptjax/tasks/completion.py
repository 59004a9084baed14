"""Text to text by template: what stands in the prompt is given, and the completion alone costs anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gptjax.config import TaskConfig
from gptjax.tasks.base import Batch, Encoded, Encoder, Judged, Language, Sums, Task, Values, fields_of, filled
from gptjax.tasks.heads import next_tokens


class Completion(Task):
    def needs(self, knobs: TaskConfig) -> frozenset[str]:
        return fields_of(knobs.prompt) | fields_of(knobs.completion)

    def encode(self, knobs: TaskConfig, record: Values, encoder: Encoder) -> list[Encoded]:
        """[bos] prompt completion [eos]; where there is no room the prompt loses its beginning, then the completion its end.

        `read` is 1 at the tokens of the completion.
        """
        prompt, completion = (encoder(filled(template, record)).tolist() for template in (knobs.prompt, knobs.completion))
        written = [*completion, *encoder.end]
        kept = written[: encoder.room - len(encoder.begin)]
        room = encoder.room - len(encoder.begin) - len(kept)
        given = [*encoder.begin, *prompt[max(0, len(prompt) - room) :]]
        read = np.repeat(np.asarray([0, 1], np.int32), [len(given), len(kept)])
        cut = len(prompt) > room or len(kept) < len(written)
        return [Encoded(np.asarray([*given, *kept], np.int32), read, {}, cut)]

    def loss(self, knobs: TaskConfig, head: Any, hidden_BTD: jax.Array, batch: Batch, language: Language) -> Sums:
        targets_BT, weights_BT = next_tokens(batch)
        return language.loss(hidden_BTD, targets_BT, weights_BT)

    def outputs(self, knobs: TaskConfig, head: Any, hidden_BTD: jax.Array, batch: Batch, language: Language) -> jax.Array:
        """Nats of each token, at its own place."""
        targets_BT, weights_BT = next_tokens(batch)
        nats_BT = language.nll(hidden_BTD, targets_BT) * weights_BT
        return jax.numpy.pad(nats_BT[:, :-1], ((0, 0), (1, 0)))[..., None]

    def judged(self, knobs: TaskConfig, record: Values, outputs: Sequence[np.ndarray]) -> Judged:
        nats = float(outputs[0].astype(np.float64).sum())
        return Judged(record, filled(knobs.completion, record), None, nats, len(outputs[0]))

    def measures(self, knobs: TaskConfig, judged: Sequence[Judged]) -> dict[str, float]:
        nats, tokens = sum(one.nats for one in judged), sum(one.weight for one in judged)
        return {"perplexity": math.exp(min(nats / tokens, 700.0)), "tokens": tokens}

    def show(self, knobs: TaskConfig, judged: Judged) -> str:
        return f"{filled(knobs.prompt, judged.record)}\n-> {judged.gold} ({judged.nats / max(judged.weight, 1):.3f} nats a token)"
