"""Which of the swept knobs the final figure hangs on: how much of its variance between runs each knob's values explain alone.

For a knob with k values over n runs, SSb is the sum of squares between the values' means, SSw the one within, SSt their sum. The
share is Kelley's epsilon squared (T. L. Kelley, An Unbiased Correlation Ratio Measure, PNAS 1935),

    1 - (SSw / (n - k)) / (SSt / (n - 1))

which is 0 on average where the values say nothing, whatever their number; a negative one counts as 0. p is the F test's of
a one-way analysis of variance. Numbers with more than MOST_VALUES values are put into QUANTILES bins of about as many runs.
What two knobs do together is in neither's share.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from gptjax.config import flatten
from gptjax.sweeps.compare import Report
from gptjax.sweeps.definition import show
from gptjax.sweeps.groups import SEED, Run
from gptjax.sweeps.statistics import holm

MOST_VALUES, QUANTILES = 5, 4


@dataclasses.dataclass(frozen=True)
class Level:
    """One value of a knob, or a bin of values: the figures of its runs."""

    text: str
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Importance:
    """Of one knob, or of several that always change together. `share` and the p's are None where each value has one run only."""

    keys: tuple[str, ...]
    levels: tuple[Level, ...]
    share: float | None
    p: float | None
    p_holm: float | None = None


def importances(report: Report) -> list[Importance]:
    """The most important first, the seed among them; [] where no knob was swept or fewer than 3 runs have a figure."""
    runs, figures = [], []
    for group, items in zip(report.groups, report.figures, strict=True):
        for run, item in zip(group.runs, items, strict=True):
            if item.value is not None:
                runs.append(run)
                figures.append(item.value)
    keys = swept_keys(runs)
    if len(runs) < 3 or not keys:
        return []
    values, configs = np.array(figures), [flatten(run.config) for run in runs]
    found: dict[tuple[int, ...], tuple[Importance, list[int]]] = {}  # by which runs have one value
    for key in [*keys, SEED]:
        texts, places = _levels([config[key] for config in configs])
        parts = tuple(places.index(place) for place in places)
        if parts in found and key != SEED:
            one, its_places = found[parts]
            found[parts] = (_merged(one, key, [texts[places[its_places.index(n)]] for n in range(len(texts))]), its_places)
        elif parts not in found and len(texts) > 1:
            found[parts] = (_importance(key, texts, np.array(places), values), places)
    tested = [one for one, _ in found.values() if one.p is not None]
    corrected = holm([one.p for one in tested if one.p is not None])
    by_keys = {one.keys: p for one, p in zip(tested, corrected, strict=True)}
    every = [dataclasses.replace(one, p_holm=by_keys.get(one.keys)) for one, _ in found.values()]
    return sorted(every, key=lambda one: 1.0 if one.share is None else -one.share)


def swept_keys(runs: Sequence[Run]) -> list[str]:
    """The knobs that shape the runs and are not the same in all, in order of declaration; the seed is not one."""
    configs = [flatten(run.config) for run in runs]
    own = {key for run in runs for key in run.knobs}
    order = list(configs[0]) if configs else []
    return [key for key in order if key in own and len({repr(config[key]) for config in configs}) > 1]


def _levels(values: Sequence[Any]) -> tuple[list[str], list[int]]:
    """(texts of the levels, each value's level): the values in order of size or appearance, or bins of many numbers."""
    distinct = list({repr(value): value for value in values}.values())
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in distinct)
    if numeric:
        distinct.sort()
    if not numeric or len(distinct) <= MOST_VALUES:
        names = [repr(value) for value in distinct]
        return [show(value) for value in distinct], [names.index(repr(value)) for value in values]
    edges = np.quantile(values, np.linspace(0, 1, QUANTILES + 1)[1:-1])
    bins = np.searchsorted(edges, values, side="left")
    used = sorted(set(bins.tolist()))
    places = [used.index(one) for one in bins.tolist()]
    parts = [[value for value, place in zip(values, places, strict=True) if place == number] for number in range(len(used))]
    return [show(min(part)) if min(part) == max(part) else f"{show(min(part))} to {show(max(part))}" for part in parts], places


def _importance(key: str, texts: Sequence[str], places: np.ndarray, values: np.ndarray) -> Importance:
    levels = tuple(Level(text, tuple(values[places == number].tolist())) for number, text in enumerate(texts))
    share, p = explained(places, values)
    return Importance((key,), levels, share, p)


def _merged(one: Importance, key: str, texts: Sequence[str]) -> Importance:
    levels = tuple(
        dataclasses.replace(level, text=f"{level.text}, {text}") for level, text in zip(one.levels, texts, strict=True)
    )
    return dataclasses.replace(one, keys=(*one.keys, key), levels=levels)


def explained(places: np.ndarray, values: np.ndarray) -> tuple[float | None, float | None]:
    """(epsilon squared, at least 0; p of the F test) of values [n] in the levels places [n]; None where no level has two."""
    n, k = len(values), len(set(places.tolist()))
    if n <= k or k < 2:
        return None, None
    means = {place: values[places == place].mean() for place in set(places.tolist())}
    within = float(sum((value - means[place]) ** 2 for value, place in zip(values, places.tolist(), strict=True)))
    total = float(((values - values.mean()) ** 2).sum())
    if total == 0:
        return 0.0, 1.0
    share = 1 - (within / (n - k)) / (total / (n - 1))
    between = max(total - within, 0.0)
    p = float(special.fdtrc(k - 1, n - k, (between / (k - 1)) / (within / (n - k)))) if within > 0 else 0.0
    return max(share, 0.0), p


def entangled(report: Report) -> list[tuple[str, str]]:
    """Pairs of swept knobs that are not crossed evenly: to tell what one of them does, the other must be known."""
    runs = [
        run
        for group, items in zip(report.groups, report.figures, strict=True)
        for run, item in zip(group.runs, items, strict=True)
        if item.value is not None
    ]
    configs = [flatten(run.config) for run in runs]
    places = {key: np.array(_levels([config[key] for config in configs])[1]) for key in swept_keys(runs)}
    return [(a, b) for a, b in itertools.combinations(places, 2) if not _crossed(places[a], places[b])]


def _crossed(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether each level of one has the same share of runs in each of the other's."""
    counts = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(counts, (a, b), 1)
    expected = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / len(a)
    return bool(np.allclose(counts, expected))
