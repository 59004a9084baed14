"""What the runs say of one metric: the answer in a sentence, means with intervals, each pair as `gptjax compare` judges it."""

from __future__ import annotations

import math

import numpy as np

from gptjax.pages.blocks import Block, Cell, Figure, List, Table, Text
from gptjax.pages.plots import Row, RowPlot
from gptjax.report.numbers import between, decimals, fixed, joined, p_value, plural
from gptjax.sweeps.compare import Comparison, Report
from gptjax.sweeps.groups import Group
from gptjax.sweeps.statistics import MIN_PAIRS, MOST_SEEDS, student

MOST_ROWS = 40  # of a plot; the table has all
MOST_SENTENCES = 15  # on pairs; the table has all
MOST_CHARACTERS = 200  # of groups listed in a sentence


def mean_interval(values: list[float], confidence: float) -> tuple[float | None, float | None]:
    """Student's interval of the mean; (None, None) with fewer than MIN_PAIRS values."""
    if len(values) < MIN_PAIRS:
        return None, None
    low, high, _ = student(np.array(values)[None], confidence)
    return float(low[0]), float(high[0])


def named(group: Group) -> Cell:
    """A group in a table: its line, its number, which no line break parts from what follows, and its label."""
    return Cell(f"{group.number}\u00a0{group.label}", group.number)


def group_means(report: Report) -> dict[int, float]:
    """{group's number: mean} of the groups that have a figure."""
    return {group.number: float(np.mean(list(found.values()))) for group in report.groups if (found := report.values(group))}


def answer(report: Report, higher_is_better: bool = False) -> str:
    """One or two sentences: the group with the best mean, over which others `compare` shows it to be better, and over which not.

    It calls a group better only where `compare` names it the winner.
    """
    means = group_means(report)
    number = (max if higher_is_better else min)(means, key=means.__getitem__)
    best = next(group for group in report.groups if group.number == number)
    values = list(report.values(best).values())
    places = decimals(means.values())
    low, high = mean_interval(values, report.confidence)
    reach = f", {report.confidence:.0%} interval {between(low, high, places)}" if low is not None else ""
    mean = f"{fixed(means[best.number], places)} ({plural(len(values), 'seed')}{reach})"
    if len(report.groups) == 1:
        return f"There is one group of runs, and nothing to compare it with. Its mean {report.metric} is {mean}."
    own = [c for c in report.comparisons if best in (c.a, c.b)]
    beaten = [_other(c, best) for c in own if c.winner is best]
    open_ = [_other(c, best) for c in own if c.winner is not best]
    lead = f"{best.title} has the {'highest' if higher_is_better else 'lowest'} mean {report.metric}, {mean}"
    if not own:
        return f"{lead}, but was compared with no other group: nothing is shown."
    if not beaten:
        rest = "the other" if len(own) == 1 else f"any of the {len(own)} others" if len(own) > 2 else "either of the others"
        return f"No winner. {lead}, but it is not shown to be better than {rest}."
    if not open_:
        others = "the other group" if len(own) == 1 else f"all {len(own)} others"
        whole = len(own) == len(report.groups) - 1
        return f"{lead}, and is better than {others if whole else _listed(beaten)}."
    return f"{lead}. It is better than {_listed(beaten)}; it is not shown to be better than {_listed(open_)}."


def _listed(groups: list[Group]) -> str:
    """Numbers and labels, or, where that would be long, the numbers alone."""
    titles = joined((group.title for group in groups), most=len(groups))
    return titles if len(titles) <= MOST_CHARACTERS else f"groups {joined((str(g.number) for g in groups), most=12)}"


def _other(comparison: Comparison, group: Group) -> Group:
    return comparison.b if comparison.a is group else comparison.a


def results(report: Report, name: str, higher_is_better: bool = False) -> list[Block]:
    """Means as a figure and a table, then the pairs; `name` begins the figures' names."""
    return [*_means(report, name), *_pairs(report, name, higher_is_better)]


def _means(report: Report, name: str) -> list[Block]:
    confidence, rows, drawn = f"{report.confidence:.0%} interval", [], []
    every = [value for group in report.groups for value in report.values(group).values()]
    places = decimals(every)
    for group in report.groups:
        values = list(report.values(group).values())
        mean = float(np.mean(values)) if values else None
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        low, high = mean_interval(values, report.confidence)
        missing = _missing(report, group)
        rows.append(
            (
                named(group),
                str(len(values)),
                fixed(mean, places),
                between(low, high, places),
                fixed(sd, places),
                fixed(min(values, default=None), places),
                fixed(max(values, default=None), places),
                missing,
            )
        )
        note = fixed(mean, places) if mean is not None else "no figure"
        drawn.append(Row(group.label, mean, low, high, tuple(values), group.number, note))
    has_missing = any(row[-1] for row in rows)
    head = ("group", "seeds", "mean", confidence, "sd", "lowest", "highest", *(["without a figure"] if has_missing else []))
    kept = tuple(row if has_missing else row[:-1] for row in rows)
    table = Table(f"{report.metric} by group", head, kept, frozenset(range(1, 7)), frozenset({7}))
    alt = f"{report.metric} of each group: mean, interval and single seeds, as in the table below"
    plot = RowPlot(alt, report.metric, tuple(drawn[:MOST_ROWS]))
    cut = f" The first {MOST_ROWS} of {len(drawn)} groups." if len(drawn) > MOST_ROWS else ""
    caption = (
        f"Mean of each group with Student's {report.confidence:.0%} interval (from {MIN_PAIRS} seeds on); small dots are single "
        f"seeds.{cut} Whether two groups differ is judged on differences paired by seed, below, and not by whether these overlap."
    )
    return [Figure(f"{name}_means", plot, caption), table]


def _missing(report: Report, group: Group) -> str:
    items = report.figures[report.groups.index(group)]
    return "; ".join(f"seed {run.seed}: {item.missing}" for run, item in zip(group.runs, items, strict=True) if item.missing)


def _pairs(report: Report, name: str, higher_is_better: bool) -> list[Block]:
    if not report.comparisons:
        return [Text("There is one group, and nothing to compare it with.", "note")]
    tested = [c for c in report.comparisons if c.paired is not None]
    untested = len(report.comparisons) - len(tested)
    left_out = (
        f"{plural(untested, 'pair')} of groups {'has' if untested == 1 else 'have'} fewer than {MIN_PAIRS} seeds in common, and "
        f"{'is' if untested == 1 else 'are'} not compared."
    )
    if not tested:
        return [Text(f"No winner: {left_out}", "note")]
    found: list[Block] = [_difference_plot(report, tested, name, higher_is_better), _pair_table(report, tested)]
    if untested:
        found.append(Text(left_out, "note"))
    if len(tested) <= MOST_SENTENCES:
        found.append(List(tuple(f"{c.a.number} and {c.b.number}: {c.verdict}" for c in tested)))
    else:
        found.append(Text(f"comparisons.csv has a sentence on each of the {len(tested)} pairs.", "note"))
    return found


def _difference_plot(report: Report, tested: list[Comparison], name: str, higher_is_better: bool) -> Figure:
    rows = []
    for c in tested[:MOST_ROWS]:
        assert c.paired is not None
        of_a, of_b = report.values(c.a), report.values(c.b)
        dots = tuple(of_b[seed] - of_a[seed] for seed in c.seeds)
        label = f"{c.b.number} − {c.a.number}: {_apart(c.b, c.a)}"
        note = f"{c.winner.number} better" if c.winner else "no winner"
        rows.append(Row(label, c.paired.difference, *c.paired.interval, dots, 0, note, strong=c.winner is not None))
    alt = f"Differences of {report.metric} between pairs of groups with their intervals, as in the table below"
    better = "right" if higher_is_better else "left"
    cut = f" The first {MOST_ROWS} of {len(tested)} pairs." if len(tested) > MOST_ROWS else ""
    caption = (
        f"Differences paired by seed, with Student's {report.confidence:.0%} interval; small dots are single seeds. "
        f"{better.title()} of the line the first named is better. A full dot: compare names a winner; a hollow one: "
        f"it does not.{cut}"
    )
    return Figure(f"{name}_differences", RowPlot(alt, f"difference of {report.metric}", tuple(rows), zero=0.0), caption)


def _apart(b: Group, a: Group) -> str:
    """What of b's label and what of a's differ, without the keys, which are the same in both."""
    parts = list(zip(b.label.split(", "), a.label.split(", "), strict=False))
    values = [[one.partition("=")[2] or one for one in pair] for pair in parts if pair[0] != pair[1]]
    return " less ".join(", ".join(side) for side in zip(*values, strict=True))


def _pair_table(report: Report, tested: list[Comparison]) -> Table:
    known = [c.paired for c in tested if c.paired is not None]
    places = decimals([bound for one in known for bound in (one.difference, *one.interval)], 4)
    has_bootstrap = any(one.bootstrap for one in known)
    head = [
        "pair",
        "difference",
        f"{report.confidence:.0%} interval",
        "p",
        "p (Holm)",
        "effect",
        "seeds",
        "more seeds",
        "compare says",
    ]
    rows = []
    for c in tested:
        assert c.paired is not None
        more = f"> {MOST_SEEDS:,}" if c.more_seeds is None else str(c.more_seeds or "—")
        effect = fixed(c.paired.effect, 2, sign=True) if math.isfinite(c.paired.effect) else "∞"
        row: list[str | Cell] = [
            f"{c.b.number}\u00a0−\u00a0{c.a.number}",
            fixed(c.paired.difference, places, sign=True),
            between(*c.paired.interval, places),
            p_value(c.paired.p),
            p_value(c.p_holm),
            effect,
            str(len(c.seeds)),
            more,
            f"{c.winner.number} is better" if c.winner else Cell("no winner", faint=True),
        ]
        if has_bootstrap:
            low, high = c.paired.bootstrap or (None, None)
            row.insert(3, between(low, high, places))
        rows.append(tuple(row))
    if has_bootstrap:
        head.insert(3, "bootstrap")
    return Table(
        f"{report.metric}: the pair's first less its second, by seed",
        tuple(head),
        tuple(rows),
        frozenset(range(1, len(head) - 1)),
    )
