"""A lock between processes of several hosts that share a folder, which a killed holder does not keep."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import socket
import time

from gptjax.config import UserError

PATIENCE = 30.0  # seconds without a sign of life after which another host's lock is taken for a dead one's


class SharedLock:
    """The file PATH.lock is the lock: a hard link, which NFS too makes for one host only, to the file of the host that holds it.

    Processes of one host first take turns on that file of theirs (flock, which dies with its holder). So whoever has the turn and
    finds the lock to be his own host's knows that its holder was killed, and has it at once; Optuna's locks would wait for 30 s.
    """

    def __init__(self, path: pathlib.Path):
        self._lock = path.with_name(f"{path.name}.lock")
        self._own = path.with_name(f".{path.name}.{socket.gethostname()}")
        self._descriptor = -1

    def acquire(self) -> bool:
        descriptor = os.open(self._own, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.utime(self._own)
        try:
            self._link()
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    def _link(self) -> None:
        seen, since, pause = None, time.monotonic(), 0.001
        while True:
            try:
                os.link(self._own, self._lock)
                return
            except FileExistsError:
                pass
            except OSError as error:
                raise UserError(f"{self._lock} cannot be made ({error.strerror}): a search needs hard links.") from None
            with contextlib.suppress(FileNotFoundError):  # released in between
                if os.path.samefile(self._own, self._lock):
                    return
                status = os.stat(self._lock)
                if (status.st_ino, status.st_mtime_ns) != seen:
                    seen, since = (status.st_ino, status.st_mtime_ns), time.monotonic()
                elif time.monotonic() - since > PATIENCE:
                    os.unlink(self._lock)
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def release(self) -> None:
        os.unlink(self._lock)
        os.close(self._descriptor)
