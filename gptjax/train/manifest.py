"""The sha256 of every file in a folder, written last.

Orbax keeps no checksum of array data: without one a flipped bit would be restored in silence.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import Any

from gptjax.train import run

NAME = "manifest.json"


def write(folder: pathlib.Path) -> int:
    """Has the disk hold every file of `folder`, then writes their manifest, atomically. Returns their bytes in all.

    Raises OSError where the disk refuses; then there is no manifest.
    """
    entries: dict[str, Any] = {}
    for path in _files(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            entries[path.relative_to(folder).as_posix()] = {"size": file.tell(), "sha256": digest}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            run.sync(path)
    run.write_atomically(folder / NAME, _render(entries))
    run.sync(folder.parent)
    return sum(entry["size"] for entry in entries.values())


def exists(folder: pathlib.Path) -> bool:
    return (folder / NAME).is_file()


def first_fault(folder: pathlib.Path) -> str | None:
    """What is wrong with the first file that is not what the manifest says; None where all are. Reads every byte."""
    try:
        content = (folder / NAME).read_bytes()
    except OSError as error:
        return f"{NAME} cannot be read ({error.strerror})"
    try:
        entries = json.loads(content)["files"]
        # Comparing all bytes with what would be written now also finds a flipped bit that leaves the same JSON.
        intact = _render(entries) == content
    except (ValueError, TypeError, KeyError):
        intact = False
    if not intact:
        return f"{NAME} does not have its own checksum"
    present = {path.relative_to(folder).as_posix() for path in _files(folder)}
    for name in sorted(present | entries.keys()):
        if fault := _fault(folder, name, entries.get(name), name in present):
            return f"{name} {fault}"
    return None


def _fault(folder: pathlib.Path, name: str, entry: dict[str, Any] | None, is_present: bool) -> str | None:
    if entry is None:
        return f"is not in {NAME}"
    if not is_present:
        return "is missing"
    try:
        with open(folder / name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry["size"]:
                return f"has {size} bytes in place of {entry['size']}"
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                return "does not have the sha256 that was written down"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir() and path != folder / NAME)


def _render(entries: dict[str, Any]) -> bytes:
    body = {"format": 1, "files": entries}
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps(body | {"sha256": checksum}, sort_keys=True, indent=1) + "\n").encode()
