"""What a metric says: one number with its interval, as a row of a table and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from gptjax.measures.bootstrap import Bootstrap, Statistic, interval


@dataclasses.dataclass(frozen=True)
class Measured:
    """A metric's `value` over n examples, in the unit that its field uses; (low, high) is None where no interval was asked for.

    `note` says what a reader must know beside the number (a signature, a mode, what an interval leaves out). `statistic` is
    what the number is a function of, kept so that two results on the same examples can be compared (`difference`).
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int = 0
    note: str = ""
    statistic: Statistic | None = dataclasses.field(default=None, repr=False, compare=False)


def measure(
    name: str, statistic: Statistic, bootstrap: Bootstrap | None = None, note: str = "", value: float | None = None
) -> Measured:
    """`statistic` with its interval. `value` is what the field's package says, where that is not the statistic's own."""
    value = statistic.value() if value is None else value
    low, high, remark = interval(statistic, bootstrap) if bootstrap is not None else (None, None, "")
    return Measured(name, value, low, high, statistic.n, "; ".join(filter(None, (note, remark))), statistic)


def difference(first: Measured, second: Measured, bootstrap: Bootstrap) -> Measured:
    """first - second with the interval of the difference, both measured on the same examples and resampled alike (paired).

    P. Koehn, Statistical Significance Tests for Machine Translation Evaluation, EMNLP 2004. Raises `ValueError` where they
    are not of the same number of examples.
    """
    if first.statistic is None or second.statistic is None or first.n != second.n:
        raise ValueError(f"{first.name} (n={first.n}) and {second.name} (n={second.n}) are not of the same examples.")
    pair = _Difference(first.statistic, second.statistic, first.n)
    return measure(f"{first.name} - {second.name}", pair, bootstrap, "paired by example", first.value - second.value)


@dataclasses.dataclass(frozen=True)
class _Difference:
    first: Statistic
    second: Statistic
    n: int

    def value(self) -> float:
        return self.first.value() - self.second.value()

    def resampled(self, counts: Any) -> Any:
        return self.first.resampled(counts) - self.second.resampled(counts)

    def left_out(self) -> Any:
        return self.first.left_out() - self.second.left_out()


def as_json(results: Sequence[Measured]) -> dict[str, dict[str, Any]]:
    """{name: {"value", "low", "high", "n", "note"}}; what is not finite, or has no interval, is None."""
    return {
        result.name: {
            "value": _finite(result.value),
            "low": _finite(result.low),
            "high": _finite(result.high),
            "n": result.n,
            "note": result.note,
        }
        for result in results
    }


def _finite(number: float | None) -> float | None:
    return float(number) if number is not None and math.isfinite(number) else None


def show(number: float) -> str:
    """Four significant digits or four decimals, whichever is fewer characters: 0.8312, 27.31, 1.204e+05."""
    if not math.isfinite(number):
        return str(number)
    return f"{number:.4f}" if abs(number) < 1 else f"{number:.4g}"


def table(results: Sequence[Measured]) -> list[str]:
    """Lines of text: name, value, [low, high], n, note."""
    rows = [("measure", "value", "interval", "n", "note")]
    for result in results:
        reach = f"[{show(result.low)}, {show(result.high)}]" if result.low is not None and result.high is not None else ""
        rows.append((result.name, show(result.value), reach, str(result.n), result.note))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4]]).rstrip() for row in rows]
