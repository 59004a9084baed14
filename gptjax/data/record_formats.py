"""The formats that records are read from: a table of functions from files to rows. `gptjax.data.records` is the way in.

A function yields (file, line from 1, values or what is wrong) for every row. What is wrong goes on from the place, as in "is not
UTF-8", and has no full stop. What is wrong with a whole file raises `UserError`.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.data.sources import decode_line, find_files, nearest, open_tfds, parse_object, read_bytes, read_tfds

Row = tuple[str, int, dict[str, Any] | str]
Line = tuple[int, dict[str, Any] | str]

LONGEST_FIELD = 2**31 - 1  # of a CSV file, in characters; the csv module's own default is 131,072
LEFT_OUT = ("readme", "license", "__macosx", ".")  # beginnings of names that are no class


@dataclass(frozen=True)
class Reading:
    """What a format needs beside the files; `gptjax.data.records.read_records` says what each means."""

    columns: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    word_column: int = 0
    tag_column: int | None = -1
    tfds_name: str = ""
    tfds_split: str = "train"


def places(paths: str, key: str) -> list[tuple[str, pathlib.Path]]:
    """(name, path) of the files, and of the folders that are named as they are, without a wildcard."""
    found: list[tuple[str, pathlib.Path]] = []
    for part in filter(None, (part.strip() for part in paths.split(","))):
        folder = pathlib.Path(os.path.expanduser(part))
        found += [(folder.name, folder)] if folder.is_dir() else find_files(part, key)
    return found or find_files(paths, key)


def _by_file(read: Callable[[bytes, str, Reading], Iterator[Line]]) -> Callable[[str, str, Reading], Iterator[Row]]:
    """A format of single files, from the function that reads the content of one."""

    def rows(paths: str, key: str, reading: Reading) -> Iterator[Row]:
        for _, path in find_files(paths, key):
            number = 0
            for number, (line, row) in enumerate(read(_content(path), str(path), reading), 1):  # noqa: B007 - how many
                yield str(path), line, row
            if not number:
                raise UserError(f"{path} is empty: it holds no record.")

    return rows


def _content(path: pathlib.Path) -> bytes:
    """A file's bytes without a UTF-8 mark. Raises `UserError` for UTF-16, which would be bad in every row."""
    data = read_bytes(path)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16, not UTF-8; convert it, as with `iconv -f UTF-16 -t UTF-8`.")
    return data.removeprefix(b"\xef\xbb\xbf")


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line without its end) for LF and CR LF."""
    start, number = 0, 0
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        number += 1
        yield number, data[start:end].removesuffix(b"\r")
        start = end + 1


# --- JSON lines -------------------------------------------------------------------------------------------------------


def _jsonl(data: bytes, where: str, reading: Reading) -> Iterator[Line]:
    for number, line in _lines(data):
        if line.strip():
            yield number, _json_line(line)


def _json_line(line: bytes) -> dict[str, Any] | str:
    try:
        values = parse_object(line, _refuse_constant)
        if b"\\ud" in line.lower():
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "has half of a surrogate pair (\\ud800 to \\udfff), which is no character"
    except ValueError as error:
        return str(error)
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


# --- separated values -------------------------------------------------------------------------------------------------


def _tsv(data: bytes, where: str, reading: Reading) -> Iterator[Line]:
    return _table(_tab_cells(data), where, reading)


def _tab_cells(data: bytes) -> Iterator[tuple[int, list[str] | str]]:
    for number, line in _lines(data):
        if line:
            try:
                yield number, decode_line(line).split("\t")
            except ValueError as error:
                yield number, str(error)


def _csv(data: bytes, where: str, reading: Reading) -> Iterator[Line]:
    return _table(_quoted_cells(data, len(reading.columns)), where, reading)


def _quoted_cells(data: bytes, width: int) -> Iterator[tuple[int, list[str] | str]]:
    """The cells of each row; `width` is how many there should be, or 0 for as many as in the first.

    After a bad row it goes on with the next line, whatever the row's quotation marks had swallowed.
    """
    lines = list(io.StringIO(data.decode("utf-8", "surrogateescape"), newline=""))
    at = 0
    while at < len(lines):
        reader, base = csv.reader(itertools.islice(lines, at, None), strict=True), at
        at = len(lines)
        while True:
            start = base + reader.line_num
            try:
                with _long_fields():
                    cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                never_closed = "unexpected end of data" in str(error)
                yield start + 1, f"is not valid CSV: {'a quotation mark is never closed' if never_closed else error}"
                at = start + 1
                break
            width = width or len(cells)
            if cells:
                yield start + 1, _bad_byte(cells) or cells
            if cells and len(cells) != width and base + reader.line_num > start + 1:
                at = start + 1
                break


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """The csv module's limit is the process's: it is lifted for a row and put back."""
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _bad_byte(cells: Sequence[str]) -> str:
    for cell in cells:
        if not cell.isascii():
            for character in cell:
                if "\udc80" <= character <= "\udcff":  # what "surrogateescape" makes of a byte that is not UTF-8
                    return f"is not UTF-8: byte 0x{ord(character) - 0xDC00:02x}"
    return ""


def _table(rows: Iterator[tuple[int, list[str] | str]], where: str, reading: Reading) -> Iterator[Line]:
    """Rows by the names of their columns, which are given or stand in the first row."""
    names = list(reading.columns)
    for number, cells in rows:
        if isinstance(cells, str):
            if not names:
                raise UserError(f"{where}, line {number} should hold the names of the columns, but {cells}.")
            yield number, cells
        elif not names:
            names = cells
            _check_header(names, f"{where}, line {number}", reading)
        elif number == 1 and cells == names:
            raise UserError(f"{where}, line 1 holds the very names that the columns are given; give none, for it has a header.")
        elif len(cells) != len(names):
            yield number, f"has {len(cells)} column{'s' * (len(cells) != 1)}, not the {len(names)} of {', '.join(names)}"
        else:
            yield number, dict(zip(names, cells, strict=True))


def _check_header(names: Sequence[str], where: str, reading: Reading) -> None:
    for name in names:
        if not name.strip():
            raise UserError(f"{where} names the columns, but column {list(names).index(name) + 1} has no name.")
        if names.count(name) > 1:
            raise UserError(f"{where} names the columns, but {name!r} stands in it twice.")
    for name in reading.required:
        if name not in names:
            near = nearest(name, names)
            shown = ", ".join(repr(other[:40]) for other in names)
            near = near if near != "." else "; name the columns if the file has no header."
            raise UserError(f"{where} has no column {name!r}, only {shown}{near}")


# --- CoNLL ------------------------------------------------------------------------------------------------------------


def _conll(data: bytes, where: str, reading: Reading) -> Iterator[Line]:
    """Columns of CoNLL-2003 (Tjong Kim Sang and De Meulder 2003): a token a line, blank lines between sentences."""
    first: int | None = None  # the sentence's first line
    words: list[str] = []
    tags: list[str] = []
    fault: Line | None = None
    width = 0
    for number, line in itertools.chain(_lines(data), [(0, b"")]):
        if not line.strip() or line.startswith(b"-DOCSTART-"):
            if fault or first is not None:
                values = {"words": words} | ({"tags": tags} if reading.tag_column is not None else {})
                yield fault or (first or 1, values)
            first, words, tags, fault = None, [], [], None
            continue
        first = first or number
        try:
            cells = _conll_cells(line)
            width = width or len(cells)
            word, tag = _word_and_tag(cells, width, reading)
        except ValueError as error:
            fault = fault or (number, str(error))
            continue
        words.append(word)
        tags.append(tag)


def _conll_cells(line: bytes) -> list[str]:
    """Cells between tabs where there are tabs, so that a cell may hold a blank; otherwise between runs of blanks."""
    text = decode_line(line)
    return [cell.strip(" ") for cell in text.split("\t")] if "\t" in text else [cell for cell in text.split(" ") if cell]


def _word_and_tag(cells: Sequence[str], width: int, reading: Reading) -> tuple[str, str]:
    """Raises `ValueError` saying what is wrong with the row."""
    count = f"has {len(cells)} column{'s' * (len(cells) != 1)}"
    wanted = {"word": reading.word_column} | ({"tag": reading.tag_column} if reading.tag_column is not None else {})
    at = {name: column if column >= 0 else len(cells) + column for name, column in wanted.items()}
    for name, column in at.items():
        if not 0 <= column < len(cells):
            raise ValueError(f"{count}, so it has no {name} column {wanted[name]}; its sentence is skipped")
    if len(set(at.values())) < len(at):
        raise ValueError(f"{count}, so its word and its tag would be the same; its sentence is skipped")
    if len(cells) != width:
        raise ValueError(f"{count}, but the file's first row has {width}; its sentence is skipped")
    for name, column in at.items():
        if not cells[column]:
            raise ValueError(f"has nothing in its {name} column {wanted[name]}; its sentence is skipped")
    return cells[at["word"]], cells[at["tag"]] if "tag" in at else ""


# --- SQuAD ------------------------------------------------------------------------------------------------------------


def _squad(data: bytes, where: str, reading: Reading) -> Iterator[Line]:
    if not data.strip():
        return
    try:
        text = decode_line(data)
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} {error}.") from None
    if not isinstance(document, dict) or not isinstance(document.get("data"), list):
        raise UserError(f'{where} is not SQuAD: it is not an object with a list "data".')
    position, line, seen = 0, 1, set()
    for row in _questions(document["data"]):
        name = row if isinstance(row, str) else row["id"]
        if isinstance(row, dict):
            found = text.find(json.dumps(name, ensure_ascii=False), position)
            if found >= 0:
                line += text.count("\n", position, found)
                position = found
            fault = f"has the question {name!r} a second time" if name in seen else _squad_fault(row)
            seen.add(name)
            yield line, fault or row
        else:
            yield line, row


def _questions(articles: list[Any]) -> Iterator[dict[str, Any] | str]:
    """One record a question as the file has it, or where the nesting is not SQuAD's."""
    for i, article in enumerate(articles):
        paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
        if not isinstance(paragraphs, list):
            yield f'holds data[{i}], which has no list "paragraphs"'
            continue
        for j, paragraph in enumerate(paragraphs):
            questions = paragraph.get("qas") if isinstance(paragraph, dict) else None
            if not isinstance(questions, list) or not isinstance(paragraph.get("context"), str):
                yield f'holds data[{i}].paragraphs[{j}], which has no text "context" and list "qas"'
                continue
            for k, question in enumerate(questions):
                if not isinstance(question, dict) or not isinstance(question.get("id"), str):
                    yield f'holds data[{i}].paragraphs[{j}].qas[{k}], which has no text "id"'
                    continue
                yield {
                    "id": question["id"],
                    "title": article.get("title", ""),
                    "context": paragraph["context"],
                    "question": question.get("question"),
                    "answers": question.get("answers", []),
                    "is_impossible": question.get("is_impossible", False),
                }


def _squad_fault(row: dict[str, Any]) -> str | None:
    """What is wrong with a question; its answers lose whatever they hold beside their text and place."""
    name = f"has the question {row['id']!r}"
    if not isinstance(row["question"], str):
        return f'{name} without a text "question"'
    if not isinstance(row["is_impossible"], bool) or not isinstance(row["answers"], list):
        return f"{name} whose answers are no list, or whose is_impossible is not true or false"
    if row["is_impossible"] == bool(row["answers"]):
        return f"{name}, which is_impossible, with answers" if row["answers"] else f"{name} with no answer, and not is_impossible"
    for answer in row["answers"]:
        text, start = (answer.get("text"), answer.get("answer_start")) if isinstance(answer, dict) else (None, None)
        if not isinstance(text, str) or not text or type(start) is not int:
            return f"{name} with an answer that is not a text and its answer_start"
        stands = row["context"][max(start, 0) : max(start, 0) + len(text)]
        if start < 0 or stands != text:
            return f"{name}, whose answer {text!r} does not stand at {start}, where the context has {stands!r}"
    row["answers"] = [{"text": answer["text"], "answer_start": answer["answer_start"]} for answer in row["answers"]]
    return None


# --- folders ----------------------------------------------------------------------------------------------------------


def _folders(paths: str, key: str, reading: Reading) -> Iterator[Row]:
    for _, path in places(paths, key):
        with _members(path) as members:
            yield from _classes(path, members)


@contextlib.contextmanager
def _members(path: pathlib.Path) -> Iterator[dict[tuple[str, ...], Callable[[], bytes]]]:
    """Of a folder or a zip archive: how to read each file, by the parts of its name."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        yield {file.relative_to(path).parts: lambda file=file: _content(file) for file in files}  # type: ignore[misc]
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(info.filename for info in archive.infolist() if not info.is_dir())
            yield {tuple(name.split("/")): lambda name=name: _zipped(archive, path, name) for name in names}  # type: ignore[misc]
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is not a zip archive that can be read: {error}.") from None


def _zipped(archive: zipfile.ZipFile, path: pathlib.Path, name: str) -> bytes:
    try:
        return archive.read(name).removeprefix(b"\xef\xbb\xbf")
    except (RuntimeError, NotImplementedError, OSError, EOFError, ValueError) as error:  # encrypted, or packed in an odd way
        raise UserError(f"{path} holds {name}, which cannot be read: {error}.") from None


def _classes(path: pathlib.Path, members: dict[tuple[str, ...], Callable[[], bytes]]) -> Iterator[Row]:
    """A folder a class, or a file a class, below the folders that hold everything."""
    kept = {parts: read for parts, read in members.items() if not any(part.lower().startswith(LEFT_OUT) for part in parts)}
    above: tuple[str, ...] = ()
    while kept and len({parts[0] for parts in kept}) == 1 and all(len(parts) > 1 for parts in kept):
        above += next(iter(kept))[:1]
        kept = {parts[1:]: read for parts, read in kept.items()}
    loose = [parts[0] for parts in kept if len(parts) == 1]
    if not kept:
        raise UserError(f"{path} is empty: it holds no folders or files of texts.")
    if loose and len(loose) < len(kept):
        raise UserError(f"{path} holds both folders of texts and the file {loose[0]} beside them, so its classes are not clear.")
    for parts, read in kept.items():
        file = str(pathlib.PurePosixPath(path.as_posix(), *above, *parts))
        lines = _lines(read()) if loose else [(1, read())]
        label = parts[0].split(".")[0] if loose else parts[0]
        for number, line in lines:
            if line.strip() or not loose:
                yield file, number, _labelled(line, label)


def _labelled(data: bytes, label: str) -> dict[str, Any] | str:
    try:
        text = decode_line(data)
    except ValueError as error:
        return str(error)
    return {"text": text, "label": label} if text.strip() else "holds no text"


# --- TFDS -------------------------------------------------------------------------------------------------------------


def _tfds(paths: str, key: str, reading: Reading) -> Iterator[Row]:
    name, split = reading.tfds_name, reading.tfds_split
    if not name:
        raise UserError("the format tfds needs the name of a prepared data set beside the folder that holds it.")
    features, records = open_tfds(name, paths, split)
    for required in reading.required:
        if required not in features:
            raise UserError(f"the TFDS data set {name} has no field {required!r}{nearest(required, list(features))}")
    for index in range(len(records)):
        place = f"{name}/{split}"
        values = read_tfds(records, index, f"{place}:{index}")
        try:
            yield place, index + 1, {field: plain_feature(value, features.get(field)) for field, value in values.items()}
        except ValueError as error:
            yield place, index + 1, f"{error}"


def plain_feature(value: Any, feature: Any = None) -> Any:
    """A TFDS value as plain Python. Raises `ValueError` for bytes that are no UTF-8."""
    if hasattr(feature, "int2str") and not isinstance(value, dict) and np.ndim(value) == 0:
        return feature.int2str(int(value)) if int(value) >= 0 else None
    if isinstance(value, dict):
        return {name: plain_feature(item, _below(feature, name)) for name, item in value.items()}
    if isinstance(value, bytes):
        return decode_line(value)
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim):
        return [plain_feature(item, getattr(feature, "feature", None)) for item in value]
    return plain_feature(value.item()) if isinstance(value, (np.ndarray, np.generic)) else value


def _below(feature: Any, name: str) -> Any:
    inner = getattr(feature, "feature", feature)  # a sequence of dictionaries is stored as a dictionary of sequences
    return inner[name] if hasattr(inner, "keys") and name in inner.keys() else None  # noqa: SIM118 - features are no mappings


FORMATS: dict[str, Callable[[str, str, Reading], Iterator[Row]]] = {
    "jsonl": _by_file(_jsonl),
    "csv": _by_file(_csv),
    "tsv": _by_file(_tsv),
    "conll": _by_file(_conll),
    "squad": _by_file(_squad),
    "folders": _folders,
    "tfds": _tfds,
}

# What format="auto" makes of a file's ending; "/" stands for a folder.
SUFFIXES: dict[str, str] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".json": "squad",
    ".zip": "folders",
    "/": "folders",
}
