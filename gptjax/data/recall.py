"""What reading a corpus came to, kept by its files' path, size, inode and times, so that an unchanged corpus is not read again.

A start needs of the text only its digest, by which the cache knows its tokens. Files whose inode, size, mtime and ctime are all
as they were are taken for unchanged: what writes to a file sets its ctime, which no program can set back. A clock that is set
back, or a file system without true times, can still deceive; `data.verify_files` reads everything. Files that changed moments
before they were read are not kept, since a second change might leave the same times.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import time
import unicodedata
from collections.abc import Callable

from gptjax.config import DataConfig, UserError
from gptjax.data import cache
from gptjax.data.cleaning import Cleaned, clean
from gptjax.data.sources import Document, Source, open_sources, source_files

_SETTLED_SECONDS = 2.0  # FAT, the coarsest file system in use, counts its times in 2 s
_KNOBS = ("source", "text_field", "split_by", "eval_fraction", "unicode_form", "drop_control_characters", "drop_duplicates")


class Deferred:
    """A source that is opened when it is first asked for something."""

    def __init__(self, opened: Callable[[], Source]):
        self._opened = functools.cache(opened)

    def __len__(self) -> int:
        return len(self._opened())

    def __getitem__(self, index: int) -> Document:
        return self._opened()[index]


def read_or_recall(config: DataConfig, cache_dir: pathlib.Path) -> tuple[Cleaned, bool]:
    """(the cleaned splits, whether their files were left unread). Raises `UserError`."""
    files = source_files(config)
    if files is None:
        return clean(open_sources(config), config), False
    key, changed = _look(config, files)
    path = cache_dir / f"read-{key}.json"
    if not config.verify_files and (kept := cache.stored_bytes(path)) is not None:
        return _recalled(config, json.loads(kept)), True
    began = time.time()
    cleaned = clean(open_sources(config), config)
    if began - changed >= _SETTLED_SECONDS and _look(config, files)[0] == key:
        found = {"digest": cleaned.digest, "train_digest": cleaned.train_digest, "report": cleaned.report}
        cache.note_bytes(path, json.dumps(found).encode())
    return cleaned, False


def _recalled(config: DataConfig, kept: dict) -> Cleaned:
    @functools.cache
    def read() -> dict[str, Source]:
        cleaned = clean(open_sources(config), config)
        if cleaned.digest != kept["digest"]:
            raise UserError(
                f"the files of data.source={config.source} hold another text than when they were last read, with the same sizes "
                "and times; set data.verify_files=True."
            )
        return cleaned.splits

    train, held_out = Deferred(lambda: read()["train"]), Deferred(lambda: read()["eval"])
    return Cleaned({"train": train, "eval": held_out}, kept["digest"], kept["train_digest"], kept["report"])


def _look(config: DataConfig, files: list[list[tuple[str, pathlib.Path]]]) -> tuple[str, float]:
    """(a hash of all that the digest depends on, with the files' times for what they hold; when the latest of them changed)."""
    parts = [_code(), unicodedata.unidata_version, *(repr(getattr(config, knob)) for knob in _KNOBS)]
    changed = 0.0
    for split in files:
        parts.append(f"{len(split)} files")
        for name, path in split:
            with contextlib.suppress(OSError):  # one that cannot be read says so when it is opened
                about = os.stat(path)
                changed = max(changed, about.st_mtime, about.st_ctime)
                numbers = (about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
                parts.append(repr((name, os.path.abspath(path), *numbers)))
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32], changed


@functools.cache
def _code() -> str:
    """A hash of the code that reads and cleans: another version of it may come to another digest."""
    folder = pathlib.Path(__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in ("sources.py", "cleaning.py"))).hexdigest()
