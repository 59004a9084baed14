"""A page of blocks as Markdown; its figures are PNGs beside it."""

from __future__ import annotations

import re

from gptjax.pages.blocks import Block, Cell, Figure, List, Page, Quote, Table, Text


def markdown(page: Page, figures: str) -> str:
    """The whole page; `figures` is the folder of the figures' PNGs, as the page's links name it."""
    parts = [f"# {plain(page.title)}", plain(page.lead)]
    for section in page.sections:
        parts.append(f"## {plain(section.title)}")
        parts += [_block(block, figures) for block in section.blocks]
    return "\n\n".join([*parts, *([plain(page.foot)] if page.foot else [])]) + "\n"


def plain(text: str) -> str:
    """Text such that Markdown shows it as it is: one line, with its signs escaped."""
    line = " ".join(text.split())
    line = re.sub(r"([\\`*_\[\]<>|~$])", r"\\\1", line)
    line = re.sub(r"^([#+-])(?=\s)", r"\\\1", line)
    return re.sub(r"^(\d+)([.)])(?=\s)", r"\1\\\2", line)


def _block(block: Block, figures: str) -> str:
    match block:
        case Text():
            text = block.text if block.markdown else plain(block.text)
            return {"answer": f"**{text}**", "warning": f"> **Note.** {text}"}.get(block.kind, text)
        case List():
            return "\n".join(f"- {plain(item)}" for item in block.items)
        case Table():
            return _table(block)
        case Figure():
            return f"![{plain(block.plot.alt)}]({figures}/{block.name}.png)\n\n{plain(block.caption)}"
        case Quote():
            return f"**{plain(block.title)}**\n\n{_fenced(block.text)}"


def _table(table: Table) -> str:
    def row(cells: tuple[str | Cell, ...]) -> str:
        texts = [plain(cell.text if isinstance(cell, Cell) else cell) for cell in cells]
        return f"| {' | '.join(texts)} |"

    rule = "|".join("---:" if place in table.numbers else "---" for place in range(len(table.head)))
    lines = [row(table.head), f"|{rule}|", *map(row, table.rows)]
    return (f"{plain(table.caption)}\n\n" if table.caption else "") + "\n".join(lines)


def _fenced(text: str) -> str:
    """A block of code whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
