"""What a page consists of, apart from how it is written: html.py and markdown.py write it."""

from __future__ import annotations

import dataclasses

from gptjax.pages.plots import Plot


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table's cell with the colour of a group (`number`, 0: none) ahead of it; `faint`: it says less than the others."""

    text: str
    number: int = 0
    faint: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """`numbers`: columns that stand right; `texts`: those of long texts, which wrap. `names`: the first names its row."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str | Cell, ...], ...]
    numbers: frozenset[int] = frozenset()
    texts: frozenset[int] = frozenset()
    names: bool = True


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph. `kind`: "", "note" smaller, "answer" the page's result, "warning". `markdown`: it is Markdown already."""

    text: str
    kind: str = ""
    markdown: bool = False


@dataclasses.dataclass(frozen=True)
class List:
    """Sentences below one another."""

    items: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A plot under the name of its file, with a sentence beneath."""

    name: str
    plot: Plot
    caption: str


@dataclasses.dataclass(frozen=True)
class Quote:
    """Text that a model wrote, as it is; `number` is its group's."""

    title: str
    text: str
    number: int = 0


Block = Table | Text | List | Figure | Quote


@dataclasses.dataclass(frozen=True)
class Section:
    key: str
    title: str
    blocks: tuple[Block, ...]


@dataclasses.dataclass(frozen=True)
class Page:
    """`lead` stands below the title, `foot` at the end."""

    title: str
    lead: str
    sections: tuple[Section, ...]
    foot: str = ""
