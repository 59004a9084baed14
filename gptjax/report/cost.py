"""What the runs took: time, tokens and model FLOPs, those of runs that came to nothing included."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from gptjax.config import Config
from gptjax.pages.blocks import Block, Cell, Table, Text
from gptjax.report.numbers import plural
from gptjax.report.results import named
from gptjax.sweeps.groups import Group, Run
from gptjax.train.flops import flops_per_token
from gptjax.train.metrics import format_count, format_seconds

Adapted = Callable[[Config], int | None]


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run or several. `seconds` is the run's own clock over all its starts, `device_seconds` that times its devices."""

    tokens: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0
    device_seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def cost_of(run: Run, adapted: Adapted) -> Cost:
    """From the run's result, or as far as its metrics say where it has not finished."""
    rows = run.rows()
    last: dict[str, Any] = next((row for row in reversed(rows) if "seconds" in row), {})
    tokens = float(run.result.get("tokens", rows[-1].get("tokens", 0) if rows else 0))
    seconds = float(run.result.get("seconds", last.get("seconds", 0.0)))
    devices = run.result.get("hardware", {}).get("device_count", 1)
    return Cost(tokens, _flops(run.config, rows, tokens, adapted) if tokens else 0.0, seconds, seconds * devices)


def _flops(config: Config, rows: Sequence[dict[str, Any]], tokens: float, adapted: Adapted) -> float:
    """Tokens by what one costs at the length of its row, which rises in a warm-up of the sequence length."""
    weights = adapted(config) if config.adapter.method != "none" else None
    total, counted = 0.0, 0.0
    for row in rows:
        if "seq_len" in row and row["tokens"] > counted:
            total += (row["tokens"] - counted) * flops_per_token(config.model, int(row["seq_len"]), weights)
            counted = float(row["tokens"])
    return total + (tokens - counted) * flops_per_token(config.model, config.data.seq_len, weights)


def cost(groups: Sequence[Group], adapted: Adapted) -> list[Block]:
    """A row a group, and the total."""
    rows: list[tuple[str | Cell, ...]] = []
    total, runs = Cost(), 0
    for group in groups:
        own = sum((cost_of(run, adapted) for run in group.runs), Cost())
        rows.append((named(group), *_cells(len(group.runs), own)))
        total, runs = total + own, runs + len(group.runs)
    if len(groups) > 1:
        rows.append((Cell("all"), *_cells(runs, total)))
    head = ("group", "runs", "tokens", "model FLOPs", "time", "device hours", "tokens a second")
    unfinished = sum(bool(run.unfinished) for group in groups for run in group.runs)
    said = (
        "Sums over the group's runs. Time is the runs' own clock over all their starts, compiling and evaluating included; runs "
        "beside one another count each. Model FLOPs are those of training as in PaLM's appendix B: 6 a weight and token, "
        "and attention's."
    )
    if unfinished:
        said += f" {plural(unfinished, 'run')} that did not finish: counted as far as the metrics go, on one device."
    return [Table("Cost by group", head, tuple(rows), frozenset(range(1, 7))), Text(said, "note")]


def _cells(runs: int, own: Cost) -> tuple[str, ...]:
    rate = f"{own.tokens / own.seconds:,.0f}" if own.seconds else "—"
    flops = f"{own.flops:.3g}".replace("e+", "e") if own.flops else "—"
    return (str(runs), format_count(own.tokens), flops, format_seconds(own.seconds), f"{own.device_seconds / 3600:.3g}", rate)
