"""Plots as PNG files (extra: plot)."""

from __future__ import annotations

import io
import math
from typing import Any

from gptjax.config import UserError
from gptjax.pages.plots import DASHES, LIGHT, LinePlot, Plot, RowPlot, count_texts, tick_texts, ticks

_GREY = "#9aa0ac"


def check_matplotlib(what: str, otherwise: str = "") -> None:
    """Raises `UserError` where it is absent: `what` needs it, `otherwise` says how to do without."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            f"{what} needs the package matplotlib, which is not installed: pip install 'gptjax[plot]'{otherwise}."
        ) from None


def png(plot: Plot) -> bytes:
    """The picture, on white. Raises `UserError` where matplotlib is absent."""
    check_matplotlib("a PNG")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    named = [one for one in plot.series if one.number] if isinstance(plot, LinePlot) else []
    height = 4.4 + 0.19 * len(named) if isinstance(plot, LinePlot) else 1.0 + 0.34 * len(plot.rows)
    figure = Figure(figsize=(8, height), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if isinstance(plot, LinePlot):
        _draw_lines(axes, plot)
        figure.legend(loc="outside lower left", frameon=False, fontsize=8)
    else:
        _draw_rows(axes, plot)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    buffer = io.BytesIO()
    canvas.print_figure(buffer, format="png")
    return buffer.getvalue()


def colour(number: int) -> str:
    return LIGHT[(number - 1) % len(LIGHT)] if number else _GREY


def _style(number: int) -> Any:
    dash = DASHES[(number - 1) // len(LIGHT) % len(DASHES)] if number else ""
    return (0, tuple(map(float, dash.split()))) if dash else "-"


def _verbatim(text: str) -> str:
    """matplotlib reads what stands between dollars as a formula."""
    return text.replace("$", r"\$")


def _draw_lines(axes: Any, plot: LinePlot) -> None:
    for one in sorted(plot.series, key=lambda one: bool(one.number)):
        own = {"color": colour(one.number), "linestyle": _style(one.number)}
        for x, y in one.faint:
            axes.plot(x, y, linewidth=0.5, alpha=0.6, **own)
        if one.low is not None and one.high is not None:
            axes.fill_between(one.x, one.low, one.high, color=own["color"], alpha=0.2, linewidth=0)
        label = _verbatim(f"{one.number} {one.label}") if one.number else "_"
        axes.plot(one.x, one.y, linewidth=1.4 if one.number else 0.8, label=label, **own)
    if plot.line is not None:
        axes.axhline(plot.line, color="#888888", linewidth=0.8, linestyle=":")
    axes.set_xlim(*plot.x_range)
    axes.set_ylim(*plot.y_range)
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    marks = ticks(*plot.x_range, most=7)
    axes.set_xticks(marks, count_texts(marks))
    axes.grid(color="#dddddd", linewidth=0.6)


def _draw_rows(axes: Any, plot: RowPlot) -> None:
    for place, row in enumerate(plot.rows):
        own = colour(row.number) if row.number else LIGHT[0]
        axes.plot(row.dots, [place - 0.25] * len(row.dots), "o", color=own, markersize=3, alpha=0.7)
        if row.value is None:
            continue
        if plot.bars:
            axes.barh(place, row.value, color=own, height=0.6)
            continue
        if row.low is not None and row.high is not None and math.isfinite(row.low):
            axes.plot([row.low, row.high], [place, place], "|-", color=own, linewidth=1.6, markersize=7)
        axes.plot([row.value], [place], "o", color=own, markersize=6, markerfacecolor=own if row.strong else "white")
    names = [f"{row.number} {row.label}" if row.number else row.label for row in plot.rows]
    names = [name if len(name) <= 60 else name[:59] + "…" for name in names]
    axes.set_yticks(range(len(plot.rows)), [_verbatim(name) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(plot.rows) - 0.4, -0.6)
    axes.set_xlim(*plot.x_range())
    marks = ticks(*plot.x_range())
    axes.set_xticks(marks, tick_texts(marks))
    for place, row in enumerate(plot.rows):
        if row.note:
            axes.annotate(_verbatim(row.note), (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    if plot.zero is not None:
        axes.axvline(plot.zero, color="#555555", linewidth=1)
    axes.set_xlabel(plot.x_label)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
