"""What is drawn, apart from how: curves over a number, and rows of values with intervals. svg.py and png.py draw them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

# Of the groups in order, told apart by the colour-blind; each has a contrast of at least 3.5 with its paper (WCAG asks for 3).
LIGHT = ("#0072b2", "#c8500a", "#00805f", "#b0478c", "#8a6a00", "#2f8fc4", "#6b4fb3")
DARK = ("#4aa8e8", "#f08a4b", "#2fc49b", "#e58cc4", "#d9b23a", "#8fd0f5", "#b39df0")
DASHES = ("", "7 3", "2 3")  # of the first len(LIGHT) numbers, the next and the ones after


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve: x, y [points] with the band low, high [points] where there is one.

    `number` gives colour and dashes, and stands at its end; 0: grey, without a name. `faint` are single runs, each (x, y).
    """

    number: int
    label: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    faint: tuple[tuple[np.ndarray, np.ndarray], ...] = ()


@dataclasses.dataclass(frozen=True)
class LinePlot:
    """Curves on common axes; `x_range` and `y_range` cut what is shown, `line` is a level. `alt` is for who can't see it."""

    alt: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    line: float | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """A value with its interval and what it is the mean of (`dots`); None: nothing to draw, `note` says why."""

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    dots: tuple[float, ...] = ()
    number: int = 0
    note: str = ""
    strong: bool = True  # False: drawn hollow


@dataclasses.dataclass(frozen=True)
class RowPlot:
    """Rows on one axis. `zero` is a vertical line; with `bars` each value is a bar from 0."""

    alt: str
    x_label: str
    rows: tuple[Row, ...]
    zero: float | None = None
    bars: bool = False

    def x_range(self) -> tuple[float, float]:
        """What holds every value, dot and interval, with a little air."""
        values = [v for row in self.rows for v in (row.value, row.low, row.high, *row.dots) if v is not None and math.isfinite(v)]
        values += [self.zero] if self.zero is not None else []
        values += [0.0] if self.bars else []
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        air = 0.04 * (high - low) or 0.04 * abs(high) or 1.0
        return (0.0 if self.bars and low >= 0 else low - air), high + air


Plot = LinePlot | RowPlot


def colour_class(number: int) -> str:
    """The style sheet's name for a number's colour and dashes: s0 for none, then s1 to s7 with d1 and d2 from 8 on."""
    if number < 1:
        return "s0"
    dash = (number - 1) // len(LIGHT) % len(DASHES)
    return f"s{(number - 1) % len(LIGHT) + 1}" + (f" d{dash}" if dash else "")


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from low to high, at most `most`."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if span / (power * factor) <= most - 0.5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [count * step for count in range(first, last + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """With as many decimals as tell the ticks apart."""
    if len(values) < 2:
        return [f"{value:.4g}" for value in values]
    step = values[1] - values[0]
    if max(map(abs, values)) >= 1e5:
        return count_texts(values)
    if step < 1e-6:
        return [f"{value:.3g}" for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value:,.{decimals}f}".replace("-", "−") for value in values]


def count_texts(values: Sequence[float]) -> list[str]:
    """Ticks of a count, all in the unit of the largest: 0, 0.5M, 1M, 1.5M."""
    largest = max(map(abs, values), default=0.0)
    units = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
    unit, letter = next((unit for unit in units if largest >= unit[0]), units[-1])
    return [f"{value / unit:.6g}{letter}".replace("-", "−") if value else "0" for value in values]


def thinned(points: int, most: int = 240) -> np.ndarray:
    """Places of at most `most` of `points` points, the first and the last among them."""
    return np.arange(points) if points <= most else np.unique(np.linspace(0, points - 1, most).round().astype(int))
