"""What a sweep file declares for a search: the space that Optuna suggests points of, its sampler and its pruner.

    Sweep("configs/shakespeare_char.py:cpu",
          {"optimizer.learning_rate": log_uniform(1e-4, 1e-1), "model.num_layers": integers(1, 4)},
          search=Search(trials=30, sampler="tpe", pruner="median"))

Nothing here needs Optuna (extra: search), which `study.py` drives.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

from gptjax import recipes
from gptjax.config import Config, UserError, walk
from gptjax.config.knobs import typed
from gptjax.sweeps.space import Choice, Distribution, Integers, Uniform

SAMPLERS = ("tpe", "random", "grid", "cmaes")
PRUNERS = ("none", "median", "hyperband")


@dataclasses.dataclass(frozen=True)
class Search:
    """How points are suggested, and which trials are stopped before their end.

    A suggestion is a function of (`seed`, its number, what is known of the trials before it). Each counts as a trial, those that
    the config's checks refuse included. Pruning compares the evaluations of a trial with those of others at the same steps.
    """

    trials: int  # suggestions in all; a grid ends earlier where it has fewer points
    sampler: str = "tpe"
    pruner: str = "none"
    seed: int = 0
    metric: str = "eval/loss"  # of the last evaluation; pruning reads the same name in metrics.jsonl
    maximize: bool = False
    sampler_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # Optuna's: {"n_startup_trials": 5}
    pruner_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # Optuna's: {"n_warmup_steps": 100}


def check_search(path: str, search: Any, space: Any) -> None:
    """Raises `UserError`, naming the sweep file, where the search or a key of its space is not as it must be."""

    def refuse(sentence: str) -> UserError:
        return UserError(f"the sweep file {path}: {sentence}")

    if not isinstance(search, Search):
        raise refuse(f"search={search!r} must be a gptjax.sweeps.search.Search.")
    for name, least in (("trials", 1), ("seed", 0)):
        value = getattr(search, name)
        if type(value) is not int or value < least:
            raise refuse(f"Search({name}={value!r}) must be a whole number of at least {least}.")
    for name, known in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
        value = getattr(search, name)
        if value not in known:
            near = difflib.get_close_matches(str(value), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise refuse(f"Search({name}={value!r}) must be one of {', '.join(known)}{hint}")
    if not isinstance(search.metric, str) or not search.metric.startswith("eval/"):
        raise refuse(f"Search(metric={search.metric!r}) must name a figure of the evaluation, such as eval/loss.")
    if not isinstance(space, Mapping) or not space:
        raise refuse("a search needs a space {key: distribution}, such as {'optimizer.learning_rate': log_uniform(1e-4, 1e-2)}.")
    for key, distribution in space.items():
        if not isinstance(distribution, Distribution):
            raise refuse(f"{key} needs uniform, log_uniform, integers or choice, not {distribution!r}.")
        try:
            _check_knob(key, distribution)
        except UserError as error:
            raise refuse(str(error)) from None
        if search.sampler == "cmaes" and isinstance(distribution, Choice):
            raise refuse(f"CMA-ES searches over numbers, and {key} is a choice; take Search(sampler='tpe').")
        if search.sampler == "grid" and isinstance(distribution, Uniform):
            raise refuse(f"a grid needs points, and {key} is a range; declare it as choice or integers.")


def _check_knob(key: str, distribution: Distribution) -> None:
    """Key, type and bounds of the schema at the ends of a range, and of every choice."""
    expected = recipes.declared_type(key)
    field = {name: field for name, _, field in walk(Config())}[key]
    if isinstance(distribution, Choice):
        values: tuple[Any, ...] = distribution.values
    elif isinstance(distribution, Uniform):
        values = (float(distribution.low), float(distribution.high))
    else:
        values = (distribution.low, distribution.high)
    for value in values:
        typed(key, value, expected, field)


def points_in_grid(space: Mapping[str, Distribution]) -> int:
    """How many points a grid over `choice` and `integers` has."""
    return math.prod(len(grid_values(distribution)) for distribution in space.values())


def grid_values(distribution: Distribution) -> list[Any]:
    """All values of a choice or of a range of whole numbers. Raises `TypeError` for a range of numbers."""
    if isinstance(distribution, Choice):
        return list(distribution.values)
    if isinstance(distribution, Integers):
        return list(range(distribution.low, distribution.high + 1))
    raise TypeError(f"{distribution} has no points.")


def describe_distribution(distribution: Distribution) -> str:
    """`log_uniform(0.0001, 0.1)`, as it is declared."""
    if isinstance(distribution, Choice):
        return f"choice({list(distribution.values)})"
    if isinstance(distribution, Uniform):
        return f"{'log_uniform' if distribution.log else 'uniform'}({distribution.low:g}, {distribution.high:g})"
    return f"integers({distribution.low}, {distribution.high}{', log=True' if distribution.log else ''})"
