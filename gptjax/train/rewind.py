"""Spikes of the loss: how one is found, and what the run goes back to (PaLM, Chowdhery et al., 2022, section 5.1).

A step is bad where its value lies `spike_threshold` robust standard deviations above the median of the good steps before it:
median + threshold * 1.4826 * MAD, where MAD, the median distance from the median, is 1 / 1.4826 of a normal distribution's
standard deviation. `spike_steps` bad steps in a row are a spike. The run then goes back to the newest checkpoint of a multiple of
`spike_checkpoint_steps` before the first of them, and passes over the rows that were taken since.

All this is a function of the run's metrics, which are the same in every process, and of what checkpoints hold. So a run that is
killed, whenever it is, finds the same spike again or goes on behind it; and so does a replay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.config import Config, TrainConfig


@dataclasses.dataclass(frozen=True)
class Rewind:
    """One going back, as checkpoints and `result.json` hold it."""

    found_at: int  # the spike's last step
    first_bad: int
    back_to: int  # the checkpoint's step
    value: float | None  # of the last step; None: not finite
    limit: float
    skipped_rows: int  # that the run passes over from then on, those of earlier spikes included


class Spike(Exception):
    """The run has to go back, `Rewind` says where to."""

    def __init__(self, rewind: Rewind):
        super().__init__(f"spike at step {rewind.found_at}")
        self.rewind = rewind


@dataclasses.dataclass
class Watch:
    """What is remembered of the steps until now. Without `spike_threshold` nothing is."""

    config: TrainConfig
    values: list[float]  # of the latest good steps, oldest first
    streak: int  # bad steps until now
    rewinds: list[Rewind]

    @classmethod
    def restored(cls, config: Config, saved: Mapping[str, Any]) -> Watch:
        """From what `saved` gave; {} at a run's start."""
        rewinds = [Rewind(**rewind) for rewind in saved.get("rewinds", ())]
        return cls(config.train, list(saved.get("values", ())), saved.get("streak", 0), rewinds)

    def saved(self) -> dict[str, Any]:
        """What a checkpoint has to hold, as JSON can."""
        return {"values": self.values, "streak": self.streak, "rewinds": [dataclasses.asdict(one) for one in self.rewinds]}

    @property
    def skipped_rows(self) -> int:
        return self.rewinds[-1].skipped_rows if self.rewinds else 0

    def is_point(self, step: int) -> bool:
        """Whether the checkpoint of `step` may be gone back to."""
        return bool(self.config.spike_threshold) and step % self.config.spike_checkpoint_steps == 0

    def held(self, step: int) -> tuple[int, ...]:
        """Steps whose checkpoints may still be gone back to after `step`: the latest, and the one before it, for a spike that
        began before the latest.
        """
        if not self.config.spike_threshold:
            return ()
        every = self.config.spike_checkpoint_steps
        return (step // every * every, step // every * every - every)

    def limit(self) -> float:
        """Above which a step is bad."""
        if len(self.values) < self.config.spike_window:
            return math.inf
        median = statistics.median(self.values)
        deviation = statistics.median(abs(value - median) for value in self.values)
        return median + self.config.spike_threshold * 1.4826 * deviation

    def see(self, step: int, value: float) -> Rewind | None:
        """Takes the value of `step` in; the rewind, its rows not yet counted, where `step` completes a spike."""
        c = self.config
        if not c.spike_threshold or len(self.rewinds) >= c.spike_max_rewinds:
            return None
        limit = self.limit()
        if value <= limit and math.isfinite(value):
            self.streak = 0
            self.values = [*self.values, value][-c.spike_window :]
            return None
        if not math.isfinite(limit):
            return None
        self.streak += 1
        if self.streak < c.spike_steps:
            return None
        first_bad = step - self.streak + 1
        back_to = (first_bad - 1) // c.spike_checkpoint_steps * c.spike_checkpoint_steps
        return Rewind(step, first_bad, back_to, value if math.isfinite(value) else None, limit, 0)

    def after(self, rewind: Rewind, skipped_rows: int, at_checkpoint: Watch) -> Watch:
        """The watch with which the run goes on from the rewind's checkpoint."""
        rewinds = [*self.rewinds, dataclasses.replace(rewind, skipped_rows=skipped_rows)]
        return Watch(self.config, at_checkpoint.values, 0, rewinds)


def recorded_rewinds(workdir: pathlib.Path) -> list[Rewind]:
    """All of a run's rewinds until now, in the order of their finding, by its result and by what its checkpoints hold.

    Where a run was killed between its way back and the checkpoint of it, that way back is not among them: it will be found again.
    """
    found: list[Any] = [[]]
    for path in [*sorted((workdir / "checkpoints").glob("*/metadata.json")), workdir / "result.json"]:
        with contextlib.suppress(OSError, ValueError):  # a damaged checkpoint is told of where it would be used
            content = json.loads(path.read_text(encoding="utf-8"))
            found.append(content.get("metadata", {}).get("spikes", content).get("rewinds", []))
    return [Rewind(**rewind) for rewind in max(found, key=len)]


def skipped_before(rewinds: Sequence[Rewind], step: int) -> int:
    """Rows passed over before `step`, as it was taken last: that of the latest way back to a step before it."""
    return next((one.skipped_rows for one in reversed(rewinds) if one.back_to < step), 0)
