"""`gptjax generate --chat`: a conversation, a line in and an answer out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.config.adapter import context_of, describe_context
from gptjax.data.tokenizer_base import refuse_half_characters
from gptjax.generate.chat import ChatTemplate
from gptjax.generate.settings import GenerationConfig
from gptjax.generate.text import generate_text
from gptjax.generate.timing import Speed
from gptjax.parallel import hosts
from gptjax.verbs.output import log, write_text

HELP = "/reset forgets the conversation, /system TEXT tells the model something first, /exit ends; // sends a line with one /."


class Conversation:
    """What was said so far, and the model that answers. Raises `UserError` where there is no template."""

    def __init__(
        self,
        model: Any,
        settings: GenerationConfig,
        seed: int,
        template: str | None = None,
        system: str | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """`options`: more arguments of `generate_text`."""
        if settings.num_return_sequences > 1:
            raise UserError(f"num_return_sequences={settings.num_return_sequences}: a conversation goes on from one answer.")
        self._model, self._settings, self._seed, self._options = model, settings, seed, options
        self._template = ChatTemplate.of(model.tokenizer, template)
        self.system = system or ""
        self.turns: list[dict[str, str]] = []
        self.speed = Speed()

    def say(self, text: str) -> None:
        """Answers `text` on standard output, as it is drawn. A text that is refused, with `UserError`, was never said."""
        refuse_half_characters(text)
        refuse_half_characters(self.system)
        self.turns.append({"role": "user", "content": text})
        try:
            ids = self._fit()
        except UserError:
            self.turns.pop()
            raise
        answer: list[str] = []
        model = self._model

        def show(number: int, text: str) -> None:
            answer.append(text)
            write_text(text)

        options: dict[str, Any] = {"seed": self._seed, "on_text": show, "speed": self.speed} | dict(self._options)
        try:
            generate_text(model.params, model.config, model.tokenizer, [ids], self._settings, **options)
        except UserError:
            self.turns.pop()
            raise
        except KeyboardInterrupt:  # what was written until then was said
            write_text("\n")
            self.turns.append({"role": "assistant", "content": "".join(answer)})
            raise
        write_text("\n")
        self.turns.append({"role": "assistant", "content": "".join(answer)})

    def _fit(self) -> np.ndarray:
        """The prompt's ids, the oldest turns dropped until there is room for an answer."""
        context = context_of(self._model.config)
        room = max(1, min(self._settings.max_new_tokens, context // 2))
        system = [{"role": "system", "content": self.system}] if self.system else []
        for dropped in range(0, len(self.turns), 2):  # a turn is what was said and its answer
            ids = self._template.encode(system + self.turns[dropped:], self._model.config.data.add_bos)
            if len(ids) + room <= context:
                break
        else:
            raise UserError(
                f"this alone makes a prompt of {len(ids)} tokens, which with {room} for the answer is more than "
                f"{describe_context(self._model.config)}."
            )
        if len(ids) == 0:
            raise UserError("the chat template makes no tokens of the conversation.")
        if dropped:
            del self.turns[:dropped]
            what = "turn was" if dropped == 2 else f"{dropped // 2} turns were"
            log(f"(the oldest {what} dropped: the context of {context} tokens is full)")
        return ids


def converse(
    model: Any,
    settings: GenerationConfig,
    seed: int,
    template: str | None,
    system: str | None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> int:
    """Reads lines until the end of standard input, /exit, or Ctrl-C twice in a row, which raises KeyboardInterrupt."""
    if hosts.process_count() > 1:
        raise UserError("--chat is for one process; of several, only one would hear what is said.")
    conversation = Conversation(model, settings, seed, template, system, options)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        log(HELP)
        import readline  # noqa: F401 - gives input() its line editing
    elif hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    interrupted = False
    while True:
        try:
            line = _read_line(is_terminal)
            interrupted = False
            if line is None or not _obey(conversation, line):
                break
        except UserError as error:
            log(f"gptjax: {error}")
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            log("(stopped; Ctrl-C once more ends the conversation)")
    if conversation.speed.prompt_tokens:
        log(f"{conversation.speed}.")
    return 0


def _read_line(is_terminal: bool) -> str | None:
    """A line; None at the end of input."""
    if not is_terminal:
        line = sys.stdin.readline()
        return line.removesuffix("\n").removesuffix("\r") if line else None
    try:
        return input("> ")
    except EOFError:
        log("")
        return None


def _obey(conversation: Conversation, line: str) -> bool:
    """Does what a line asks for; whether the conversation goes on."""
    command, _, rest = line.strip().partition(" ")
    if line.startswith("//"):
        conversation.say(line[1:])
    elif command == "/exit":
        return False
    elif command == "/reset":
        conversation.turns.clear()
        log("(forgotten)")
    elif command == "/system":
        refuse_half_characters(rest)
        conversation.system = rest.strip()
        log("(the model is told so)" if conversation.system else "(the model is told nothing)")
    elif command.startswith("/"):
        raise UserError(f"there is no command {command}; {HELP}")
    elif line.strip():
        conversation.say(line)
    return True
