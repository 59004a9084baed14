"""Runs read from their folders and grouped by config, with one figure of each run to compare."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptjax.config import Config, UserError, flatten, from_json, walk
from gptjax.sweeps.definition import own_knobs, short_names, show
from gptjax.sweeps.folder import SweepFolder
from gptjax.train.metrics import FILE_NAME, read_metrics
from gptjax.train.run import read_result

SEED, VOCAB_SIZE = "train.seed", "model.vocab_size"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder. `knobs`: what shapes it, besides the seed, and is not at its default.

    `unfinished` is '' or what became of it in a word or two, `why` a sentence where a sweep knows one.

    `origin` is the sweep's folder, or the folder that holds the run's.
    """

    folder: pathlib.Path
    origin: str
    config: Config
    knobs: dict[str, Any]
    result: dict[str, Any]
    unfinished: str = ""
    why: str = ""

    @property
    def seed(self) -> int:
        return self.config.train.seed

    def rows(self) -> list[dict[str, Any]]:
        path = self.folder / FILE_NAME
        return read_metrics(path) if path.exists() else []


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed. `number` counts from 1; `label` says what sets it apart from the others."""

    number: int
    label: str
    runs: tuple[Run, ...]

    @property
    def title(self) -> str:
        return f"{self.number} ({self.label})"


def read_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in these folders, each a run's or a sweep's. Raises `UserError` for any other."""
    runs: list[Run] = []
    for argument in folders:
        path = pathlib.Path(argument)
        if (path / "sweep.json").is_file():
            sweep = SweepFolder(path)
            runs += [_sweep_run(sweep, trial["name"], argument) for trial in sweep.read_definition()["trials"]]
        elif (path / "config.json").is_file():
            runs.append(_run(path, str(path.parent), from_json(path / "config.json"), "it has not finished"))
        else:
            raise UserError(f"{path} is neither a run's folder nor a sweep's: it has no config.json and no sweep.json.")
    doubles: dict[pathlib.Path, Run] = {}
    for run in runs:
        doubles.setdefault(run.folder.resolve(), run)
    return _with_vocab_sizes(list(doubles.values()))


def _with_vocab_sizes(runs: Sequence[Run]) -> list[Run]:
    """A trial that never started has no vocabulary's size yet: it takes the one that all runs on the same data have."""
    sizes: dict[str, set[int]] = {}
    for run in runs:
        if VOCAB_SIZE in run.knobs:
            sizes.setdefault(_data_key(run), set()).add(run.knobs[VOCAB_SIZE])
    return [_as_large(run, sizes.get(_data_key(run), set())) for run in runs]


def _data_key(run: Run) -> str:
    return _key({key: value for key, value in run.knobs.items() if key.startswith("data.")})


def _as_large(run: Run, sizes: set[int]) -> Run:
    if VOCAB_SIZE in run.knobs or len(sizes) != 1:
        return run
    (size,) = sizes
    return dataclasses.replace(run, config=run.config.with_vocab_size(size), knobs=run.knobs | {VOCAB_SIZE: size})


def _sweep_run(sweep: SweepFolder, name: str, origin: str) -> Run:
    folder, state = sweep.trial(name), sweep.observed(name)
    config = from_json(folder / "config.json") if (folder / "config.json").exists() else sweep.requested(name)
    return _run(folder, origin, config, f"{state.status} ({state.kind})" if state.kind else state.status, state.why)


def _run(folder: pathlib.Path, origin: str, config: Config, otherwise: str, why: str = "") -> Run:
    result = read_result(folder)
    shaping = {key for key, _, field in walk(config) if field.metadata["shapes_run"]}
    knobs = {key: value for key, value in own_knobs(config).items() if key in shaping and key != SEED}
    return Run(folder, origin, config, knobs, result or {}, "" if result else otherwise, "" if result else why)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in order of appearance.

    Where there are two runs of one config and seed, as before and after a change of the code, runs of different origins are not
    grouped together. Raises `UserError` where two such runs have one origin.
    """
    by_config: dict[str, list[Run]] = {}
    for run in runs:
        by_config.setdefault(_key(run.knobs), []).append(run)
    apart = any(len({run.seed for run in group}) < len(group) for group in by_config.values())
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        found.setdefault((run.origin if apart else "", _key(run.knobs)), []).append(run)
    for group in found.values():
        seen: dict[int, Run] = {}
        for run in group:
            if run.seed in seen:
                raise UserError(
                    f"{seen[run.seed].folder} and {run.folder} have one config and seed, and lie in one folder; leave one out."
                )
            seen[run.seed] = run
    labels = _labels([group[0] for group in found.values()], apart)
    return [
        Group(number, label, tuple(sorted(group, key=lambda run: run.seed)))
        for number, (label, group) in enumerate(zip(labels, found.values(), strict=True), 1)
    ]


def _key(knobs: dict[str, Any]) -> str:
    return json.dumps(dict(sorted(knobs.items())), default=list)


def _labels(firsts: Sequence[Run], apart: bool) -> list[str]:
    """What tells each group apart: the knobs that are not the same in all, and the origin where configs do not."""
    keys = dict.fromkeys(key for run in firsts for key in run.knobs)
    differing = [key for key in keys if len({repr(run.knobs.get(key)) for run in firsts}) > 1]
    short = short_names(set(differing))
    texts = []
    for run in firsts:
        values = flatten(run.config)
        knobs = ", ".join(f"{short[key]}={show(values[key])}" for key in differing)
        texts.append(", ".join(filter(None, [run.origin if apart else "", knobs])) or "all runs")
    return texts


# --- one figure of a run ---


@dataclasses.dataclass(frozen=True)
class Figure:
    """A run's figure, or why it has none."""

    value: float | None
    missing: str = ""


def figure(run: Run, metric: str, target: float | None = None) -> Figure:
    """`metric` of a run: tokens_to_loss and time_to_loss (with `target`), eval/NAME of the last evaluation, a number of
    result.json such as seconds, or else the last value in metrics.jsonl.
    """
    if metric in TO_LOSS:
        return _to_loss(run, metric, target)
    if run.unfinished:
        return Figure(None, run.unfinished)
    group, _, name = metric.partition("/")
    value = run.result.get("eval", {}).get(name) if group == "eval" else run.result.get(metric)
    if value is None:
        values = [row[metric] for row in run.rows() if metric in row]
        value = values[-1] if values else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return Figure(None, f"it has no {metric}")
    return Figure(float(value)) if np.isfinite(value) else Figure(None, f"its {metric} is {value}")


TO_LOSS: dict[str, Callable[[dict[str, Any], list[dict[str, Any]]], float]] = {
    "tokens_to_loss": lambda row, rows: float(row["tokens"]),
    "time_to_loss": lambda row, rows: _seconds(row["step"], rows),
}


def _seconds(step: int, rows: list[dict[str, Any]]) -> float:
    """The run's clock at an evaluation, which has none: between those of the rows around it."""
    clock = [(row["step"], row["seconds"]) for row in rows if "seconds" in row]
    steps, seconds = zip(*([(0, 0.0)] + clock), strict=True)
    return float(np.interp(step, steps, seconds))


def _to_loss(run: Run, metric: str, target: float | None) -> Figure:
    """Where the evaluation's loss first falls to `target`: linear between the two evaluations around it."""
    if target is None:
        raise UserError(f"--metric={metric} needs --target=LOSS.")
    rows = run.rows()
    evaluations = [(TO_LOSS[metric](row, rows), row["eval/loss"]) for row in rows if "eval/loss" in row]
    before: tuple[float, float] | None = None
    for at, loss in evaluations:
        if loss <= target:
            if before is None or before[1] == loss:
                return Figure(at)
            share = (before[1] - target) / (before[1] - loss)
            return Figure(before[0] + share * (at - before[0]))
        before = (at, loss) if np.isfinite(loss) else None
    return Figure(None, run.unfinished or f"it never reached {target:g}")
