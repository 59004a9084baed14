"""A run's steps by what they take: rows and their length, which may rise over its beginning.

Two warm-ups, each of few stages, since every shape of a batch is compiled:

- of the batch size (McCandlish et al., 2018; GPT-3): the rows of a step double until they are `data.batch_size`. Step s takes
  the rows that follow those of the steps before it, so that none is skipped or taken twice.
- of the sequence length (Li et al., 2022): each row is cut into shorter ones, which double until they are `data.seq_len`. No
  token is lost: a step takes the same rows, and predicts the same tokens, from a shorter context.

What is counted in rows, tokens or epochs is counted here in batches of the full size. As sizes double, their shares of it are
exact.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import NamedTuple


class Stage(NamedTuple):
    """Steps of one shape."""

    first_step: int  # steps before it
    first_batch: float  # batches of the full size that the steps before it took
    batch_size: int  # rows of the data that a step takes
    seq_len: int  # of the pieces into which they are cut


@dataclass(frozen=True)
class Stages:
    """All stages of a run, in order; the last one has no end."""

    batch_size: int  # the full one
    every: tuple[Stage, ...]

    @classmethod
    def of(cls, batch_size: int, seq_len: int, batches: dict[int, int], lengths: dict[int, int]) -> Stages:
        """`batches` and `lengths`: {first step: rows a step, tokens a row}; {}: the full size from the start."""
        starts = sorted({0, *batches, *lengths})
        every: list[Stage] = []
        for start in starts:
            rows, length = _latest({0: batch_size} | batches, start), _latest({0: seq_len} | lengths, start)
            before = every[-1] if every else Stage(0, 0.0, rows, length)
            taken = before.first_batch + (start - before.first_step) * before.batch_size / batch_size
            every.append(Stage(start, taken, rows, length))
        return cls(batch_size, tuple(every))

    def at(self, step: int) -> Stage:
        """The stage of the step that has `step` steps before it."""
        return self.every[bisect.bisect_right(self.every, step, key=lambda stage: stage.first_step) - 1]

    def end(self, step: int) -> int | None:
        """Steps before the first one of the stage after `at(step)`; None in the last stage."""
        return next((stage.first_step for stage in self.every if stage.first_step > step), None)

    def batches(self, steps: int) -> float:
        """Batches of the full size in the first `steps` steps."""
        stage = self.at(steps)
        return stage.first_batch + (steps - stage.first_step) * stage.batch_size / self.batch_size

    def rows(self, steps: int) -> int:
        """Rows that the first `steps` steps take."""
        return int(self.batches(steps) * self.batch_size)

    def steps(self, batches: float) -> int:
        """The fewest steps that take `batches` batches of the full size."""
        number = bisect.bisect_right(self.every, batches, key=lambda stage: stage.first_batch) - 1
        stage = self.every[number]
        return stage.first_step + math.ceil((batches - stage.first_batch) * self.batch_size / stage.batch_size)

    def last_steps(self, batches: float, until: int) -> int:
        """The fewest steps before step `until` that take `batches` batches of the full size, `until` where all do not."""
        rest = self.batches(until) - batches
        before = self.steps(max(rest, 0.0))
        return until - before + (self.batches(before) > rest)


def _latest(sizes: dict[int, int], step: int) -> int:
    return sizes[max(first for first in sizes if first <= step)]


def doublings(start: int, full: int) -> int:
    """How many times `start` is doubled to be `full`."""
    return (full // start).bit_length() - 1


def doubling(start: int, full: int, stage_steps: int) -> dict[int, int]:
    """{first step: size} of sizes that double from `start` until they are `full`, `stage_steps` steps each."""
    return {number * stage_steps: start << number for number in range(doublings(start, full) + 1)}
