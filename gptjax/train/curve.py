"""The loss curve of a run, as a picture."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gptjax.train.metrics import FILE_NAME, Log, format_count, log_to_stderr, read_metrics


def draw_loss_curve(workdir: pathlib.Path, log: Log = log_to_stderr) -> pathlib.Path | None:
    """Draws `workdir/loss_curve.png` from `workdir/metrics.jsonl`: loss in nats a token over steps, and over tokens on top.

    None, with one sentence logged, where matplotlib (extra: plot) is absent or there is nothing to draw.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log("loss_curve.png is not drawn: it needs matplotlib, pip install 'gptjax[plot]'.")
        return None
    rows = read_metrics(workdir / FILE_NAME)
    curves = {
        name: [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
        for name in ("train/loss", "eval/loss")
    }
    if not any(curves.values()):
        log(f"loss_curve.png is not drawn: {FILE_NAME} has no finite loss.")
        return None
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_losses(axes, curves)
    _draw_token_axis(axes, rows)
    axes.set_title(workdir.resolve().name, loc="left", fontweight="bold", fontsize=11)
    path = workdir / "loss_curve.png"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    canvas.print_figure(temporary, format="png")
    temporary.replace(path)
    return path


def _draw_losses(axes: Any, curves: Mapping[str, list[tuple[int, float]]]) -> None:
    train, evaluation = curves["train/loss"], curves["eval/loss"]
    if train:
        steps, losses = zip(*train, strict=True)
        smooth = _smoothed(losses, window=len(losses) // 50)  # a mean over 4 % of the run
        marker = "." if len(train) == 1 else None
        if len(smooth) > 50:
            axes.plot(steps, losses, color="#4c78a8", linewidth=0.6, alpha=0.5)
        axes.plot(steps, smooth, color="#4c78a8", linewidth=1.1, marker=marker, label=f"train {smooth[-1]:.3f}")
    if evaluation:
        steps, losses = zip(*evaluation, strict=True)
        best = min(range(len(losses)), key=losses.__getitem__)
        label = f"eval {losses[-1]:.3f}" + (
            f" (lowest {losses[best]:.3f}, step {steps[best]:,})" if best < len(losses) - 1 else ""
        )
        axes.plot(steps, losses, color="#e45756", linewidth=1.1, marker="o", markersize=4, markeredgecolor="white", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)


def _smoothed(values: tuple[float, ...], window: int) -> list[float]:
    """Means over `window` values on either side, fewer towards the ends, so that neither end is pulled to one side."""
    reaches = [min(window, index, len(values) - 1 - index) for index in range(len(values))]
    return [sum(values[i - reach : i + reach + 1]) / (2 * reach + 1) for i, reach in enumerate(reaches)]


def _draw_token_axis(axes: Any, rows: list[dict[str, Any]]) -> None:
    counted = [row for row in rows if row["step"] and row.get("tokens")]
    if not counted:
        return
    # A warm-up of the batch size bends the line; past both ends it goes on as it is there.
    steps = np.array([0.0, *(row["step"] for row in counted)])
    tokens = np.array([0.0, *(row["tokens"] for row in counted)])
    steps, first = np.unique(steps, return_index=True)
    tokens = tokens[first]
    top = axes.secondary_xaxis("top", functions=(_line_through(steps, tokens), _line_through(tokens, steps)))
    top.set_xlabel("tokens")
    top.xaxis.set_major_formatter(lambda value, _: format_count(value).replace(".00", "") if value >= 0 else "")
    top.spines["top"].set_visible(False)


def _line_through(x: np.ndarray, y: np.ndarray) -> Callable[[Any], Any]:
    """The line through points of ascending x and y, its first and last piece going on for as long as all of them."""
    span = x[-1] - x[0]
    slopes = (y[1] - y[0]) / (x[1] - x[0]), (y[-1] - y[-2]) / (x[-1] - x[-2])
    ends = np.array([x[0] - span, *x, x[-1] + span])
    values = np.array([y[0] - span * slopes[0], *y, y[-1] + span * slopes[1]])
    return lambda at: np.interp(at, ends, values)
