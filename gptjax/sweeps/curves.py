"""Learning curves of groups of runs, with the band of their mean (extra: plot)."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.sweeps.groups import Group, Run
from gptjax.sweeps.statistics import MIN_PAIRS, mean_and_band
from gptjax.train.metrics import format_count

# Okabe and Ito's colours, told apart by the colour-blind.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def draw_curves(path: pathlib.Path, groups: Sequence[Group], confidence: float = 0.95, target: float | None = None) -> None:
    """The evaluation's loss over tokens as a PNG: each group's mean, and its band where at least 3 runs have a curve.

    Raises `UserError` where matplotlib is absent, no run has two evaluations, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs the package matplotlib, which is not installed: pip install 'gptjax[plot]'.") from None
    curves = [(group, [curve for run in group.runs if len(curve := curve_of(run)) > 1]) for group in groups]
    if not any(found for _, found in curves):
        raise UserError("--plot: no run has two evaluations; set evaluate.every_steps.")
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (group, found) in enumerate(curves):
        if found:
            _draw(axes, group, found, COLOURS[index % len(COLOURS)], "-" if index < len(COLOURS) else "--", confidence)
    if target is not None:
        axes.axhline(target, color="#888888", linewidth=0.8, linestyle=":")
    _dress(axes)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        canvas.print_figure(temporary, format="png")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"--plot={path} cannot be written: {error.strerror}.") from None


def curve_of(run: Run) -> np.ndarray:
    """[evaluations, 2] tokens and loss; evaluations that are not finite are left out."""
    points = [(row["tokens"], row["eval/loss"]) for row in run.rows() if np.isfinite(row.get("eval/loss", np.nan))]
    return np.array(points, np.float64).reshape(-1, 2)


def on_common_grid(curves: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [points], losses [runs, points]) where all curves have values: at each one's evaluations, linear in between."""
    first, last = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
    tokens = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    tokens = tokens[(tokens >= first) & (tokens <= last)]
    return tokens, np.stack([np.interp(tokens, curve[:, 0], curve[:, 1]) for curve in curves])


def _draw(axes: Any, group: Group, curves: list[np.ndarray], colour: str, style: str, confidence: float) -> None:
    tokens, losses = on_common_grid(curves)
    mean, low, high = mean_and_band(losses, confidence)
    label = f"{group.label}, {len(curves)} seed{'s' if len(curves) > 1 else ''}"
    axes.plot(tokens, mean, color=colour, linestyle=style, linewidth=1.4, label=label)
    if len(curves) >= MIN_PAIRS:
        axes.fill_between(tokens, low, high, color=colour, alpha=0.2, linewidth=0)
    elif len(curves) > 1:
        for curve in curves:
            axes.plot(curve[:, 0], curve[:, 1], color=colour, linewidth=0.5, alpha=0.6)


def _dress(axes: Any) -> None:
    axes.set_xlabel("tokens")
    axes.set_ylabel("eval loss (nats per token)")
    axes.xaxis.set_major_formatter(lambda value, _: format_count(value).replace(".00", "") if value >= 0 else "")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
