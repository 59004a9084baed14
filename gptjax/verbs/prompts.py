"""The prompts of `gptjax generate`: from the command line, standard input, or a file of many."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gptjax.config import Config, UserError, tasks_of
from gptjax.data.tokenizer_base import refuse_half_characters


@dataclass(frozen=True)
class Line:
    """One line of a file of prompts."""

    where: str  # FILE:LINE
    id: Any  # the line's own, or its number
    prompt: Any = None  # a text, or the messages of a conversation
    error: str = ""  # why there is no prompt

    def within(self, config: Config, task: str) -> Line:
        """The line with its prompt put into the template of a task."""
        if self.error or not isinstance(self.prompt, str):
            return self
        try:
            return dataclasses.replace(self, prompt=in_template(config, task, self.prompt))
        except UserError as error:
            return dataclasses.replace(self, error=str(error))


def one_prompt(arguments: argparse.Namespace) -> str:
    """The text of --prompt, --prompt_file or standard input. Raises `UserError`."""
    if arguments.prompt == "-":
        return decoded(sys.stdin.buffer.read(), "the prompt on standard input")
    if arguments.prompt_file is not None:
        return decoded(_read(arguments.prompt_file, "prompt_file"), f"--prompt_file={arguments.prompt_file}")
    prompt = arguments.prompt or ""
    refuse_half_characters(prompt)
    return prompt


def many_prompts(name: str) -> list[Line]:
    """The lines of a file, or of standard input where it is called -: a prompt each, or JSON objects.

    JSON where the name ends in .jsonl or .json, or where it has another ending than .txt and the first line is a JSON object:
    {"prompt": TEXT} or {"messages": [{"role": ..., "content": ...}, ...]}, with an "id" where that is wanted.
    """
    content = sys.stdin.buffer.read() if name == "-" else _read(name, "prompts")
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    suffix = pathlib.Path(name).suffix
    is_json = suffix in (".jsonl", ".json") or (suffix != ".txt" and bool(lines) and _is_object(lines[0]))
    shown = "standard input" if name == "-" else name
    return [_line(f"{shown}:{number}", number, line.removesuffix(b"\r"), is_json) for number, line in enumerate(lines, 1)]


def in_template(config: Config, name: str, text: str) -> str:
    """The prompt that a run's task makes of a JSON object of its fields, or of the text of its only field. `name` may be empty
    where the run has one task that has a prompt. Raises `UserError`.
    """
    from gptjax.tasks.base import fields_of, filled

    tasks = {task: knobs for task, knobs in tasks_of(config).items() if knobs.kind in ("completion", "preference")}
    if name not in tasks and (name or len(tasks) != 1):
        has = f"has {', '.join(tasks)}" if tasks else "has no task with a prompt template"
        raise UserError(f"--task{f'={name}' if name else ''}: the run {has}; name one of its tasks by --task=NAME.")
    template = tasks[name or next(iter(tasks))].prompt
    fields = sorted(fields_of(template))
    record = _object(text) if _is_object(text.encode()) else {fields[0]: text} if len(fields) == 1 else None
    if record is None:
        raise UserError(f"--task: the prompt must be a JSON object with {', '.join(fields) or 'no field'}, for {template!r}.")
    if missing := [field for field in fields if field not in record]:
        raise UserError(f"--task: the prompt has no field {missing[0]!r} for {template!r}.")
    return filled(template, record)


def template_of_run(config: Config) -> str | None:
    """How the run's task writes conversations, as source for `ChatTemplate.of`; None: as the tokenizer does."""
    from gptjax.tasks.chat import template_source

    for knobs in tasks_of(config).values():
        if knobs.kind == "chat" or (knobs.kind == "preference" and knobs.chat_template):
            return template_source(knobs)
    return None


def decoded(content: bytes, what: str) -> str:
    """UTF-8 as text. Raises `UserError` that names the first byte that is not."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}.") from None


def _read(name: str, option: str) -> bytes:
    try:
        return pathlib.Path(name).read_bytes()
    except FileNotFoundError:
        raise UserError(f"--{option}={name} does not exist.") from None
    except OSError as error:
        raise UserError(f"--{option}={name} cannot be read: {error.strerror}.") from None


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _line(where: str, number: int, line: bytes, is_json: bool) -> Line:
    name: Any = number
    try:
        text = decoded(line, "the line")
        if not is_json:
            return Line(where, name, text)
        values = _object(text)
        name = _name(values.get("id", number))
        return Line(where, name, _prompt(values))
    except UserError as error:
        return Line(where, name, error=str(error))


def _object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the line is not valid JSON: {error}.") from None
    if not isinstance(values, dict):
        raise UserError("the line is not a JSON object.")
    return values


def _name(name: Any) -> Any:
    refuse_half_characters(json.dumps(name, ensure_ascii=False))
    return name


def _prompt(values: dict[str, Any]) -> str | Sequence[Any]:
    if ("prompt" in values) == ("messages" in values):
        raise UserError("the line must have either a prompt or messages.")
    if "prompt" in values:
        if not isinstance(values["prompt"], str):
            raise UserError("the prompt must be a text.")
        refuse_half_characters(values["prompt"])
        return values["prompt"]
    messages = values["messages"]
    if not (isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)):
        raise UserError("messages must be a list of objects with a role and a content.")
    refuse_half_characters(json.dumps(messages, ensure_ascii=False))
    return messages
