"""Two real training processes started by launch/local.sh: one told to stop, one killed; the same command goes on each time."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from gptjax.train.metrics import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS, HEARTBEAT = 60, 3.0
OVERRIDES = {
    "model.num_layers": 1,
    "model.model_dim": 16,
    "model.num_heads": 2,
    "model.max_seq_len": 32,
    "model.residual_dropout": 0.1,
    "data.seq_len": 32,
    "data.batch_size": 4,
    "data.eval_fraction": 0.005,
    "optimizer.warmup_steps": 2,
    "train.duration_steps": STEPS,
    "checkpoint.every_steps": 15,
    "metrics.every_steps": 1,
    "evaluate.every_steps": 0,
    "evaluate.max_batches": 1,
    "evaluate.batch_size": 4,
    "evaluate.sample_tokens": 0,
}


@dataclass
class Ended:
    status: int
    result: str  # standard output, each line with the number of its process
    said: str  # standard error, likewise
    seconds: float  # from the signal to the end


def process_of(launcher: int, rank: int) -> int:
    """The process id of a rank: the child of local.sh that was told so."""
    children = subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(launcher)], text=True).split()
    told = f"GPTJAX_PROCESS_ID={rank}".encode()
    return next(int(child) for child in children if told in pathlib.Path(f"/proc/{child}/environ").read_bytes().split(b"\0"))


def wait_for_step(metrics: pathlib.Path, step: int, launcher: subprocess.Popen[bytes]) -> None:
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text(encoding="utf-8"):
        assert launcher.poll() is None, f"it ended before step {step}"
        time.sleep(0.05)


def launch(workdir: pathlib.Path, at_step: int = 0, number: signal.Signals = signal.SIGTERM) -> Ended:
    """`local.sh 2 -- python -m gptjax train`; when the run has logged `at_step` (0: never), process 1 gets the signal."""
    command = [ROOT / "launch/local.sh", "--devices-per-process=1", "2", "--", sys.executable, "-m", "gptjax", "train", "--json"]
    command += [f"--config={ROOT / 'configs/stdlib_tiny.py'}", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in OVERRIDES.items()]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
        "GPTJAX_HEARTBEAT_SECONDS": str(HEARTBEAT),
        # A cached executable is the same program; compiling at every start would be most of the time.
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    output, errors = workdir.parent / "stdout", workdir.parent / "stderr"
    with (
        output.open("wb") as stdout,
        errors.open("wb") as stderr,
        subprocess.Popen(command, env=environment, stdout=stdout, stderr=stderr, cwd=ROOT) as launcher,
    ):
        if at_step:
            wait_for_step(workdir / "metrics.jsonl", at_step, launcher)
            os.kill(process_of(launcher.pid, 1), number)
        began = time.monotonic()
        try:
            status = launcher.wait(timeout=300)
        finally:
            launcher.terminate()  # and with it all that it started
    return Ended(status, output.read_text(encoding="utf-8"), errors.read_text(encoding="utf-8"), time.monotonic() - began)


def losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in read_metrics(workdir / "metrics.jsonl") if "train/loss" in row]


def state(workdir: pathlib.Path) -> str:
    return json.loads((workdir / "result.json").read_text(encoding="utf-8"))["state_sha256"]


@pytest.mark.skipif(not pathlib.Path("/proc/self/environ").exists(), reason="tells the processes apart by Linux's /proc")
def test_a_signal_to_one_process_ends_both_and_the_same_command_goes_on(tmp_path):
    undisturbed = launch(tmp_path / "undisturbed")
    assert undisturbed.status == 0, undisturbed.said
    # One line of process 0's, though the library that joins the processes writes to standard output too.
    number, _, text = undisturbed.result.partition(" ")
    assert number == "[0]" and json.loads(text)["steps"] == STEPS, undisturbed.result

    told = launch(tmp_path / "run", 10, signal.SIGTERM)
    assert told.status == 75, told.said
    for process in (0, 1):
        assert f"[{process}] gptjax: stopped by SIGTERM and saved at step" in told.said
    assert "ending the other" not in told.said  # nobody had to be told

    killed = launch(tmp_path / "run", 35, signal.SIGKILL)
    assert killed.status == 128 + signal.SIGKILL, killed.said
    assert "going on from the checkpoint of step" in killed.said
    sentences = [line for line in killed.said.splitlines() if line.startswith("[0] gptjax: ") and "no sign of life" in line]
    assert len(sentences) == 1 and "process 1 on " in sentences[0], killed.said
    assert killed.seconds < HEARTBEAT + 15  # three beats so that others read it; and a busy machine

    last = launch(tmp_path / "run")
    assert last.status == 0, last.said
    assert "going on from the checkpoint of step" in last.said
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")
    assert state(tmp_path / "run") == state(tmp_path / "undisturbed")
