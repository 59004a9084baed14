"""Conversations over many turns, by a chat template: what the assistant says is learnt, and the rest given.

What is too long loses whole turns from its front, a system message kept: an exchange begins with a turn of the user. Which tokens
are the assistant's is exact (generate/chat.py), and the model is asked with the same tokens before an answer as in training.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gptjax.config import TaskConfig, UserError
from gptjax.data.records import chat_fault
from gptjax.generate.chat import ASSISTANT, PLAIN, ChatTemplate, PlainTemplate
from gptjax.measures.bootstrap import Bootstrap
from gptjax.measures.measured import Measured
from gptjax.tasks.base import Batch, Encoded, Encoder, Judged, Language, Request, Sums, Task, Values
from gptjax.tasks.completion import Completion, judged_by_nats, perplexity, shown
from gptjax.tasks.writing import neighbours, rows

Messages = Sequence[Mapping[str, Any]]
Template = ChatTemplate | PlainTemplate


class Chat(Task):
    def needs(self, knobs: TaskConfig) -> frozenset[str]:
        return frozenset({knobs.messages})

    def check(self, knobs: TaskConfig, record: Values) -> str:
        if fault := chat_fault({"messages": record[knobs.messages]}):
            return fault.replace('"messages"', f'"{knobs.messages}"')
        answers = [message["content"] for message in record[knobs.messages] if message["role"] == ASSISTANT]
        if not answers:
            return f"has no turn of {ASSISTANT!r} to learn"
        learnt = answers[-1:] if knobs.turns == "last" else answers
        return "" if all(text.strip() for text in learnt) else f"has an empty turn of {ASSISTANT!r}"

    def encode(self, knobs: TaskConfig, record: Values, encoder: Encoder) -> list[Encoded]:
        """`read` is 1 at what the assistant wrote. What follows its last turn is left out."""
        template, messages = template_of(knobs, encoder), answered(record[knobs.messages])
        parts, cut = without_front(messages, lambda kept: [learnt(knobs, template, kept, encoder)], encoder.room)
        return [trimmed(parts[0], encoder.room, cut)]

    def loss(self, knobs: TaskConfig, head: Any, hidden_BTD: jax.Array, batch: Batch, language: Language) -> Sums:
        return _AS_TEXT.loss(knobs, head, hidden_BTD, batch, language)

    def outputs(self, knobs: TaskConfig, head: Any, hidden_BTD: jax.Array, batch: Batch, language: Language) -> jax.Array:
        return _AS_TEXT.outputs(knobs, head, hidden_BTD, batch, language)

    def judged(self, knobs: TaskConfig, record: Values, outputs: Sequence[np.ndarray]) -> Judged:
        return judged_by_nats(record, [answered(record[knobs.messages])[-1]["content"]], outputs)

    def request(self, knobs: TaskConfig, record: Values, encoder: Encoder) -> Request:
        """What was said before the assistant's last turn."""
        *before, last = answered(record[knobs.messages])
        template, room = template_of(knobs, encoder), encoder.room - knobs.max_new_tokens
        for start in starts(before):
            ids = template.encode(beginning_at(before, start), bool(encoder.begin))
            if len(ids) <= room:
                break
        return Request(ids[-room:], said(before), (last["content"],))

    def measures(self, knobs: TaskConfig, judged: Sequence[Judged]) -> dict[str, float]:
        return perplexity(judged)

    def measured(self, knobs: TaskConfig, judged: Sequence[Judged], bootstrap: Bootstrap | None = None) -> list[Measured]:
        return rows(knobs, judged, bootstrap)

    def baselines(self, knobs: TaskConfig, train: Sequence[Values], new: Sequence[Judged]) -> dict[str, list[Judged]]:
        talks = [answered(record[knobs.messages]) for record in train]
        return neighbours([(said(talk[:-1]), talk[-1]["content"]) for talk in talks], new)

    def show(self, knobs: TaskConfig, judged: Judged) -> str:
        return shown(said(answered(judged.record[knobs.messages])[:-1]), judged)


_AS_TEXT = Completion()


def template_of(knobs: TaskConfig, encoder: Encoder) -> Template:
    """How conversations are written. Raises `UserError`."""
    if knobs.chat_template not in encoder.templates:
        encoder.templates[knobs.chat_template] = load_template(knobs, encoder.tokenizer)
    return encoder.templates[knobs.chat_template]


def load_template(knobs: TaskConfig, tokenizer: Any) -> Template:
    """The template that `knobs.chat_template` names. Raises `UserError`."""
    source = template_source(knobs)
    if source is None and "default" not in tokenizer.chat_templates():
        raise UserError("the tokenizer has no chat template; set task.chat_template to plain, or to a Jinja file.")
    if source in (None, PLAIN):
        return ChatTemplate.of(tokenizer, source)
    return ChatTemplate(source, tokenizer, f"the chat template {knobs.chat_template}")


def template_source(knobs: TaskConfig) -> str | None:
    """What `ChatTemplate.of` takes: the text of the file, PLAIN, or None for the tokenizer's own. Raises `UserError`."""
    name = knobs.chat_template
    if name in ("", PLAIN):
        return name or None
    try:
        return pathlib.Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"task.chat_template={name} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def learnt(knobs: TaskConfig, template: Template, messages: Messages, encoder: Encoder, last: bool = False) -> Encoded:
    """A whole conversation; `read` is 1 at what is to be learnt of it. Raises `UserError`."""
    tokens, written = template.encode_turns(messages, bool(encoder.begin))
    if not written.any():
        raise UserError(f"the chat template writes nothing of what {ASSISTANT!r} says.")
    read = written == written.max() if last or knobs.turns == "last" else written > 0
    return Encoded(tokens, read.astype(np.int32), {})


def answered(messages: Messages) -> Messages:
    """The conversation up to the assistant's last turn."""
    return messages[: 1 + max(number for number, message in enumerate(messages) if message["role"] == ASSISTANT)]


def starts(messages: Messages) -> list[int]:
    """Where a conversation may begin, behind a system message: with its first message, or a later one of the user."""
    first = int(bool(messages) and messages[0]["role"] == "system")
    return [first, *(number for number in range(first + 1, len(messages)) if messages[number]["role"] == "user")]


def beginning_at(messages: Messages, start: int) -> Messages:
    return [*(message for message in messages[:1] if message["role"] == "system"), *messages[start:]]


def without_front(messages: Messages, encode: Callable[[Messages], list[Encoded]], room: int) -> tuple[list[Encoded], bool]:
    """(what `encode` makes of the conversation, without as many turns from its front as makes it fit, whether any is missing)."""
    for start in starts(messages):
        parts = encode(beginning_at(messages, start))
        if sum(len(part.tokens) for part in parts) <= room:
            break
    return parts, start != starts(messages)[0]


def trimmed(part: Encoded, room: int, cut: bool) -> Encoded:
    """The end of an example that is still too long; where what is to be learnt has no room itself, that loses its end."""
    over = len(part.tokens) - room
    if over <= 0:
        return Encoded(part.tokens, part.read, part.columns, cut)
    begin = max(0, min(over, int(part.read.argmax()) - 1))
    return Encoded(part.tokens[begin : begin + room], part.read[begin : begin + room], part.columns, True)


def said(messages: Messages) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
