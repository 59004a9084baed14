"""Runs a sweep's trials on this machine, some at a time, until each is done or has failed.

Whatever kills the driver, starting it again runs only what is missing: what it knows lies in the sweep's folder, a trial goes on
from its checkpoint, and one whose process outlived the driver is waited for, never started beside itself.
"""

from __future__ import annotations

import abc
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from gptjax.sweeps.attempt import TRAIN, Attempt
from gptjax.sweeps.definition import Trial
from gptjax.sweeps.folder import State, SweepFolder, lock_trial
from gptjax.sweeps.resources import Slot

RETRIED = ("crash", "memory")  # failures that another start may not meet again


class StopRequests:
    """Context manager that counts SIGINT, SIGTERM and SIGHUP; `first` is the first one's number."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.count, self.first = 0, 0
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.first = self.first or number

    def __enter__(self) -> StopRequests:
        self._before = {number: signal.signal(number, self._handle) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def still_to_do(folder: SweepFolder, trials: Sequence[Trial], retry_failed: bool) -> list[Trial]:
    """The trials that are neither done, pruned nor failed; with `retry_failed`, all that are not done."""
    settled = ("done", "pruned") if retry_failed else ("done", "pruned", "failed")
    return [trial for trial in trials if folder.observed(trial.name).status not in settled]


class Source(abc.ABC):
    """Where the driver has its trials from: a list, or a search that makes the next one when there is a place for it."""

    @abc.abstractmethod
    def take(self) -> Trial | None:
        """The trial to start now; None where there is none, or none yet."""

    @abc.abstractmethod
    def is_exhausted(self) -> bool:
        """Whether `take` will give nothing more, whatever happens to the trials that run."""

    @abc.abstractmethod
    def all_done(self) -> bool:
        """Whether every trial came to the end that it should."""

    def is_to_stop(self, trial: Trial) -> bool:
        """Whether a trial that runs is to save and end, for it is known well enough."""
        return False

    def ended(self, trial: Trial, state: State) -> State:
        """A trial has ended, and the driver does not start it again; returns what is to be said of it."""
        return state


class Listed(Source):
    """Trials that are known beforehand, in their order, those before them that a dead driver left running."""

    def __init__(self, folder: SweepFolder, trials: Sequence[Trial], retry_failed: bool = False):
        self._folder, self._trials = folder, trials
        waiting = still_to_do(folder, trials, retry_failed)
        self._queue = deque(sorted(waiting, key=lambda trial: not self._is_held(trial)))

    def take(self) -> Trial | None:
        return self._queue.popleft() if self._queue else None

    def is_exhausted(self) -> bool:
        return not self._queue

    def all_done(self) -> bool:
        return all(self._folder.observed(trial.name).status == "done" for trial in self._trials)

    def _is_held(self, trial: Trial) -> bool:
        descriptor = lock_trial(self._folder.trial(trial.name))
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is None


class Driver:
    """`run` blocks until all trials have ended; the folder's lock is the caller's.

    `trials`: a list of them, or a `Source`. `show()` is called after each look at the processes; `say` gets a line for each
    trial that ends.
    """

    def __init__(
        self,
        folder: SweepFolder,
        trials: Sequence[Trial] | Source,
        slots: Sequence[Slot],
        *,
        timeout: float = 0.0,
        retries: int = 0,
        retry_failed: bool = False,
        command: Sequence[str] = TRAIN,
        say: Callable[[str], None] = lambda line: None,
        show: Callable[[], None] = lambda: None,
        interval: float = 0.1,
    ):
        self._folder, self._slots = folder, slots
        self._source = trials if isinstance(trials, Source) else Listed(folder, trials, retry_failed)
        self._timeout, self._retries, self._command = timeout, retries, command
        self._say, self._show, self._interval = say, show, interval
        self._running: dict[int, tuple[Trial, Attempt]] = {}
        self._again: deque[Trial] = deque()  # ended, and to be started once more
        self._starts: dict[str, int] = {}  # by this driver

    def run(self) -> int:
        """Exit status: 0 all trials are done, 1 some are not, 75 and 130 after SIGTERM and Ctrl-C (all are saved)."""
        with StopRequests() as stop:
            asked = 0
            while self._running or not (asked or self._is_exhausted()):
                if stop.count > asked:
                    asked = stop.count
                    self._stop(stop.first, kill=asked > 1)
                if not asked:
                    self._fill()
                for slot, (trial, attempt) in list(self._running.items()):
                    if not asked and self._source.is_to_stop(trial):
                        attempt.stop(grace=True)
                    state = attempt.poll()
                    if state is not None:
                        del self._running[slot]
                        self._ended(trial, state, bool(asked))
                self._show()
                time.sleep(self._interval)
        if asked:
            return 130 if stop.first == signal.SIGINT else 75
        return 0 if self._source.all_done() else 1

    def _is_exhausted(self) -> bool:
        return not self._again and self._source.is_exhausted()

    def _fill(self) -> None:
        for number, slot in enumerate(self._slots):
            if number in self._running:
                continue
            trial = self._again.popleft() if self._again else self._source.take()
            if trial is None:
                return
            self._running[number] = (
                trial,
                Attempt.start(self._folder, trial.name, number, slot, self._timeout, self._command),
            )
            self._starts[trial.name] = self._starts.get(trial.name, 0) + 1

    def _stop(self, number: int, kill: bool) -> None:
        how = "ending the trials at once" if kill else "the trials save and end (again: at once)"
        self._say(f"{signal.Signals(number).name}: {how}; the same command goes on.")
        for _, attempt in self._running.values():
            attempt.stop(kill)

    def _ended(self, trial: Trial, state: State, stopping: bool) -> None:
        unseen = state.status == "stopped" and state.exit_status is None  # of a driver before us: go on with it
        again = unseen or (state.kind in RETRIED and self._starts[trial.name] <= self._retries)
        if again and not stopping and not self._source.is_to_stop(trial):
            self._again.append(trial)
        else:
            state = self._source.ended(trial, state)
        self._say(f"{trial.name}: {describe_end(state)}")


def describe_end(state: State) -> str:
    """`done, eval loss 1.2345`, or `failed (timeout): it ran longer than 10 s.`"""
    if state.status == "done":
        return f"done, eval loss {state.loss:.4f}" if state.loss is not None else "done"
    return f"{state.status}{f' ({state.kind})' if state.kind else ''}: {state.why}"
