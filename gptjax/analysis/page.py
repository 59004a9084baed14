"""The findings as one HTML page that needs nothing else: no script, no network, light or dark as the reader has it, printable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

import gptjax
from gptjax.analysis.charts import confusion_table, interval_bar, reliability_diagram
from gptjax.analysis.findings import Findings, Leak
from gptjax.analysis.predictions import Prediction, TrainText
from gptjax.analysis.slices import MOST_LABELS, Interval, Slice
from gptjax.measures.measured import show
from gptjax.pages import document
from gptjax.pages.document import note, scroll, table

MOST_CONFUSED = 25  # rows of the confusion matrix
MOST_ROWS = 40  # labels in the table
MOST_PAIRS = 20
MOST_CHARACTERS = 500  # of a text


def page(title: str, findings: Findings, predictions: Sequence[Prediction], train: Sequence[TrainText] | None = None) -> str:
    """The whole page; every text and label is escaped. `train` are the texts that the leak's matches count into."""
    sections = [
        ("summary", "Summary", _summary(findings)),
        ("confusion", "Confusion", _confusion(*findings.confusion)),
        ("labels", "Labels", _labels(findings)),
        ("slices", "Slices", _slices(findings)),
        ("worst", "Worst examples", _worst(findings)),
        ("calibration", "Calibration", _calibration(findings)),
        ("leak", "Leak report", _leak(findings.leak, predictions, train or [])),
    ]
    lead = f"{findings.n:,} predictions, gptjax {escape(gptjax.__version__)}. Intervals are of 95 %."
    return document.document(title, lead, sections)


def _reach(low: float | None, high: float | None) -> str:
    known = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
    return f"[{show(low)}, {show(high)}]" if known and low is not None and high is not None else "—"


def _share(part: Interval) -> str:
    return f"{part.value:.4f} <small>{_reach(part.low, part.high)}</small>" if part.n else "—"


def cut_text(text: str) -> str:
    """Escaped, at most MOST_CHARACTERS of it, and then how long it is."""
    return document.cut_text(text, MOST_CHARACTERS)


def _summary(findings: Findings) -> str:
    rows = [[escape(m.name), show(m.value), _reach(m.low, m.high), f"{m.n:,}", escape(m.note)] for m in findings.summary]
    kind = "below full score" if findings.scored else "wrong"
    return (
        table(["measure", "value", "interval", "n", "note"], rows, (1, 2, 3), texts=(4,), names=True)
        + f"<p>{findings.wrong:,} of {findings.n:,} are {kind}.</p>"
    )


def _confusion(names: list[str], matrix: np.ndarray) -> str:
    if not names:
        return note("Gold and predicted are texts of their own here, or scored, and not labels of a set: there is no matrix.")
    cut = ""
    if len(names) > MOST_CONFUSED:
        frequent = np.argsort(-(matrix.sum(axis=1) + matrix.sum(axis=0)), kind="stable")
        keep, rest = np.sort(frequent[: MOST_CONFUSED - 1]), np.sort(frequent[MOST_CONFUSED - 1 :])
        merge = np.zeros((len(names), MOST_CONFUSED), np.int64)
        merge[keep, np.arange(len(keep))] = 1
        merge[rest, -1] = 1
        cut = note(
            f"The {len(keep)} most frequent of {len(names)} labels; the other {len(rest)} stand together as “others”, "
            "where confusions among them look right."
        )
        names, matrix = [*(names[place] for place in keep), f"others ({len(rest)})"], merge.T @ matrix @ merge
    order = [(int(matrix[i, j]), i, j) for i in range(len(names)) for j in range(len(names)) if i != j and matrix[i, j]]
    most = [f"{count} × {escape(names[i])} → {escape(names[j])}" for count, i, j in sorted(order, key=lambda row: -row[0])[:5]]
    often = f"<p>Most frequent mistakes (gold → predicted): {'; '.join(most) or 'none'}.</p>"
    return f"{scroll(confusion_table(names, matrix), 'Confusion')}{often}{cut}"


def _labels(findings: Findings) -> str:
    if not findings.labels:
        return note("There are no labels to tell apart.")
    rows = [
        [
            escape(row.label),
            f"{row.support:,}",
            _share(row.precision),
            _share(row.recall),
            f"{row.f1.value:.4f} <small>{_reach(row.f1.low, row.f1.high)}</small>",
        ]
        for row in findings.labels[:MOST_ROWS]
    ]
    shown = table(["label", "gold", "precision", "recall", "F1"], rows, (1, 2, 3, 4), names=True)
    if len(findings.labels) > MOST_ROWS:
        shown += note(f"The {MOST_ROWS} most frequent of {len(findings.labels)} labels.")
    if findings.labels[0].f1.low is None:
        shown += note("There are too many texts and labels to resample each: F1 has no interval here.")
    return shown


def _slices(findings: Findings) -> str:
    if not findings.slices:
        return note("No part differs from the whole: texts are of one length and label, and no pattern is in some of them only.")
    overall = findings.summary[0].value
    rows = [_slice_row(part, overall) for part in findings.slices]
    head = ["by", "part", "n", "score", "interval", "", "less that of the rest", ""]
    number = len(findings.slices)
    apart = sum(part.stands_out for part in findings.slices)
    labels = sum(part.family == "gold label" for part in findings.slices)
    cut = f" Labels are the {MOST_LABELS} most frequent." if labels == MOST_LABELS else ""
    by_chance = max(1, round(0.05 * number))
    return table(head, rows, (2, 3, 4, 6)) + note(
        f"The line in each bar is the score of all. ● marks the {apart} of {number} parts of which the interval of the "
        f"difference excludes 0: about {by_chance} of {number} would by chance alone. Lengths are characters.{cut}"
    )


def _slice_row(part: Slice, overall: float) -> list[str]:
    gap = part.difference
    return [
        part.family,
        escape(part.name),
        f"{part.part.n:,}",
        f"{part.part.value:.4f}",
        _reach(part.part.low, part.part.high),
        interval_bar(part.part, overall),
        f"{gap.value:+.4f} <small>{_reach(gap.low, gap.high)}</small>",
        "●" if part.stands_out else "",
    ]


def _worst(findings: Findings) -> str:
    if not findings.worst:
        return note("Nothing is wrong.")
    sure = findings.worst[0].confidence is not None
    rows = []
    for prediction in findings.worst:
        gold = prediction.gold if isinstance(prediction.gold, str) else " | ".join(prediction.gold)
        row = [escape(prediction.id), f'<div class="text">{cut_text(prediction.text)}</div>', cut_text(gold)]
        row.append(cut_text(prediction.predicted))
        if findings.scored:
            row.append(f"{prediction.points:.3f}")
        if sure and prediction.probabilities is not None:
            row += [f"{prediction.confidence:.4f}", f"{prediction.probabilities.get(gold, 0.0):.4f}"]
        rows.append(row)
    head = ["id", "text", "gold", "predicted", *(["score"] if findings.scored else [])]
    head += ["p(predicted)", "p(gold)"] if sure else []
    shown = len(findings.worst)
    order = "the surest first" if sure else "in the order of the file"
    lead = "by rising score, then " if findings.scored else ""
    which = f"All {shown} that are wrong" if shown == findings.wrong else f"{shown} of the {findings.wrong:,} that are wrong"
    return note(f"{which}, {lead}{order}.") + table(head, rows, range(4, len(head)))


def _calibration(findings: Findings) -> str:
    if not findings.bins:
        return note("The predictions have no probabilities of labels.")
    rows = [
        [
            f"{row.low:.1f} to {row.high:.1f}",
            f"{row.n:,}",
            f"{row.confidence:.4f}",
            f"{row.accuracy:.4f} <small>{_reach(row.accuracy_low, row.accuracy_high)}</small>",
            f"{row.confidence - row.accuracy:+.4f}",
        ]
        for row in findings.bins
    ]
    head = ["confidence", "n", "mean confidence", "accuracy", "too sure by"]
    return f'<div class="beside">{reliability_diagram(findings.bins)}<div>{table(head, rows, (1, 2, 3, 4))}</div></div>' + note(
        "On the dashed line a model is as often right as it says; below it, it is too sure. Grey: how many predictions."
    )


def _leak(leak: Leak | None, predictions: Sequence[Prediction], train: Sequence[TrainText]) -> str:
    if leak is None:
        return note("No training texts were given (--train=FILE), so that nothing is said about a leak.")
    found = len(leak.matches)
    near = found - leak.exact
    share = f"{100 * found / len(predictions):.2f} %"
    parts = [
        f"<p>{found:,} of {len(predictions):,} test texts ({share}) stand in the {leak.train_texts:,} training texts: "
        f"{leak.exact:,} as they are but for case, spaces and punctuation, {near:,} nearly (Jaccard similarity of 5-character "
        f"shingles at least {leak.threshold:g}). {leak.repeated_in_test:,} test texts repeat an earlier one.</p>"
    ]
    if leak.same_label is not None and found:
        parts.append(f"<p>{leak.same_label:,} of the {found:,} have the label of their training text.</p>")
    if found:
        rows = [
            ["leaked", f"{leak.leaked.n:,}", _share(leak.leaked)],
            ["clean", f"{leak.clean.n:,}", _share(leak.clean)],
        ]
        if leak.clean.n:
            rows.append(["leaked less clean", "", f"{leak.gap.value:+.4f} <small>{_reach(leak.gap.low, leak.gap.high)}</small>"])
        parts.append(table(["part", "n", "score"], rows, (1, 2)))
        pairs = [
            [
                f"{match.similarity:.3f}",
                escape(predictions[match.test].id),
                f'<div class="text">{cut_text(predictions[match.test].text)}</div>',
                f'<div class="text">{cut_text(train[match.train].text)}</div>',
            ]
            for match in leak.matches[:MOST_PAIRS]
        ]
        parts.append(table(["similarity", "id", "test", "train"], pairs, (0,)))
        if found > MOST_PAIRS:
            parts.append(note(f"The {MOST_PAIRS} most similar of {found:,} pairs; --json has them all."))
    if leak.cut:
        parts.append(note(f"There is much text: only the first {leak.cut:,} characters of each were compared."))
    parts.append(note("A text that a longer training text contains is not found: whole texts are compared."))
    return "".join(parts)
