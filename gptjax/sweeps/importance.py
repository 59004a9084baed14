"""What a search says of its space: importance of each knob, loss over pairs of knobs, course of the best (extra: search).

Importance is fANOVA's (Hutter, Hoos and Leyton-Brown, ICML 2014) as Optuna has it: the share of the loss's variance over the
declared space, as a random forest fitted to the finished trials sees it, that a knob by itself explains.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.sweeps.definition import short_names, show
from gptjax.sweeps.folder import SweepFolder
from gptjax.sweeps.study import numbered, open_journal
from gptjax.train.run import write_atomically

try:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.trial import FrozenTrial, TrialState, create_trial
    from sklearn.exceptions import NotFittedError  # noqa: F401, Optuna's forest is scikit-learn's
except ImportError:
    raise UserError("this needs the packages optuna and scikit-learn, which are absent: pip install 'gptjax[search]'.") from None

LEAST = 4  # finished trials below which a forest says nothing
POINTS = 40  # of a contour along each axis


@dataclasses.dataclass(frozen=True)
class Axis:
    """A knob as an axis from 0 to 1, in logarithms where it was declared so; choices stand at equal distances."""

    key: str
    distribution: Any

    @property
    def choices(self) -> tuple[Any, ...]:
        return self.distribution.choices if isinstance(self.distribution, CategoricalDistribution) else ()

    @property
    def is_whole(self) -> bool:
        return isinstance(self.distribution, IntDistribution)

    def _ends(self) -> tuple[float, float]:
        low, high = self.distribution.low, self.distribution.high
        return (math.log(low), math.log(high)) if self.distribution.log else (float(low), float(high))

    def unit(self, value: Any) -> float:
        if self.choices:
            return self.choices.index(value) / max(len(self.choices) - 1, 1)
        low, high = self._ends()
        return ((math.log(value) if self.distribution.log else value) - low) / (high - low) if high > low else 0.5

    def value(self, unit: float) -> Any:
        """Of a number's axis."""
        low, high = self._ends()
        value = low + unit * (high - low)
        return math.exp(value) if self.distribution.log else value


@dataclasses.dataclass(frozen=True)
class Searched:
    """A search's trials, read from its folder. `axes` in the order in which they were declared."""

    metric: str
    maximize: bool
    axes: tuple[Axis, ...]
    trials: tuple[FrozenTrial, ...]

    @property
    def complete(self) -> list[FrozenTrial]:
        return [trial for trial in self.trials if trial.state == TrialState.COMPLETE]


def read_search(path: pathlib.Path) -> Searched:
    """Raises `UserError` where the folder is no search's, or has too few finished trials."""
    definition = SweepFolder(path).read_definition()
    if "search" not in definition:
        raise UserError(f"{path} is the folder of a sweep that was no search; `gptjax compare {path}` compares its groups.")
    storage, study = open_journal(path)
    trials = tuple(numbered(storage.get_all_trials(study)))
    search = definition["search"]
    axes = tuple(Axis(key, distribution) for key, distribution in trials[0].distributions.items()) if trials else ()
    searched = Searched(search["metric"], search["maximize"], axes, trials)
    values = [trial.value for trial in searched.complete]
    if len(values) < LEAST:
        raise UserError(f"{path} has {len(values)} finished trials; importance needs at least {LEAST}.")
    if len(set(values)) == 1:
        raise UserError(f"{path}: all {len(values)} finished trials have the same {search['metric']}, {values[0]}.")
    return searched


def importances(searched: Searched, seed: int = 0) -> dict[str, float]:
    """{key: share of the variance}, the largest first; they add up to 1."""
    study = optuna.create_study(direction="maximize" if searched.maximize else "minimize")
    axes: dict[str, BaseDistribution] = {
        axis.key: CategoricalDistribution([str(i) for i in range(len(axis.choices))]) if axis.choices else FloatDistribution(0, 1)
        for axis in searched.axes
    }
    for trial in searched.complete:
        params = {
            axis.key: str(axis.choices.index(trial.params[axis.key])) if axis.choices else axis.unit(trial.params[axis.key])
            for axis in searched.axes
        }
        study.add_trial(create_trial(value=trial.value, params=params, distributions=axes))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def surface(searched: Searched, x: Axis, y: Axis) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(units of x [points], units of y [points], metric [y, x]): linear between the finished trials, NaN outside their hull.

    The other knobs are as they happened to be in each trial: a rough surface says that they matter too.
    """
    from scipy.interpolate import griddata
    from scipy.spatial import QhullError

    found: dict[tuple[float, float], list[float]] = {}
    for trial in searched.complete:
        found.setdefault((x.unit(trial.params[x.key]), y.unit(trial.params[y.key])), []).append(trial.values[0])
    places = np.array(list(found))
    values = np.array([np.mean(held) for held in found.values()])
    along = np.linspace(0, 1, POINTS)
    mesh = np.meshgrid(along, along)
    try:
        return along, along, griddata(places, values, tuple(mesh), method="linear")
    except (QhullError, ValueError):  # the trials lie on a line
        return along, along, np.full((POINTS, POINTS), np.nan)


def write_numbers(folder: pathlib.Path, searched: Searched, shares: dict[str, float], pairs: Sequence[tuple[Axis, Axis]]) -> None:
    """importance.csv, contour.csv and trials.csv."""
    _write_csv(folder / "importance.csv", ("key", "importance"), shares.items())
    rows = []
    for x, y in pairs:
        across, up, metric = surface(searched, x, y)
        for i, j in np.argwhere(np.isfinite(metric)):
            rows.append((x.key, y.key, _named(x, across[j]), _named(y, up[i]), metric[i, j]))
    _write_csv(folder / "contour.csv", ("x", "y", "x_value", "y_value", searched.metric), rows)
    keys = [axis.key for axis in searched.axes]
    trials = [
        (
            trial.number,
            trial.state.name.lower(),
            *(trial.params[key] for key in keys),
            trial.value,
            trial.user_attrs.get("why", ""),
        )
        for trial in searched.trials
    ]
    _write_csv(folder / "trials.csv", ("number", "state", *keys, searched.metric, "why"), trials)


def _named(axis: Axis, unit: float) -> Any:
    """A place on an axis; between two choices, how far it is from the first one to the last."""
    return unit if axis.choices else axis.value(unit)


def _write_csv(path: pathlib.Path, header: Sequence[str], rows: Any) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def lines(searched: Searched, shares: dict[str, float]) -> list[str]:
    """The importance in a table, and the best trial."""
    width = max(map(len, shares))
    best = (max if searched.maximize else min)(searched.complete, key=lambda trial: trial.values[0])
    point = ", ".join(f"{key}={show(value)}" for key, value in best.params.items())
    return [
        f"share of the variance of {searched.metric} over {len(searched.complete)} finished trials (fANOVA)",
        *(f"  {key:<{width}}  {share:6.1%}" for key, share in shares.items()),
        f"best {searched.metric} {best.values[0]:.4f}, trial {best.number:03d}: {point}",
    ]


def pairs_of(searched: Searched, shares: dict[str, float], most: int = 3) -> list[tuple[Axis, Axis]]:
    """Pairs of the most important knobs, the more important one across."""
    axes = {axis.key: axis for axis in searched.axes}
    chosen = [axes[key] for key in list(shares)[:most]]
    return [(x, y) for i, x in enumerate(chosen) for y in chosen[i + 1 :]]


def axis_titles(searched: Searched) -> dict[str, str]:
    """Each key's last word, or all of it where two end alike."""
    return short_names({axis.key for axis in searched.axes})
