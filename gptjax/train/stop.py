"""What SIGTERM and Ctrl-C do to a run."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from gptjax.parallel import hosts


class Interrupted(Exception):
    """The run was asked to stop, and is saved; `signal_number` says by what."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name} and saved at step {step}; the same command goes on from there."
        )
        self.signal_number = signal_number


class StopSignals:
    """Context manager that turns the first SIGTERM or SIGINT into a number to look at; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        again = " (Ctrl-C again: at once, without saving)" if number == signal.SIGINT else ""
        # Straight to the descriptor: the signal may have come in the middle of a print.
        os.write(2, f"\n{signal.Signals(number).name}: stopping after this step{again}.\n".encode())

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        fails = kind is not None and issubclass(kind, Exception) and not issubclass(kind, Interrupted)
        for number, handler in self._before.items():
            # Another process's death may be the cause, and then a launcher's SIGTERM follows: it must not come before this
            # process, which ends by itself in seconds, has found out and said who died.
            speaks = fails and hosts.process_count() > 1 and number == signal.SIGTERM
            signal.signal(number, signal.SIG_IGN if speaks else handler)
