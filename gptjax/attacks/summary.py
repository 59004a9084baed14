"""What an attack did, in numbers with bootstrap intervals over texts, and its examples for a reader."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gptjax.attacks.attack import Attacked
from gptjax.measures.bootstrap import Bootstrap, mean_of
from gptjax.measures.measured import Measured, measure

SHARES = ("accuracy before", "accuracy under attack", "success rate", "changed share")  # printed as percentages
NOTES = {
    "success rate": "of the texts attacked",
    "changed share": "of a text's words, where the attack succeeded",
    "queries": "of a text attacked",
}


def summary(results: Sequence[Attacked], bootstrap: Bootstrap | None = None) -> list[Measured]:
    """Accuracy before and under attack, success rate, changed share and queries, as means over texts; NaN over none.

    A text is attacked if the answer to it is right before; with a target, if moreover neither label nor answer is the target.
    Under attack a text counts as the attack leaves it: one that it did not attack, or in vain, as it was.
    """
    attacked = [result for result in results if result.outcome != "skipped"]
    succeeded = [result for result in attacked if result.outcome == "succeeded"]
    values: dict[str, list[float]] = {
        "accuracy before": [result.before == result.label for result in results],
        "accuracy under attack": [result.after == result.label for result in results],
        "success rate": [result.outcome == "succeeded" for result in attacked],
        "changed share": [result.changed_share for result in succeeded],
        "queries": [result.queries for result in attacked],
    }
    bootstrap = bootstrap or Bootstrap()
    return [
        measure(name, mean_of(column), bootstrap, NOTES.get(name, ""), None if column else math.nan)
        for name, column in values.items()
    ]


def table(figures: Sequence[Measured]) -> str:
    """The summary as lines."""
    width = max(len(figure.name) for figure in figures)
    return "\n".join(f"{figure.name:{width}}  {_shown(figure)}" for figure in figures)


def _shown(figure: Measured) -> str:
    scale, unit = (100, " %") if figure.name in SHARES else (1, "")
    if math.isnan(figure.value):
        return "no text"
    band = ""
    if figure.low is not None and figure.high is not None and not math.isnan(figure.low):
        band = f" [{figure.low * scale:.1f}, {figure.high * scale:.1f}]"
    note = f" ({figure.note})" if figure.note else ""
    return f"{figure.value * scale:.1f}{unit}{band}, n={figure.n}{note}"


def examples(results: Sequence[Attacked], most: int = 3) -> str:
    """The first successes: what changed, and the answers before and after."""
    lines: list[str] = []
    for result in [result for result in results if result.outcome == "succeeded"][:most]:
        changed = ", ".join(f"{old!r} to {new!r}" if new else f"without {old!r}" for old, new in result.changed)
        lines.append(f"{result.place}: {result.before} becomes {result.after}: {changed}")
    return "\n".join(lines)
