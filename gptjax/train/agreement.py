"""Whether two records of one run say the same numbers: bit for bit, or within what."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

CLOCKS = ("seconds", "tokens_per_second", "mfu")  # of a row: what the machine was busy with, not what was computed


@dataclasses.dataclass(frozen=True)
class Difference:
    """A number that is not the recorded one."""

    step: int
    key: str
    recorded: Any
    now: Any

    @property
    def relative(self) -> float:
        """|a - b| / max(|a|, |b|); infinite where one of the two is no finite number."""
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in (self.recorded, self.now)):
            return math.inf
        return abs(self.recorded - self.now) / max(abs(self.recorded), abs(self.now))

    def __str__(self) -> str:
        return f"{self.key} at step {self.step}: {self.recorded!r} recorded, {self.now!r} now (relative {self.relative:.2g})"


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Of the recorded numbers, those that were computed anew; `differing` and `missing` by step."""

    compared: int
    keys: tuple[str, ...]
    first_step: int | None  # of those compared
    last_step: int | None
    differing: tuple[Difference, ...]
    missing: tuple[tuple[int, str], ...]  # (step, key) of what was not computed anew

    @property
    def is_exact(self) -> bool:
        """Whether every recorded number was computed anew, and has the same bits; of none at all nothing is known."""
        return bool(self.compared) and not self.differing and not self.missing

    @property
    def largest(self) -> float:
        """The largest relative difference; 0 without any."""
        return max((difference.relative for difference in self.differing), default=0.0)

    def holds(self, tolerance: float) -> bool:
        """Whether all recorded numbers agree within a relative difference of `tolerance`."""
        return bool(self.compared) and not self.missing and self.largest <= tolerance

    def worst(self) -> dict[str, Difference]:
        """{key: its largest difference}, in the order of the steps at which keys first differ."""
        found: dict[str, Difference] = {}
        for difference in self.differing:
            if difference.key not in found or difference.relative > found[difference.key].relative:
                found[difference.key] = difference
        return found

    def as_json(self) -> dict[str, Any]:
        """Plain numbers; an infinite difference is None in JSON."""

        def of(difference: Difference) -> dict[str, Any]:
            return dataclasses.asdict(difference) | {"relative": difference.relative}

        return {
            "compared": self.compared,
            "keys": list(self.keys),
            "steps": [self.first_step, self.last_step],
            "exact": self.is_exact,
            "largest_relative_difference": self.largest,
            "differing": len(self.differing),
            "first_difference": of(self.differing[0]) if self.differing else None,
            "worst": {key: of(difference) for key, difference in self.worst().items()},
            "missing": [list(one) for one in self.missing],
        }


def agreement(
    recorded: Sequence[Mapping[str, Any]], made: Sequence[Mapping[str, Any]], first: int = 0, last: float = math.inf
) -> Agreement:
    """Compares rows of metrics (`train.metrics`) of the steps from `first` to `last`, number by number, but for `CLOCKS`."""
    then, now = (_numbers(rows, first, last) for rows in (recorded, made))
    both = [place for place in then if place in now]
    differing = [Difference(*place, then[place], now[place]) for place in both if not _same(then[place], now[place])]
    steps = [step for step, _ in both]
    return Agreement(
        compared=len(both),
        keys=tuple(dict.fromkeys(key for _, key in both)),
        first_step=min(steps, default=None),
        last_step=max(steps, default=None),
        differing=tuple(sorted(differing, key=lambda one: one.step)),
        missing=tuple(sorted(place for place in then if place not in now)),
    )


def _numbers(rows: Sequence[Mapping[str, Any]], first: int, last: float) -> dict[tuple[int, str], Any]:
    return {
        (row["step"], key): value
        for row in rows
        if first <= row["step"] <= last
        for key, value in row.items()
        if key != "step" and key not in CLOCKS
    }


def _same(a: Any, b: Any) -> bool:
    """Numbers of metrics.jsonl are written so that they are read back to the bit."""
    if all(isinstance(value, float) and math.isnan(value) for value in (a, b)):
        return True
    return a == b and math.copysign(1, a) == math.copysign(1, b) if _are_numbers(a, b) else a == b


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, (int, float)) for value in values)
