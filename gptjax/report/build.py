"""The report's page, section by section."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import gptjax
from gptjax.config import Config
from gptjax.pages.blocks import Block, Cell, Figure, List, Page, Section, Table, Text
from gptjax.pages.plots import Row, RowPlot
from gptjax.report.configs import configs
from gptjax.report.cost import cost
from gptjax.report.curves import curves
from gptjax.report.environment import environment
from gptjax.report.importance import Importance, entangled, importances
from gptjax.report.numbers import between, decimals, fixed, joined, p_value, percent, plural
from gptjax.report.results import answer, mean_interval, results
from gptjax.report.samples import samples
from gptjax.report.sources import Sources
from gptjax.sweeps.compare import Report, compare
from gptjax.sweeps.groups import SEED, TO_LOSS, Group, group_runs

MOST_RUNS = 120  # rows in the table of runs; runs.csv has all


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the report is asked to say: as for `gptjax compare`."""

    metric: str = "eval/loss"
    target: float | None = None
    higher_is_better: bool = False
    baseline: int = 0
    confidence: float = 0.95
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Contents:
    """All that the files of a report are written from. `reports` are of the metric, and of tokens and time to the target."""

    sources: Sources
    wanted: Wanted
    groups: tuple[Group, ...]
    reports: tuple[Report, ...]
    importances: tuple[Importance, ...]
    answer: str
    page: Page


def build(sources: Sources, wanted: Wanted, adapted: Callable[[Config], int | None]) -> Contents:
    """Raises `UserError` where no run has the metric, or two runs of one folder have one config and seed.

    `adapted` counts the weights of a config's adapters that a token is multiplied with.
    """
    groups = tuple(group_runs(sources.runs))
    metrics = [wanted.metric, *(name for name in TO_LOSS if wanted.target is not None and name != wanted.metric)]
    reports = tuple(_compare(groups, metric, wanted) for metric in metrics)
    found = importances(reports[0])
    said = answer(reports[0], wanted.higher_is_better)
    sections = [
        Section("answer", "Question and answer", tuple(_answer(sources, groups, said))),
        *(
            Section(f"results-{number}" if number else "results", _title(report), tuple(_results(report, wanted, number)))
            for number, report in enumerate(reports)
        ),
        Section("curves", "Curves", tuple(curves(reports[0], wanted.higher_is_better, wanted.target))),
        Section("importance", "What it hangs on", tuple(_importance(reports[0], found))),
        Section("configs", "Configs", tuple(configs(groups))),
        Section("samples", "Samples", tuple(samples(groups))),
        Section("runs", "Runs", tuple(_runs(reports[0]))),
        Section("environment", "Environment", tuple(environment(sources.runs))),
        Section("cost", "Cost", tuple(cost(groups, adapted))),
    ]
    lead = f"{plural(len(sources.runs), 'run')} in {plural(len(groups), 'group')}, from {joined(sources.folders)}."
    page = Page(wanted.title or _heading(sources), lead, tuple(sections), f"gptjax {gptjax.__version__}, gptjax report")
    return Contents(sources, wanted, groups, reports, tuple(found), said, page)


def _compare(groups: Sequence[Group], metric: str, wanted: Wanted) -> Report:
    higher = wanted.higher_is_better and metric == wanted.metric
    return compare(
        groups,
        metric,
        target=wanted.target,
        higher_is_better=higher,
        baseline=wanted.baseline,
        confidence=wanted.confidence,
    )


def _heading(sources: Sources) -> str:
    if len(sources.questions) == 1:
        return ": ".join([sources.questions[0].title, *([", ".join(sources.arguments)] if sources.arguments else [])])
    return f"Report on {joined(sources.folders)}"


def _title(report: Report) -> str:
    return report.metric if report.metric not in TO_LOSS else report.metric.replace("_", " ").capitalize()


def _answer(sources: Sources, groups: Sequence[Group], said: str) -> list[Block]:
    found: list[Block] = []
    for question in sources.questions:
        if len(sources.questions) > 1:
            found.append(Text(f"{question.title} ({question.path}):", "note"))
        found.append(Text(question.text, markdown=True) if question.text else Text(f"{question.path} asks nothing.", "note"))
    if not sources.questions:
        found.append(
            Text("The question is not written down: no README.md beside the runs or the sweep file (--readme=FILE).", "note")
        )
    found.append(Text(said, "answer"))
    unfinished = [run for group in groups for run in group.runs if run.unfinished]
    if unfinished:
        kinds = dict.fromkeys(run.unfinished for run in unfinished)
        counts = ", ".join(f"{sum(run.unfinished == kind for run in unfinished)} {kind}" for kind in kinds)
        found.append(Text(f"{plural(len(unfinished), 'run')} without a result: {counts}; see Runs.", "warning"))
    return found


def _results(report: Report, wanted: Wanted, number: int) -> list[Block]:
    higher = wanted.higher_is_better and report.metric == wanted.metric
    lead: list[Block] = [Text(answer(report, higher))] if number else []
    return lead + results(report, report.metric.replace("/", "_"), higher)


def _importance(report: Report, found: Sequence[Importance]) -> list[Block]:
    swept = [one for one in found if one.keys != (SEED,)]
    if not swept:
        return [Text("No knob was swept, or fewer than 3 runs have a figure.", "note")]
    names = {one.keys: " + ".join(one.keys) for one in found}
    drawn = tuple(
        Row(names[one.keys], one.share, number=0, note=percent(one.share) if one.share is not None else "not known")
        for one in found
    )
    alt = "Share of the variance explained by each knob alone: " + "; ".join(f"{row.label} {row.note}" for row in drawn)
    plot = RowPlot(alt, f"share of the variance of {report.metric}", drawn, bars=True)
    caption = (
        f"How much of the variance of {report.metric} between runs each knob's values explain alone: epsilon squared (Kelley "
        "1935), which is 0 on average where they explain nothing. What knobs do together is in no bar, and so the bars need not "
        "add up to 100 %. The seed stands there to compare with."
    )
    head = ("knob", "values", "share", "p (F test)", "p (Holm)")
    rows = tuple(
        (
            names[one.keys],
            str(len(one.levels)),
            percent(one.share) if one.share is not None else "—",
            p_value(one.p),
            p_value(one.p_holm),
        )
        for one in found
    )
    blocks: list[Block] = [
        Figure("importance", plot, caption),
        Table("Shares of the variance", head, rows, frozenset({1, 2, 3, 4})),
        _levels(report, swept),
    ]
    together = {frozenset((a, b)) for one in swept for a in one.keys for b in one.keys}
    tied = [f"{a} and {b}" for a, b in entangled(report) if frozenset((a, b)) not in together]
    if any(len(one.keys) > 1 for one in swept):
        blocks.append(Text("Knobs joined by + always change together; which of them matters, these runs cannot tell.", "note"))
    if tied:
        blocks.append(
            Text(
                f"Not every value meets every other as often: {joined(tied)}. Part of one's share may be the other's.", "warning"
            )
        )
    return blocks


def _levels(report: Report, swept: Sequence[Importance]) -> Table:
    rows: list[tuple[str | Cell, ...]] = []
    places = decimals([value for one in swept for level in one.levels for value in level.values])
    for one in swept:
        for level in one.levels:
            mean = sum(level.values) / len(level.values)
            interval = between(*mean_interval(list(level.values), report.confidence), places)
            rows.append((" + ".join(one.keys), level.text, str(len(level.values)), fixed(mean, places), interval))
    head = ("knob", "value", "runs", "mean", f"{report.confidence:.0%} interval")
    return Table(f"Mean {report.metric} by value, over everything else", head, tuple(rows), frozenset({2, 3, 4}))


def _runs(report: Report) -> list[Block]:
    rows: list[tuple[str | Cell, ...]] = []
    values = [item.value for items in report.figures for item in items]
    places = decimals(values)
    for group, items in zip(report.groups, report.figures, strict=True):
        for run, item in zip(group.runs, items, strict=True):
            state = run.unfinished or "done"
            why_not = "—" if item.missing == state else item.missing
            shown = fixed(item.value, places) if item.value is not None else Cell(why_not, faint=True)
            rows.append((Cell(str(group.number), group.number), str(run.seed), state, shown, run.folder.name))
    head = ("group", "seed", "state", report.metric, "folder")
    found: list[Block] = [Table("Every run", head, tuple(rows[:MOST_RUNS]), frozenset({1, 3}), frozenset({4}), names=False)]
    if len(rows) > MOST_RUNS:
        found.append(Text(f"The first {MOST_RUNS} of {len(rows)}; runs.csv has them all.", "note"))
    why = [f"{run.folder.name}: {said}" for group in report.groups for run in group.runs if (said := run.why)]
    return found + ([Text("Why runs ended without a result:"), List(tuple(why))] if why else [])
