"""What an experiment's README asks: its title, and the paragraph that begins with "Question"."""

from __future__ import annotations

import dataclasses
import pathlib
import re

from gptjax.config import UserError

_ASKS = re.compile(r"^\W*question\W", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Question:
    """`text` is one paragraph of Markdown; `path` the README that asks it."""

    path: pathlib.Path
    title: str
    text: str


def read_question(path: pathlib.Path) -> Question:
    """The question is the paragraph that begins with "Question", or the first under a heading of that name, or else the first.

    Raises `UserError` where the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    title, heading, first, under, asking = "", "", "", "", ""
    for kind, content in _parts(text):
        if kind == "heading":
            heading, title = content, title or content
            continue
        first = first or content
        if _ASKS.match(content):
            asking = asking or content
        if _ASKS.match(heading + " "):
            under = under or content
    return Question(path, title or path.resolve().parent.name, asking or under or first)


def _parts(text: str) -> list[tuple[str, str]]:
    """("heading" or "paragraph", its text on one line), in order; code, tables, lists' signs and comments are left out."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^(`{3,}|~{3,}).*?^\1`*~*\s*$", "", text, flags=re.DOTALL | re.MULTILINE)
    parts: list[tuple[str, str]] = []
    for block in re.split(r"\n\s*\n", text):
        paragraph: list[str] = []
        for line in block.split("\n"):
            if re.match(r"#{1,6}\s", line):
                if paragraph:
                    parts.append(("paragraph", " ".join(paragraph)))
                    paragraph = []
                parts.append(("heading", line.lstrip("#").strip().rstrip("#").strip()))
            elif line.strip() and (paragraph or not re.match(r"\s{4}|\t|\||!\[", line)):
                paragraph.append(line.strip())
        if paragraph:
            parts.append(("paragraph", " ".join(paragraph)))
    return parts
