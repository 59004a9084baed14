"""One start of one trial: a process, watched until it ends, and its end written down."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import gptjax
from gptjax.sweeps.folder import State, SweepFolder, lock_trial
from gptjax.sweeps.outcome import START, judge, read_log
from gptjax.sweeps.resources import Slot, bound_to
from gptjax.train.run import is_alive, read_result, start_time

TRAIN = (sys.executable, "-m", "gptjax", "train")
GRACE = 60.0  # seconds that a trial has to save after its time-out
# What joins processes to one run: a trial is a run of its own.
NOT_INHERITED = ("GPTJAX_COORDINATOR", "GPTJAX_NUM_PROCESSES", "GPTJAX_PROCESS_ID", "GPTJAX_DISTRIBUTED")


class Attempt:
    """A trial's process: one that we started, or one that a driver before us had started and that outlived it."""

    def __init__(self, folder: SweepFolder, name: str, timeout: float, process: subprocess.Popen | None, lock: int | None):
        self.name = name
        self._folder, self._workdir, self._timeout = folder, folder.trial(name), timeout
        self._process, self._lock, self._state = process, lock, folder.state(name)
        self._stopped_by_us = self._timed_out = False
        self._kill_at = float("inf")

    @classmethod
    def start(
        cls,
        folder: SweepFolder,
        name: str,
        slot_number: int,
        slot: Slot,
        timeout: float = 0.0,
        command: Sequence[str] = TRAIN,
        job: str = "",
    ) -> Attempt:
        """Starts the trial, or takes over its process where one is alive."""
        workdir, before = folder.trial(name), folder.state(name)
        state = dataclasses.replace(
            before,
            status="running",
            kind="",
            why="",
            exit_status=None,
            starts=before.starts + 1,
            host=socket.gethostname(),
            job=job,
            slot=slot_number,
            started=time.time(),
        )
        lock = lock_trial(workdir)
        if lock is None:
            if not before.is_alive():  # its driver was killed before it could write the process down
                pid, process_start = _holder(workdir)
                folder.write_state(name, dataclasses.replace(state, pid=pid, process=process_start))
            return cls(folder, name, timeout, None, None)
        words = [*command, f"--config={workdir / 'requested.json'}", f"--workdir={workdir}"]
        environment = _environment(slot) | ({"GPTJAX_JOB": job} if job else {})
        with (workdir / "trial.log").open("ab") as log:
            log.write(f"{START}{state.starts}, {time.strftime('%Y-%m-%d %H:%M:%S')}: {shlex.join(words)}\n".encode())
            log.flush()
            with bound_to(slot.cores):
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    pass_fds=(lock,),
                    start_new_session=True,  # Ctrl-C goes to the driver alone
                )
        folder.write_state(name, dataclasses.replace(state, pid=process.pid, process=start_time(process.pid)))
        return cls(folder, name, timeout, process, lock)

    def poll(self) -> State | None:
        """None while it runs; its final state once it has ended, which is then written down."""
        if self._has_ended():
            return self._close()
        now = time.time()
        if self._timeout and not self._stopped_by_us and not self._timed_out and now - self._state.started > self._timeout:
            self._timed_out, self._kill_at = True, now + GRACE
            self._signal(signal.SIGTERM)
        if now > self._kill_at:
            self._signal(signal.SIGKILL)
        return None

    def stop(self, kill: bool = False, grace: bool = False) -> None:
        """Has the trial save and end; `kill` ends it at once, `grace` where it has not ended by itself after that time."""
        if grace and self._stopped_by_us:
            return
        self._stopped_by_us = True
        if grace:
            self._kill_at = time.time() + GRACE
        self._signal(signal.SIGKILL if kill else signal.SIGTERM)

    def _has_ended(self) -> bool:
        if self._process is not None:
            return self._process.poll() is not None
        self._lock = lock_trial(self._workdir)
        return self._lock is not None

    def _signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            return
        known = (self._state.pid, self._state.process)
        pid, process_start = known if is_alive(*known) else _holder(self._workdir)
        if is_alive(pid, process_start):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _close(self) -> State:
        result = read_result(self._workdir)
        exit_status = None if self._process is None else self._process.returncode
        outcome = judge(
            exit_status,
            read_log(self._workdir / "trial.log"),
            finished=result is not None,
            stopped_by_us=self._stopped_by_us,
            timeout=self._timeout if self._timed_out else 0.0,
        )
        state = dataclasses.replace(
            self._state,
            status=outcome.status,
            kind=outcome.kind,
            why=outcome.why,
            exit_status=exit_status,
            seconds=round(self._state.seconds + time.time() - self._state.started, 3),
            loss=result["eval"]["loss"] if result else None,
        )
        self._folder.write_state(self.name, state)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        return state


def _holder(workdir: pathlib.Path) -> tuple[int, str]:
    """(pid, start) of the process that the run's own lock names, on this host; (0, '') where there is none."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
        lock = json.loads((workdir / "run.lock").read_text(encoding="utf-8"))
        if lock["host"] == socket.gethostname():
            return int(lock["pid"]), str(lock["started"])
    return 0, ""


def _environment(slot: Slot) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED} | slot.environment
    here = str(pathlib.Path(gptjax.__file__).parents[1])  # trials run the very code that the driver is
    environment["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [environment.get("PYTHONPATH")])])
    return environment
