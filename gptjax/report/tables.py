"""The report's numbers as CSV files, unrounded, for whoever draws or counts anew."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gptjax.config import Config, flatten
from gptjax.report.build import Contents
from gptjax.report.cost import cost_of
from gptjax.report.curves import series
from gptjax.report.importance import swept_keys
from gptjax.report.results import mean_interval
from gptjax.sweeps.definition import show


def csv_files(contents: Contents, adapted: Callable[[Config], int | None]) -> dict[str, str]:
    """{file name: content}."""
    return {
        "runs.csv": _runs(contents, adapted),
        "groups.csv": _groups(contents),
        "comparisons.csv": _comparisons(contents),
        "curves.csv": _curves(contents),
        "importance.csv": _importance(contents),
    }


def _csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(["" if cell is None else cell for cell in row] for row in rows)
    return file.getvalue()


def _runs(contents: Contents, adapted: Callable[[Config], int | None]) -> str:
    keys = swept_keys(contents.sources.runs)
    metrics = [report.metric for report in contents.reports]
    rows = []
    for place, group in enumerate(contents.groups):
        for number, run in enumerate(group.runs):
            own, spent = flatten(run.config), cost_of(run, adapted)
            figures = [report.figures[place][number].value for report in contents.reports]
            knobs = [show(own[key]) for key in keys]
            state = run.unfinished or "done"
            rows.append(
                [
                    group.number,
                    group.label,
                    run.seed,
                    state,
                    *figures,
                    spent.tokens,
                    spent.flops,
                    spent.seconds,
                    *knobs,
                    run.folder,
                ]
            )
    head = ["group", "label", "seed", "state", *metrics, "tokens", "model_flops", "seconds", *keys, "folder"]
    return _csv(head, rows)


def _groups(contents: Contents) -> str:
    rows = []
    for report in contents.reports:
        for group in report.groups:
            values = list(report.values(group).values())
            mean = sum(values) / len(values) if values else None
            rows.append([report.metric, group.number, group.label, len(values), mean, *mean_interval(values, report.confidence)])
    return _csv(["metric", "group", "label", "seeds", "mean", "low", "high"], rows)


def _comparisons(contents: Contents) -> str:
    rows = []
    for report in contents.reports:
        for c in report.comparisons:
            found: list[Any] = [None] * 7
            if c.paired is not None:
                low, high = c.paired.bootstrap or (None, None)
                found = [c.paired.difference, *c.paired.interval, low, high, c.paired.p, c.paired.effect]
            winner = c.winner.number if c.winner else None
            rows.append([report.metric, c.b.number, c.a.number, *found, c.p_holm, len(c.seeds), c.more_seeds, winner, c.verdict])
    head = ["metric", "group", "less_group", "difference", "low", "high", "bootstrap_low", "bootstrap_high", "p", "effect"]
    return _csv([*head, "p_holm", "seeds", "more_seeds", "winner", "verdict"], rows)


def _curves(contents: Contents) -> str:
    report = contents.reports[0]
    keys = dict.fromkeys([*([report.metric] if report.metric.startswith("eval/") else []), "eval/loss", "train/loss"])
    rows = []
    for key in keys:
        for one in series(report, key):
            for place, tokens in enumerate(one.x.tolist()):
                band = [None if line is None else line[place] for line in (one.low, one.high)]
                rows.append([key, one.number, round(tokens), one.y[place], *band])
    return _csv(["curve", "group", "tokens", "mean", "low", "high"], rows)


def _importance(contents: Contents) -> str:
    rows = [
        [" + ".join(one.keys), one.share, one.p, one.p_holm, level.text, len(level.values), sum(level.values) / len(level.values)]
        for one in contents.importances
        for level in one.levels
    ]
    return _csv(["knob", "share", "p", "p_holm", "value", "runs", "mean"], rows)
