"""How trials that run beside each other share one machine: CPU cores and GPUs, the same number for each.

A run on the CPU gives the same bits only with the same number of threads, so that number belongs to the sweep (`cores`) and not
to how many trials run at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator

from gptjax.config import UserError


@dataclasses.dataclass(frozen=True)
class Slot:
    """One trial's share: cores it is bound to (none: all), and what is set in its environment."""

    cores: tuple[int, ...]
    environment: dict[str, str]


def available_cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def available_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES lists, or else the NVIDIA devices of this machine; none where JAX_PLATFORMS leaves them out."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device for device in visible.split(",") if device and device != "-1"]
    numbers = [match[1] for path in pathlib.Path("/dev").glob("nvidia*") if (match := re.fullmatch(r"nvidia(\d+)", path.name))]
    return sorted(numbers, key=int)


def divide(jobs: int, cores: int, devices: int) -> tuple[list[Slot], str]:
    """A slot for each of `jobs` trials at a time, and a sentence that says what each has.

    On GPUs `devices` each, and the cores shared out evenly; otherwise `cores` each, whatever `jobs` is. Raises `UserError` where
    there are too few.
    """
    own, gpus = available_cores(), available_gpus()
    if gpus:
        if jobs * devices > len(gpus):
            raise UserError(f"--jobs={jobs} with {devices} GPU(s) each needs {jobs * devices} GPUs, but there are {len(gpus)}.")
        share = max(len(own) // jobs, 1)
        slots = []
        for job in range(jobs):
            mine = ",".join(gpus[job * devices : (job + 1) * devices])
            slots.append(Slot(_cores(own, job, share), {"CUDA_VISIBLE_DEVICES": mine}))
        return slots, f"{jobs} at a time, {devices} of {len(gpus)} GPU(s) and {share} of {len(own)} cores each"
    if cores > len(own):
        raise UserError(f"--cores={cores}: this process may use only {len(own)} cores.")
    limits = {name: str(cores) for name in ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    slots = [Slot(_cores(own, job, cores), limits) for job in range(jobs)]
    more = len(own) // cores
    hint = f"; --jobs={more} would use them all" if jobs < more else ", shared" if jobs > more else ""
    return slots, f"{jobs} at a time, {cores} of {len(own)} cores each{hint}"


def _cores(own: list[int], job: int, each: int) -> tuple[int, ...]:
    return tuple(sorted(own[(job * each + i) % len(own)] for i in range(each)))


@contextlib.contextmanager
def bound_to(cores: tuple[int, ...]) -> Iterator[None]:
    """Processes started inside have these cores; there is no such thing outside Linux."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
