"""Where documents come from: random-access sources, split into what is trained on and what is held out.

A source is a sequence of `Document`s that reads a document when it is asked for it, so that a corpus need not fit in memory.
"""

from __future__ import annotations

import bisect
import difflib
import glob
import hashlib
import itertools
import json
import mmap
import os
import pathlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gptjax.config import DataConfig, UserError


@dataclass(frozen=True)
class Document:
    """One text; `name` says where it came from, and is the same on every machine that has the same files."""

    name: str
    text: str


class Source(Protocol):
    """A sequence of documents."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Document: ...


def documents(source: Source) -> Iterator[Document]:
    """The documents of `source` in order."""
    return (source[index] for index in range(len(source)))


# --- the sources ------------------------------------------------------------------------------------------------------


class TextSource:
    """Each file is a document. Raises `UserError` for a file that is not UTF-8."""

    def __init__(self, files: Sequence[tuple[str, pathlib.Path]]):
        self._files = list(files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Document:
        name, path = self._files[index]
        return Document(name, _decode(read_bytes(path), str(path)))


class JsonlSource:
    """Each line is a JSON object, whose field `field` is a document; empty lines are left out.

    Raises `UserError` naming file and line for a line that is not such an object.
    """

    def __init__(self, files: Sequence[tuple[str, pathlib.Path]], field: str):
        self._files = list(files)
        self._field = field
        self._bytes = [_map(path) for _, path in self._files]
        index = [_line_index(data) for data in self._bytes]
        self._lines = [lines for lines, _ in index]  # line numbers from 0 of the lines that are not empty
        self._starts = [starts for _, starts in index]  # byte at which each line starts, and the end of the last
        self._ends = list(itertools.accumulate(len(lines) for lines in self._lines))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = bisect.bisect_right(self._ends, index)
        line = int(self._lines[file][index - (self._ends[file] - len(self._lines[file]))])
        start, end = self._starts[file][line : line + 2]
        name, path = self._files[file]
        return Document(f"{name}:{line + 1}", self._text(self._bytes[file][start:end], f"{path}, line {line + 1}"))

    def _text(self, line: bytes, where: str) -> str:
        try:
            record = parse_object(line)
        except ValueError as error:
            raise UserError(f"{where} {error}.") from None
        if self._field not in record:
            raise UserError(f"data.text_field: {where} has no field {self._field!r}{nearest(self._field, list(record))}")
        if not isinstance(record[self._field], str):
            raise UserError(f"data.text_field: {where} has a field {self._field!r} that is not a text.")
        return record[self._field]


def parse_object(line: bytes, parse_constant: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """The JSON object of one line; `parse_constant` gets NaN and Infinity, as `json.loads` has it.

    Raises `ValueError` saying what the line is instead ("is not ...", with no full stop).
    """
    text = decode_line(line)
    try:
        record = json.loads(text, parse_constant=parse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a whole number of thousands of digits, or thousands of brackets
        raise ValueError(f"is not JSON that can be read: {error}") from None
    if not isinstance(record, dict):
        raise ValueError("is not a JSON object")
    return record


class TfdsSource:
    """One split of a prepared TFDS data set in the ArrayRecord format; reads it without TensorFlow and downloads nothing.

    Raises `UserError` for a missing data set, split or field, and for a file that holds fewer records than its data set records.
    """

    def __init__(self, name: str, data_dir: str, split: str, field: str):
        self._split, self._field = split, field
        features, self._records = open_tfds(name, data_dir, split)
        if field not in features:
            raise UserError(f"data.text_field: the TFDS data set {name} has no field {field!r}{nearest(field, list(features))}")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Document:
        name = f"{self._split}:{index}"
        text = read_tfds(self._records, index, name)[self._field]
        return Document(name, text if isinstance(text, str) else _decode(bytes(text), f"the TFDS record {name}"))


def open_tfds(name: str, data_dir: str, split: str) -> tuple[dict[str, Any], Sequence[Any]]:
    """(TFDS's features by name, the records of one split) of a prepared data set; `read_tfds` reads a record.

    Raises `UserError` for a missing data set or split, and for a file that holds fewer records than its data set records.
    """
    builder = _tfds_builder(name, data_dir)
    try:
        files = builder.info.splits[split].file_instructions
        records = builder.as_data_source(split=split)
    except (KeyError, ValueError) as error:
        known = ", ".join(builder.info.splits)
        raise UserError(f"the TFDS data set {name} has no records for the split {split!r}: its splits are {known}.") from error
    except NotImplementedError as error:
        raise UserError(f"the TFDS data set {name} is not in the ArrayRecord format; prepare it with array_record.") from error
    for file in files:
        _check_records(file.filename, file.examples_in_shard)
    return dict(builder.info.features or {}), records


def read_tfds(records: Sequence[Any], index: int, name: str) -> dict[str, Any]:
    """One record, of numpy values and bytes. Raises `UserError` where it is damaged, calling it `name`."""
    try:
        return records[index]
    except RuntimeError as error:  # ArrayRecord's own checksum
        raise UserError(f"the TFDS record {name} is damaged; prepare the data set again: {error}.") from error


def _tfds_builder(name: str, data_dir: str) -> Any:
    """The builder of DATA_DIR/NAME[/CONFIG]/VERSION, the newest version unless `name` says `NAME:VERSION`."""
    root = pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    base, _, version = name.partition(":")
    if root.is_file():
        raise UserError(
            f"data.path={root} is a file, which data.source=tfds cannot read; set data.source=text to read it as text."
        )
    missing = f"data.name: the TFDS data set {name} is not prepared under {root}"
    if not (root / base).is_dir():
        names = [path.name for path in root.iterdir()] if root.is_dir() else []
        near = nearest(base, names)
        raise UserError(
            missing + (near if near != "." else "; data.path names another folder, or set data.source=text to read a file.")
        )
    found = sorted((root / base).glob("**/dataset_info.json"), key=lambda path: _version(path.parent.name))
    found = [path.parent for path in found if not version or path.parent.name == version]
    if not found:
        versions = [path.parent.name for path in (root / base).glob("**/dataset_info.json")]
        raise UserError(f"{missing}{nearest(version, versions)}")
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"data.source=tfds needs the package tensorflow-datasets: {error}.") from error
    return tfds.builder_from_directory(found[-1])


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _check_records(path: str, expected: int) -> None:
    """Counts a file's records: TFDS believes its own index, and a truncated ArrayRecord may open with none and no error."""
    from array_record.python import array_record_module

    try:
        reader = array_record_module.ArrayRecordReader(path)
        found = reader.num_records()
        reader.close()
    except (RuntimeError, OSError) as error:
        reason = str(error).split(";")[0]
        raise UserError(f"{path} is damaged or missing; prepare the data set again ({reason}).") from error
    if found != expected:
        raise UserError(f"{path} holds {found} of its {expected} records; prepare the data set again.")


def _stdlib_files() -> list[tuple[str, pathlib.Path]]:
    """The Python standard library's own source files, tests and installed packages left out: about 700 files, 12 MB."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith("config-")]
        files += [pathlib.Path(folder, name) for name in names if name.endswith(".py")]
    return sorted((path.relative_to(root).as_posix(), path) for path in files)


def _open_stdlib(config: DataConfig) -> dict[str, Source]:
    return hold_out(TextSource(_stdlib_files()), config)


def _open_text(config: DataConfig) -> dict[str, Source]:
    return _open_files(config, TextSource)


def _open_jsonl(config: DataConfig) -> dict[str, Source]:
    return _open_files(config, lambda files: JsonlSource(files, config.text_field))


def source_files(config: DataConfig) -> list[list[tuple[str, pathlib.Path]]] | None:
    """(name, path) of the files that `open_sources` would read, split by split; None where it does not read files itself."""
    if config.source == "stdlib":
        return [_stdlib_files()]
    if config.source not in ("text", "jsonl"):
        return None
    held_out = [find_files(config.eval_path, "data.eval_path")] if config.eval_path else []
    return [find_files(config.path, "data.path"), *held_out]


def _open_files(config: DataConfig, make: Callable[[list[tuple[str, pathlib.Path]]], Source]) -> dict[str, Source]:
    train = make(find_files(config.path, "data.path"))
    if config.eval_path:
        return {"train": train, "eval": make(find_files(config.eval_path, "data.eval_path"))}
    return hold_out(train, config)


def _open_tfds(config: DataConfig) -> dict[str, Source]:
    splits = {"train": config.train_split, "eval": config.eval_split}
    return {key: TfdsSource(config.name, config.path, split, config.text_field) for key, split in splits.items()}


SOURCES: dict[str, Callable[[DataConfig], dict[str, Source]]] = {
    "stdlib": _open_stdlib,
    "text": _open_text,
    "jsonl": _open_jsonl,
    "tfds": _open_tfds,
}


def open_sources(config: DataConfig) -> dict[str, Source]:
    """{"train": ..., "eval": ...}: the documents as they are, not cleaned. Raises `UserError`."""
    return SOURCES[config.source](config)


# --- what is held out -------------------------------------------------------------------------------------------------


class Subset:
    """Some documents of a source, each through `change` where it is given."""

    def __init__(self, source: Source, indices: Sequence[int], change: Callable[[Document], Document] | None = None):
        self._source, self._indices, self._change = source, indices, change

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Document:
        document = self._source[self._indices[index]]
        return self._change(document) if self._change else document


def hold_out(source: Source, config: DataConfig) -> dict[str, Source]:
    """Splits off `eval_fraction` as `split_by` says. Raises `UserError` where one side would be empty."""
    if config.split_by == "tail":
        return _hold_out_tail(source, config.eval_fraction)
    if len(source) < 2:
        raise UserError(
            f"data.source={config.source} has {len(source)} document, which data.split_by=hash cannot split; "
            "set data.split_by=tail, or give data.eval_path."
        )
    held = [name_hash(document.name) < config.eval_fraction for document in documents(source)]
    splits = {"train": [i for i, out in enumerate(held) if not out], "eval": [i for i, out in enumerate(held) if out]}
    for split, indices in splits.items():
        if not indices:
            raise UserError(
                f"data.split_by=hash with data.eval_fraction={config.eval_fraction} leaves none of the {len(source)} documents "
                f"to the {split} split; set data.split_by=tail, or change data.eval_fraction."
            )
    return {split: Subset(source, indices) for split, indices in splits.items()}


def name_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, so that adding documents moves none from one split to the other."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _hold_out_tail(source: Source, eval_fraction: float) -> dict[str, Source]:
    """The first int((1 - eval_fraction) * n) of the n characters are trained on; a document on the border is cut in two."""
    ends = list(itertools.accumulate(len(document.text) for document in documents(source)))
    total = ends[-1] if ends else 0
    cut = int((1 - eval_fraction) * total)
    if not 0 < cut < total:
        raise UserError(f"the source has {total} characters, too few to hold out data.eval_fraction={eval_fraction} of them.")
    border = bisect.bisect_left(ends, cut)  # the first document that ends at or after the cut
    within = cut - (ends[border - 1] if border else 0)
    head = Subset(source, [border], lambda document: Document(document.name, document.text[:within]))
    tail = Subset(source, [border], lambda document: Document(document.name, document.text[within:]))
    return {
        "train": Joined(Subset(source, range(border)), head),
        "eval": Joined(tail, Subset(source, range(border + 1, len(source)))),  # an empty tail is dropped by cleaning
    }


class Joined:
    """One source after another."""

    def __init__(self, *sources: Source):
        self._sources = sources
        self._ends = list(itertools.accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect.bisect_right(self._ends, index)
        return self._sources[part][index - (self._ends[part] - len(self._sources[part]))]


# --- files ------------------------------------------------------------------------------------------------------------


def find_files(patterns: str, key: str) -> list[tuple[str, pathlib.Path]]:
    """(name, path) of the files that comma-separated paths and globs stand for; names are relative to the glob's folder."""
    found: dict[pathlib.Path, str] = {}
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        expanded = os.path.expanduser(pattern)
        if os.path.isfile(expanded):
            found.setdefault(pathlib.Path(expanded), os.path.basename(expanded))
            continue
        if os.path.isdir(expanded):
            raise UserError(f"{key}: {pattern} is a folder; write a glob such as {os.path.join(pattern, '*')}.")
        if not glob.has_magic(expanded):
            path = pathlib.Path(expanded)
            names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UserError(f"{key}: {pattern} does not exist{nearest(path.name, names)}")
        matches = sorted(path for path in glob.glob(expanded, recursive=True) if os.path.isfile(path))
        if not matches:
            raise UserError(f"{key}: no file matches {pattern}.")
        folder = _fixed_folder(expanded)
        for match in matches:
            found.setdefault(pathlib.Path(match), os.path.relpath(match, folder).replace(os.sep, "/"))
    if not found:
        raise UserError(f"{key} names no file.")
    return [(name, path) for path, name in found.items()]


def _fixed_folder(pattern: str) -> str:
    """The folder before a glob's first wildcard."""
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), pathlib.Path(pattern).parts)
    return os.path.join(*fixed, "") or "."


def nearest(name: str, names: Sequence[str]) -> str:
    """'; did you mean ...?', or a full stop where nothing is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else "."


def read_bytes(path: pathlib.Path) -> bytes:
    """A file's content. Raises `UserError` where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def _map(path: pathlib.Path) -> mmap.mmap | bytes:
    """The file's bytes, which need not fit in memory."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def _line_index(data: mmap.mmap | bytes) -> tuple[np.ndarray, np.ndarray]:
    """int64 numbers (from 0) of the lines that are not blank, and the byte at which each line starts, with the end."""
    starts, kept, position = [0], [], 0
    while position < len(data):
        end = data.find(b"\n", position) + 1 or len(data)
        if data[position:end].strip():
            kept.append(len(starts) - 1)
        starts.append(end)
        position = end
    return np.asarray(kept, np.int64), np.asarray(starts, np.int64)


def _decode(data: bytes, where: str) -> str:
    try:
        return decode_line(data)
    except ValueError as error:
        raise UserError(f"{where} {error}.") from None


def decode_line(data: bytes) -> str:
    """UTF-8 bytes, a mark at their start left out. Raises `ValueError` ("is not UTF-8: ...", with no full stop)."""
    try:
        return data.decode("utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}") from None
