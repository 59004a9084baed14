"""The table of a sweep's trials: from their folders alone, so that any shell can print it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from gptjax.config import Config
from gptjax.sweeps.definition import describe, short_names, varying
from gptjax.sweeps.folder import State, SweepFolder
from gptjax.train.metrics import FILE_NAME, format_seconds

TAIL = 16384  # bytes of metrics.jsonl that are looked at


@dataclasses.dataclass(frozen=True)
class Row:
    """One trial in the table. `progress` is a share of its steps, `remaining` seconds; None where they are not known yet."""

    number: int
    name: str
    label: str
    state: State
    step: int
    progress: float | None
    loss: float | None  # the latest of the evaluation, or else of training
    loss_name: str
    elapsed: float
    remaining: float | None


def read_rows(folder: SweepFolder) -> list[Row]:
    """A row for each trial in order. Raises `UserError` where the folder is no sweep's."""
    definition = folder.read_definition()
    points = [trial["overrides"] for trial in definition["trials"]]
    short = short_names(set(varying(points)))
    return [
        _row(folder, number, trial["name"], describe(trial["overrides"], short) or trial["name"])
        for number, trial in enumerate(definition["trials"], 1)
    ]


def _row(folder: SweepFolder, number: int, name: str, label: str) -> Row:
    state, latest = folder.observed(name), latest_metrics(folder.trial(name) / FILE_NAME)
    step, total = latest.get("step", 0), total_steps(folder.requested(name))
    if state.status == "done":
        progress: float | None = 1.0
    else:
        progress = min(step / total, 1.0) if total else None
    running = state.status == "running"
    elapsed = state.seconds + (max(time.time() - state.started, 0.0) if running else 0.0)
    taken = latest.get("seconds", elapsed)  # the run's own clock, over all its starts
    remaining = taken * (1 - progress) / progress if running and progress and isinstance(taken, float) else None
    loss_name = next((key for key in ("eval/loss", "train/loss") if key in latest), "")
    loss = state.loss if state.loss is not None else latest.get(loss_name)
    if state.loss is not None:
        loss_name = "eval/loss"
    return Row(number, name, label, state, step, progress, _number(loss), loss_name, elapsed, remaining)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def total_steps(config: Config) -> int:
    """0 where the length is in epochs, which only the data can turn into steps."""
    return config.duration("train", "duration", steps_per_epoch=0.0)


def latest_metrics(path: pathlib.Path) -> dict[str, Any]:
    """The latest value of each key in the last rows; {} where there is none."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, 2) - TAIL)
            file.seek(start)
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return {}
    merged: dict[str, Any] = {}
    for line in lines[1 if start else 0 :]:
        try:
            row = json.loads(line)
        except ValueError:  # the last line may be half written
            continue
        if isinstance(row, dict):
            merged |= row
    return merged


def search_lines(definition: Mapping[str, Any]) -> list[str]:
    """Of a search: how much has been suggested, and what the config's checks refused. [] for other sweeps."""
    if "search" not in definition:
        return []
    search = definition["search"]
    refused = search["refused"]
    count = f", {len(refused)} of them refused by the config's checks" if refused else ""
    told = [f"  {entry['number']:03d} refused ({describe(entry['overrides'])}): {entry['why']}" for entry in refused]
    return [f"{search['suggested']} of {search['limit']} suggested by {search['sampler']}{count}", *told]


def to_come(definition: Mapping[str, Any]) -> int:
    """How many trials a search has yet to suggest."""
    search = definition.get("search", {"limit": 0, "suggested": 0})
    return max(search["limit"] - search["suggested"], 0)


def estimate(rows: Sequence[Row], jobs: int, more: int = 0) -> float | None:
    """Seconds until all trials and `more` to come have ended: what running ones have left, and for each other the mean of what
    is known.
    """
    known = [row.elapsed for row in rows if row.state.status == "done" and row.elapsed]
    known += [row.elapsed + row.remaining for row in rows if row.remaining is not None]
    if not known:
        return None
    mean = sum(known) / len(known)
    left = [row.remaining if row.remaining is not None else max(mean - row.elapsed, 0) for row in rows if _is_running(row)]
    waiting = sum(row.state.status in ("waiting", "queued", "stopped") for row in rows) + more
    return max(max(left, default=0.0), (sum(left) + waiting * mean) / max(jobs, 1))


def _is_running(row: Row) -> bool:
    return row.state.status == "running"


def lines(rows: Sequence[Row], jobs: int, width: int = 130, most: int = 0, more: int = 0) -> list[str]:
    """The table and a line that sums it up; with `most`, that many trials, those that say most first."""
    shown = list(rows)
    if most and len(rows) > most:
        order = {"running": 0, "failed": 1, "stopped": 2, "queued": 3, "done": 4, "pruned": 5, "waiting": 6}
        shown = sorted(sorted(rows, key=lambda row: order[row.state.status])[:most], key=lambda row: row.number)
    cells = [("#", "trial", "status", "step", "", "loss", "time", "ETA", "why"), *map(_cells, shown)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    widths[1] = min(widths[1], max(width // 3, 20))
    made = []
    for row in cells:
        padded = [
            f"{cell[:size]:<{size}}" if i in (1, 2, 8) else f"{cell:>{size}}"
            for i, (cell, size) in enumerate(zip(row, widths, strict=True))
        ]
        made.append("  ".join(padded)[:width].rstrip())
    if len(shown) < len(rows):
        made.append(f"... and {len(rows) - len(shown)} more")
    return [*made, summary(rows, jobs, more)[:width]]


def _cells(row: Row) -> tuple[str, ...]:
    state = row.state
    status = f"{state.status} ({state.kind})" if state.kind else state.status
    loss = f"{'train ' if row.loss_name == 'train/loss' else ''}{row.loss:.4f}" if row.loss is not None else ""
    return (
        str(row.number),
        row.label,
        status,
        f"{row.step:,}" if row.step else "",
        f"{row.progress:.0%}" if row.progress else "",
        loss,
        format_seconds(row.elapsed) if row.elapsed else "",
        format_seconds(row.remaining) if row.remaining is not None else "",
        state.why,
    )


def summary(rows: Sequence[Row], jobs: int, more: int = 0) -> str:
    """`3 of 8 done, 2 running, 1 failed (timeout); about 4:10 left`"""
    count = Counter(row.state.status for row in rows)
    parts = [f"{count['done']} of {len(rows)} done"]
    parts += [f"{count[status]} {status}" for status in ("pruned", "running", "queued", "waiting", "stopped") if count[status]]
    if count["failed"]:
        kinds = Counter(row.state.kind for row in rows if row.state.status == "failed")
        parts.append(f"{count['failed']} failed ({', '.join(f'{number} {kind}' for kind, number in kinds.items())})")
    left = estimate(rows, jobs, more) if count["running"] + count["queued"] else None
    return ", ".join(parts) + (f"; about {format_seconds(left)} left" if left is not None else "")


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain values."""
    return [
        {key: value for key, value in vars(row).items() if key != "state"} | dataclasses.asdict(row.state) | {"loss": row.loss}
        for row in rows
    ]


class LiveTable:
    """The table on a terminal, drawn again in place; elsewhere only the lines that it is given."""

    def __init__(self, folder: SweepFolder, jobs: int, stream: TextIO | None = None, interval: float = 1.0):
        self._folder, self._jobs, self._interval = folder, jobs, interval
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty() and os.environ.get("TERM", "") != "dumb"
        self._height, self._drawn_at = 0, -math.inf

    def say(self, text: str) -> None:
        """A line that stays, above the table."""
        self._erase()
        self._stream.write(text + "\n")
        self._stream.flush()
        self._drawn_at = -math.inf

    def show(self) -> None:
        """Draws the table where a second has passed since it was drawn."""
        if not self._is_terminal or time.monotonic() - self._drawn_at < self._interval:
            return
        size = shutil.get_terminal_size()
        more = to_come(self._folder.read_definition())
        drawn = lines(read_rows(self._folder), self._jobs, size.columns - 1, most=max(size.lines - 5, 3), more=more)
        self._erase()
        self._stream.write("\n".join(drawn) + "\n")
        self._stream.flush()
        self._height, self._drawn_at = len(drawn), time.monotonic()

    def close(self) -> None:
        """Leaves the whole table standing, on a terminal or not."""
        self._erase()
        width = shutil.get_terminal_size().columns - 1 if self._is_terminal else 10**6
        searched = search_lines(self._folder.read_definition())
        self._stream.write("\n".join([*lines(read_rows(self._folder), self._jobs, width), *searched]) + "\n")
        self._stream.flush()

    def _erase(self) -> None:
        if self._height:
            self._stream.write(f"\x1b[{self._height}F\x1b[J")
            self._height = 0
