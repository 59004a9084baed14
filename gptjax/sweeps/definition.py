"""A sweep file: what `get_sweep()` returns, and the ordered list of trials that it stands for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax import recipes
from gptjax.config import Config, UserError, flatten, from_dict, underived
from gptjax.sweeps.search import Search, check_search
from gptjax.sweeps.space import Distribution, Space

WHERE = ("local", "slurm", "jobset")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A recipe, the points laid over it one by one, and how trials run.

    `space` lists the points; with a `search`, it is {key: distribution}, and each point is suggested when a trial can begin.
    `recipe` is FILE.py[:ARG], found as on the command line; `overrides` are laid over it in every trial, below the point's own.
    """

    recipe: str
    space: Space | Mapping[str, Distribution]
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    timeout: float = 0.0  # seconds that one start of a trial may take; 0: no limit
    retries: int = 0  # further starts of a trial that crashed or ran out of memory
    cores: int = 1  # CPU cores of each trial, where it computes on the CPU: another number gives other roundings
    devices: int = 1  # GPUs of each trial, where there are any
    slurm: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # submitit's parameters: slurm_partition=..., ...
    jobset: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # render_jobset.py's options: image=..., ...
    search: Search | None = None


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep. `name` is its folder's, readable and ending in `hash`, by which the run is known again."""

    name: str
    hash: str
    overrides: dict[str, Any]
    config: Config


def load_sweep(spec: str) -> Sweep:
    """What `get_sweep` of `FILE.py[:ARG]` returns. Raises `UserError` in one sentence, whatever the file does."""
    path, _, argument = spec.partition(":")
    sweep = recipes.call_file(pathlib.Path(path), "get_sweep", argument, "sweep file")
    if isinstance(sweep, Sweep) and sweep.search is not None:
        check_search(path, sweep.search, sweep.space)
    elif not isinstance(sweep, Sweep) or not isinstance(sweep.space, Space):
        what = type(sweep).__name__ if not isinstance(sweep, Sweep) else f"one with a space of type {type(sweep.space).__name__}"
        if isinstance(sweep, Sweep) and isinstance(sweep.space, Mapping):
            raise UserError(f"the sweep file {path}: a space of distributions needs Sweep(..., search=Search(trials=...)).")
        raise UserError(f"get_sweep of the sweep file {path} must return a gptjax.sweeps.definition.Sweep, not {what}.")
    for name, least in (("timeout", 0), ("retries", 0), ("cores", 1), ("devices", 1)):
        value = getattr(sweep, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
            raise UserError(f"the sweep file {path}: {name}={value!r} must be a number of at least {least}.")
    if not len(sweep.space):  # a search's space has been checked
        raise UserError(f"the sweep file {path}: its space has no points.")
    return sweep


def make_trials(sweep: Sweep, overrides: Sequence[str] = ()) -> list[Trial]:
    """The trials in order, each config built and checked; points that give the same config are one trial.

    `overrides` are texts such as `train.duration_steps=20`, laid over everything. Raises `UserError` naming the first point that
    the schema refuses.
    """
    if not isinstance(sweep.space, Space):
        raise TypeError("the trials of a search are not known before it runs.")
    base = recipes.recipe_values(sweep.recipe)
    found: dict[str, tuple[dict[str, Any], Config]] = {}
    for number, point in enumerate(sweep.space, 1):
        try:
            config = from_dict(lay_point(sweep, point, overrides, base))
        except UserError as error:
            raise UserError(f"point {number} of the sweep ({describe(point) or 'the recipe as it is'}): {error}") from None
        found.setdefault(config_hash(config), (point, config))
    short = short_names(set(varying([point for point, _ in found.values()])))
    return [Trial(readable_name(point, short, digest), digest, point, config) for digest, (point, config) in found.items()]


def lay_point(sweep: Sweep, point: Mapping[str, Any], overrides: Sequence[str], base: Any = None) -> Any:
    """The ConfigDict of recipe, sweep, point and command line, each over the one before; `base`: what the recipe says, if read.

    Raises `UserError` for an unknown key; the values are checked where it becomes a `Config`.
    """
    values = (recipes.recipe_values(sweep.recipe) if base is None else base).copy_and_resolve_references()
    recipes.lay_over(values, sweep.recipe, {**sweep.overrides, **point}, overrides)
    return values


def config_hash(config: Config) -> str:
    """Ten hexadecimal digits of the knobs that are not at their defaults, so that a knob added later leaves old hashes alone."""
    return knobs_hash(own_knobs(config))


def own_knobs(config: Config) -> dict[str, Any]:
    """{dotted key: value} of knobs that are not at their defaults; sizes that follow from others are left out."""
    defaults = flatten(Config())
    return {key: value for key, value in flatten(underived(config)).items() if value != defaults[key]}


def knobs_hash(knobs: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(sorted(knobs.items())), default=list).encode()).hexdigest()[:10]


def varying(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all points, in order of appearance."""
    keys = dict.fromkeys(key for point in points for key in point)
    return [key for key in keys if len({repr(point.get(key)) for point in points}) > 1]


def short_names(keys: set[str]) -> dict[str, str]:
    """Each dotted key's last word, or the whole key where two end alike."""
    leaves = [key.rsplit(".", 1)[-1] for key in keys]
    return {key: leaf if leaves.count(leaf := key.rsplit(".", 1)[-1]) == 1 else key for key in sorted(keys)}


def describe(overrides: Mapping[str, Any], short: Mapping[str, str] | None = None) -> str:
    """`learning_rate=0.001, seed=2`; only the keys of `short`, under these names, where it is given."""
    shown = overrides if short is None else {short[key]: value for key, value in overrides.items() if key in short}
    return ", ".join(f"{key}={show(value)}" for key, value in shown.items())


def show(value: Any) -> str:
    """A value for tables and names: numbers to 6 digits."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return "+".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def as_override(key: str, value: Any) -> str:
    """`key=text` such that the command line reads the same value back. Raises `UserError` for a text in a list with a comma."""
    if isinstance(value, (tuple, list)):
        if any("," in item or not item for item in value):
            raise UserError(f"{key}={value!r} cannot be written as an override: one of its texts is empty or has a comma.")
        return f"{key}={','.join(value)}"
    return f"{key}={value!r}" if isinstance(value, float) else f"{key}={value}"


def readable_name(point: Mapping[str, Any], short: Mapping[str, str], digest: str) -> str:
    """A folder's name: the point in letters that any file system takes, and the hash."""
    readable = re.sub(r"[^A-Za-z0-9=,.+-]+", "_", describe(point, short).replace(", ", ","))[:80].strip(".,-_")
    return f"{readable}-{digest}" if readable else digest
