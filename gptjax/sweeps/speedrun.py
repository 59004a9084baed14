"""Speed-runs: who trains to a given validation loss in the least time? A track says what all have in common, a record is one way.

    TRACK/track.json              `Track`: the target, the data, the hardware, and what a record may choose
    TRACK/records/NAME/
        recipe.py                   get_config(), as for `gptjax train`
        record.json                 what its runs gave (`write_record`)
        logs/SEED.jsonl             the metrics of each of them

What counts is the time of the whole process: imports, data, compilation (no compiled code is kept from before), training, the
evaluation and the checkpoint at the end. What a record claims is a mean over seeds 0, 1, 2, ..., none left out, and that the mean
loss is below the target by more than chance: a one-sided test of Student's with p below the track's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import special

from gptjax.config import Config, UserError
from gptjax.sweeps.attempt import TRAIN
from gptjax.sweeps.definition import Sweep, Trial, make_trials, own_knobs
from gptjax.sweeps.driver import Driver
from gptjax.sweeps.folder import SweepFolder
from gptjax.sweeps.resources import divide
from gptjax.sweeps.space import seeds
from gptjax.sweeps.statistics import student
from gptjax.train.metrics import FILE_NAME
from gptjax.train.run import RunLock, read_result, write_json

# A run that finds code compiled before would be timed without its compilation.
NO_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "false"}


@dataclasses.dataclass(frozen=True)
class Track:
    """What all records of a track have in common. Times are in seconds, losses in nats a token."""

    folder: pathlib.Path
    question: str
    target: float  # of the mean loss over the whole validation split
    p: float
    seeds: int  # the fewest that a record has
    cores: int
    data_sha256: str
    fixed: dict[str, Any]  # dotted keys of the config, and their values in every record
    free: list[str]  # keys and groups that a record may set


@dataclasses.dataclass(frozen=True)
class Run:
    """One seed's. `seconds` is None where the run was cut off and went on, so that its time says nothing."""

    seed: int
    loss: float
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What runs say. `p`: the chance of a mean loss as low as this one if the true mean were the target."""

    runs: int
    loss: float
    p: float
    seconds: float
    interval: tuple[float, float]  # of the mean time, 95 %; NaN with one run

    def holds(self, track: Track) -> bool:
        """Whether the target is met beyond chance."""
        return self.runs >= track.seeds and self.p < track.p


def find_track(record: pathlib.Path) -> Track:
    """The track that a record's folder lies in. Raises `UserError` where there is none, or its file says something else."""
    folder = next((above for above in record.resolve().parents if (above / "track.json").is_file()), None)
    if folder is None:
        raise UserError(f"{record} lies in no track: no folder above it has a track.json.")
    path = folder / "track.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    names = {field.name for field in dataclasses.fields(Track)} - {"folder"}
    if not isinstance(values, dict) or set(values) != names:
        given = set(values) if isinstance(values, dict) else set()
        wrong = sorted(names ^ given)[0]
        raise UserError(
            f"{path} {'lacks' if wrong in names else 'has an unknown key'} {wrong}; it has {', '.join(sorted(names))}."
        )
    return Track(folder=folder, **values)


def trials_of(track: Track, record: pathlib.Path, data: pathlib.Path, count: int) -> list[Trial]:
    """A trial for each of the first `count` seeds. Raises `UserError` for other data than the track's, and for a recipe that sets
    what the track does not leave free.
    """
    _check_data(track, data)
    fixed = dict(track.fixed) | {"data.path": str(data.resolve())}
    sweep = Sweep(recipe=str(record / "recipe.py"), space=seeds(count), overrides=fixed, cores=track.cores)
    trials = make_trials(sweep)
    _check_free(track, record, trials[0].config, fixed)
    return trials


def _check_data(track: Track, data: pathlib.Path) -> None:
    try:
        found = hashlib.sha256(data.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"--data={data} cannot be read: {error.strerror}.") from None
    if found != track.data_sha256:
        raise UserError(f"--data={data} is not the track's text: its SHA-256 is {found[:12]}…, not {track.data_sha256[:12]}….")


def _check_free(track: Track, record: pathlib.Path, config: Config, fixed: dict[str, Any]) -> None:
    for key, value in own_knobs(config).items():
        if key not in fixed and not any(key == free or key.startswith(f"{free}.") for free in track.free):
            raise UserError(
                f"{record / 'recipe.py'} sets {key}={value!r}, which {track.folder / 'track.json'} does not leave free."
            )


def run(
    track: Track,
    trials: Sequence[Trial],
    workdir: pathlib.Path,
    say: Callable[[str], None] = lambda line: None,
    show: Callable[[], None] = lambda: None,
    command: Sequence[str] = TRAIN,
) -> tuple[int, list[Run]]:
    """(the driver's exit status, the runs that are done) of trials run one at a time on the track's cores; done ones are kept.

    Raises `UserError` where this process may not use that many cores.
    """
    slots, _ = divide(1, track.cores, 1)
    slots = [dataclasses.replace(slot, environment=slot.environment | NO_CACHE) for slot in slots]
    folder = SweepFolder(workdir.resolve())
    trials = folder.settle_names(trials)
    with RunLock(folder.path, say):
        folder.write_definition(trials, {"cores": track.cores, "where": "local", "jobs": 1})
        status = Driver(folder, trials, slots, command=command, say=say, show=show).run()
    return status, [found for trial in trials if (found := _read_run(folder, trial)) is not None]


def _read_run(folder: SweepFolder, trial: Trial) -> Run | None:
    state = folder.observed(trial.name)
    if state.status != "done" or state.loss is None:
        return None
    return Run(trial.config.train.seed, state.loss, state.seconds if state.starts == 1 else None)


def judge(runs: Sequence[Run], target: float) -> Verdict:
    """The verdict over the runs. Raises ValueError for none; with one, and with a loss that is not finite, p is 1."""
    losses = np.array([one.loss for one in runs], np.float64)
    times = np.array([one.seconds for one in runs if one.seconds is not None], np.float64)
    n, mean = len(losses), float(losses.mean())
    p = 1.0
    if n > 1 and np.isfinite(losses).all():
        error = float(losses.std(ddof=1)) / math.sqrt(n)
        p = float(special.stdtr(n - 1, (mean - target) / error)) if error else float(mean >= target)
    interval = (math.nan, math.nan)
    if len(times) > 1:
        low, high, _ = student(times[None])
        interval = float(low[0]), float(high[0])
    return Verdict(n, mean, p, float(times.mean()) if len(times) else math.nan, interval)


# --- a record's files ---


def write_record(record: pathlib.Path, runs: Sequence[Run], workdir: pathlib.Path, trials: Sequence[Trial]) -> None:
    """`record.json` and the logs of runs that are done, each run's own where `run` left it."""
    folder = SweepFolder(workdir.resolve())
    trials = folder.settle_names(trials)
    (record / "logs").mkdir(exist_ok=True)
    for trial in trials:
        shutil.copyfile(folder.trial(trial.name) / FILE_NAME, record / "logs" / f"{trial.config.train.seed}.jsonl")
    about = read_result(folder.trial(trials[0].name)) or {}
    kept = {name: about.get(name) for name in ("versions", "git_commit", "git_dirty", "hardware")}
    write_json(record / "record.json", {"runs": [dataclasses.asdict(one) for one in runs], **kept})


def read_record(record: pathlib.Path) -> list[Run]:
    """The runs that a record claims, seeds 0, 1, 2, ... . Raises `UserError` where there are none, or a seed is left out."""
    path = record / "record.json"
    try:
        runs = [Run(**one) for one in json.loads(path.read_text(encoding="utf-8"))["runs"]]
    except FileNotFoundError:
        raise UserError(f"{record} is no record yet: it has no record.json; `gptjax speedrun record` writes it.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a record of runs: {error}.") from None
    if [one.seed for one in runs] != list(range(len(runs))) or not runs:
        raise UserError(f"{path} must have the seeds 0, 1, 2, ... in order, none left out.")
    return runs


def records_of(track: Track) -> list[tuple[str, Verdict]]:
    """(name, verdict) of each record that has runs, the fastest first."""
    folders = [path.parent for path in track.folder.glob("records/*/record.json")]
    found = [(folder.name, judge(read_record(folder), track.target)) for folder in folders]
    return sorted(found, key=lambda item: (not item[1].holds(track), item[1].seconds))


def write_table(track: Track) -> str:
    """The records as a Markdown table."""
    lines = ["| record | seconds, mean | 95 % interval | loss, mean | seeds | p |", "|---|---:|---|---:|---:|---:|"]
    for name, own in records_of(track):
        low, high = own.interval
        missed = "" if own.holds(track) else " (target not shown)"
        lines.append(
            f"| {name}{missed} | {own.seconds:.1f} | {low:.1f} to {high:.1f} | {own.loss:.4f} | {own.runs} | {own.p:.1g} |"
        )
    return "\n".join(lines)
