"""Which source each row of training is from: a function of (train.seed, the row's number) alone.

Row n has the place x_n = (u + n * g) mod 1, u drawn from the seed and g the golden ratio, whose multiples lie more evenly than
any other number's (Kronecker's sequence; Kuipers and Niederreiter 1974, chapter 2). The sources share out [0, 1) by their weights
at that row, and the row is from the source whose part holds x_n. So every stretch of rows has each source's share to within a
few rows, and a row's source does not depend on the size of the batch.

Places are whole numbers below 2**63, so that no machine rounds otherwise. How many rows of a source came before row n is a sum
of floors, which a Euclid-like recursion gives at once for any n while weights are level; a slope is climbed in stairs.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gptjax.config.mixture import Knots, weight_at

_ONE = 1 << 63
_GOLDEN = 5700357409661599243  # the odd number nearest to 2**63 / 1.618...
_STAIRS = 256  # levels of a slope: a step of a 256th of it is far below what a loss could show


@dataclass(frozen=True)
class Shares:
    """Levels one after another: level i holds from row `starts[i]` on, where source k has the part
    `bounds[i][k]` to `bounds[i][k + 1]` of 2**63, and `before[i][k]` rows of source k came before.
    """

    first: int  # place of row 0, below 2**63
    starts: list[int]
    bounds: list[tuple[int, ...]]
    before: list[tuple[int, ...]]

    @classmethod
    def of(cls, weights: Sequence[Knots], total_rows: int, first: int) -> Shares:
        """`weights` of each source by place in a run of `total_rows` rows; past its end they stay as they were there."""
        levels = _levels(weights, total_rows)
        starts, bounds = [start for start, _ in levels], [_bounds(level) for _, level in levels]
        before = [(0,) * len(weights)]
        for start, end, bound in zip(starts, starts[1:], bounds, strict=False):
            more = _counts(first, bound, start, end)
            before.append(tuple(a + b for a, b in zip(before[-1], more, strict=True)))
        return cls(first, starts, bounds, before)

    def _level(self, row: int) -> int:
        return bisect.bisect_right(self.starts, row) - 1

    def at(self, row: int) -> list[float]:
        """The shares of the sources at a row; they add to 1."""
        bounds = self.bounds[self._level(row)]
        return [(upper - lower) / _ONE for lower, upper in itertools.pairwise(bounds)]

    def rows_before(self, row: int) -> tuple[int, ...]:
        """How many of the rows 0 to `row` - 1 are from each source."""
        level = self._level(row)
        more = _counts(self.first, self.bounds[level], self.starts[level], row)
        return tuple(a + b for a, b in zip(self.before[level], more, strict=True))

    def assign(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 (source, its row's number counted from 0) of the rows `numbers`, ascending."""
        start, end = int(numbers[0]), int(numbers[-1]) + 1
        sources = self._sources(start, end)
        places = np.empty_like(sources)
        for source, before in enumerate(self.rows_before(start)):
            own = np.flatnonzero(sources == source)
            places[own] = before + np.arange(len(own))
        return sources[numbers - start], places[numbers - start]

    def _sources(self, start: int, end: int) -> np.ndarray:
        """int64 sources of the rows `start` to `end` - 1."""
        mask = np.uint64(_ONE - 1)  # 2**63 divides 2**64, so that sums may run over
        at = (np.arange(start, end, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(self.first)) & mask
        levels = range(self._level(start), self._level(end - 1) + 1)
        cuts = [0, *(self.starts[level] - start for level in levels[1:]), end - start]
        parts = [
            (at[a:b, None] >= np.asarray(self.bounds[level][1:-1], np.uint64)).sum(1)
            for level, (a, b) in zip(levels, itertools.pairwise(cuts), strict=True)
        ]
        return np.concatenate(parts).astype(np.int64)


def _levels(weights: Sequence[Knots], total_rows: int) -> list[tuple[int, list[float]]]:
    """(first row, weights) of each level: the weights in the middle of each stair, of which a level stretch has one."""
    places = sorted({0.0, 1.0} | {place for knots in weights for place, _ in knots})
    found: dict[int, list[float]] = {}
    for low, high in itertools.pairwise(places):
        ends = [[weight_at(knots, low, after=True), weight_at(knots, high, after=False)] for knots in weights]
        begin, end = round(low * total_rows), round(high * total_rows)
        stairs = min(_STAIRS, end - begin) if any(a != b for a, b in ends) else min(1, end - begin)
        for stair in range(stairs):
            middle = (stair + 0.5) / stairs
            found[begin + (end - begin) * stair // stairs] = [a + (b - a) * middle for a, b in ends]
    found[total_rows] = [weight_at(knots, 1.0) for knots in weights]
    return sorted(found.items())


def _bounds(weights: Sequence[float]) -> tuple[int, ...]:
    sums = list(itertools.accumulate(weights))
    return (0, *(int(part / sums[-1] * _ONE) for part in sums))


def _counts(first: int, bounds: Sequence[int], start: int, end: int) -> list[int]:
    """Rows from `start` to `end` - 1 whose place lies in each part."""
    rows, place = end - start, (first + start * _GOLDEN) % _ONE
    wraps = _floor_sum(rows, place)
    # place + 2**63 - bound reaches 2**63 once more than place does, just where place is at or above the bound.
    below = [rows - (_floor_sum(rows, place + _ONE - bound) - wraps) for bound in bounds]
    return [upper - lower for lower, upper in itertools.pairwise(below)]


def _floor_sum(rows: int, place: int) -> int:
    """The sum over i < rows of floor((place + i * g) / 2**63), by Euclid's algorithm (Graham, Knuth and Patashnik 1994, 3.5)."""
    total, slope, offset, one = 0, _GOLDEN, place, _ONE
    while rows:
        total += rows * (rows - 1) // 2 * (slope // one) + rows * (offset // one)
        slope, offset = slope % one, offset % one
        # Counted along the other axis: the lattice points under the line.
        highest = slope * rows + offset
        rows, offset, slope, one = highest // one, highest % one, one, slope
    return total


def describe(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A small table, a line a name; figures that are missing are left blank."""
    columns = list(dict.fromkeys(key for figures in rows.values() for key in figures))
    lines = [["source", *columns]]
    lines += [[name, *(_cell(figures.get(column)) for column in columns)] for name, figures in rows.items()]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
