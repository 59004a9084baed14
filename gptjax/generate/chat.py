"""Conversations to prompts, by the Jinja templates that Hugging Face tokenizers bring.

A template is a stranger's program: it runs in Jinja's sandbox and sees plain JSON values only. What the messages say is a
stranger's text: a special token that it spells out stays text, while one that the template spells is that token. For that a mark,
a code point that stands for no character, is put into each such spelling before the template sees it; where the marks are in the
result, no special token can be.

For training, what the assistant wrote is told from the rest (`encode_turns`): by the marks {% generation %} of the template,
where it has them, else by what each answer adds to the prompt before it. Each such stretch is encoded for itself, as it is when
a model writes it, so that no token reaches over its ends.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import UserError
from gptjax.data.tokenizer_base import Tokenizer, one_line

Message = Mapping[str, Any]

PLAIN = "plain"  # the name of `PlainTemplate` where a template's source may stand
ASSISTANT = "assistant"

_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode assigns no character to these, for good


class Refused(UserError):
    """A conversation that its template cannot write, where it may write others."""


class Turns(NamedTuple):
    """A conversation in tokens."""

    tokens: np.ndarray  # int32 [n]
    written: np.ndarray  # int32 [n]: which of the assistant's turns wrote it, from 1; 0: none


class ChatTemplate:
    """One template with its tokenizer. `source`: Jinja; `where`: what to call it in a message.

    Raises `UserError` where jinja2 is missing or the source is no template.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, where: str = "the chat template") -> None:
        self._tokenizer, self._where = tokenizer, where
        self._names_bos = "bos_token" in source
        self._tells_turns = re.search(r"{%-?\s*generation\b", source) is not None
        self._template = _compiled(source, where)

    @classmethod
    def of(cls, tokenizer: Tokenizer, source: str | None = None, name: str = "default") -> ChatTemplate | PlainTemplate:
        """The template `source`, or the tokenizer's; PLAIN: the one without Jinja. Raises `UserError` where there is none."""
        if source == PLAIN:
            return PlainTemplate(tokenizer)
        if source is not None:
            return cls(source, tokenizer)
        templates = tokenizer.chat_templates()
        if name not in templates:
            others = f" (it has {', '.join(templates)})" if templates else ""
            raise UserError(
                f"the tokenizer has no chat template{others}; give one with --chat_template=FILE, a Jinja file that turns "
                "`messages` into a prompt, or --chat_template=plain."
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
        """The prompt as text. `variables`: whatever else the template asks for. Raises `Refused` where it refuses."""
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
        """int32 ids of the prompt. Raises `Refused`.

        A template spells the begin-of-text token itself; where no text can spell it, `add_bos` puts it in front.
        """
        mark = _unsaid([list(messages), tools, variables], 1)[0]
        text = self._render(messages, mark, add_generation_prompt, tools, variables)
        return np.concatenate([self._begin(add_bos), self._ids(text, mark)])

    def encode_turns(self, messages: Sequence[Message], add_bos: bool = False) -> Turns:
        """A whole conversation, and what of it the assistant wrote, for training.

        Raises `Refused` as `encode` does, and `UserError` for a template that has no {% generation %} and writes earlier turns
        otherwise once later ones follow, so that a model would be asked for other texts than it is trained on.
        """
        mark, begin, end = _unsaid(list(messages), 3)
        if self._tells_turns:
            text = self._render(messages, mark, False, None, {"_generation_begin": begin, "_generation_end": end})
        else:
            text = self._with_turns(messages, mark, begin, end)
        tokens, written = [self._begin(add_bos)], [np.zeros(len(self._begin(add_bos)), np.int32)]
        for number, part in enumerate(text.split(begin)):
            own, _, rest = part.rpartition(end)
            for ids, whose in ((self._ids(own, mark), number), (self._ids(rest, mark), 0)):
                tokens.append(ids)
                written.append(np.full(len(ids), whose, np.int32))
        return Turns(np.concatenate(tokens), np.concatenate(written))

    def _with_turns(self, messages: Sequence[Message], mark: str, begin: str, end: str) -> str:
        """The conversation with `begin` and `end` around what each answer adds to its prompt."""
        whole = self._render(messages, mark, False, None, {})
        cuts = [0]
        for number, message in enumerate(messages):
            if message.get("role") != ASSISTANT:
                continue
            before = self._render(messages[:number], mark, True, None, {})
            after = self._render(messages[: number + 1], mark, False, None, {})
            if not (after.startswith(before) and whole.startswith(after)):
                raise UserError(
                    f"{self._where} writes what was said up to message {number} otherwise when more follows, so that the "
                    "assistant's turns cannot be told from the rest; mark them in it by {% generation %}."
                )
            cuts += [len(before), len(after)]
        parts = [whole[a:b] for a, b in itertools.pairwise([*cuts, len(whole)])]
        return "".join(f"{begin}{part}{end}" if number % 2 else part for number, part in enumerate(parts))

    def _begin(self, add_bos: bool) -> np.ndarray:
        bos = self._tokenizer.bos_id
        unspelt = add_bos and bos is not None and bos not in self._tokenizer.special_tokens().values()
        return np.asarray([bos] if unspelt else [], np.int32)

    def _ids(self, text: str, mark: str) -> np.ndarray:
        parts = [self._tokenizer.encode_special(part) for part in text.split(mark) if part]
        return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)

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
            raise Refused(f"{self._where} refuses the conversation: {one_line(error)}.") from error


class PlainTemplate:
    """Conversations without Jinja: a line ROLE: CONTENT a turn. The assistant's ends with the end-of-text token, or where the
    tokenizer has none with the line; nothing keeps a content from looking like the turns that follow it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **_: Any) -> str:
        """The prompt as text."""
        return "".join(text for text, _ in self._pieces(messages, add_generation_prompt))

    def encode(
        self, messages: Sequence[Message], add_bos: bool = False, *, add_generation_prompt: bool = True, **_: Any
    ) -> np.ndarray:
        """int32 ids of the prompt. Raises `Refused` for a content that is no text."""
        return self._encoded(messages, add_bos, add_generation_prompt).tokens

    def encode_turns(self, messages: Sequence[Message], add_bos: bool = False) -> Turns:
        """As `ChatTemplate.encode_turns`."""
        return self._encoded(messages, add_bos, False)

    def _encoded(self, messages: Sequence[Message], add_bos: bool, add_generation_prompt: bool) -> Turns:
        tokenizer = self._tokenizer
        ids = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
        written = [0] * len(ids)
        for text, number in self._pieces(messages, add_generation_prompt):
            own = tokenizer.encode(text).tolist()
            if number and tokenizer.eos_id is not None:
                own.append(tokenizer.eos_id)
            ids, written = ids + own, written + [number] * len(own)
        return Turns(np.asarray(ids, np.int32), np.asarray(written, np.int32))

    def _pieces(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[tuple[str, int]]:
        """(text, which of the assistant's turns it is, 0: none), in turn."""
        end = "" if self._tokenizer.eos_id is not None else "\n"
        pieces: list[tuple[str, int]] = []
        given, turn = "", 0
        for number, message in enumerate(messages):
            role, content = _checked(message, number)["role"], message.get("content")
            if not isinstance(content, str):
                raise Refused(f"the content of message {number} of the conversation must be a text for the plain template.")
            if role == ASSISTANT:
                turn += 1
                pieces += [(f"{given}{role}:", 0), (f" {content}{end}", turn)]
                given = "" if end else "\n"
            else:
                given += f"{role}: {content}\n"
        given += f"{ASSISTANT}:" if add_generation_prompt else ""
        return [*pieces, (given, 0)] if given.strip() else pieces


def _unsaid(values: Any, count: int) -> list[str]:
    """Marks that don't occur in a conversation. Raises `Refused` where there are not so many."""
    said = json.dumps(values, ensure_ascii=False, default=str)
    marks = [mark for mark in _MARKS if mark not in said][:count]
    if len(marks) < count:
        raise Refused("the conversation holds nearly every one of U+FDD0 to U+FDEF, which are no characters.")
    return marks


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
        """{% generation %} marks what the assistant wrote; `encode_turns` gives the two variables that are put around it."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            around = [
                jinja2.nodes.Output([jinja2.nodes.Name(f"_generation_{end}", "load", lineno=line)], lineno=line)
                for end in ("begin", "end")
            ]
            return jinja2.nodes.Scope([around[0], *body, around[1]], lineno=line)

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
