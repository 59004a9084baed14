"""The better of two completions of a prompt: direct preference optimisation (Rafailov et al., 2023).

A pair is one example of two parts, [bos] prompt chosen [eos] and [bos] prompt rejected [eos], in one row, which don't see each
other; so a pair is never torn over two batches. With r the sum over a completion's tokens of log p - log p0, p0 being the model
that the run starts from, and h = r(chosen) - r(rejected), the loss of a pair is

    sigmoid: -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h), s being `preference_smoothing` (Mitchell, 2023)
    ipo: (h - 1 / (2 beta))**2 (Azar et al., 2023)

p0 is asked once, at the run's start (train/reference.py): its nats are a column beside the tokens, and no second model is held.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import TaskConfig
from gptjax.data.records import chat_fault
from gptjax.tasks.base import Batch, Encoded, Encoder, Judged, Language, Sums, Task, Values, fields_of, filled
from gptjax.tasks.chat import Messages, learnt, template_of, trimmed, without_front
from gptjax.tasks.completion import written_behind
from gptjax.tasks.heads import next_tokens, one_later

SIDES = ("chosen", "rejected")
REWARDS = ("chosen_reward", "rejected_reward")
_BEGIN, _END = 1, 2  # in the column "bounds"


class Preference(Task):
    compares = True

    def needs(self, knobs: TaskConfig) -> frozenset[str]:
        return fields_of(knobs.chosen) | fields_of(knobs.rejected)  # a conversation may have its prompt in itself

    def check(self, knobs: TaskConfig, record: Values) -> str:
        texts: list[Any] = []
        for name in SIDES:
            messages = _messages(knobs, record, name)
            if messages is None:
                texts.append(filled(getattr(knobs, name), record))
                if not texts[-1].strip():
                    return f"has an empty {name} completion"
                continue
            if fault := chat_fault({"messages": messages}):
                return f"{fault} in its {name} conversation"
            if messages[-1]["role"] != "assistant":
                return f"has a {name} conversation that ends with a turn of {messages[-1]['role']!r}, not of 'assistant'"
            texts.append(messages)
        if isinstance(texts[0], str) != isinstance(texts[1], str):
            return "has a text on one side and a conversation on the other"
        if isinstance(texts[0], str):
            if missing := sorted(fields_of(knobs.prompt) - record.keys()):
                return f"has no field {missing[0]!r}"
        elif texts[0][:-1] != texts[1][:-1]:
            return "has two conversations that differ in more than their last turn"
        return "has the same completion as chosen and rejected" if texts[0] == texts[1] else ""

    def columns(self, knobs: TaskConfig) -> Mapping[str, np.ndarray]:
        return {"side": np.zeros(0, np.int32), "bounds": np.zeros(0, np.int32), "reference": np.zeros(0, np.float32)}

    def encode(self, knobs: TaskConfig, record: Values, encoder: Encoder) -> list[Encoded]:
        """`read` is 1 at the tokens of both completions; column "side" is 1 at those of the chosen one, -1 at the other's, and
        "bounds" marks the first and the last token of the pair.

        Where there is no room both parts lose the same from the prompt's beginning, then completions lose their ends.
        """
        parts = _parts(knobs, record, encoder)
        chosen, rejected = (len(part.tokens) for part in parts)
        read = np.concatenate([part.read for part in parts])
        bounds = np.zeros(chosen + rejected, np.int32)
        bounds[0], bounds[-1] = _BEGIN, _END
        columns = {
            "side": read * np.repeat(np.asarray([1, -1], np.int32), [chosen, rejected]),
            "bounds": bounds,
            "reference": np.zeros(len(read), np.float32),
        }
        tokens = np.concatenate([part.tokens for part in parts])
        return [Encoded(tokens, read, columns, any(part.cut for part in parts), (chosen, rejected))]

    def loss(self, knobs: TaskConfig, head: Any, hidden_BTD: jax.Array, batch: Batch, language: Language) -> Sums:
        targets_BT, weights_BT = next_tokens(batch)
        nats_BT = one_later(language.nll(hidden_BTD, targets_BT) * weights_BT)
        gains_BT = batch["side"] * (batch["reference"] - nats_BT)
        margins_BT = _sums_of_pairs(gains_BT, batch["bounds"] == _BEGIN)  # at the last token: of the whole pair
        ends_BT = (batch["bounds"] == _END).astype(jnp.float32)
        loss = (_losses(knobs, margins_BT, jax.nn.log_sigmoid) * ends_BT).sum()
        return Sums(loss, loss, ends_BT.sum())

    def outputs(self, knobs: TaskConfig, head: Any, hidden_BTD: jax.Array, batch: Batch, language: Language) -> jax.Array:
        """[B, T, 3]: nats of each token, at its own place, the initial model's, and the side that it is on."""
        targets_BT, weights_BT = next_tokens(batch)
        nats_BT = one_later(language.nll(hidden_BTD, targets_BT) * weights_BT)
        return jnp.stack([nats_BT, batch["reference"], batch["side"].astype(jnp.float32)], axis=-1)

    def judged(self, knobs: TaskConfig, record: Values, outputs: Sequence[np.ndarray]) -> Judged:
        nats, reference, side = outputs[0].astype(np.float64).T
        rewards = [float((reference - nats)[side == sign].sum()) for sign in (1, -1)]
        loss = float(_losses(knobs, np.float64(rewards[0] - rewards[1]), lambda x: -np.logaddexp(0, -x)))
        said = "chosen" if rewards[0] > rewards[1] else "rejected"
        more = dict(zip(REWARDS, (knobs.preference_beta * one for one in rewards), strict=True))
        return Judged(record, "chosen", said, loss, 1.0, more)

    def measures(self, knobs: TaskConfig, judged: Sequence[Judged]) -> dict[str, float]:
        """Rewards are beta * r, as in the paper; a pair that is level counts as wrong."""
        rewards = {name: float(np.mean([one.more[name] for one in judged])) for name in REWARDS}
        accuracy = float(np.mean([one.predicted == "chosen" for one in judged]))
        return {"accuracy": accuracy, "margin": rewards[REWARDS[0]] - rewards[REWARDS[1]]} | rewards

    def show(self, knobs: TaskConfig, judged: Judged) -> str:
        said = {name: _shown(knobs, judged.record, name) for name in ("prompt", *SIDES)}
        rewards = " and ".join(f"{judged.more[name]:+.3f}" for name in REWARDS)
        return f"{said['prompt']}\n-> chosen: {said['chosen']}\n-> rejected: {said['rejected']}\nrewards {rewards}"


def _losses(knobs: TaskConfig, margins: Any, log_sigmoid: Any) -> Any:
    beta, s = knobs.preference_beta, knobs.preference_smoothing
    if knobs.preference_loss == "ipo":
        return (margins - 1 / (2 * beta)) ** 2
    return -(1 - s) * log_sigmoid(beta * margins) - s * log_sigmoid(-beta * margins)


def _sums_of_pairs(x_BT: jax.Array, begins_BT: jax.Array) -> jax.Array:
    """Sums from the last place with `begins_BT` up to each place; added as a tree, in the same order on all devices."""

    def together(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jnp.where(right[1], right[0], left[0] + right[0]), left[1] | right[1]

    return jax.lax.associative_scan(together, (x_BT, begins_BT), axis=1)[0]


def _messages(knobs: TaskConfig, record: Values, name: str) -> list[Any] | None:
    """The conversation of one side, its prompt included; None where the sides are texts."""
    fields = fields_of(getattr(knobs, name))
    own = record[next(iter(fields))] if len(fields) == 1 else None
    if not isinstance(own, list):
        return None
    before: list[Any] = next((record[field] for field in fields_of(knobs.prompt) if isinstance(record.get(field), list)), [])
    return own if own[: len(before)] == before else [*before, *own]


def _parts(knobs: TaskConfig, record: Values, encoder: Encoder) -> list[Encoded]:
    """Both sides, each behind the same prompt, together in `encoder.room`."""
    conversations = [messages for name in SIDES if (messages := _messages(knobs, record, name)) is not None]
    if conversations:
        return _of_conversations(knobs, conversations, encoder)
    prompt = encoder(filled(knobs.prompt, record)).tolist()
    written = [[*encoder(filled(getattr(knobs, name), record)).tolist(), *encoder.end] for name in SIDES]
    left = encoder.room - 2 * len(encoder.begin) - sum(map(len, written))
    kept = min(len(prompt), max(0, left // 2))
    room = encoder.room if left >= 0 else encoder.room // 2
    parts = [written_behind(encoder.begin, prompt[len(prompt) - kept :], one, room) for one in written]
    return [dataclasses.replace(part, cut=part.cut or kept < len(prompt)) for part in parts]


def _of_conversations(knobs: TaskConfig, conversations: list[list[Any]], encoder: Encoder) -> list[Encoded]:
    """Only the last turn is learnt; both lose the same turns from the front."""
    template, (*before, _), last = template_of(knobs, encoder), conversations[0], [messages[-1] for messages in conversations]

    def encode(kept: Messages) -> list[Encoded]:
        return [learnt(knobs, template, [*kept[:-1], turn], encoder, last=True) for turn in last]

    parts, cut = without_front([*before, last[0]], encode, encoder.room)
    fits = sum(len(part.tokens) for part in parts) <= encoder.room
    return [trimmed(part, encoder.room if fits else encoder.room // 2, cut) for part in parts]


def _shown(knobs: TaskConfig, record: Values, name: str) -> str:
    if name != "prompt" and (messages := _messages(knobs, record, name)) is not None:
        return str(messages[-1]["content"])
    if name == "prompt" and (messages := _messages(knobs, record, "chosen")) is not None:
        return "\n".join(f"{message['role']}: {message['content']}" for message in messages[:-1])
    return filled(getattr(knobs, name), record)
