"""A run once more, from what its folder says alone: whether the numbers come out as they did.

The second run is one like any other, in a folder of its own, so it goes on where it was interrupted; `reproduction.json` beside
it says of which run it is, and in the end how well the two agree.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from gptjax import config as config_lib
from gptjax import recipes
from gptjax.config import Config, UserError
from gptjax.data.pipeline import Dataset
from gptjax.parallel import hosts
from gptjax.parallel.mesh import make_mesh
from gptjax.train.agreement import Agreement, agreement
from gptjax.train.loop import train
from gptjax.train.metrics import FILE_NAME, read_metrics
from gptjax.train.provenance import Change, changes, check_same_data, check_same_initial, environments, starts_of
from gptjax.train.rewind import recorded_rewinds
from gptjax.train.run import environment, read_result, write_json

FILE = "reproduction.json"

# Where things lie may have changed since; that they are the same things is checked by their fingerprints.
PLACES = (
    "data.path",
    "data.eval_path",
    "data.tokenizer_path",
    "data.mixture",
    "data.mixture_settings",
    "task.path",
    "task.eval_path",
    "task.mixture_settings",
    "init_from",
)


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """What came of it."""

    folder: pathlib.Path
    workdir: pathlib.Path
    steps: int  # taken anew
    of_steps: int | None  # that the run had at its end; None: it has not ended
    agreement: Agreement
    samples: tuple[int, int]  # written anew, of which these are the recorded texts
    states: tuple[str, str] | None  # sha256 of the final states, recorded and now, where both runs have ended
    changes: tuple[tuple[int, Change], ...]  # (steps before the start of the recorded run that differs, what)
    environment_known: bool
    notes: tuple[str, ...]
    tolerance: float

    @property
    def is_exact(self) -> bool:
        """Whether all agrees to the bit."""
        same_state = self.states is None or self.states[0] == self.states[1]
        return self.agreement.is_exact and same_state and self.samples[0] == self.samples[1]

    @property
    def holds(self) -> bool:
        """Whether all agrees to the bit, or all numbers within the tolerance that was given."""
        return self.is_exact or bool(self.tolerance) and self.agreement.holds(self.tolerance)

    def as_json(self) -> dict[str, Any]:
        found = [{"from_step": step, **dataclasses.asdict(change)} for step, change in self.changes]
        return {
            "run": str(self.folder),
            "workdir": str(self.workdir),
            "steps": self.steps,
            "of_steps": self.of_steps,
            "exact": self.is_exact,
            "tolerance": self.tolerance,
            "holds": self.holds,
            "numbers": self.agreement.as_json(),
            "samples": {"compared": self.samples[0], "same": self.samples[1]},
            "state_sha256": None if self.states is None else {"recorded": self.states[0], "now": self.states[1]},
            "environment": found if self.environment_known else None,
            "notes": list(self.notes),
        }


def reproduce(
    folder: pathlib.Path,
    workdir: pathlib.Path | None = None,
    steps: int | None = None,
    overrides: Sequence[str] = (),
    tolerance: float = 0.0,
    log: Callable[[str], None] = print,
) -> Reproduction:
    """Runs the run of `folder` again in `workdir` (`folder`/reproduction), to the last step it logged or to `steps`.

    `overrides`: of where things lie (`PLACES`), and of what does not shape a run. Raises `UserError` where something is missing
    or has changed, and what `train` raises.
    """
    config = recorded_config(folder, overrides)
    rows = read_metrics(folder / FILE_NAME)
    if not rows:
        raise UserError(f"{folder / FILE_NAME} has no rows: there is nothing to compare with.")
    last = max(row["step"] for row in rows)
    if steps is not None and steps > last:
        raise UserError(f"--steps={steps} is more than the {last} steps that {folder / FILE_NAME} has rows of.")
    until = reaching(recorded_rewinds(folder), steps or last)
    if steps is not None and until > steps:
        log(f"step {steps} was taken anew after the spike that was found at step {until}: going on to there.")
    workdir = workdir or folder / "reproduction"
    again = with_own_checkpoints(config, until)
    if hosts.is_primary():
        _claim(folder, workdir, again)
    notes = of_changed_configs(folder, until)
    if not any((workdir / "checkpoints").glob("*/manifest.json")):
        check_same_initial(folder, again)

    def accepts(dataset: Dataset) -> None:
        if note := check_same_data(folder, dataset):
            notes.append(note)

    train(again, workdir, until=until, accepts=accepts)
    found = _compared(folder, workdir, rows, until, notes, config, tolerance)
    if hosts.is_primary():
        write_json(workdir / FILE, _plain(found.as_json() | {"of": _named(folder, workdir), "ended": True}))
    return found


def recorded_config(folder: pathlib.Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a run's folder. Raises `UserError` where there is none, and for an override that would make another run."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a run's folder: it has no config.json.")
    recorded = config_lib.from_json(path)
    config = recipes.load_recipe(str(path), overrides)
    for key, (was, now) in config_lib.differences(recorded, config, shaping_only=True).items():
        if key not in PLACES:
            raise UserError(f"--config.{key}={now} would make another run: {folder} had {was!r}.")
    return config


def reaching(rewinds: Sequence[Any], step: int) -> int:
    """The step to run to for the steps up to `step` to be those that stayed: past the spikes after which some were taken anew."""
    while later := [one.found_at for one in rewinds if one.back_to < step < one.found_at]:
        step = max(later)
    return step


def with_own_checkpoints(config: Config, steps: int) -> Config:
    """The config with what it keeps and tells for its own sake: checkpoints, to go on from, and no accounts elsewhere."""
    own = dataclasses.replace(config.checkpoint, keep_every_steps=0)
    if not (own.every_steps or own.every_tokens or own.every_epochs):
        own = dataclasses.replace(own, every_steps=max(1, math.ceil(steps / 10)))
    metrics = dataclasses.replace(config.metrics, tensorboard=False, wandb=False)
    return dataclasses.replace(config, checkpoint=own, metrics=metrics)


def _claim(folder: pathlib.Path, workdir: pathlib.Path, config: Config) -> None:
    """Takes the folder for this run's reproduction. Raises `UserError` where it holds something else, or cannot be written."""
    marker = workdir / FILE
    if workdir.is_dir() and any(path.name != "run.lock" for path in workdir.iterdir()):
        if not marker.is_file():
            raise UserError(f"{workdir} holds something else than a reproduction; take another --workdir.")
        if _of(marker) != _named(folder, workdir):
            raise UserError(f"{workdir} holds the reproduction of {_of(marker)}; take another --workdir.")
        own = workdir / "config.json"
        before = config_lib.from_json(own) if own.is_file() else config
        changed = [key for key in config_lib.differences(before, config, shaping_only=True) if key not in PLACES]
        if changed:
            raise UserError(
                f"{workdir} holds a reproduction that was begun with another {changed[0]}; remove it, or take another --workdir."
            )
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(marker, {"of": _named(folder, workdir), "ended": False})
    except OSError as error:
        raise UserError(f"{workdir} cannot be written ({error.strerror}); name another folder by --workdir.") from None


def _named(folder: pathlib.Path, workdir: pathlib.Path) -> str:
    """The run as seen from its reproduction: the two may be moved together where one is inside the other."""
    folder, workdir = folder.resolve(), workdir.resolve()
    return os.path.relpath(folder, workdir) if workdir.is_relative_to(folder) else str(folder)


def _of(marker: pathlib.Path) -> str:
    try:
        return str(json.loads(marker.read_text(encoding="utf-8"))["of"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{marker} is damaged ({error}); remove its folder, or take another --workdir.") from None


def of_changed_configs(folder: pathlib.Path, until: int) -> list[str]:
    """A sentence for each start that went on with another config: what came before it was made with the other one."""
    found = []
    for start in starts_of(folder):
        told = ", ".join(f"{key} from {was!r} to {now!r}" for key, (was, now) in start["config_changes"].items())
        if told and start["from_step"] < until:
            found.append(f"from step {start['from_step']} on the run changed {told}; the steps before it had the former.")
    return found


def _compared(
    folder: pathlib.Path,
    workdir: pathlib.Path,
    rows: Sequence[dict[str, Any]],
    until: int,
    notes: Sequence[str],
    config: Config,
    tolerance: float,
) -> Reproduction:
    results = read_result(folder), read_result(workdir)
    states = tuple(result["state_sha256"] for result in results if result)
    known = environments(folder)
    now = environment() | {"mesh": dict(make_mesh(config.mesh).shape)}
    if any(then.get("git_dirty") is True for _, then in known) or now["git_dirty"] is True:
        notes = [*notes, "the code of then or of now has changes that no commit holds: whether it is the same cannot be told."]
    return Reproduction(
        folder,
        workdir,
        until,
        results[0]["steps"] if results[0] else None,
        agreement(rows, read_metrics(workdir / FILE_NAME), last=until),
        _compared_samples(folder / "samples", workdir / "samples", until),
        (states[0], states[1]) if len(states) == 2 else None,
        tuple((step, change) for step, then in known if step < until for change in changes(then, now)),
        bool(known),
        tuple(notes),
        tolerance,
    )


def _compared_samples(then: pathlib.Path, now: pathlib.Path, until: int) -> tuple[int, int]:
    recorded = [path for path in sorted(then.glob("*.txt")) if path.stem.isdigit() and int(path.stem) <= until]
    both = [path for path in recorded if (now / path.name).is_file()]
    return len(both), sum(path.read_bytes() == (now / path.name).read_bytes() for path in both)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def lines(found: Reproduction) -> list[str]:
    """What a person reads of it."""
    of = f" of {found.of_steps:,}" if found.of_steps else ""
    said = [f"{found.folder}: {found.steps:,}{of} steps once more in {found.workdir}."]
    numbers = found.agreement
    said.append(f"compared: {numbers.compared:,} numbers ({_listed(numbers.keys)}).")
    if numbers.missing:
        step, key = numbers.missing[0]
        said.append(f"not computed anew: {len(numbers.missing):,} recorded numbers, the first {key} at step {step}.")
    if numbers.differing:
        said.append(f"first difference: {numbers.differing[0]}.")
        said += [f"  largest of {difference}" for difference in numbers.worst().values()]
    if found.samples[0]:
        said.append(f"samples: {found.samples[1]} of {found.samples[0]} are the same texts.")
    if found.states is not None:
        same = found.states[0] == found.states[1]
        said.append(f"the final state {'has the same' if same else 'has another'} sha256 ({found.states[1][:16]}).")
    said += found.notes
    said += _environment_lines(found)
    return [*said, verdict(found)]


def _listed(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _environment_lines(found: Reproduction) -> list[str]:
    if not found.environment_known:
        return ["environment: the run's is not known, since it has not ended and is older than provenance.json."]
    if not found.changes:
        return ["environment: as it was."]
    starts = {step for step, _ in found.changes}
    said = ["environment, then and now:"]
    for step, change in found.changes:
        where = f" (from step {step} on)" if len(starts) > 1 else ""
        said.append(f"  {change.name}{where}: {_value(change.then)} -> {_value(change.now)}")
    return said


def _value(value: Any) -> str:
    return "not set" if value in (None, "") else str(value)[:80]


def verdict(found: Reproduction) -> str:
    """One sentence."""
    numbers = found.agreement
    if found.is_exact:
        return "bit for bit: every number is the recorded one."
    if not numbers.compared:
        return "nothing was compared: the two have no number in common."
    if not numbers.differing:
        what = "the final state" if found.states and found.states[0] != found.states[1] else "a sample"
        return f"not reproduced: {'some numbers were not computed anew' if numbers.missing else f'{what} is another one'}."
    within = (
        f"within a relative difference of {numbers.largest:.2g}, at {len(numbers.differing):,} of {numbers.compared:,} numbers"
    )
    if found.holds:
        return f"not bit for bit, but {within} (--tolerance={found.tolerance:g})."
    return f"not bit for bit: {within}."


def exit_status(found: Reproduction) -> int:
    """0 where the run was reproduced, as `Reproduction.holds` has it."""
    return 0 if found.holds else 1
