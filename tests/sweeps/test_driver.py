"""Trials that crash, hang, run out of memory; drivers that are killed: what is recorded, and that nothing runs twice at once."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from gptjax.config import UserError
from gptjax.sweeps import attempt, resources
from gptjax.sweeps.folder import SweepFolder, lock_trial
from gptjax.sweeps.resources import available_cores, bound_to, divide
from tests.sweeps.drive import drive, prepare

HERE = pathlib.Path(__file__).parent
EIGHT = ["ok", "crash", "ok", "nonfinite", "stuck", "ok", "killed", "ok"]
WHY = {
    "crash": ("crash", "ValueError: seed 1 is unlucky"),
    "nonfinite": ("nonfinite", "the gradient was not finite in 10 steps in a row"),
    "stuck": ("timeout", "it ran longer than 6 s."),
    "killed": ("memory", "killed by SIGKILL, which its driver did not send: most likely out of memory."),
    "exhausted": ("memory", "RESOURCE_EXHAUSTED: Out of memory allocating 8796093022208 bytes."),
}


def driver(path: pathlib.Path, *words: object) -> subprocess.Popen:
    root = str(HERE.parents[1])
    environment = os.environ | {"PYTHONPATH": root}
    return subprocess.Popen([sys.executable, str(HERE / "drive.py"), str(path), *map(str, words)], env=environment, cwd=root)


def starts(folder: SweepFolder, name: str) -> list[int]:
    path = folder.trial(name) / "starts"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def wait_for(condition, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def under_way(folder: SweepFolder, names: list[str], step: int) -> bool:
    """Whether one of the trials has taken that many steps and has not finished."""
    for name in names:
        path = folder.trial(name) / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= step and not (folder.trial(name) / "result.json").exists():
            return True
    return False


def test_eight_trials_of_which_four_fail_with_the_driver_killed_once(tmp_path):
    folder, trials = prepare(tmp_path, EIGHT)
    names = {trial.name: behaviour for trial, behaviour in zip(trials, EIGHT, strict=True)}
    first = driver(tmp_path, 2, ",".join(EIGHT), 6)
    wait_for(lambda: under_way(folder, list(names), 8))
    first.kill()
    first.wait()
    orphans = [name for name in names if folder.observed(name).status == "running"]
    assert orphans, "a trial outlives its driver"

    assert drive(tmp_path, 2, EIGHT, timeout=6) == 1
    for name, behaviour in names.items():
        state = folder.state(name)
        assert not (folder.trial(name) / "twice").exists()
        assert len(starts(folder, name)) == 1, "an orphan was waited for, and nothing else was begun before"
        if behaviour == "ok":
            assert (state.status, state.kind, state.why) == ("done", "", "")
        else:
            kind, why = WHY[behaviour]
            assert (state.status, state.kind) == ("failed", kind) and state.why.startswith(why)

    before = {name: starts(folder, name) for name in names}
    assert drive(tmp_path, 2, EIGHT, timeout=6) == 1
    assert before == {name: starts(folder, name) for name in names}, "nothing was missing"


def test_killed_with_its_trials_the_next_driver_goes_on_from_their_checkpoints(tmp_path):
    behaviours = ["ok", "ok", "ok"]
    folder, trials = prepare(tmp_path, behaviours)
    first = driver(tmp_path, 1, ",".join(behaviours))
    wait_for(lambda: under_way(folder, [trials[0].name], 12))
    first.kill()
    first.wait()
    os.kill(starts(folder, trials[0].name)[0], signal.SIGKILL)
    wait_for(lambda: folder.observed(trials[0].name).status == "stopped")
    (folder.trial(trials[0].name) / "alive").unlink()
    assert drive(tmp_path, 2, behaviours) == 0
    rows = [json.loads(line)["step"] for line in (folder.trial(trials[0].name) / "metrics.jsonl").read_text().splitlines()]
    resumed = next(step for before, step in zip(rows, rows[1:], strict=False) if step <= before)
    assert resumed > 10 and rows[-1] == 40, "it went on behind step 10, the last one saved"
    assert [len(starts(folder, trial.name)) for trial in trials] == [2, 1, 1]
    losses = {trial.name: folder.state(trial.name).loss for trial in trials}
    assert list(losses.values()) == [1 + seed / 7 for seed in range(3)]


def test_a_signal_to_the_driver_has_the_trials_save(tmp_path):
    folder, trials = prepare(tmp_path, ["ok", "ok", "ok"])
    for number, status, step in ((signal.SIGTERM, 75, 3), (signal.SIGINT, 130, 8)):
        running = driver(tmp_path, 2, "ok,ok,ok")
        wait_for(lambda step=step: all(under_way(folder, [trial.name], step) for trial in trials[:2]))
        running.send_signal(number)
        assert running.wait(30) == status
        assert [folder.state(trial.name).status for trial in trials] == ["stopped", "stopped", "waiting"]
        assert all(int((folder.trial(trial.name) / "saved").read_text()) >= step for trial in trials[:2])
    assert drive(tmp_path, 3, ["ok", "ok", "ok"]) == 0
    assert [folder.state(trial.name).starts for trial in trials] == [3, 3, 1]


def test_a_process_that_its_killed_driver_never_wrote_down_is_not_started_beside_itself(tmp_path):
    folder, trials = prepare(tmp_path, ["ok"])
    workdir = folder.trial(trials[0].name)
    lock = lock_trial(workdir)
    code = "import os, sys, time; time.sleep(0.6)"
    child = subprocess.Popen([sys.executable, "-c", code], pass_fds=(lock,))
    os.close(lock)
    assert drive(tmp_path, 1, ["ok"]) == 0
    assert child.wait() == 0 and len(starts(folder, trials[0].name)) == 1
    assert folder.state(trials[0].name).starts == 2, "waited for once, then started"


def test_failed_trials_run_again_when_asked_and_crashes_are_retried_when_asked(tmp_path):
    behaviours = ["crash", "ok", "nonfinite", "exhausted"]
    folder, trials = prepare(tmp_path, behaviours)
    assert drive(tmp_path, 2, behaviours, retries=1) == 1
    assert [len(starts(folder, trial.name)) for trial in trials] == [2, 1, 1, 2]
    kind, why = WHY["exhausted"]
    assert (folder.state(trials[3].name).kind, folder.state(trials[3].name).why) == (kind, f"RuntimeError: {why}")
    assert drive(tmp_path, 2, behaviours, retry_failed=True) == 1
    assert [len(starts(folder, trial.name)) for trial in trials] == [3, 1, 2, 3]


def test_one_driver_a_folder(tmp_path):
    folder, trials = prepare(tmp_path, ["ok", "ok"])
    running = driver(tmp_path, 1, "ok,ok")
    wait_for(lambda: under_way(folder, [trials[0].name], 1))
    with pytest.raises(UserError, match=f"process {running.pid} "):
        drive(tmp_path, 1, ["ok", "ok"])
    running.terminate()
    assert running.wait(30) == 75


def test_trials_are_bound_to_as_many_cores_whatever_runs_beside_them(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(resources, "available_cores", lambda: [0, 1, 2, 3])
    one, _ = divide(1, 2, 1)
    many, said = divide(3, 2, 1)
    assert [slot.cores for slot in one] == [(0, 1)]
    assert [slot.cores for slot in many] == [(0, 1), (2, 3), (0, 1)] and "shared" in said
    assert {slot.environment["NPROC"] for slot in one + many} == {"2"}
    with pytest.raises(UserError, match="--cores=5: this process may use only 4 cores"):
        divide(1, 5, 1)


def test_gpus_are_divided(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    slots, said = divide(2, 1, 2)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["4,5", "6,7"] and "2 of 4 GPU(s)" in said
    with pytest.raises(UserError, match="needs 6 GPUs, but there are 4"):
        divide(3, 1, 2)


def test_a_process_started_inside_has_the_cores_and_we_keep_ours():
    before = available_cores()
    with bound_to((before[0],)):
        code = "import os; print(len(os.sched_getaffinity(0)))"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"
    assert available_cores() == before


def test_what_joins_processes_to_one_run_is_not_inherited(monkeypatch):
    monkeypatch.setenv("GPTJAX_COORDINATOR", "host:1")
    monkeypatch.setenv("GPTJAX_CACHE", "/cache")
    environment = attempt._environment(resources.Slot((), {"NPROC": "3"}))
    assert "GPTJAX_COORDINATOR" not in environment
    assert environment["GPTJAX_CACHE"] == "/cache" and environment["NPROC"] == "3"
