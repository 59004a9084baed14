"""Several processes of one run on this machine: the same losses, the same documents, and what becomes of accidents.

    python experiments/hosts/hosts.py --json=figures.json

1. One, two and four processes, and two between which the mesh splits heads in place of rows: the losses of one process.
2. One process, stopped; four, stopped; two to the end: every document of the epoch reaches the devices exactly once.
3. A worker gets SIGKILL, SIGSTOP, SIGTERM, or sleeps for ever; then process 0 gets SIGKILL and SIGSTOP. How long until every
   other process has ended, and with which status; the same command, given again, must end with the undisturbed run's state.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKER = pathlib.Path(__file__).with_name("worker.py")
DOCUMENTS, BATCH = 96, 8

# One document fills more than half a row, so rows and documents are the same; 12 steps take all of them once.
OVERRIDES: dict[str, Any] = {
    "model.num_layers": 1,
    "model.model_dim": 32,
    "model.num_heads": 2,
    "model.max_seq_len": 64,
    "model.residual_dropout": 0.1,
    "data.source": "text",
    "data.seq_len": 64,
    "data.batch_size": BATCH,
    "train.duration_steps": DOCUMENTS // BATCH,
    "optimizer.warmup_steps": 2,
    "checkpoint.every_steps": 2,
    "metrics.every_steps": 1,
    "evaluate.every_steps": 0,
    "evaluate.batch_size": 8,
    "evaluate.sample_tokens": 0,
    "evaluate.sample_prompt": "t",
}


def write_text(folder: pathlib.Path) -> dict[str, Any]:
    """Files of documents with names in them; the knobs that read them. 11 rows of evaluation do not fill batches of 8."""
    for split, count in (("train", DOCUMENTS), ("eval", 11)):
        (folder / split).mkdir(parents=True)
        for number in range(count):
            numbers = " ".join(str(number * n) for n in range(20))
            (folder / split / f"{number:04d}.txt").write_text(f"{split} {number:04d} {numbers}"[:50], encoding="utf-8")
    return {"data.path": f"{folder}/train/*.txt", "data.eval_path": f"{folder}/eval/*.txt"}


@dataclass
class Ended:
    """What became of one start of the processes."""

    statuses: list[int]
    errors: list[str]  # standard error of each
    seconds: float  # of all
    detection: float | None  # seconds from the accident to the end of the last process, but for one that was stopped


class Launcher:
    """Starts a run as so many processes, in folders of its own."""

    def __init__(self, folder: pathlib.Path, heartbeat: float = 5.0, stuck: float = 10.0, log: Callable[[str], None] = print):
        self.folder, self.log = folder, log
        self.knobs = OVERRIDES | write_text(folder / "text")
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "GPTJAX_CACHE": str(folder / "cache"),
            "GPTJAX_HEARTBEAT_SECONDS": str(heartbeat),
            "GPTJAX_STUCK_SECONDS": str(stuck),
            # Compiling after every restart would be most of the time; a cached executable is the same program.
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self._starts = 0

    def start(
        self,
        run: str,
        processes: int,
        accident: str = "",
        victim: int = 1,
        timeout: float = 600,
        verb: str = "train",
        **knobs: Any,
    ) -> Ended:
        """Starts `processes` processes on `run` and waits for all of them; `accident` ("kill:5") meets the process `victim`."""
        self._starts += 1
        scratch = self.folder / f"start{self._starts}"
        scratch.mkdir()
        port, began = _free_port(), time.monotonic()
        children = [
            self._child(run, scratch, verb, knobs, process, processes, port, accident if process == victim else "")
            for process in range(processes)
        ]
        # Who is stopped cannot end; whoever else meets with an accident must, by itself.
        others = [child for process, child in enumerate(children) if not (accident.startswith("stop") and process == victim)]
        deadline = began + timeout
        try:
            for child in others:
                child.wait(max(1.0, deadline - time.monotonic()))
            ended_at = time.time()
        finally:
            for child in children:
                if child not in others or time.monotonic() >= deadline:
                    child.kill()
            statuses = [child.wait() for child in children]
        acted = scratch / "acted"
        errors = [(scratch / f"{process}.stderr").read_text(encoding="utf-8") for process in range(processes)]
        detection = ended_at - float(acted.read_text()) if acted.exists() else None
        found = Ended(statuses, errors, time.monotonic() - began, detection)
        told = f", {detection:.1f} s after {accident} of process {victim}" if detection is not None else ""
        self.log(f"{run}: {processes} processes ended with {statuses} in {found.seconds:.1f} s{told}.")
        return found

    def _child(
        self,
        run: str,
        scratch: pathlib.Path,
        verb: str,
        knobs: Mapping[str, Any],
        process: int,
        processes: int,
        port: int,
        accident: str,
    ) -> subprocess.Popen[bytes]:
        environment = {**self.environment, "WORKER_DOCUMENTS": str(self.folder / f"{run}.documents")}
        if processes > 1:
            environment |= {
                "GPTJAX_COORDINATOR": f"127.0.0.1:{port}",
                "GPTJAX_NUM_PROCESSES": str(processes),
                "GPTJAX_PROCESS_ID": str(process),
            }
        if accident:
            environment |= {"WORKER_ACCIDENT": accident, "WORKER_ACTED": str(scratch / "acted")}
        command = [sys.executable, str(WORKER), verb, f"--workdir={self.folder / run}", "--json"]
        if verb == "train":
            command.append(f"--config={ROOT / 'configs/stdlib_tiny.py'}")
            command += [f"--config.{key}={value}" for key, value in (self.knobs | knobs).items()]
        with open(scratch / f"{process}.stderr", "wb") as errors, open(scratch / f"{process}.stdout", "wb") as output:
            return subprocess.Popen(command, stdout=output, stderr=errors, cwd=ROOT, env=environment)

    def output(self) -> dict[str, Any]:
        """What process 0 of the latest start printed."""
        return json.loads((self.folder / f"start{self._starts}" / "0.stdout").read_text(encoding="utf-8"))

    def losses(self, run: str) -> dict[str, list[float]]:
        """{"train/loss", "eval/loss", "gradient_norm"} by step."""
        rows = [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        names = ("train/loss", "eval/loss", "gradient_norm")
        return {name: [row[name] for row in rows if name in row] for name in names}

    def state(self, run: str) -> str:
        return json.loads((self.folder / run / "result.json").read_text(encoding="utf-8"))["state_sha256"]

    def documents(self, run: str) -> list[str]:
        """Names of all training documents that reached a device in any start of the run, sorted."""
        lines = (self.folder / f"{run}.documents").read_text(encoding="utf-8").splitlines()
        return sorted(name for line in lines for name in json.loads(line))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check(ended: Ended, statuses: list[int]) -> Ended:
    """`ended`, if it ended with these statuses."""
    if ended.statuses != statuses:
        raise RuntimeError(
            f"statuses {ended.statuses}, not {statuses}:\n" + "\n---\n".join(text[-2000:] for text in ended.errors)
        )
    return ended


def largest_difference(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
    """Relative, over all figures of two runs that have as many; infinite otherwise."""
    if any(len(a[name]) != len(b[name]) for name in a):
        return float("inf")
    return max(abs(x - y) / abs(x) for name in a for x, y in zip(a[name], b[name], strict=True))


def same_losses(launcher: Launcher) -> dict[str, float]:
    """The largest relative difference to one process's losses and gradient norms."""
    check(launcher.start("one", 1), [0])
    one = launcher.losses("one")
    found = {}
    layouts: dict[str, tuple[int, dict[str, int]]] = {
        "two processes": (2, {}),
        "four processes": (4, {}),
        "two processes, tensor 2": (2, {"mesh.data": 1, "mesh.tensor": 2}),
        "four processes, fsdp 2, tensor 2": (4, {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2, "evaluate.sample_tokens": 4}),
    }
    for name, (processes, mesh) in layouts.items():
        run = name.replace(",", "").replace(" ", "-")
        check(launcher.start(run, processes, **mesh), [0] * processes)
        found[name] = largest_difference(one, launcher.losses(run))
    return found


def elastic_epoch(launcher: Launcher) -> dict[str, Any]:
    """One process, then four, then two, each stopped by SIGTERM of one of them but the last."""
    check(launcher.start("elastic", 1, "term:4", victim=0), [75])
    check(launcher.start("elastic", 4, "term:8", victim=2), [75] * 4)
    check(launcher.start("elastic", 2), [0] * 2)
    seen = launcher.documents("elastic")
    return {
        "documents": len(seen),
        "each_exactly_once": seen == [f"train {number:04d}" for number in range(DOCUMENTS)],
        "difference_to_one_process": largest_difference(launcher.losses("one"), launcher.losses("elastic")),
    }


# Accident, victim, and the statuses that the two processes must have (None: any other than 0).
ACCIDENTS: tuple[tuple[str, int, list[int | None]], ...] = (
    ("kill", 1, [1, -signal.SIGKILL]),
    ("stop", 1, [1, -signal.SIGKILL]),
    ("term", 1, [75, 75]),
    ("sleep", 1, [1, 1]),
    ("kill", 0, [-signal.SIGKILL, None]),
    ("stop", 0, [-signal.SIGKILL, None]),
)


def accidents(launcher: Launcher, which: tuple[tuple[str, int, list[int | None]], ...] = ACCIDENTS) -> list[dict[str, Any]]:
    """Each accident in a run of two processes at step 7, and the same command again."""
    check(launcher.start("undisturbed", 2), [0, 0])
    reference = launcher.state("undisturbed")
    found = []
    for kind, victim, wanted in which:
        run = f"{kind}-{victim}"
        ended = launcher.start(run, 2, f"{kind}:7", victim)
        for status, want in zip(ended.statuses, wanted, strict=True):
            if status != want if want is not None else status == 0:
                raise RuntimeError(f"{run}: statuses {ended.statuses}, not {wanted}:\n" + "\n---\n".join(ended.errors))
        survivor = ended.errors[1 - victim]
        check(launcher.start(run, 2), [0, 0])
        said = [line for line in survivor.splitlines() if line.startswith("gptjax: ") and "joins" not in line]
        found.append(
            {
                "accident": f"{kind} of process {victim}",
                "detection_seconds": round(ended.detection or 0.0, 1),
                "statuses": ended.statuses,
                "said": said[-1] if said else survivor.strip().splitlines()[0][:300],
                "same_state": launcher.state(run) == reference,
            }
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heartbeat", type=float, default=5.0, help="GPTJAX_HEARTBEAT_SECONDS (5)")
    parser.add_argument("--stuck", type=float, default=10.0, help="GPTJAX_STUCK_SECONDS (10)")
    parser.add_argument("--json", metavar="FILE", help="figures as JSON")
    arguments = parser.parse_args()

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        launcher = Launcher(pathlib.Path(folder), arguments.heartbeat, arguments.stuck, log)
        figures: dict[str, Any] = {"heartbeat_seconds": arguments.heartbeat, "stuck_seconds": arguments.stuck}
        figures["largest_relative_difference"] = same_losses(launcher)
        figures["elastic_epoch"] = elastic_epoch(launcher)
        figures["accidents"] = accidents(launcher)
        result = json.loads((pathlib.Path(folder) / "one" / "result.json").read_text(encoding="utf-8"))
        figures |= {name: result[name] for name in ("versions", "hardware", "git_commit")}
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(text + "\n", encoding="utf-8")
    ok = figures["elastic_epoch"]["each_exactly_once"] and all(row["same_state"] for row in figures["accidents"])
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
