"""Plots as SVG text, coloured by the page's style sheet, so that they follow its light and its dark."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

import numpy as np

from gptjax.pages.plots import LinePlot, Plot, Row, RowPlot, Series, colour_class, count_texts, thinned, tick_texts, ticks

WIDE, NARROW = 900, 350  # of the two drawings of a plot: the style sheet shows the one that fits
_CHARACTER = 6.6  # width of one, of the 12-pixel font, taken widely
_ROW = 30  # height of a row

Axis = Callable[[np.ndarray | float], np.ndarray]  # places in the drawing of values


def svg(plot: Plot, width: int = WIDE) -> str:
    return _lines(plot, width) if isinstance(plot, LinePlot) else _rows(plot, width)


def _open(kind: str, width: float, height: float, alt: str) -> str:
    return (
        f'<svg class="{kind}" width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(alt)}">'
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "") -> str:
    cls = f' class="{kind}"' if kind else ""
    return f'<text{cls} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>'


# --- curves ---


def _lines(plot: LinePlot, width: int) -> str:
    height = round(width * (0.42 if width >= WIDE else 0.8))
    y_ticks = ticks(*plot.y_range)
    y_texts = tick_texts(y_ticks)
    left, right = 26 + _CHARACTER * max(map(len, y_texts)), width - 30
    top, bottom = 10, height - 42

    def x(value: np.ndarray | float) -> np.ndarray:
        low, high = plot.x_range
        return np.round(left + (np.asarray(value) - low) / ((high - low) or 1) * (right - left), 1)

    def y(value: np.ndarray | float) -> np.ndarray:
        low, high = plot.y_range
        return np.round(bottom - (np.asarray(value) - low) / ((high - low) or 1) * (bottom - top), 1)

    parts = [_open("plot", width, height, plot.alt)]
    for value, text in zip(y_ticks, y_texts, strict=True):
        parts += [_line("grid", left, float(y(value)), right, float(y(value)))]
        parts += [_text(left - 7, float(y(value)) + 4, text, "end")]
    x_ticks = ticks(*plot.x_range, most=7 if width >= WIDE else 4)
    for value, text in zip(x_ticks, count_texts(x_ticks), strict=True):
        parts += [_line("tick", float(x(value)), bottom, float(x(value)), bottom + 4)]
        parts += [_text(float(x(value)), bottom + 18, text)]
    parts += [_line("axis", left, bottom, right, bottom)]
    if plot.line is not None and plot.y_range[0] <= plot.line <= plot.y_range[1]:
        parts += [_line("diagonal", left, float(y(plot.line)), right, float(y(plot.line)))]
    # What lies outside the ranges is cut off by an inner drawing's edge, which needs no name that two drawings could share.
    parts.append(
        f'<svg x="{left:g}" y="{top - 4}" width="{right - left + 3:g}" height="{bottom - top + 4}" '
        f'viewBox="{left:g} {top - 4} {right - left + 3:g} {bottom - top + 4}">'
    )
    named = sorted(plot.series, key=lambda one: bool(one.number))  # grey ones first, beneath the others
    parts += [_curve(one, x, y) for one in named]
    parts.append("</svg>")
    parts += _end_numbers(plot, y, right, bottom)
    parts.append(_text((left + right) / 2, height - 6, plot.x_label, kind="label"))
    middle = (top + bottom) / 2
    parts.append(f'<text class="label" transform="translate(12 {middle:g}) rotate(-90)" text-anchor="middle">')
    parts.append(f"{escape(plot.y_label)}</text></svg>")
    return "".join(parts)


def _curve(one: Series, x: Axis, y: Axis) -> str:
    kind, parts = colour_class(one.number), []
    for single in one.faint:
        parts.append(f'<path class="{kind} faint" d="{_path(x(single[0]), y(single[1]))}"/>')
    if one.low is not None and one.high is not None and len(one.x) > 1:
        keep = thinned(len(one.x))
        there, back = _points(x(one.x[keep]), y(one.low[keep])), _points(x(one.x[keep]), y(one.high[keep]))[::-1]
        parts.append(f'<path class="{kind} band" d="M{"L".join(there + back)}Z"/>')
    if len(one.x):
        title = f"<title>{escape(one.label)}</title>" if one.label else ""
        parts.append(f'<path class="{kind} line" d="{_path(x(one.x), y(one.y))}">{title}</path>')
    return "".join(parts)


def _path(x: np.ndarray, y: np.ndarray) -> str:
    keep = thinned(len(x))
    return "M" + "L".join(_points(x[keep], y[keep]))


def _points(x: np.ndarray, y: np.ndarray) -> list[str]:
    return [f"{a:g} {b:g}" for a, b in zip(x.tolist(), y.tolist(), strict=True)]


def _end_numbers(plot: LinePlot, y: Axis, right: float, bottom: float) -> list[str]:
    """Each curve's number where it ends, moved apart where two would overlap; an arrow where it is off the drawing."""
    ends = sorted((float(y(one.y[-1])), one.number) for one in plot.series if one.number and len(one.y))
    places: list[float] = []
    for at, _ in ends:
        places.append(max(at, places[-1] + 13) if places else max(at, 10))
    for index in range(len(places) - 1, -1, -1):  # and back up from the bottom
        limit = places[index + 1] - 13 if index + 1 < len(places) else bottom
        places[index] = min(places[index], limit)
    return [
        _text(right + 8, place + 4, f"{number}{_arrow(at, bottom)}", "start", f"{colour_class(number).split()[0]} name")
        for place, (at, number) in zip(places, ends, strict=True)
    ]


def _arrow(at: float, bottom: float) -> str:
    return "↑" if at < 0 else "↓" if at > bottom + 4 else ""


# --- rows ---


def _rows(plot: RowPlot, width: int) -> str:
    beside = width >= WIDE  # labels stand beside the rows, or above them
    longest = max(len(_label(row)) for row in plot.rows)
    of_notes = max(len(row.note) for row in plot.rows)
    left = min(16 + _CHARACTER * longest, 0.42 * width) if beside else 12.0
    right = width - (14 + _CHARACTER * of_notes if beside else 14)
    each = _ROW if beside else 46
    top, bottom = 6, 6 + each * len(plot.rows)
    low, high = plot.x_range()

    def x(value: float) -> float:
        return round(left + (value - low) / (high - low) * (right - left), 1)

    parts = [_open("plot", width, bottom + 44, plot.alt)]
    marks = ticks(low, high, 6 if beside else 4)
    for value, text in zip(marks, tick_texts(marks), strict=True):
        parts += [_line("grid", x(value), top, x(value), bottom), _text(x(value), bottom + 17, text)]
    if plot.zero is not None:
        parts.append(_line("overall", x(plot.zero), top, x(plot.zero), bottom))
    for place, row in enumerate(plot.rows):
        head = top + each * place
        middle = head + (each / 2 if beside else each - 14)
        parts.append(_row_label(row, left, head, middle, width, beside))
        parts.append(_mark(row, middle, x, plot.bars))
    parts.append(_text((left + right) / 2, bottom + 36, plot.x_label, kind="label"))
    return "".join([*parts, "</svg>"])


def _label(row: Row) -> str:
    return f"{row.number} {row.label}" if row.number else row.label


def _row_label(row: Row, left: float, head: float, middle: float, width: int, beside: bool) -> str:
    room = int((left - 12 if beside else width - 20 - _CHARACTER * len(row.note)) / _CHARACTER)
    label = _label(row)
    shown = label if len(label) <= room else label[: max(room - 1, 1)] + "…"
    title = f"<title>{escape(label)}</title>" if shown != label else ""
    at = (left - 10, middle + 4, "end") if beside else (4, head + 14, "start")
    name = f'<text class="rowname" x="{at[0]:g}" y="{at[1]:g}" text-anchor="{at[2]}">{title}{escape(shown)}</text>'
    return name + (_text(width - 4, at[1], row.note, "end") if row.note else "")


def _mark(row: Row, middle: float, x: Callable[[float], float], bars: bool) -> str:
    kind = f"{colour_class(row.number).split()[0]}" if row.number else "plain"
    dots = "".join(f'<circle class="{kind} single" cx="{x(dot)}" cy="{middle - 8:g}" r="2.6"/>' for dot in row.dots)
    if row.value is None:
        return dots
    if bars:
        start, end = sorted((x(0.0), x(row.value)))
        return f'<rect class="{kind} bar" x="{start}" y="{middle - 8:g}" width="{max(end - start, 1):g}" height="16"/>'
    reach = ""
    if row.low is not None and row.high is not None and math.isfinite(row.low):
        ends = (x(row.low), x(row.high))
        reach = _line(f"{kind} span", ends[0], middle, ends[1], middle)
        reach += "".join(_line(f"{kind} span", end, middle - 4, end, middle + 4) for end in ends)
    hollow = "" if row.strong else " hollow"
    return f'{reach}{dots}<circle class="{kind} point{hollow}" cx="{x(row.value)}" cy="{middle:g}" r="4.6"/>'
