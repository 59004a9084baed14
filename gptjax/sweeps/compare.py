"""Which of several groups of runs is better, paired by seed; and a refusal to say so where the runs do not show it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.sweeps.groups import Figure, Group, figure
from gptjax.sweeps.statistics import MIN_PAIRS, MOST_SEEDS, Paired, holm, paired, pairs_needed


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Group `b` against group `a`: the difference is b's figure less a's, over the `seeds` that both have.

    `paired` is None where too few are; `more_seeds` of each group would settle it with a chance of 0.8, None: more than 1,000.
    """

    a: Group
    b: Group
    seeds: tuple[int, ...]
    paired: Paired | None
    p_holm: float | None
    more_seeds: int | None
    winner: Group | None
    verdict: str


@dataclasses.dataclass(frozen=True)
class Report:
    """One metric over all groups. `figures[i]` are those of the runs of `groups[i]`."""

    metric: str
    confidence: float
    groups: tuple[Group, ...]
    figures: tuple[tuple[Figure, ...], ...]
    comparisons: tuple[Comparison, ...]

    def values(self, group: Group) -> dict[int, float]:
        """{seed: figure} of the runs that have one."""
        found = zip(group.runs, self.figures[self.groups.index(group)], strict=True)
        return {run.seed: item.value for run, item in found if item.value is not None}


def compare(
    groups: Sequence[Group],
    metric: str = "eval/loss",
    *,
    target: float | None = None,
    higher_is_better: bool = False,
    baseline: int = 0,
    confidence: float = 0.95,
) -> Report:
    """All pairs of groups, or each with the group numbered `baseline`; p-values are corrected for the number of pairs (Holm).

    Raises `UserError` where the metric is nowhere, or there is no such baseline.
    """
    figures = tuple(tuple(figure(run, metric, target) for run in group.runs) for group in groups)
    if not any(item.value is not None for items in figures for item in items):
        reasons = sorted({item.missing for items in figures for item in items})
        raise UserError(f"no run has the metric {metric}: {'; '.join(reasons)}.")
    if not 0 <= baseline <= len(groups):
        raise UserError(f"--baseline={baseline}: the groups are numbered 1 to {len(groups)}.")
    report = Report(metric, confidence, tuple(groups), figures, ())
    pairs = (
        [(groups[baseline - 1], group) for group in groups if group.number != baseline]
        if baseline
        else list(itertools.combinations(groups, 2))
    )
    measured = [_measure(report, a, b) for a, b in pairs]
    tested = [index for index, (_, found) in enumerate(measured) if found is not None]
    corrected = dict(zip(tested, holm([found.p for _, found in measured if found is not None]), strict=True))
    order = sorted(tested, key=lambda index: corrected[index])
    comparisons = []
    for index, ((a, b), (seeds, found)) in enumerate(zip(pairs, measured, strict=True)):
        level = (1 - confidence) / (len(tested) - order.index(index)) if found else 1 - confidence
        comparisons.append(_conclude(report, a, b, seeds, found, corrected.get(index), level, len(tested), higher_is_better))
    return dataclasses.replace(report, comparisons=tuple(comparisons))


def _measure(report: Report, a: Group, b: Group) -> tuple[tuple[int, ...], Paired | None]:
    of_a, of_b = report.values(a), report.values(b)
    seeds = tuple(sorted(of_a.keys() & of_b.keys()))
    differences = [of_b[seed] - of_a[seed] for seed in seeds]
    return seeds, paired(differences, report.confidence) if len(seeds) >= MIN_PAIRS else None


def _conclude(
    report: Report,
    a: Group,
    b: Group,
    seeds: tuple[int, ...],
    found: Paired | None,
    p_holm: float | None,
    level: float,
    tests: int,
    higher_is_better: bool,
) -> Comparison:
    if found is None or p_holm is None:
        named = f" ({', '.join(map(str, seeds))})" if seeds else ""
        count = f"{len(seeds)} seed{' is' if len(seeds) == 1 else 's are'}"
        verdict = f"no winner: {count} paired{named}, and at least {MIN_PAIRS} are needed."
        return Comparison(a, b, seeds, None, None, MIN_PAIRS - len(seeds), None, verdict)
    settled = found.excludes_zero and p_holm < 1 - report.confidence
    needed = pairs_needed(found.effect, level)
    more = 0 if settled else None if needed is None else max(needed - found.pairs, 1)
    better = (b if found.difference > 0 else a) if higher_is_better else (b if found.difference < 0 else a)
    reason = "" if settled else _refusal(report, found, p_holm, tests, more)
    missing = [item.missing for item in report.figures[report.groups.index(better)] if item.value is None]
    if not reason and missing:
        reason = (
            f"{len(missing)} of the runs of {better.title} have no {report.metric} ({'; '.join(sorted(set(missing)))}), and "
            "leaving them out favours it."
        )
    if reason:
        return Comparison(a, b, seeds, found, p_holm, more, None, f"no winner: {reason}")
    low, high = sorted(map(abs, found.interval))
    how = "higher" if higher_is_better else "lower"
    verdict = (
        f"{better.title} is better: {report.metric} is {how} by {abs(found.difference):.4g} "
        f"({report.confidence:.0%} interval {_between((low, high))}, {found.pairs} seeds, {_p(p_holm)}{_after(tests)})."
    )
    return Comparison(a, b, seeds, found, p_holm, more, better, verdict)


def _refusal(report: Report, found: Paired, p_holm: float, tests: int, more: int | None) -> str:
    settle = (
        f"more than {MOST_SEEDS} seeds would be needed"
        if more is None
        else f"about {more} more seeds of each would settle it, if the difference is what it looks like"
    )
    low, high = found.interval
    if low <= 0 <= high:
        return f"the {report.confidence:.0%} interval of the difference, {_between(found.interval)}, holds zero; {settle}."
    if not found.excludes_zero and found.bootstrap is not None:
        return f"the bootstrap's interval, {_between(found.bootstrap)}, holds zero, though Student's does not; {settle}."
    return f"{_p(found.p)} is {_p(p_holm)[4:]}{_after(tests)}; {settle}."


def _between(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.4g} to {interval[1]:.4g}"


def _p(p: float) -> str:
    return f"p = {p:.2g}"


def _after(tests: int) -> str:
    return f" after Holm's correction for {tests} comparisons" if tests > 1 else ""


# --- what is printed ---


def lines(report: Report) -> list[str]:
    """The groups, the comparisons, and a verdict in a sentence for each."""
    groups: list[tuple[str, ...]] = [("#", "group", "seeds", "mean", "sd", "lowest", "highest", "missing")]
    for group in report.groups:
        values = np.array(list(report.values(group).values()))
        numbers = (
            [values.mean(), values.std(ddof=1) if len(values) > 1 else None, values.min(), values.max()] if len(values) else []
        )
        shown = ["-" if number is None else f"{number:.5g}" for number in numbers] or ["-"] * 4
        groups.append((str(group.number), group.label, str(len(values)), *shown, _missing(report, group)))
    pairs: list[tuple[str, ...]] = [
        ("", "difference", f"{report.confidence:.0%} interval", "bootstrap", "p", "p (Holm)", "effect", "seeds", "more seeds")
    ]
    for c in report.comparisons:
        more = f"> {MOST_SEEDS}" if c.more_seeds is None else str(c.more_seeds or "-")
        cells = ["-"] * 6
        if c.paired is not None and c.p_holm is not None:
            bootstrap = _between(c.paired.bootstrap) if c.paired.bootstrap else "-"
            cells = [f"{c.paired.difference:+.4g}", _between(c.paired.interval), bootstrap, f"{c.paired.p:.2g}"]
            cells += [f"{c.p_holm:.2g}", f"{c.paired.effect:+.2f}"]
        pairs.append((f"{c.b.number} - {c.a.number}", *cells, str(len(c.seeds)), more))
    verdicts = [f"{c.a.number} and {c.b.number}: {c.verdict}" for c in report.comparisons]
    if not verdicts:
        return [report.metric, *_table(groups), "", "there is one group, and nothing to compare it with."]
    return [report.metric, *_table(groups), "", *_table(pairs), "", *verdicts]


def _missing(report: Report, group: Group) -> str:
    items = report.figures[report.groups.index(group)]
    return "; ".join(f"seed {run.seed} {item.missing}" for run, item in zip(group.runs, items, strict=True) if item.missing)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = {1} if rows[0][0] == "#" else set()
    return [
        "  ".join(
            f"{cell:<{w}}" if i in left else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain values."""
    groups = [
        {
            "number": group.number,
            "label": group.label,
            "knobs": group.runs[0].knobs,
            "runs": [
                {"seed": run.seed, "folder": str(run.folder), "value": item.value, "missing": item.missing}
                for run, item in zip(group.runs, items, strict=True)
            ],
        }
        for group, items in zip(report.groups, report.figures, strict=True)
    ]
    comparisons = [
        {
            "a": c.a.number,
            "b": c.b.number,
            "seeds": list(c.seeds),
            **(dataclasses.asdict(c.paired) if c.paired is not None else {}),
            "p_holm": c.p_holm,
            "more_seeds": c.more_seeds,
            "winner": c.winner.number if c.winner is not None else None,
            "verdict": c.verdict,
        }
        for c in report.comparisons
    ]
    return {"metric": report.metric, "confidence": report.confidence, "groups": groups, "comparisons": comparisons}
