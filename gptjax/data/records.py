"""Examples for tasks: files of many formats to one list of records, each with the place it came from.

What is wrong with a row is said with its file and line; up to the caller's limit, such rows are skipped and counted.
The formats themselves stand in gptjax/data/record_formats.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptjax.config import UserError
from gptjax.data.record_formats import FORMATS, SUFFIXES, Reading, places
from gptjax.data.sources import nearest

SHOWN = 3  # bad rows that the log line quotes


@dataclass(frozen=True)
class Record:
    """One example. `line` is the (first) line of `file` it stands on, from 1; in a TFDS split, the number of the record."""

    values: dict[str, Any]
    file: str
    line: int

    @property
    def place(self) -> str:
        """'FILE, line N', for messages."""
        return f"{self.file}, line {self.line}"


@dataclass(frozen=True)
class BadRow:
    """A row that is no record; `reason` goes on from its place, as in 'has no field ...', without a full stop."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line} {self.reason}"


@dataclass(frozen=True)
class Records:
    """What was read: a sequence of records in the order of the files, and the bad rows that were skipped."""

    records: list[Record]
    skipped: list[BadRow]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def column(self, field: str) -> list[Any]:
        """That field of every record; `read_records(required=...)` makes sure that they have it."""
        return [record.values[field] for record in self.records]

    def summary(self) -> str:
        """One line: how many records and files, how many rows were skipped, and the first of these."""
        files = sorted({record.file for record in self.records})
        of = files[0] if len(files) == 1 else f"{len(files)} files"
        text = f"{len(self)} record{'s' * (len(self) != 1)} of {of}"
        if not self.skipped:
            return text
        return f"{text}; {skipped_rows(self.skipped)}"


def read_records(
    paths: str,
    format: str = "auto",
    *,
    max_bad: int = 0,
    required: Sequence[str] = (),
    columns: Sequence[str] = (),
    word_column: int = 0,
    tag_column: int | None = -1,
    tfds_name: str = "",
    tfds_split: str = "train",
    check: Callable[[dict[str, Any]], str | None] | None = None,
    key: str = "paths",
    limit_key: str = "max_bad",
    log: Callable[[str], None] | None = None,
) -> Records:
    """Reads every record of the files that comma-separated paths and globs stand for.

    format: one of FORMATS, or "auto", by the files' endings. What a record's values are:
      jsonl    the JSON object of a line; a conversation is {"messages": [{"role": ..., "content": ...}, ...]} (`chat_fault`)
      csv      text by column name, quoted as Python's csv module has it; the names are `columns`, or else the file's first row
      tsv      the same with tabs, where quotation marks mean nothing and every line is a row
      conll    {"words": [...], "tags": [...]} of a sentence; sentences end at blank lines, columns at blanks or tabs, and
               `word_column` and `tag_column` count from 0, or from the end below 0; `tag_column=None` reads words alone
      squad    {"id", "title", "context", "question", "answers": [{"text", "answer_start"}], "is_impossible"} of a question, from
               the JSON of SQuAD 1.1 (Rajpurkar et al. 2016) or 2.0 (Rajpurkar et al. 2018)
      folders  {"text", "label"} from folders or zip archives: a folder a class, a text a file; or a file a class, a text a line
      tfds     the features of `tfds_split` of the prepared data set `tfds_name` under the folder `paths`, as plain Python: texts
               as str, arrays as lists, class labels by their names (None for -1, TFDS's mark of an unlabelled example)
    required: fields that a record must have, and not as null.
    check: says what is wrong with a record's values, to go on from its place ("has no ..."), or None.
    max_bad: how many bad rows may be skipped, over all files. log: gets one line. key, limit_key: what messages call the paths
    and `max_bad` ("": a person cannot set it).

    Raises `UserError` for files that are missing, empty or unreadable, for a header without the required columns, and for one
    more bad row than `max_bad`, naming the first one's file and line.
    """
    if max_bad < 0:
        raise UserError(f"max_bad={max_bad} must be at least 0.")
    if format == "auto":
        format = _format_of(paths, key)
    elif format not in FORMATS:
        raise UserError(f"format={format!r} is none of {', '.join(FORMATS)}{nearest(format, list(FORMATS))}")
    reading = Reading(tuple(columns), tuple(required), word_column, tag_column, tfds_name, tfds_split)
    records: list[Record] = []
    bad: list[BadRow] = []
    for file, line, row in FORMATS[format](paths, key, reading):
        fault = row if isinstance(row, str) else _missing(row, required) or (check and check(row))
        if fault:
            bad.append(BadRow(file, line, fault))
        elif not isinstance(row, str):
            records.append(Record(row, file, line))
        if len(bad) > max_bad:
            raise UserError(too_many(bad, max_bad, limit_key))
    if not records:
        raise UserError(f"{key}: {paths} holds no record{f': {bad[0]}' if bad else ''}.")
    found = Records(records, bad)
    if log:
        log(found.summary())
    return found


def chat_fault(values: Mapping[str, Any]) -> str | None:
    """A `check` for conversations: a list of messages, each with a role and a content that are texts, the role not empty."""
    messages = values.get("messages")
    if not isinstance(messages, list) or not messages:
        return 'has no list "messages" with a message in it'
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return f"has a message {number} that is not an object with a role and a content"
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                return f"has a message {number} without a text as its {name}"
        if not message["role"]:
            return f"has a message {number} with an empty role"
    return None


def _missing(values: Mapping[str, Any], required: Sequence[str]) -> str | None:
    for name in required:
        if name not in values:
            near = nearest(name, list(values))
            return f"has no field {name!r}{'' if near == '.' else f' ({near[2:]})'}"
        if values[name] is None:
            return f"has null as its field {name!r}"
    return None


def _format_of(paths: str, key: str) -> str:
    """The one format that the endings of all files name."""
    formats: dict[str, str] = {}
    for _, path in places(paths, key):
        ending = "/" if path.is_dir() else path.suffix.lower()
        if ending not in SUFFIXES:
            known = ", ".join(name for name in SUFFIXES if name != "/")
            raise UserError(f"{key}: the ending of {path} does not tell its format ({known}); give the format.")
        formats.setdefault(SUFFIXES[ending], str(path))
    if len(formats) > 1:
        (one, first), (other, second) = list(formats.items())[:2]
        raise UserError(f"{key}: {first} is {one} and {second} is {other}; read files of one format at a time.")
    return next(iter(formats))


def skipped_rows(bad: Sequence[BadRow]) -> str:
    """'2 bad rows skipped: ...', with the first of them."""
    shown = "; ".join(map(str, bad[:SHOWN]))
    more = "; ..." if len(bad) > SHOWN else ""
    return f"{len(bad)} bad row{'s' * (len(bad) != 1)} skipped: {shown}{more}"


def too_many(bad: Sequence[BadRow], max_bad: int, key: str) -> str:
    """What to say of more bad rows than `max_bad`, the limit that a person knows as `key`."""
    if max_bad == 0:
        return f"{bad[0]}; {key}=0 lets no bad row pass." if key else f"{bad[0]}."
    return f"more than {key}={max_bad} bad row{'s' * (max_bad != 1)}, of which the first: {bad[0]}."
