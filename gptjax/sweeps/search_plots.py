"""Figures of a search (extra: search): importance of its knobs, loss over pairs of them, course of the best."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.pages.plots import LIGHT as COLOURS
from gptjax.sweeps.definition import show
from gptjax.sweeps.importance import Axis, Searched, axis_titles, surface
from gptjax.train.run import write_atomically

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError:
    raise UserError("figures need the package matplotlib, which is not installed: pip install 'gptjax[search]'.") from None


def draw(folder: pathlib.Path, searched: Searched, shares: dict[str, float], pairs: Sequence[tuple[Axis, Axis]]) -> list[str]:
    """importance.png, contour.png (with two knobs or more) and history.png; returns their names."""
    figures = {"importance.png": _importance(searched, shares), "history.png": _history(searched)}
    if pairs:
        figures["contour.png"] = _contours(searched, pairs)
    for name, figure in figures.items():
        drawn = io.BytesIO()
        FigureCanvasAgg(figure).print_figure(drawn, format="png")
        write_atomically(folder / name, drawn.getvalue())
    return list(figures)


def _importance(searched: Searched, shares: dict[str, float]) -> Figure:
    figure = Figure(figsize=(6.4, 1.2 + 0.35 * len(shares)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    titles = axis_titles(searched)
    bars = axes.barh([titles[key] for key in shares], list(shares.values()), color=COLOURS[0])
    axes.bar_label(bars, [f"{share:.1%}" for share in shares.values()], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(shares.values()))
    axes.set_xlabel(f"share of the variance of {searched.metric} (fANOVA, {len(searched.complete)} trials)")
    _plain(axes)
    return figure


def _history(searched: Searched) -> Figure:
    figure = Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    numbers = [trial.number for trial in searched.complete]
    values = np.array([trial.values[0] for trial in searched.complete])
    best = (np.maximum if searched.maximize else np.minimum).accumulate(values)
    axes.plot(numbers, values, "o", color=COLOURS[5], markersize=4, label="finished trials")
    axes.step(numbers, best, where="post", color=COLOURS[0], label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel(searched.metric)
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    return figure


def _contours(searched: Searched, pairs: Sequence[tuple[Axis, Axis]]) -> Figure:
    figure = Figure(figsize=(4.6 * len(pairs) + 0.6, 4.2), dpi=150, layout="constrained")
    titles = axis_titles(searched)
    values = [trial.values[0] for trial in searched.complete]
    # A trial that went astray would leave one colour for all the others.
    low, high = np.quantile(values, [0, 0.9]) if not searched.maximize else np.quantile(values, [0.1, 1])
    levels = np.linspace(low, high if high > low else low + 1e-9, 13)
    panels = [figure.add_subplot(1, len(pairs), number + 1) for number in range(len(pairs))]
    for axes, (x, y) in zip(panels, pairs, strict=True):
        across, up, metric = surface(searched, x, y)
        if np.isfinite(metric).any():
            drawn = axes.contourf(across, up, np.ma.masked_invalid(metric), levels=levels, cmap="viridis", extend="both")
            axes.contour(across, up, np.ma.masked_invalid(metric), levels=levels, colors="white", linewidths=0.4)
            if axes is panels[-1]:
                figure.colorbar(drawn, ax=panels, label=searched.metric)
        for trial in searched.trials:
            mark, colour, size = ("o", "black", 3) if trial in searched.complete else ("x", "#888888", 4)
            axes.plot(x.unit(trial.params[x.key]), y.unit(trial.params[y.key]), mark, color=colour, markersize=size)
        _ticks(axes.xaxis, axes.set_xlim, x)
        _ticks(axes.yaxis, axes.set_ylim, y)
        axes.set_xlabel(titles[x.key])
        axes.set_ylabel(titles[y.key])
    figure.suptitle("dots: finished trials; crosses: pruned, failed and refused ones", fontsize=8)
    return figure


def _ticks(side: Any, set_limits: Any, axis: Axis) -> None:
    values = axis.choices or [axis.value(place) for place in np.linspace(0, 1, 5)]
    if axis.is_whole:
        values = sorted({round(value) for value in values})
    side.set_ticks([axis.unit(value) for value in values], [show(value) if axis.choices else f"{value:.3g}" for value in values])
    set_limits(-0.03, 1.03)


def _plain(axes: Any) -> None:
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
