"""Combinators for sweep files: each makes a `Space`, an ordered tuple of overrides (dotted config key to value).

    grid({"optimizer.learning_rate": [1e-3, 3e-3], "model.num_layers": [2, 4]}, seeds(3))    12 points, the seed varying fastest
    zip_({"model.model_dim": [128, 256], "model.num_heads": [4, 8]})                          2 points, the values side by side
    chain(a, b)                                                                               those of a, then those of b
    sample(20, {"optimizer.learning_rate": log_uniform(1e-4, 1e-2)}, seed=0)                  20 points drawn at random

Keys and types are checked where a space is laid over a recipe (definition.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.config import UserError

Point = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Space:
    """Points in the order in which their trials run."""

    points: tuple[Point, ...]

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)


def grid(*parts: Mapping[str, Sequence[Any]] | Space) -> Space:
    """Every combination of the values of each key and of the points of each space; the last one varies fastest.

    Raises `UserError` where two parts set the same key, or one has no value.
    """
    axes: list[Sequence[Point]] = []
    for part in parts:
        axes += [part.points] if isinstance(part, Space) else [[{k: v} for v in _values("grid", k, vs)] for k, vs in part.items()]
    seen: set[str] = set()
    for axis in axes:
        keys = {key for point in axis for key in point}
        if seen & keys:
            raise UserError(f"grid: {sorted(seen & keys)[0]} is set by two of its parts; keep one.")
        seen |= keys
    points = []
    for combination in itertools.product(*axes):
        merged: Point = {}
        for point in combination:
            merged |= point
        points.append(merged)
    return Space(tuple(points))


def zip_(columns: Mapping[str, Sequence[Any]]) -> Space:
    """The first values of all keys, then the second ones, and so on. Raises `UserError` where the lengths differ."""
    checked = {key: _values("zip_", key, values) for key, values in columns.items()}
    lengths = {key: len(values) for key, values in checked.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise UserError(f"zip_: the keys must have equally many values, but {listed}.")
    return Space(tuple(dict(zip(checked, row, strict=True)) for row in zip(*checked.values(), strict=True)))


def chain(*spaces: Space) -> Space:
    """The points of each space, one space after the other."""
    return Space(tuple(point for space in spaces for point in space))


def seeds(count_or_seeds: int | Sequence[int]) -> Space:
    """`train.seed` = 0 .. n - 1, or these seeds."""
    chosen = range(count_or_seeds) if isinstance(count_or_seeds, int) else count_or_seeds
    return zip_({"train.seed": list(chosen)})


def _values(name: str, key: str, values: Sequence[Any]) -> Sequence[Any]:
    if isinstance(values, (str, bytes)) or not isinstance(values, (Sequence, np.ndarray)):
        raise UserError(f"{name}: {key} needs a list of values, not {values!r}.")
    if not len(values):
        raise UserError(f"{name}: {key} has no values.")
    # numpy's numbers are not Python's, which is what the schema asks for
    return [value.item() if isinstance(value, np.generic) else value for value in values]


# --- random points ---


@dataclasses.dataclass(frozen=True)
class Uniform:
    """A number between low and high; with `log`, its logarithm is drawn evenly."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _check_bounds("log_uniform" if self.log else "uniform", self.low, self.high, self.log)

    def draw(self, rng: np.random.Generator) -> float:
        if self.log:
            return math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        return float(rng.uniform(self.low, self.high))


@dataclasses.dataclass(frozen=True)
class Integers:
    """A whole number from low to high, both included; with `log`, small ones more often."""

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        if type(self.low) is not int or type(self.high) is not int:
            raise UserError(f"integers: its bounds must be whole numbers, not {self.low!r} and {self.high!r}.")
        _check_bounds("integers", self.low, self.high + 1, self.log)

    def draw(self, rng: np.random.Generator) -> int:
        if self.log:  # each whole number has the share of the logarithmic axis from it to the next
            return min(int(math.exp(rng.uniform(math.log(self.low), math.log(self.high + 1)))), self.high)
        return int(rng.integers(self.low, self.high + 1))


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of the values, all alike."""

    values: tuple[Any, ...]

    def draw(self, rng: np.random.Generator) -> Any:
        return self.values[int(rng.integers(len(self.values)))]


Distribution = Uniform | Integers | Choice


def uniform(low: float, high: float) -> Uniform:
    """A number between low and high."""
    return Uniform(low, high)


def log_uniform(low: float, high: float) -> Uniform:
    """A number between low and high, as likely between 1e-4 and 1e-3 as between 1e-3 and 1e-2."""
    return Uniform(low, high, log=True)


def integers(low: int, high: int, log: bool = False) -> Integers:
    """A whole number from low to high, both included."""
    return Integers(low, high, log)


def choice(values: Sequence[Any]) -> Choice:
    """One of the values."""
    return Choice(tuple(_values("choice", "it", values)))


def sample(count: int, distributions: Mapping[str, Distribution], seed: int = 0) -> Space:
    """`count` points drawn independently; the first ones stay the same where `count` grows (they are drawn point by point)."""
    for key, distribution in distributions.items():
        if not isinstance(distribution, Distribution):
            raise UserError(f"sample: {key} needs uniform, log_uniform, integers or choice, not {distribution!r}.")
    if count < 1:
        raise UserError(f"sample: the number of points must be at least 1, not {count}.")
    rng = np.random.default_rng(seed)
    return Space(tuple({key: d.draw(rng) for key, d in distributions.items()} for _ in range(count)))


def _check_bounds(name: str, low: float, high: float, log: bool) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"{name}: the lower bound must lie below the upper one, not {low!r} and {high!r}.")
    if log and low <= 0:
        raise UserError(f"{name}: the logarithm needs a lower bound above 0, not {low!r}.")
