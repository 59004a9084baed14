"""The files of a report: report.html, report.md with figures/*.png, tables/*.csv. Each is the old one or the new one, whole."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence

from gptjax.config import Config, UserError
from gptjax.pages.blocks import Figure
from gptjax.pages.html import html
from gptjax.pages.markdown import markdown
from gptjax.pages.png import check_matplotlib, png
from gptjax.report.build import Contents
from gptjax.report.tables import csv_files
from gptjax.train.run import write_atomically

FORMATS = ("html", "markdown", "csv")
FIGURES, TABLES = "figures", "tables"


def check_formats(formats: Sequence[str]) -> None:
    """Raises `UserError` for a format that is none, and for Markdown where matplotlib, which draws its figures, is absent."""
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"--formats names {name!r}; it may name {', '.join(FORMATS)}.")
    if "markdown" in formats:
        check_matplotlib("--formats=markdown", ", or leave it out: --formats=html,csv")


def write_report(
    contents: Contents, out: pathlib.Path, formats: Sequence[str], adapted: Callable[[Config], int | None]
) -> list[pathlib.Path]:
    """The files written, in `out`. Raises `UserError` where the folder cannot be written to."""
    files: dict[str, bytes] = {}
    if "csv" in formats:
        files |= {f"{TABLES}/{name}": _bytes(text) for name, text in csv_files(contents, adapted).items()}
    if "markdown" in formats:
        blocks = [block for section in contents.page.sections for block in section.blocks]
        files |= {f"{FIGURES}/{block.name}.png": png(block.plot) for block in blocks if isinstance(block, Figure)}
        files["report.md"] = _bytes(markdown(contents.page, FIGURES))
    if "html" in formats:
        files["report.html"] = _bytes(html(contents.page))
    try:
        for name, content in files.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(out / name, content)
    except OSError as error:
        raise UserError(f"{out / name} cannot be written: {error.strerror}.") from None
    return [out / name for name in files]


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")  # a model's text may hold halves of characters
