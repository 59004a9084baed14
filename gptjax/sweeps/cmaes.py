"""CMA-ES (Hansen 2016, arXiv:1604.00772) for Optuna, its state rebuilt from the trials before (extra: search).

Optuna's own sampler keeps its state in the study as a pickle, and whoever goes on with a stranger's study would run what is in
it. The state follows from the finished trials and the generation that each was drawn in, so nothing but that is kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import cmaes
import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

GENERATION = "generation"  # system attribute: the one a trial was drawn in, from 0
Number = FloatDistribution | IntDistribution
SIGMA = 1 / 6  # of generation 0, where each axis runs from 0 to 1: three of them reach from the middle to an end


class CmaEs(BaseSampler):
    """Draws one point of `ranges`, numbers all; `generation` is then the one that it belongs to.

    `popsize`: trials of a generation; 4 + 3 log(axes), rounded down, where it is None. With several trials at a time, a
    generation is told the first `popsize` of its trials that finished, in order of number.
    """

    def __init__(self, ranges: Mapping[str, Number], seed: int, popsize: int | None = None):
        self._ranges, self._seed, self._popsize = dict(ranges), seed, popsize
        self.generation = 0

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self._ranges)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        axes = len(search_space)
        optimizer = cmaes.CMA(
            mean=np.full(axes, 0.5),
            sigma=SIGMA,
            bounds=np.tile([0.0, 1.0], (axes, 1)),
            n_max_resampling=10 * axes,
            seed=self._seed,  # read by `ask` alone: what is told decides the rest of the state
            population_size=self._popsize,
        )
        sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        for generation in itertools.count():
            drawn = [trial for trial in complete if trial.system_attrs.get(GENERATION) == generation]
            if len(drawn) < optimizer.population_size:
                break
            told = drawn[: optimizer.population_size]
            optimizer.tell([(self._to_unit(trial.params), sign * trial.values[0]) for trial in told])
        self.generation = optimizer.generation
        return self._from_unit(optimizer.ask())

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        raise ValueError(f"{param_name} is not one of the ranges.")

    def _to_unit(self, params: Mapping[str, Any]) -> np.ndarray:
        """[axes] from 0 to 1; a whole number in the middle of its share."""
        unit = []
        for key, distribution in self._ranges.items():
            low, high, warp = _axis(distribution)
            unit.append((warp(params[key]) - low) / (high - low))
        return np.array(unit)

    def _from_unit(self, point: np.ndarray) -> dict[str, Any]:
        params: dict[str, Any] = {}
        for (key, distribution), unit in zip(self._ranges.items(), point, strict=True):
            low, high, _ = _axis(distribution)
            value = low + float(unit) * (high - low)
            value = math.exp(value) if distribution.log else value
            if isinstance(distribution, IntDistribution):
                value = round(value)
            params[key] = min(max(value, distribution.low), distribution.high)
        return params


def _axis(distribution: Number) -> tuple[float, float, Any]:
    """(low, high, function) of the axis, in logarithms where the range is; whole numbers have half a step more at each end."""
    half = 0.5 if isinstance(distribution, IntDistribution) else 0.0
    warp = math.log if distribution.log else float
    return warp(distribution.low - half), warp(distribution.high + half), warp
