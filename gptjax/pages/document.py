"""The frame of a page, and tables and notes in it, as HTML text: no script, no network, light or dark as the reader has it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from gptjax.pages.style import STYLE


def document(title: str, lead: str, sections: Sequence[tuple[str, str, str]], foot: str = "") -> str:
    """The whole page. `title` is plain text; `lead`, `foot` and the third of each section (key, name, content) are HTML."""
    links = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, _ in sections)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{escape(name)}</h2>{text}</section>'
        for key, name, text in sections
    )
    end = f"<footer>{foot}</footer>" if foot else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'  # or a browser asks the server for one
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<a class="skip" href="#main">Skip to the content</a><header><h1>{escape(title)}</h1>'
        f'<p>{lead}</p><nav aria-label="Sections">{links}</nav></header>'
        f'<main id="main">{body}</main>{end}</body></html>\n'
    )


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Sequence[int] | frozenset[int] = (),
    *,
    caption: str = "",
    texts: Sequence[int] | frozenset[int] = (),
    names: bool = False,
) -> str:
    """Cells are HTML already; those in columns `numbers` stand right, in `texts` wrap. `names`: the first names its row."""

    def cells(row: Sequence[str], is_head: bool) -> str:
        return "".join(_cell(cell, place, is_head, place in numbers, place in texts, names) for place, cell in enumerate(row))

    body = "".join(f"<tr>{cells(row, False)}</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return scroll(
        f"<table>{title}<thead><tr>{cells(head, True)}</tr></thead><tbody>{body}</tbody></table>",
        caption or ", ".join(filter(None, head)),
    )


def _cell(cell: str, place: int, is_head: bool, number: bool, text: bool, names: bool) -> str:
    kind = ' class="number"' if number else ' class="long"' if text else ""
    if is_head:
        return f'<th scope="col"{kind}>{cell}</th>' if cell else f"<td{kind}></td>"
    return f'<th scope="row"{kind}>{cell}</th>' if names and place == 0 else f"<td{kind}>{cell}</td>"


def scroll(content: str, label: str) -> str:
    """What may be wider than the window, in a region that the keyboard reaches."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{content}</div>'


def note(text: str) -> str:
    return f'<p class="note">{text}</p>'


def cut_text(text: str, most: int) -> str:
    """Escaped, at most `most` characters of it, and then how long it is."""
    if len(text) <= most:
        return escape(text)
    return f"{escape(text[:most])}<em> … cut here, of {len(text):,} characters</em>"
