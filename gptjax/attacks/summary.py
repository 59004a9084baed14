"""What an attack did, in numbers with 95 % intervals, and its examples for a reader."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gptjax.attacks.attack import Attacked
from gptjax.sweeps.statistics import studentised_bootstrap

Figure = dict[str, float | int]  # value, low, high, n

TITLES = {
    "accuracy_before": "accuracy before",
    "accuracy_after": "accuracy under attack",
    "success_rate": "success rate (of those right before)",
    "changed_share": "share of words changed (where it succeeded)",
    "queries": "queries a text (of those attacked)",
}
SHARES = ("accuracy_before", "accuracy_after", "success_rate", "changed_share")


def summary(results: Sequence[Attacked]) -> dict[str, Figure]:
    """Each of TITLES, as {"value", "low", "high", "n"}; value, low and high are NaN where n is too small for them.

    Accuracy under attack is that of the texts as the attack leaves them; a text it could not change counts as it was. With a
    target, texts whose label or answer is the target are not attacked, and count in neither the success rate nor the queries.
    """
    attacked = [result for result in results if result.outcome != "skipped"]
    succeeded = [result for result in attacked if result.outcome == "succeeded"]
    values = {
        "accuracy_before": [result.before == result.label for result in results],
        "accuracy_after": [result.after == result.label for result in results],
        "success_rate": [result.outcome == "succeeded" for result in attacked],
        "changed_share": [result.changed_share for result in succeeded],
        "queries": [result.queries for result in attacked],
    }
    return {name: _figure(np.asarray(column, np.float64), name in SHARES) for name, column in values.items()}


def _figure(values: np.ndarray, is_share: bool) -> Figure:
    """Mean with the interval of the studentised bootstrap over texts, within what a share or a count can be."""
    if len(values) < 2:
        return {"value": float(values.mean()) if len(values) else math.nan, "low": math.nan, "high": math.nan, "n": len(values)}
    low, high = (float(bound[0]) for bound in studentised_bootstrap(values[None]))
    return {
        "value": float(values.mean()),
        "low": max(0.0, low),
        "high": min(1.0, high) if is_share else high,
        "n": len(values),
    }


def table(figures: dict[str, Figure]) -> str:
    """The summary as lines."""
    width = max(map(len, TITLES.values()))
    lines = []
    for name, title in TITLES.items():
        figure = figures[name]
        scale, unit = (100, " %") if name in SHARES else (1, "")
        value, low, high = (figure[key] * scale for key in ("value", "low", "high"))
        shown = "none" if math.isnan(value) else f"{value:.1f}{unit}"
        band = "" if math.isnan(low) else f" [{low:.1f}, {high:.1f}]"
        lines.append(f"{title:{width}}  {shown}{band}, n={figure['n']}")
    return "\n".join(lines)


def examples(results: Sequence[Attacked], most: int = 3) -> str:
    """The first successes: what changed, and the answers before and after."""
    lines: list[str] = []
    for result in [result for result in results if result.outcome == "succeeded"][:most]:
        changed = ", ".join(f"{old!r} to {new!r}" if new else f"without {old!r}" for old, new in result.changed)
        lines.append(f"{result.place}: {result.before} becomes {result.after}: {changed}")
    return "\n".join(lines)
