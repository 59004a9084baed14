"""Small drawings as SVG text, coloured by the page's style sheet, so that they follow its light and its dark."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np

from gptjax.analysis.slices import Interval
from gptjax.measures.calibration import Bin

_WIDE, _HIGH = 180, 18  # of an interval in a table's row
_SIDE, _MARGIN = 300, 44  # of the reliability diagram


def interval_bar(part: Interval, overall: float) -> str:
    """A dot with its interval on the axis from 0 to 1, and a line where the score of all is."""

    def x(value: float) -> float:
        return round(4 + (_WIDE - 8) * value, 1)

    middle = _HIGH / 2
    reach = (
        f'<line class="reach" x1="{x(part.low)}" x2="{x(part.high)}" y1="{middle}" y2="{middle}"/>'
        if math.isfinite(part.low)
        else ""
    )
    return (
        f'<svg class="bar" width="{_WIDE}" height="{_HIGH}" viewBox="0 0 {_WIDE} {_HIGH}" role="img" '
        f'aria-label="{part.value:.3f} of 0 to 1"><line class="axis" x1="4" x2="{_WIDE - 4}" y1="{middle}" y2="{middle}"/>'
        f'<line class="overall" x1="{x(overall)}" x2="{x(overall)}" y1="1" y2="{_HIGH - 1}"/>{reach}'
        f'<circle class="dot" cx="{x(part.value)}" cy="{middle}" r="4"/></svg>'
    )


def reliability_diagram(bins: Sequence[Bin]) -> str:
    """Accuracy of each bin with its interval over its mean confidence; beneath, how many predictions it holds."""
    whole = _SIDE + 2 * _MARGIN

    def x(value: float) -> float:
        return round(_MARGIN + _SIDE * value, 1)

    def y(value: float) -> float:
        return round(_MARGIN / 2 + _SIDE * (1 - value), 1)

    most = max(row.n for row in bins)
    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="{x(tick)}" x2="{x(tick)}" y1="{y(0)}" y2="{y(1)}"/>')
        parts.append(f'<line class="grid" x1="{x(0)}" x2="{x(1)}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(f'<text x="{x(tick)}" y="{y(0) + 16}" text-anchor="middle">{tick:g}</text>')
        parts.append(f'<text x="{x(0) - 6}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    for row in bins:
        height = round(0.25 * _SIDE * row.n / most, 1)  # the highest takes a quarter of the drawing
        width = round(x(row.high) - x(row.low) - 2, 1)
        title = f"<title>{row.n} predictions from {row.low:.2f} to {row.high:.2f}</title>"
        parts.append(
            f'<rect class="count" x="{x(row.low) + 1}" y="{y(0) - height}" width="{width}" height="{height}">{title}</rect>'
        )
    parts.append(f'<line class="diagonal" x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}"/>')
    for row in bins:
        at = x(row.confidence)
        parts.append(f'<line class="reach" x1="{at}" x2="{at}" y1="{y(row.accuracy_low)}" y2="{y(row.accuracy_high)}"/>')
        parts.append(f'<circle class="dot" cx="{at}" cy="{y(row.accuracy)}" r="4.5"/>')
    parts.append(f'<text x="{x(0.5)}" y="{y(0) + 34}" text-anchor="middle">confidence</text>')
    parts.append(f'<text transform="translate(12 {y(0.5)}) rotate(-90)" text-anchor="middle">accuracy</text>')
    height_all = _SIDE + 2 * _MARGIN - 18
    return (
        f'<svg class="chart" width="{whole}" height="{height_all}" viewBox="0 0 {whole} {height_all}" role="img" '
        f'aria-label="accuracy over confidence">{"".join(parts)}</svg>'
    )


def confusion_table(names: Sequence[str], matrix: np.ndarray) -> str:
    """Gold in rows, predicted in columns; a cell is as deep as its share of the row: right ones blue, wrong ones red."""
    head = "".join(f'<th scope="col"><span>{html.escape(name)}</span></th>' for name in names)
    rows = []
    for place, name in enumerate(names):
        total = int(matrix[place].sum())
        cells = []
        for column, count in enumerate(matrix[place].tolist()):
            depth = 0.6 * count / total if total else 0  # deeper, and the number on it would be hard to read
            kind = "right" if place == column else "wrong"
            title = f"gold {name}, predicted {names[column]}: {count} of {total}"
            cells.append(f'<td class="{kind}" style="--depth:{depth:.3f}" title="{html.escape(title)}">{count or "·"}</td>')
        rows.append(f'<tr><th scope="row">{html.escape(name)}</th>{"".join(cells)}<td class="total">{total}</td></tr>')
    return (
        f'<table class="confusion"><thead><tr><th>gold \\ predicted</th>{head}<th>all</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
