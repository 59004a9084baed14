"""One process of a run, which writes down the documents that reach its devices, and meets with an accident at a given step.

Takes the arguments of `gptjax`. The environment says what else:

    WORKER_DOCUMENTS=FILE        append, for each step, the names of the documents in the rows that this process's devices hold
                                 (of rows that several devices hold, the first one's)
    WORKER_ACCIDENT=KIND:STEP    at that step: kill, term, stop (signals to itself), sleep (a Python thread that never goes on)
    WORKER_ACTED=FILE            the time of the accident, in seconds since 1970
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from gptjax import cli
from gptjax.parallel import hosts

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}
NAME = re.compile(rb"train \d{4}")  # each document begins with it


def write_down(path: pathlib.Path) -> None:
    """Has every batch that is placed on devices leave the names of its training documents."""
    place_batch = hosts.place_batch

    def wrapped(sharding: Any, batch: Mapping[str, np.ndarray], batch_size: int) -> dict[str, Any]:
        placed = place_batch(sharding, batch, batch_size)
        parts = [np.asarray(shard.data) for shard in placed["tokens"].addressable_shards if shard.replica_id == 0]
        found = [name.decode() for rows in parts for row in rows for name in NAME.findall(row.astype(np.uint8).tobytes())]
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        return placed

    hosts.place_batch = wrapped


def have_accident(kind: str, at_step: int, acted: pathlib.Path) -> None:
    moved = hosts.moved

    def wrapped(what: str, number: int = 0, patience: float = 1.0) -> None:
        if what == "step" and number == at_step:
            acted.write_text(str(time.time()))
            if kind == "sleep":
                time.sleep(3600)
            os.kill(os.getpid(), SIGNALS[kind])
        moved(what, number, patience)

    hosts.moved = wrapped


if __name__ == "__main__":
    if path := os.environ.get("WORKER_DOCUMENTS"):
        write_down(pathlib.Path(path))
    if accident := os.environ.get("WORKER_ACCIDENT"):
        kind, _, step = accident.partition(":")
        have_accident(kind, int(step), pathlib.Path(os.environ["WORKER_ACTED"]))
    sys.exit(cli.main())
