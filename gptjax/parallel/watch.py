"""The watch over the processes of a run: one that is gone, silent or stuck ends all of them, with a sentence that names it.

Each process has a thread that writes a text to the board once a second: a count that shows it lives, and how far it got.
Process 0 reads all of them and judges; the others read its verdict. Nothing but these small texts is exchanged, and no device
is touched.

    gone, stopped    its text has not changed for `heartbeat_seconds`
    stuck            every text changes, but no process has got on for `stuck_seconds`: the one that is furthest behind is named

A second thread of each process sees that the first one still gets answers: a call to a coordinator that is stopped returns
from nowhere.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

ENDED_BY_A_PEER = 1  # exit status


class Texts(Protocol):
    """What the watch needs of a board."""

    def write(self, key: str, text: str, replace: bool = True) -> None: ...
    def read_all(self, prefix: str) -> dict[str, str]: ...


class Judge:
    """Process 0's view of the others. Time is given in; it is counted only while this process itself runs."""

    def __init__(self, count: int, heartbeat_seconds: float, stuck_seconds: float):
        self._count, self._heartbeat, self._stuck = count, heartbeat_seconds, stuck_seconds
        self._texts: dict[int, str] = {}
        self._silent = dict.fromkeys(range(count), 0.0)
        self._moves: dict[int, int] = {}
        self._still = 0.0

    def verdict(self, texts: dict[str, str], elapsed: float) -> str | None:
        """The sentence that ends the run, or None. `texts`: what each process wrote last; `elapsed`: seconds since then."""
        now = {int(process): text for process, text in texts.items()}
        for process in range(self._count):
            unchanged = now.get(process) == self._texts.get(process)
            self._silent[process] = self._silent[process] + elapsed if unchanged else 0.0
        self._texts = now
        beats = {process: json.loads(text) for process, text in now.items()}
        silent = [p for p, seconds in self._silent.items() if seconds >= self._heartbeat and not beats.get(p, {}).get("left")]
        if silent:
            named = " and ".join(name(process, beats.get(process)) for process in silent[:4])
            more = f" and {len(silent) - 4} more" if len(silent) > 4 else ""
            return (
                f"{named}{more} has given no sign of life for {self._heartbeat:g} s (GPTJAX_HEARTBEAT_SECONDS): "
                "it died, was stopped, or its host is gone."
            )
        return self._stuck_verdict(beats, elapsed)

    def _stuck_verdict(self, beats: dict[int, dict[str, Any]], elapsed: float) -> str | None:
        moves = {process: beat["moves"] for process, beat in beats.items()}
        self._still = self._still + elapsed if moves == self._moves else 0.0
        self._moves = moves
        patience = max((beat["patience"] for beat in beats.values()), default=math.inf)
        if len(beats) < self._count or self._still < self._stuck * patience:
            return None
        behind = [process for process, made in moves.items() if made == min(moves.values())]
        waited = f"for {self._stuck * patience:g} s (GPTJAX_STUCK_SECONDS{f' times {patience:g}' if patience != 1 else ''})"
        if len(behind) == self._count:
            return f"no process has got on {waited}; all of them are at {beats[0]['at']}."
        ahead = next(beat["at"] for process, beat in beats.items() if process not in behind)
        named = " and ".join(name(process, beats[process]) for process in behind[:4])
        return f"{named} is stuck at {beats[behind[0]]['at']} while others wait at {ahead}; nothing moved {waited}."


def name(process: int, beat: dict[str, Any] | None) -> str:
    """A process in words."""
    return f"process {process} on {beat['host']} (pid {beat['pid']})" if beat else f"process {process}"


class Watch:
    """The threads of one process. `leave` ends the process with a status, and does not return."""

    def __init__(
        self, board: Texts, process: int, count: int, heartbeat_seconds: float, stuck_seconds: float, leave: Callable[[int], Any]
    ):
        self._board, self._process, self._count, self._leave = board, process, count, leave
        self._heartbeat = heartbeat_seconds
        self.interval = min(1.0, heartbeat_seconds / 5)
        self._judge = Judge(count, heartbeat_seconds, stuck_seconds) if process == 0 else None
        self._beat: dict[str, Any] = {
            "host": socket.gethostname(), "pid": os.getpid(), "moves": 0, "at": "its start", "patience": math.inf,
        }  # fmt: skip
        self._beats = 0
        self._answered = time.monotonic()
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=run, name=run.__name__, daemon=True) for run in (self._exchange, self._guard)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Says that this process leaves in order, so that its silence means nothing."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=10)
        self._beat = {**self._beat, "left": True}
        with contextlib.suppress(Exception):
            self._publish()

    def moved(self, what: str, number: int, patience: float) -> None:
        """See `hosts.moved`."""
        # One assignment, so that the thread never publishes half of it.
        at = f"{what} {number}" if number else what
        self._beat = {**self._beat, "moves": self._beat["moves"] + 1, "at": at, "patience": patience}

    def name(self, process: int) -> str:
        return name(process, self._beat if process == self._process else None)

    def announce(self, text: str, status: int) -> None:
        """Has the other processes end with this sentence. Process 0 gives them time to read it, for it takes the board along."""
        verdict = json.dumps({"text": f"{self.name(self._process)} ended the run: {text}", "status": status})
        self._stopped.set()
        with contextlib.suppress(Exception):  # the board may be gone; JAX's own heartbeat then ends the others
            self._board.write(f"verdict/{self._process}", verdict, replace=False)
            if self._process == 0:
                time.sleep(4 * self.interval)

    def cause(self) -> tuple[str, int] | None:
        """(sentence, exit status) where an error of this process came from another one; takes five beats to tell."""
        self._stopped.set()  # from here on the main thread judges
        try:
            before = self._board.read_all("beat")
            for _ in range(5):
                time.sleep(self.interval)
                if found := self._read_verdict():
                    return found
                self._publish()
            after = self._board.read_all("beat")
        except Exception as error:
            return f"{self.name(self._process)}: the coordinator, process 0, does not answer any more: {_first(error)}", 1
        dead = [p for p in sorted(before, key=int) if p != str(self._process) and before[p] == after.get(p)]
        dead = [p for p in dead if not json.loads(before[p]).get("left")]
        if not dead:
            return None
        named = " and ".join(name(int(p), json.loads(before[p])) for p in dead[:4])
        text = f"{named} has given no sign of life for {5 * self.interval:g} s: it died, was stopped, or its host is gone."
        self.announce(text, ENDED_BY_A_PEER)
        return f"{self.name(self._process)}: {text}", ENDED_BY_A_PEER

    def _exchange(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(self.interval):
            try:
                self._publish()
                found = self._read_verdict()
                now = time.monotonic()
                self._answered = now
                # Time in which this process itself was stopped says nothing of the others.
                elapsed, last = min(now - last, 2 * self.interval), now
                if found is None and self._judge is not None:
                    text = self._judge.verdict(self._board.read_all("beat"), elapsed)
                    if text is not None and not self._stopped.is_set():
                        self._board.write("verdict/judge", json.dumps({"text": text, "status": ENDED_BY_A_PEER}))
                        found = text, ENDED_BY_A_PEER
                        time.sleep(3 * self.interval)  # until the others have read it
            except Exception:
                continue  # no answer: the guard's business
            if found is not None and not self._stopped.is_set():
                self._end(*found)

    def _guard(self) -> None:
        """Of its own, because a call of the other thread may hang."""
        waited, seen, last = 0.0, self._answered, time.monotonic()
        while not self._stopped.wait(self.interval):
            now = time.monotonic()
            waited = waited + min(now - last, 2 * self.interval) if self._answered == seen else 0.0
            seen, last = self._answered, now
            if waited >= self._heartbeat:
                self._end(
                    f"the coordinator, process 0, has not answered for {self._heartbeat:g} s (GPTJAX_HEARTBEAT_SECONDS): "
                    "it died, was stopped, or its host is gone.",
                    ENDED_BY_A_PEER,
                )

    def _publish(self) -> None:
        self._beats += 1
        self._board.write(f"beat/{self._process}", json.dumps({**self._beat, "beat": self._beats}))

    def _read_verdict(self) -> tuple[str, int] | None:
        """What another process has announced."""
        told = [text for who, text in sorted(self._board.read_all("verdict").items()) if who != str(self._process)]
        if not told:
            return None
        verdict = json.loads(told[0])
        return f"{self.name(self._process)} ends: {verdict['text']}", verdict["status"]

    def _end(self, text: str, status: int) -> None:
        self._stopped.set()
        print(f"gptjax: {text}", file=sys.stderr, flush=True)
        self._leave(status)


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
