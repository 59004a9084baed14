"""Curves of the evaluation and of training, the whole of them and their end."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from gptjax.pages.blocks import Block, Figure, Text
from gptjax.pages.plots import Series
from gptjax.report.numbers import joined, percent
from gptjax.report.results import group_means
from gptjax.sweeps.compare import Report
from gptjax.sweeps.curves import line_plot, series_of

MOST_NAMED = 8  # groups with a colour; the others are grey
SMOOTH = 0.02  # of the rows of a training curve, on either side
END = 0.6  # of the tokens, where the drawing of the end begins
BEYOND = 2.5  # a group whose end is this many times farther from the best than the median is cut off there


def series(report: Report, key: str) -> list[Series]:
    """Of each group with a curve, in order; all but the MOST_NAMED best by the report's metric are grey."""
    smooth = SMOOTH if key.startswith("train/") else 0.0
    return [one for group in report.groups if (one := series_of(group, key, report.confidence, smooth))]


def curves(report: Report, higher_is_better: bool = False, target: float | None = None) -> list[Block]:
    """Figures for the report's metric where it is an evaluation's, the evaluation's loss, and the training loss."""
    keys = dict.fromkeys([*([report.metric] if report.metric.startswith("eval/") else []), "eval/loss", "train/loss"])
    named = _named(report, higher_is_better)
    found: list[Block] = []
    for key in keys:
        every = [
            one if one.number in named else dataclasses.replace(one, number=0, low=None, high=None) for one in series(report, key)
        ]
        better_high = higher_is_better and key == report.metric
        found += _figures(key, every, better_high, target if key == "eval/loss" else None, report.confidence)
    if not found:
        return [Text("No run has two rows of metrics with a loss: there are no curves (evaluate.every_steps).", "note")]
    hidden = len(report.groups) - len(named)
    if hidden > 0:
        found.append(
            Text(
                f"Grey, without a number: the other {hidden} groups, whose means are worse or not known. curves.csv has all.",
                "note",
            )
        )
    return found


def _named(report: Report, higher_is_better: bool) -> set[int]:
    means = group_means(report)
    ordered = sorted(means, key=means.__getitem__, reverse=higher_is_better)
    rest = [group.number for group in report.groups if group.number not in means]
    return set([*ordered, *rest][:MOST_NAMED])


def _figures(key: str, every: list[Series], higher: bool, target: float | None, confidence: float) -> list[Block]:
    name, what = key.replace("/", "_"), f"{key} over tokens"
    if not any(len(one.x) > 1 for one in every):
        return []
    band = f"Mean over seeds with Student's {confidence:.0%} band of the mean (from 3 seeds on)"
    if key.startswith("train/"):
        of_rows = f"Each run is first smoothed: means over {percent(2 * SMOOTH)} of its rows."
        plot = line_plot(every, key, y_range=_after_the_start(every))
        return (
            [Figure(name, plot, f"{what}. {band}. {of_rows} The first {percent(0.05)} of the tokens may lie outside.")]
            if plot
            else []
        )
    plot = line_plot(every, key, target=target)
    if plot is None:
        return []
    faint = " Thin: single runs, where there are two or where they have not finished." if any(one.faint for one in every) else ""
    dashed = f" Dashed: {target:g}." if target is not None else ""
    found: list[Block] = [Figure(name, plot, f"{what}. {band}.{faint}{dashed}")]
    if max(len(one.x) for one in every) >= 4:
        found += _end(key, every, higher, target)
    return found


def _after_the_start(every: Sequence[Series]) -> tuple[float, float]:
    values = np.concatenate([one.y[one.x >= 0.05 * one.x[-1]] for one in every if len(one.x)])
    low, high = float(values.min()), float(values.max())
    air = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - air, high + air


def _end(key: str, every: Sequence[Series], higher: bool, target: float | None) -> list[Block]:
    """The last part of the tokens, drawn for the groups that end near the best."""
    drawn = [one for one in every if len(one.x)]
    ends = np.array([one.y[-1] for one in drawn])
    behind = np.abs(ends - (ends.max() if higher else ends.min()))
    near = [one for one, gap in zip(drawn, behind, strict=True) if gap <= BEYOND * np.median(behind) or len(drawn) < 3]
    start = END * max(float(one.x[-1]) for one in drawn)
    values = np.concatenate([line[one.x >= start] for one in near for line in (one.y, one.low, one.high) if line is not None])
    if not len(values):
        return []
    low, high = float(values.min()), float(values.max())
    air = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    x_range = (start, max(float(one.x[-1]) for one in drawn))
    plot = line_plot(drawn, key, target=target, x_range=x_range, y_range=(low - air, high + air))
    beyond = [f"{one.number} ({one.label.rpartition(', ')[0]})" for one in drawn if one.number and one not in near]
    cut = f" Beyond its edge (arrow): {joined(beyond)}." if beyond else ""
    return (
        [Figure(f"{key.replace('/', '_')}_end", plot, f"The last {percent(1 - END)} of the tokens, closer.{cut}")] if plot else []
    )
