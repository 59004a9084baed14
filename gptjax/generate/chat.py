"""Conversations to prompts, by the Jinja templates that Hugging Face tokenizers bring.

A template is a stranger's program: it runs in Jinja's sandbox and sees plain JSON values only. What the messages say is a
stranger's text: a special token that it spells out stays text, while one that the template spells is that token. For that a mark,
a code point that stands for no character, is put into each such spelling before the template sees it; where the marks are in the
result, no special token can be.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.data.tokenizer_base import Tokenizer, one_line

Message = Mapping[str, Any]

_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode assigns no character to these, for good


class ChatTemplate:
    """One template with its tokenizer. `source`: Jinja; `where`: what to call it in a message.

    Raises `UserError` where jinja2 is missing or the source is no template.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, where: str = "the chat template") -> None:
        self._tokenizer, self._where = tokenizer, where
        self._names_bos = "bos_token" in source
        self._template = _compiled(source, where)

    @classmethod
    def of(cls, tokenizer: Tokenizer, source: str | None = None, name: str = "default") -> ChatTemplate:
        """The template `source`, or the tokenizer's. Raises `UserError` where there is neither."""
        if source is not None:
            return cls(source, tokenizer)
        templates = tokenizer.chat_templates()
        if name not in templates:
            others = f" (it has {', '.join(templates)})" if templates else ""
            raise UserError(
                f"the tokenizer has no chat template{others}; give one with --chat_template=FILE, a Jinja file that turns "
                "`messages` into a prompt."
            )
        return cls(templates[name], tokenizer, "the tokenizer's chat template")

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt as text. `variables`: whatever else the template asks for. Raises `UserError` where it refuses."""
        return self._render(messages, "", add_generation_prompt, tools, variables)

    def encode(
        self,
        messages: Sequence[Message],
        add_bos: bool = False,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> np.ndarray:
        """int32 ids of the prompt. Raises `UserError`.

        A template spells the begin-of-text token itself; where no text can spell it, `add_bos` puts it in front.
        """
        said = json.dumps([list(messages), tools, variables], ensure_ascii=False, default=str)
        mark = next((mark for mark in _MARKS if mark not in said), None)
        if mark is None:
            raise UserError("the conversation holds every one of U+FDD0 to U+FDEF, which are no characters.")
        text = self._render(messages, mark, add_generation_prompt, tools, variables)
        tokenizer = self._tokenizer
        parts = [tokenizer.encode_special(part) for part in text.split(mark) if part]
        unspelt = tokenizer.bos_id is not None and tokenizer.bos_id not in tokenizer.special_tokens().values()
        if add_bos and unspelt:
            parts.insert(0, np.array([tokenizer.bos_id], np.int32))
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

    def _render(
        self,
        messages: Sequence[Message],
        mark: str,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        checked = [_checked(message, number) for number, message in enumerate(messages)]
        special = tuple(self._tokenizer.special_tokens()) if mark else ()
        plain = functools.partial(_plain, mark=mark, special=special)
        try:
            return self._template.render(
                **self._tokenizer.token_names() | plain(variables),
                messages=plain(checked),
                tools=None if tools is None else plain(list(tools)),
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is somebody's program: whatever it raises, the answer is one sentence
            raise UserError(f"{self._where} refuses the conversation: {one_line(error)}.") from error


def _checked(message: Message, number: int) -> dict[str, Any]:
    """A message as a dict. Raises `UserError` where it has no role, or content of another kind than a text or a list of parts."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UserError(f"message {number} of the conversation must be an object with a role and a content.")
    if not isinstance(message.get("content", ""), (str, list, type(None))):
        raise UserError(f"the content of message {number} of the conversation must be a text, not {message['content']!r}.")
    return dict(message)


def _plain(value: Any, mark: str, special: tuple[str, ...]) -> Any:
    """JSON's values only, texts marked: an object with methods would be a way out of the sandbox."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return _marked(value, mark, special)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, mark, special) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, mark, special) for item in value]
    raise UserError(f"a chat template takes JSON's values only, not {type(value).__name__}.")


def _marked(text: str, mark: str, special: tuple[str, ...]) -> str:
    """The text with the mark behind the first character of every special token, and of its last characters where one begins so.

    The latter could be continued by what the template puts behind.
    """
    firsts = {name[0] for name in special}
    marked = []
    for i, character in enumerate(text):
        marked.append(character)
        if character in firsts:
            rest = text[i : i + 256]  # the longest spelling by far
            if any(rest.startswith(name) or (i + len(name) > len(text) and name.startswith(rest)) for name in special):
                marked.append(mark)
    return "".join(marked)


@functools.lru_cache(maxsize=16)
def _compiled(source: str, where: str) -> Any:
    try:
        import jinja2
        import jinja2.ext
        import jinja2.nodes
        import jinja2.sandbox
    except ImportError:
        raise UserError("chat templates need the extra chat: pip install 'gptjax[chat]'.") from None

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what the assistant wrote, for training; here it is only passed through."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: f"{datetime.datetime.now():{form}}"}
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{where} is no Jinja template: {one_line(error)} (line {error.lineno}).") from error


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Plain JSON; Jinja's own filter escapes what HTML would read as markup."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
