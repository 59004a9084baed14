"""Runs a sweep's trials on this machine, some at a time, until each is done or has failed.

Whatever kills the driver, starting it again runs only what is missing: what it knows lies in the sweep's folder, a trial goes on
from its checkpoint, and one whose process outlived the driver is waited for, never started beside itself.
"""

from __future__ import annotations

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
    """The trials that are neither done nor failed; with `retry_failed`, all that are not done."""
    settled = ("done",) if retry_failed else ("done", "failed")
    return [trial for trial in trials if folder.observed(trial.name).status not in settled]


class Driver:
    """`run` blocks until all trials have ended; the folder's lock is the caller's.

    `show(final)` is called after each look at the processes; `say` gets a line for each trial that ends.
    """

    def __init__(
        self,
        folder: SweepFolder,
        trials: Sequence[Trial],
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
        self._folder, self._trials, self._slots = folder, trials, slots
        self._timeout, self._retries, self._command = timeout, retries, command
        self._say, self._show, self._interval = say, show, interval
        self._retry_failed = retry_failed
        self._running: dict[int, Attempt] = {}
        self._starts: dict[str, int] = {}  # by this driver

    def run(self) -> int:
        """Exit status: 0 all trials are done, 1 some are not, 75 and 130 after SIGTERM and Ctrl-C (all are saved)."""
        queue = deque(still_to_do(self._folder, self._trials, self._retry_failed))
        queue = deque(sorted(queue, key=lambda trial: not self._is_held(trial)))  # live ones of a driver before us come first
        with StopRequests() as stop:
            asked = 0
            while queue or self._running:
                if stop.count > asked:
                    asked = stop.count
                    queue.clear()
                    self._stop(stop.first, kill=asked > 1)
                self._fill(queue)
                for slot, attempt in list(self._running.items()):
                    state = attempt.poll()
                    if state is not None:
                        del self._running[slot]
                        self._ended(attempt.name, state, queue, bool(asked))
                self._show()
                time.sleep(self._interval)
        if asked:
            return 130 if stop.first == signal.SIGINT else 75
        return 0 if all(self._folder.observed(trial.name).status == "done" for trial in self._trials) else 1

    def _is_held(self, trial: Trial) -> bool:
        descriptor = lock_trial(self._folder.trial(trial.name))
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is None

    def _fill(self, queue: deque[Trial]) -> None:
        for number, slot in enumerate(self._slots):
            if queue and number not in self._running:
                name = queue.popleft().name
                self._running[number] = Attempt.start(self._folder, name, number, slot, self._timeout, self._command)
                self._starts[name] = self._starts.get(name, 0) + 1

    def _stop(self, number: int, kill: bool) -> None:
        how = "ending the trials at once" if kill else "the trials save and end (again: at once)"
        self._say(f"{signal.Signals(number).name}: {how}; the same command goes on.")
        for attempt in self._running.values():
            attempt.stop(kill)

    def _ended(self, name: str, state: State, queue: deque[Trial], stopping: bool) -> None:
        self._say(f"{name}: {describe_end(state)}")
        if stopping or state.status == "done":
            return
        unseen = state.status == "stopped" and state.exit_status is None  # of a driver before us: go on with it
        if unseen or (state.kind in RETRIED and self._starts[name] <= self._retries):
            queue.append(next(trial for trial in self._trials if trial.name == name))


def describe_end(state: State) -> str:
    """`done, eval loss 1.2345`, or `failed (timeout): it ran longer than 10 s.`"""
    if state.status == "done":
        return f"done, eval loss {state.loss:.4f}" if state.loss is not None else "done"
    return f"{state.status}{f' ({state.kind})' if state.kind else ''}: {state.why}"
