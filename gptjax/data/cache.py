"""The tokenized form of a source, in the user's cache: written once, whole or not at all, and memory-mapped read-only.

An entry is a folder `tokens-KEY` of, for each split, `tokens` (the smallest unsigned type that holds the vocabulary, raw),
`offsets` (int64) and `names`, and of `entry.json`, which records every file's size. KEY is a hash of all that the content
depends on.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.data.sources import Source, documents
from gptjax.data.tokenizers import Tokenizer, write_atomically

_ENTRY = "entry.json"
_ABANDONED_SECONDS = 24 * 3600  # no process tokenizes one split for a day without creating a file in the folder
_WRITE_TOKENS = 1 << 20  # tokens gathered before they are written


def default_cache_dir() -> pathlib.Path:
    """$GPTJAX_CACHE, else $XDG_CACHE_HOME/gptjax, else ~/.cache/gptjax."""
    if chosen := os.environ.get("GPTJAX_CACHE"):
        return pathlib.Path(chosen).expanduser()
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gptjax"


@dataclass(frozen=True)
class Tokens:
    """One split. Document i is `tokens[offsets[i]:offsets[i + 1]]`."""

    tokens: np.ndarray  # unsigned [n], read-only
    offsets: np.ndarray  # int64 [documents + 1]
    names: list[str]
    text_bytes: int  # UTF-8 bytes of the documents


@dataclass(frozen=True)
class Delimiters:
    """Ids around each document, None for none. `at_end` comes once, after the last document."""

    before: int | None
    after: int | None
    at_end: int | None = None


def read_entry(directory: pathlib.Path) -> dict[str, Tokens] | None:
    """The entry's splits, or None where it is missing or any of its files has not the recorded size."""
    try:
        entry = json.loads((directory / _ENTRY).read_bytes())
        if any((directory / name).stat().st_size != size for name, size in entry["sizes"].items()):
            return None
        return {split: _read_split(directory, split, meta) for split, meta in entry["splits"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_split(directory: pathlib.Path, split: str, meta: dict[str, Any]) -> Tokens:
    file = directory / f"{split}.tokens"
    dtype = np.dtype(meta["dtype"])
    # As a plain array: indexing through the memmap class itself takes several times as long.
    tokens = np.asarray(np.memmap(file, dtype, mode="r")) if file.stat().st_size else np.zeros(0, dtype)
    offsets = np.fromfile(directory / f"{split}.offsets", np.int64)
    names = json.loads((directory / f"{split}.names").read_bytes())
    if offsets[-1] != len(tokens) or len(names) != len(offsets) - 1:
        raise ValueError("the files do not belong together")
    return Tokens(tokens, offsets, names, meta["text_bytes"])


def write_entry(
    directory: pathlib.Path, splits: Mapping[str, Source], tokenizer: Tokenizer, around: Delimiters
) -> dict[str, Tokens]:
    """Tokenizes the splits into a temporary folder and moves it into place, unless another process was first."""
    with _disk(directory.parent):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_folder(directory) as temporary:
            metas = {split: _write_split(temporary, split, source, tokenizer, around) for split, source in splits.items()}
            sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
            write_atomically(temporary / _ENTRY, json.dumps({"sizes": sizes, "splits": metas}).encode())
            _move_into_place(temporary, directory)
    entry = read_entry(directory)
    if entry is None:
        raise UserError(f"the cache entry {directory} cannot be read back; remove it, or set GPTJAX_CACHE to another folder.")
    return entry


def _write_split(folder: pathlib.Path, split: str, source: Source, tokenizer: Tokenizer, around: Delimiters) -> dict[str, Any]:
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    before = np.asarray([] if around.before is None else [around.before], np.int32)
    after = np.asarray([] if around.after is None else [around.after], np.int32)
    offsets, names, text_bytes = [0], [], 0
    gathered: list[np.ndarray] = []
    waiting = 0
    with open(folder / f"{split}.tokens", "wb") as file:
        for document in documents(source):
            ids = tokenizer.encode(document.text)
            gathered += [before, ids, after]
            waiting += len(ids)
            offsets.append(offsets[-1] + len(before) + len(ids) + len(after))
            names.append(document.name)
            text_bytes += len(document.text.encode())
            if waiting >= _WRITE_TOKENS:
                file.write(np.concatenate(gathered).astype(dtype).tobytes())
                gathered, waiting = [], 0
        if around.at_end is not None and names:
            gathered.append(np.asarray([around.at_end], np.int32))
            offsets[-1] += 1
        if gathered:
            file.write(np.concatenate(gathered).astype(dtype).tobytes())
        file.flush()
        os.fsync(file.fileno())
    (folder / f"{split}.offsets").write_bytes(np.asarray(offsets, np.int64).tobytes())
    (folder / f"{split}.names").write_bytes(json.dumps(names).encode())
    return {"dtype": dtype.str, "text_bytes": text_bytes}


def _move_into_place(temporary: pathlib.Path, directory: pathlib.Path) -> None:
    """A folder can only replace an empty one, so a damaged entry is moved aside; a whole one stays, others may read it."""
    for _ in range(10):
        try:
            os.replace(temporary, directory)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if read_entry(directory) is not None:
            return
        with _temporary_folder(directory) as aside, contextlib.suppress(FileNotFoundError):
            os.replace(directory, aside)
    raise UserError(f"the cache entry {directory} cannot be replaced; remove it, or set GPTJAX_CACHE to another folder.")


@contextlib.contextmanager
def _temporary_folder(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder beside `directory`, removed at the end if it is still there; so are those that killed processes left."""
    for left in directory.parent.glob(f".{directory.name}.*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    folder = pathlib.Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def cached_bytes(path: pathlib.Path, make: Callable[[], bytes]) -> bytes:
    """The file's content, made and kept where it is missing or damaged."""
    content = stored_bytes(path)
    if content is None:
        content = make()
        store_bytes(path, content)
    return content


def stored_bytes(path: pathlib.Path) -> bytes | None:
    """What `store_bytes` kept; None where it is missing or damaged."""
    with contextlib.suppress(OSError):
        stored = path.read_bytes()
        if hashlib.sha256(stored[:-32]).digest() == stored[-32:]:
            return stored[:-32]
    return None


def store_bytes(path: pathlib.Path, content: bytes) -> None:
    """Keeps `content`, with a checksum in the file's last 32 bytes."""
    with _disk(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content + hashlib.sha256(content).digest())


def note_bytes(path: pathlib.Path, content: bytes) -> None:
    """`store_bytes` for what only saves time: a cache that others filled, and that cannot be written, serves all the same."""
    with contextlib.suppress(UserError):
        store_bytes(path, content)


@contextlib.contextmanager
def _disk(folder: pathlib.Path) -> Iterator[None]:
    """Says a full disk or a folder that cannot be written in one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk that holds the cache {folder} is full; free space on it, or set GPTJAX_CACHE to another folder."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(
                f"the cache {folder} cannot be written ({error.strerror}); set GPTJAX_CACHE to another folder."
            ) from error
        raise
