"""A sweep's folder: its files, and what became of each trial so far.

    sweep.json                the trials in order, and how they run
    run.lock                  while a driver lives; workers/NAME/run.lock: while that worker of a search does
    study.journal             a search's record: see study.py
    trials/NAME/              a run's folder like any other, and in it
        requested.json          the config that the run is started with
        trial.json              its `State`
        trial.log               standard output and error of all its starts
        trial.lock              locked while a process of the trial lives

Every file but the log is replaced atomically. Whoever only reads needs no lock.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.config import Config, UserError, from_json, to_json
from gptjax.sweeps.definition import Trial
from gptjax.train.run import is_alive, read_result, write_atomically, write_json

FAILURES = ("config", "crash", "nonfinite", "timeout", "memory")


@dataclasses.dataclass(frozen=True)
class State:
    """What became of a trial.

    `status`: waiting, queued (by SLURM), running, stopped (it goes on at the next start), done, pruned (by a search, for good) or
    failed; then `kind` is one of FAILURES, and `why` a sentence. Times are in seconds, `started` since 1970.
    """

    status: str = "waiting"
    kind: str = ""
    why: str = ""
    starts: int = 0
    exit_status: int | None = None
    host: str = ""
    pid: int = 0
    process: str = ""  # when that process began, in words that only it has
    job: str = ""  # SLURM's name for it
    slot: int = 0
    started: float = 0.0  # the latest start
    seconds: float = 0.0  # of all starts that have ended
    loss: float | None = None  # of the evaluation at the end
    pruned_at: int | None = None  # step whose evaluation decided it

    def is_alive(self) -> bool:
        """Whether its process runs; one on another host is believed."""
        return self.status == "running" and (self.host != socket.gethostname() or is_alive(self.pid, self.process))


class SweepFolder:
    """Paths and files of one sweep."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def trial(self, name: str) -> pathlib.Path:
        return self.path / "trials" / name

    def settle_names(self, trials: Sequence[Trial]) -> list[Trial]:
        """The trials under the names that their folders have already, whatever the sweep file calls them by now."""
        present = {path.name.rsplit("-", 1)[-1]: path.name for path in sorted(self.path.glob("trials/*")) if path.is_dir()}
        return [dataclasses.replace(trial, name=present.get(trial.hash, trial.name)) for trial in trials]

    def write_definition(self, trials: Sequence[Trial], about: dict[str, Any]) -> None:
        """`sweep.json`, and the folder and config of each trial."""
        for trial in trials:
            self.write_trial(trial)
        listed = [{"name": trial.name, "hash": trial.hash, "overrides": trial.overrides} for trial in trials]
        self.write_list(listed, about)

    def write_trial(self, trial: Trial) -> None:
        """The folder and config of one trial."""
        folder = self.trial(trial.name)
        folder.mkdir(parents=True, exist_ok=True)
        text = to_json(trial.config).encode()
        path = folder / "requested.json"
        if not path.exists() or path.read_bytes() != text:
            write_atomically(path, text)

    def write_list(self, listed: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
        """`sweep.json`: {name, hash, overrides} of each trial, and how they run."""
        write_json(self.path / "sweep.json", {**about, "trials": list(listed)})

    def read_definition(self) -> dict[str, Any]:
        """Raises `UserError` where the folder is no sweep's."""
        path = self.path / "sweep.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self.path} is not a sweep's folder: it has no sweep.json.") from None
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}.") from None

    def requested(self, name: str) -> Config:
        return from_json(self.trial(name) / "requested.json")

    def state(self, name: str) -> State:
        path = self.trial(name) / "trial.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return State()
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON ({error}); remove it to run the trial again.") from None
        known = {field.name for field in dataclasses.fields(State)}
        return State(**{key: value for key, value in content.items() if key in known})

    def observed(self, name: str) -> State:
        """The state, as it must be by what else is known: finished runs are done, and a process that died no longer runs."""
        state = self.state(name)
        if state.status == "pruned":  # one that was quicker to finish than to be stopped too: the search has not seen its end
            return state
        result = read_result(self.trial(name))
        if result is not None:
            return dataclasses.replace(state, status="done", kind="", why="", loss=result["eval"]["loss"])
        if state.status == "running" and not state.is_alive():
            return dataclasses.replace(state, status="stopped", why="it was cut off; the next start goes on.")
        if state.status in ("waiting", "queued") and (self.trial(name) / "run.lock").exists():  # started by another launcher
            return dataclasses.replace(state, status="running")
        return state

    def write_state(self, name: str, state: State) -> None:
        write_json(self.trial(name) / "trial.json", dataclasses.asdict(state))


def lock_trial(folder: pathlib.Path) -> int | None:
    """A descriptor that holds the trial, for its process to inherit; None where a process holds it already.

    The kernel's lock lives as long as any copy of the descriptor: a trial whose driver was killed keeps it, a dead one does not.
    """
    descriptor = os.open(folder / "trial.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
