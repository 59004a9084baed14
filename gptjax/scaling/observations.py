"""Finished runs as (parameters, tokens, FLOPs, loss): what every fit starts from.

Two counts of parameters are kept, because the two papers disagree on them. Kaplan et al. (2020) leave out token and position
embeddings, and the head; Hoffmann et al. (2022, Chinchilla) count them. In small models embeddings are a large share, and the
count alone moves the exponent of the best size from about 0.5 to about 0.7 (Pearce and Song, 2024; Porian et al., 2024).
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gptjax.config import Config, UserError
from gptjax.sweeps.groups import Run
from gptjax.train.flops import flops_per_token

COUNTS = ("total", "non_embedding")
COLUMNS = ("name", "parameters", "non_embedding", "tokens", "flops", "loss")


class Counted(NamedTuple):
    """Parameters of a model: all, and those besides token and position embeddings and the head."""

    total: int
    non_embedding: int


Counter = Callable[[Config], Counted]


@dataclasses.dataclass(frozen=True)
class Observations:
    """n runs, each an element of float64 arrays [n]; `non_embedding` is NaN where it is not known. Loss in nats a token."""

    names: tuple[str, ...]
    parameters: np.ndarray
    non_embedding: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    @property
    def knows_non_embedding(self) -> bool:
        return bool(np.isfinite(self.non_embedding).all())

    def sizes(self, count: str) -> np.ndarray:
        """Parameters [n] by one of COUNTS."""
        return {"total": self.parameters, "non_embedding": self.non_embedding}[count]

    def select(self, keep: np.ndarray) -> Observations:
        """Those of a mask [n]."""
        names = tuple(name for name, kept in zip(self.names, keep, strict=True) if kept)
        arrays = (self.parameters, self.non_embedding, self.tokens, self.flops, self.loss)
        return Observations(names, *(array[keep] for array in arrays))

    def rows(self) -> Iterator[dict[str, str | float]]:
        for index, name in enumerate(self.names):
            yield {"name": name} | {column: float(getattr(self, column)[index]) for column in COLUMNS[1:]}


def make(rows: Sequence[Mapping[str, float | str]]) -> Observations:
    """Observations of rows with the keys of COLUMNS; `non_embedding` may be NaN."""
    arrays = (np.array([float(row[column]) for row in rows], np.float64) for column in COLUMNS[1:])
    return Observations(tuple(str(row["name"]) for row in rows), *arrays)


def of_runs(runs: Sequence[Run], count: Counter) -> tuple[Observations, list[str]]:
    """(the finished runs, a sentence for each of the others). FLOPs are those of train/flops.py for the tokens of the run."""
    rows: list[dict[str, float | str]] = []
    left_out = []
    for run in runs:
        loss = run.result.get("eval", {}).get("loss")
        if run.unfinished or loss is None or not math.isfinite(loss):
            left_out.append(f"{run.folder.name}: {run.unfinished or f'its evaluation loss is {loss}'}")
            continue
        counted, tokens = count(run.config), run.result["tokens"]
        flops = flops_per_token(run.config.model, run.config.data.seq_len) * tokens
        rows.append(
            {
                "name": run.folder.name,
                "parameters": counted.total,
                "non_embedding": counted.non_embedding,
                "tokens": tokens,
                "flops": flops,
                "loss": loss,
            }
        )
    return make(rows), left_out


def read_csv(path: pathlib.Path, columns: Mapping[str, str] | None = None) -> Observations:
    """A table with a header: parameters and loss, tokens or flops or both, and optionally non_embedding and name.

    `columns` maps these names to those of the file. Of tokens and FLOPs the one that is missing is made by flops = 6 * parameters
    * tokens. Raises `UserError` naming file, line and column.
    """
    columns = dict(columns or {})
    for name in columns:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS, n=1)
            raise UserError(f"--columns: there is no {name}; {f'did you mean {near[0]}?' if near else ', '.join(COLUMNS)}")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            header, lines = list(reader.fieldnames or []), [(reader.line_num, line) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--csv={path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    named = {name: columns.get(name, name) for name in COLUMNS}
    for name, column in named.items():
        needed = name in ("parameters", "loss") or name in columns
        if needed and column not in header:
            near = difflib.get_close_matches(column, header, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"--csv={path} has no column {column!r} but {', '.join(map(repr, header)) or 'no header'}{hint}")
    present = {name for name, column in named.items() if column in header}
    if not present & {"tokens", "flops"}:
        raise UserError(f"--csv={path} needs a column tokens or flops; it has {', '.join(map(repr, header))}.")
    rows = [_row(path, number, line, named, present) for number, line in lines]
    if not rows:
        raise UserError(f"--csv={path} has a header and no rows.")
    return make(rows)


def _row(
    path: pathlib.Path, number: int, line: dict[str, str], named: dict[str, str], present: set[str]
) -> dict[str, float | str]:
    row: dict[str, float | str] = {"name": line[named["name"]] if "name" in present else f"line {number}"}
    for name in COLUMNS[1:]:
        text = (line.get(named[name]) or "").strip()
        if name not in present or (name == "non_embedding" and not text):
            row[name] = math.nan
            continue
        try:
            row[name] = value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{path}, line {number}: {named[name]} is {text!r}, and must be a number above 0.")
    if "tokens" not in present:
        row["tokens"] = float(row["flops"]) / (6 * float(row["parameters"]))
    if "flops" not in present:
        row["flops"] = 6 * float(row["parameters"]) * float(row["tokens"])
    return row


def write_csv(path: pathlib.Path, observations: Observations) -> None:
    """The table that `read_csv` reads."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for row in observations.rows():
            cells = {key: value if isinstance(value, str) else repr(value) for key, value in row.items()}
            table.writerow(cells if math.isfinite(float(row["non_embedding"])) else cells | {"non_embedding": ""})
