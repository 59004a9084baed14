"""Trials as one SLURM array, through submitit (extra: slurm).

Each trial is one process on one node; SLURM's preemption and time limit have it save, and it is queued again. The driver only
waits: stopping it leaves the jobs alone, and the next one waits for those that are still in the queue.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from gptjax.config import UserError
from gptjax.sweeps.attempt import TRAIN, Attempt
from gptjax.sweeps.definition import Sweep, Trial
from gptjax.sweeps.driver import StopRequests, describe_end, still_to_do
from gptjax.sweeps.folder import State, SweepFolder
from gptjax.sweeps.resources import Slot
from gptjax.sweeps.table import LiveTable

# What SLURM says of a job that ended without our process having written why.
ENDS = {
    "OUT_OF_MEMORY": ("failed", "memory"),
    "TIMEOUT": ("failed", "timeout"),
    "DEADLINE": ("failed", "timeout"),
    "CANCELLED": ("stopped", ""),
    "PREEMPTED": ("stopped", ""),
    "NODE_FAIL": ("stopped", ""),
    "BOOT_FAIL": ("stopped", ""),
}


class TrialJob:
    """What runs on the node: one start of a trial. submitit calls `checkpoint` before the job is preempted or out of time."""

    def __init__(self, path: pathlib.Path, name: str, timeout: float, command: Sequence[str] = TRAIN):
        self.path, self.name, self.timeout, self.command = path, name, timeout, tuple(command)
        self._attempt: Attempt | None = None

    def __call__(self) -> str:
        job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID", ""))
        task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
        name = f"{job}_{task}" if job and task else job
        self._attempt = Attempt.start(
            SweepFolder(self.path), self.name, 0, Slot((), {}), self.timeout, self.command, name and f"slurm-{name}"
        )
        return self._wait(self._attempt).status

    def checkpoint(self) -> Any:
        """Has the trial save, waits for it, and says what the job is to do when it runs again."""
        import submitit

        if self._attempt is not None:
            self._attempt.stop()
            self._wait(self._attempt)
        return submitit.helpers.DelayedSubmission(TrialJob(self.path, self.name, self.timeout, self.command))

    def _wait(self, attempt: Attempt) -> State:
        while (state := attempt.poll()) is None:
            time.sleep(0.2)
        return state


def run_on_slurm(
    folder: SweepFolder,
    sweep: Sweep,
    trials: Sequence[Trial],
    jobs: int,
    retry_failed: bool,
    table: LiveTable,
    *,
    cluster: str = "slurm",
    command: Sequence[str] = TRAIN,
    interval: float = 1.0,
) -> int:
    """Submits what is neither done nor in the queue, `jobs` at a time, and waits; the exit status as of `Driver.run`.

    Raises `UserError` where submitit or SLURM is absent, or a setting is none of theirs.
    """
    executor, job_class = _executor(folder, sweep, jobs, cluster)
    waiting = still_to_do(folder, trials, retry_failed)
    live = {trial.name: job for trial in waiting if (job := _live_job(folder, trial.name, job_class)) is not None}
    fresh = [trial for trial in waiting if trial.name not in live]
    if fresh:
        for trial in fresh:
            queued = dataclasses.replace(folder.state(trial.name), status="queued", kind="", why="", job="", exit_status=None)
            folder.write_state(trial.name, queued)
        submitted = executor.submit_array([TrialJob(folder.path, trial.name, sweep.timeout, command) for trial in fresh])
        for trial, job in zip(fresh, submitted, strict=True):
            live[trial.name] = job
            state = folder.state(trial.name)
            if state.status == "queued":  # one that runs by now has written down more
                folder.write_state(trial.name, dataclasses.replace(state, job=job.job_id))
    table.say(f"{len(fresh)} jobs submitted, {len(live) - len(fresh)} in the queue already; {jobs} at a time.")
    return _wait_for(folder, trials, live, table, interval)


def _executor(folder: SweepFolder, sweep: Sweep, jobs: int, cluster: str) -> tuple[Any, Callable[..., Any]]:
    try:
        import submitit
    except ImportError:
        raise UserError("--where=slurm needs the package submitit: pip install 'gptjax[slurm]'.") from None
    settings = {"cpus_per_task": sweep.cores, "nodes": 1, "tasks_per_node": 1, "name": "gptjax"} | dict(sweep.slurm)
    if "timeout_min" not in settings:  # submitit would take five minutes
        raise UserError("slurm needs the jobs' time limit in minutes: Sweep(slurm={'timeout_min': 600, ...}).")
    for name in ("nodes", "tasks_per_node"):
        if settings[name] != 1:
            raise UserError(f"slurm: {name}={settings[name]}, but a trial is one process; launch/slurm.sbatch runs larger ones.")
    if cluster == "slurm":
        settings["slurm_array_parallelism"] = jobs
    try:
        executor = submitit.AutoExecutor(folder=folder.path / "slurm", cluster=cluster)
        executor.update_parameters(**settings)
    except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:  # its ways to refuse
        raise UserError(f"--where=slurm: {' '.join(str(error).split()).rstrip('.')}.") from error
    return executor, submitit.SlurmJob if cluster == "slurm" else submitit.LocalJob


def _live_job(folder: SweepFolder, name: str, job_class: Callable[..., Any]) -> Any:
    """The trial's job where it is still in the queue or running, or else None."""
    state = folder.state(name)
    job_id = state.job.removeprefix("slurm-")
    if not job_id or state.status not in ("queued", "running", "stopped"):
        return None
    job = job_class(folder.path / "slurm", job_id)
    return None if job.done(force_check=True) else job


def _wait_for(folder: SweepFolder, trials: Sequence[Trial], live: dict[str, Any], table: LiveTable, interval: float) -> int:
    with StopRequests() as stop:
        while live:
            for name, job in list(live.items()):
                state = folder.observed(name)
                if state.status not in ("done", "failed") and job.done():
                    state = _ended_unseen(folder, name, job)
                elif state.status not in ("done", "failed"):
                    continue
                del live[name]
                table.say(f"{name}: {describe_end(state)}")
            if stop.count:
                table.say(f"{len(live)} jobs stay in the queue; the same command waits for them, scancel ends them.")
                return 130 if stop.first == signal.SIGINT else 75
            table.show()
            if live:
                time.sleep(interval)
    return 0 if all(folder.observed(trial.name).status == "done" for trial in trials) else 1


def _ended_unseen(folder: SweepFolder, name: str, job: Any) -> State:
    """The job is over. What its process wrote counts; where it was cut off, SLURM's word does."""
    state = folder.state(name)
    if state.status not in ("queued", "running"):
        return folder.observed(name)
    said = str(job.state).split()[0].rstrip("+")
    status, kind = ENDS.get(said, ("failed", "crash"))
    state = dataclasses.replace(state, status=status, kind=kind, why=f"SLURM ended job {job.job_id} with {said}.")
    folder.write_state(name, state)
    return state
