"""Does a run that is killed at random moments end with the state of an undisturbed one, bit for bit?

    python experiments/resume/kill.py --kills=100 --signal=KILL
    python experiments/resume/kill.py --kills=100 --signal=TERM

One undisturbed run gives the reference hash. Then runs are started, killed and started again with the same command until
`--kills` have struck; the clock of each starts at the first step that the process logs, and its moment is drawn evenly over the
length of a whole run, so that steps, saves and evaluations are hit as they come. Every run that reaches its end must have the
reference hash. Prints the histogram of the steps at which kills struck and of the steps that were taken again.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Small enough for a hundred restarts, with every part of a state: dropout, an average, accumulation, packed rows.
OVERRIDES = {
    "model.num_layers": 2,
    "model.model_dim": 32,
    "model.num_heads": 2,
    "model.max_seq_len": 64,
    "model.residual_dropout": 0.1,
    "data.seq_len": 64,
    "data.batch_size": 8,
    "data.eval_fraction": 0.005,
    "optimizer.ema_decay": 0.99,
    "optimizer.warmup_steps": 10,
    "train.accumulation_steps": 2,
    "checkpoint.every_steps": 25,
    "metrics.every_steps": 1,
    "evaluate.every_steps": 60,
    "evaluate.max_batches": 5,
    "evaluate.sample_tokens": 0,
}


@dataclass
class Outcome:
    """What a campaign of kills saw."""

    reference: str
    hashes: list[str] = field(default_factory=list)  # of the runs that reached their end after at least one kill
    kill_steps: list[int] = field(default_factory=list)
    steps_lost: list[int] = field(default_factory=list)
    exit_statuses: collections.Counter[int] = field(default_factory=collections.Counter)

    @property
    def differing(self) -> int:
        return sum(found != self.reference for found in self.hashes)


class Process:
    """One start of the command, its standard error read in a thread."""

    def __init__(self, workdir: pathlib.Path, steps: int, environment: dict[str, str]):
        overrides = OVERRIDES | {"train.duration_steps": steps}
        command = [sys.executable, "-m", "gptjax", "train", f"--config={ROOT / 'configs/stdlib_tiny.py'}", f"--workdir={workdir}"]
        command += [f"--config.{key}={value}" for key, value in overrides.items()]
        self.began_at = 0  # the checkpoint that it went on from
        self.lines: list[str] = []
        self.steps_under_way = threading.Event()
        self.child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.child.stderr is not None
        for line in self.child.stderr:
            self.lines.append(line)
            if found := re.search(r"going on from the checkpoint of step (\d+)|holds a finished run of (\d+) steps", line):
                self.began_at = int(found[1] or found[2])
            if re.match(r"step [\d,]+/", line):
                self.steps_under_way.set()
        self.steps_under_way.set()

    def wait(self) -> int:
        status = self.child.wait()
        self._reader.join()
        assert self.child.stderr is not None
        self.child.stderr.close()
        return status


def last_step(workdir: pathlib.Path) -> int:
    """Step of the last whole row of metrics.jsonl."""
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def undisturbed(folder: pathlib.Path, steps: int) -> tuple[str, float]:
    """(hash of the last state, seconds of the steps) of a run in `folder` that nothing happens to."""
    environment = _environment(folder)
    _whole_run(folder / "undisturbed", steps, environment)
    seconds = _whole_run(folder / "timed", steps, environment)  # the first one compiled on the way
    reference = _hash(folder / "undisturbed")
    if _hash(folder / "timed") != reference:
        raise RuntimeError("two undisturbed runs differ: this machine does not compute the same bits twice.")
    return reference, seconds


def campaign(
    folder: pathlib.Path, kills: int, which: signal.Signals, steps: int, seed: int, known: tuple[str, float], log: Any = print
) -> Outcome:
    """Kills runs in `folder` until `kills` have struck, and lets the last one end; `known` is what `undisturbed` gave there.

    Raises RuntimeError where a start fails by itself.
    """
    environment = _environment(folder)
    reference, seconds = known
    outcome = Outcome(reference)
    log(f"undisturbed: {reference}, {seconds:.1f} s of steps.")
    moments = random.Random(seed)
    runs = 0
    killed_at: int | None = None  # what that cost is known when the next start says where it goes on
    while len(outcome.kill_steps) < kills or (folder / f"run{runs}").exists():
        workdir = folder / f"run{runs}"
        process = Process(workdir, steps, environment)
        process.steps_under_way.wait()
        struck = False
        if len(outcome.kill_steps) < kills:
            try:
                process.child.wait(moments.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                process.child.send_signal(which)
                struck = True
        status = process.wait()
        if killed_at is not None:
            outcome.steps_lost.append(killed_at - process.began_at)
            killed_at = None
        if status == 0:
            outcome.hashes.append(_hash(workdir))
            log(f"run {runs} ended: {'the same' if outcome.hashes[-1] == outcome.reference else 'DIFFERENT'} state.")
            shutil.rmtree(workdir)
            runs += 1
            continue
        if not struck:
            raise RuntimeError(f"a run ended by itself with status {status}:\n" + "".join(process.lines[-20:]))
        outcome.exit_statuses[status] += 1
        killed_at = last_step(workdir)
        outcome.kill_steps.append(killed_at)
        log(f"kill {len(outcome.kill_steps)}: run {runs}, step {outcome.kill_steps[-1]}, status {status}.")
    return outcome


def _environment(folder: pathlib.Path) -> dict[str, str]:
    # Recompiling after every kill would be most of the time; a cached executable is the same program.
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def _whole_run(workdir: pathlib.Path, steps: int, environment: dict[str, str]) -> float:
    """Seconds from the first logged step to the end."""
    process = Process(workdir, steps, environment)
    process.steps_under_way.wait()
    began = time.monotonic()
    status = process.wait()
    if status:
        raise RuntimeError(f"the undisturbed run ended with status {status}:\n" + "".join(process.lines[-20:]))
    return time.monotonic() - began


def _hash(workdir: pathlib.Path) -> str:
    return json.loads((workdir / "result.json").read_text(encoding="utf-8"))["state_sha256"]


def histogram(values: list[int], bins: int = 10) -> str:
    """Bars of counts over equal ranges of whole numbers."""
    width = max(1, -(-(max(values) + 1) // bins))
    counts = collections.Counter(value // width for value in values)
    return "\n".join(f"{i * width:>6}-{(i + 1) * width - 1:<6} {counts[i]:>4} {'#' * counts[i]}" for i in range(max(counts) + 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--steps", type=int, default=300, help="length of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", action="store_true", help="figures as one JSON object on standard output")
    arguments = parser.parse_args()

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        which = signal.Signals[f"SIG{arguments.signal}"]
        known = undisturbed(pathlib.Path(folder), arguments.steps)
        outcome = campaign(pathlib.Path(folder), arguments.kills, which, arguments.steps, arguments.seed, known, log)
    lost = outcome.steps_lost
    figures = {
        "signal": arguments.signal,
        "kills": len(outcome.kill_steps),
        "runs": len(outcome.hashes),
        "runs_that_differ": outcome.differing,
        "exit_statuses": dict(outcome.exit_statuses),
        "steps_lost_mean": sum(lost) / len(lost),
        "steps_lost_max": max(lost),
        "state_sha256": outcome.reference,
    }
    log(f"\nsteps at which kills struck, of {arguments.steps}:\n{histogram(outcome.kill_steps)}")
    log(f"\nsteps taken again after a kill:\n{histogram(lost)}\n")
    print(json.dumps(figures) if arguments.json else "\n".join(f"{name}: {value}" for name, value in figures.items()))
    return 1 if outcome.differing else 0


if __name__ == "__main__":
    sys.exit(main())
