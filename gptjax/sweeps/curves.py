"""Learning curves of groups of runs, with the band of their mean."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from gptjax.config import UserError
from gptjax.pages.plots import LinePlot, Series
from gptjax.pages.png import png
from gptjax.sweeps.groups import Group, Run
from gptjax.sweeps.statistics import MIN_PAIRS, mean_and_band

UNITS = {"eval/loss": "eval loss (nats per token)", "train/loss": "training loss (nats per token)"}


def draw_curves(path: pathlib.Path, groups: Sequence[Group], confidence: float = 0.95, target: float | None = None) -> None:
    """The evaluation's loss over tokens as a PNG: each group's mean, and its band where at least 3 runs have a curve.

    Raises `UserError` where matplotlib is absent (extra: plot), no run has two evaluations, or the file cannot be written.
    """
    plot = line_plot([one for group in groups if (one := series_of(group, confidence=confidence))], target=target)
    if plot is None:
        raise UserError("--plot: no run has two evaluations; set evaluate.every_steps.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    picture = png(plot)
    try:
        temporary.write_bytes(picture)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"--plot={path} cannot be written: {error.strerror}.") from None


def curve_of(run: Run, key: str = "eval/loss") -> np.ndarray:
    """[rows, 2] tokens and `key` of the rows that have it; what is not finite is left out."""
    points = [
        (row["tokens"], value)
        for row in run.rows()
        if isinstance(value := row.get(key), (int, float)) and np.isfinite(value) and "tokens" in row
    ]
    return np.array(points, np.float64).reshape(-1, 2)


def smoothed(curve: np.ndarray, share: float = 0.02) -> np.ndarray:
    """[rows, 2] with means over `share` of the rows on either side, fewer towards the ends, so that neither is pulled aside."""
    count = len(curve)
    window = int(share * count)
    places = np.arange(count)
    reach = np.minimum(np.minimum(window, places), count - 1 - places)
    sums = np.concatenate([[0.0], np.cumsum(curve[:, 1])])
    means = (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)
    return np.stack([curve[:, 0], means], axis=1)


def on_common_grid(curves: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [points], losses [runs, points]) where all curves have values: at each one's evaluations, linear in between."""
    first, last = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
    tokens = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    tokens = tokens[(tokens >= first) & (tokens <= last)]
    return tokens, np.stack([np.interp(tokens, curve[:, 0], curve[:, 1]) for curve in curves])


def series_of(group: Group, key: str = "eval/loss", confidence: float = 0.95, smooth: float = 0.0) -> Series | None:
    """The mean over the group's finished runs where all have values, with its band from 3 of them on.

    Two runs, and those that have not finished, are faint curves of their own. None where no run has two points. `smooth`: see
    `smoothed`.
    """
    finished: list[np.ndarray] = []
    others: list[np.ndarray] = []
    for run in group.runs:
        curve = curve_of(run, key)
        if len(curve) > 1:
            (others if run.unfinished else finished).append(smoothed(curve, smooth) if smooth else curve)
    if not finished and not others:
        return None
    counted = finished or others
    tokens, losses = on_common_grid(counted)
    mean, low, high = mean_and_band(losses, confidence) if len(tokens) else (tokens, tokens, tokens)
    label = f"{group.label}, {len(counted)} seed{'s' if len(counted) > 1 else ''}{'' if finished else ', unfinished'}"
    faint = (others if finished else []) + (counted if 1 < len(counted) < MIN_PAIRS else [])
    lines = tuple((curve[:, 0], curve[:, 1]) for curve in faint)
    if len(counted) < MIN_PAIRS:
        return Series(group.number, label, tokens, mean, faint=lines)
    return Series(group.number, label, tokens, mean, low, high, lines)


def line_plot(
    series: Sequence[Series],
    key: str = "eval/loss",
    *,
    target: float | None = None,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> LinePlot | None:
    """The curves on axes that hold them all, where no ranges are given; None without a curve."""
    drawn = [one for one in series if len(one.x)]
    if not drawn:
        return None
    means = np.concatenate([one.y for one in drawn])
    bottom, top = float(means.min()), float(means.max())
    air = 0.05 * (top - bottom) or 0.05 * abs(top) or 1.0
    last = max(float(one.x[-1]) for one in drawn)
    names = ", ".join(f"{one.number} {one.label}" for one in drawn if one.number)
    unit = UNITS.get(key, key)
    alt = f"{unit} over tokens: {names}"
    return LinePlot(alt, "tokens", unit, tuple(drawn), x_range or (0.0, last), y_range or (bottom - air, top + air), target)
