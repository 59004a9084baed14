"""A page of blocks as one HTML text with its figures inside."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from gptjax.pages import blocks
from gptjax.pages.blocks import Block, Cell, Figure, List, Page, Quote, Text
from gptjax.pages.document import document, table
from gptjax.pages.plots import LinePlot, colour_class
from gptjax.pages.svg import NARROW, WIDE, svg

_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_SPANS = (
    (re.compile(r"\*\*(.+?)\*\*"), r"<strong>\1</strong>"),
    (re.compile(r"(?<![\w*])\*([^*\s](?:[^*]*[^*\s])?)\*(?![\w*])"), r"<em>\1</em>"),
)


def html(page: Page) -> str:
    """The whole page; every text in it is escaped."""
    sections = [(one.key, one.title, "".join(_block(block) for block in one.blocks)) for one in page.sections]
    return document(page.title, escape(page.lead), sections, escape(page.foot))


def _block(block: Block) -> str:
    match block:
        case Text():
            kind = f' class="{block.kind}"' if block.kind else ""
            return f"<p{kind}>{inline(block.text) if block.markdown else escape(block.text)}</p>"
        case List():
            return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in block.items)}</ul>"
        case blocks.Table():
            head, rows = [escape(name) for name in block.head], [[_cell(cell) for cell in row] for row in block.rows]
            return table(head, rows, block.numbers, caption=block.caption, texts=block.texts, names=block.names)
        case Figure():
            return _figure(block)
        case Quote():
            return _quote(block)


def inline(markdown: str) -> str:
    """One paragraph's Markdown: code, strong, emphasis; of a link its text only, for it may lead nowhere from here."""
    parts = []
    for place, part in enumerate(re.split(r"(?<!`)`([^`]+)`(?!`)", markdown)):
        if place % 2:
            parts.append(f"<code>{escape(part)}</code>")
            continue
        text = escape(_LINK.sub(r"\1", part), quote=False)
        for pattern, put in _SPANS:
            text = pattern.sub(put, text)
        parts.append(text)
    return "".join(parts)


def _cell(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return escape(cell)
    text = f'<span class="faint-text">{escape(cell.text)}</span>' if cell.faint else escape(cell.text)
    return swatch(cell.number) + text if cell.number else text


def swatch(number: int) -> str:
    """A piece of the group's line, as the curves have it."""
    kind = colour_class(number)
    return (
        f'<svg class="swatch" width="22" height="10" viewBox="0 0 22 10" aria-hidden="true"><path class="{kind} line" '
        'd="M1 5L21 5"/></svg>'
    )


def _figure(figure: Figure) -> str:
    """Two drawings, of which the style sheet shows the one that fits the window."""
    legend = _legend([(one.number, one.label) for one in figure.plot.series]) if isinstance(figure.plot, LinePlot) else ""
    return (
        f'<figure id="{escape(figure.name)}"><div class="wide">{svg(figure.plot, WIDE)}</div>'
        f'<div class="narrow">{svg(figure.plot, NARROW)}</div>{legend}<figcaption>{escape(figure.caption)}</figcaption></figure>'
    )


def _legend(items: Sequence[tuple[int, str]]) -> str:
    rows = "".join(f"<li>{swatch(number)}{number} {escape(label)}</li>" for number, label in items if number)
    return f'<ul class="legend">{rows}</ul>'


def _quote(quote: Quote) -> str:
    mark = swatch(quote.number) if quote.number else ""
    return f'<div class="quote"><h3>{mark}{escape(quote.title)}</h3><pre>{escape(quote.text)}</pre></div>'
