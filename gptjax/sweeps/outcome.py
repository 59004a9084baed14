"""Why a trial ended: its exit status and the end of its log, as one of a few words and a sentence."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import signal

MISTAKE, STOPPED = 2, (75, 130)  # exit statuses of `gptjax train`: see cli.py
NONFINITE = "gptjax: the gradient was not finite"
OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|\bMemoryError\b|std::bad_alloc|CUDA_ERROR_OUT_OF_MEMORY")
EXCEPTION = re.compile(r"(\w+\.)*[A-Za-z_]\w*(Error|Exception|Interrupt|Exit|Warning)\b")
MARK = "gptjax: "
START = "--- start "  # begins the line that the log has before each start
TAIL = 65536  # bytes of the log that are looked at


@dataclasses.dataclass(frozen=True)
class Outcome:
    """`status` done, failed or stopped; `kind` of a failure, one of folder.FAILURES; `why` in a sentence."""

    status: str
    kind: str = ""
    why: str = ""


def judge(
    exit_status: int | None, log: list[str], *, finished: bool, stopped_by_us: bool = False, timeout: float = 0.0
) -> Outcome:
    """What became of a process that has ended.

    `exit_status` is negative for a signal, None where nobody was there to see it; `log` holds the last lines of this start;
    `finished`: the run wrote its result; `timeout`: seconds after which we ended it, 0 where we did not.
    """
    if finished:
        return Outcome("done")
    if timeout:
        return Outcome("failed", "timeout", f"it ran longer than {timeout:g} s.")
    if exit_status in STOPPED or stopped_by_us:
        return Outcome("stopped", why=last_line(log) or "it was told to stop.")
    if exit_status == MISTAKE:
        return Outcome("failed", "config", last_line(log) or "exit status 2.")
    nonfinite = [line for line in log if line.startswith(NONFINITE)]
    if nonfinite:
        return Outcome("failed", "nonfinite", nonfinite[-1].removeprefix(MARK))
    exhausted = [line for line in log if OUT_OF_MEMORY.search(line)]
    if exhausted:
        return Outcome("failed", "memory", exhausted[-1].strip())
    if exit_status == -signal.SIGKILL:
        return Outcome("failed", "memory", "killed by SIGKILL, which its driver did not send: most likely out of memory.")
    if exit_status is None:
        return _unseen(log)
    if exit_status < 0:
        return Outcome("failed", "crash", f"killed by {signal.Signals(-exit_status).name}: {last_line(log) or 'it said nothing'}")
    if exit_status == 0:
        return Outcome("failed", "crash", "it ended with status 0, but left no result.json.")
    return Outcome("failed", "crash", last_line(log) or f"exit status {exit_status}, and nothing said.")


def _unseen(log: list[str]) -> Outcome:
    """Of a process that outlived its driver: where its log names no fault, it was interrupted, and goes on."""
    if any(line.startswith("Traceback (most recent call last)") for line in log):
        return Outcome("failed", "crash", last_line(log))
    return Outcome("stopped", why="it ended unseen, after its driver had died; the next start goes on.")


def last_line(log: list[str]) -> str:
    """The sentence that says why: the last exception's line, below which JAX adds notes, or else the last line with words."""
    lines = [line.strip() for line in log if line.strip()]
    marked = [line for line in lines if line.startswith(MARK)]
    if marked:
        return marked[-1].removeprefix(MARK)
    if any(line.startswith("Traceback (most recent call last)") for line in log):
        raised = [line for line in log if EXCEPTION.match(line)]
        if raised:
            return raised[-1].strip()
    return lines[-1] if lines else ""


def read_log(path: pathlib.Path) -> list[str]:
    """The last lines that the latest start wrote; [] where there is no log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    begins = [number for number, line in enumerate(lines) if line.startswith(START)]
    return lines[begins[-1] + 1 :] if begins else lines
