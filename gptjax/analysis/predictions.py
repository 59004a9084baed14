"""The file of predictions that `gptjax analyze` reads: JSON lines, an object a text.

{"id": "17", "text": "Free entry ...", "gold": "spam", "predicted": "ham", "probabilities": {"ham": 0.93, "spam": 0.07}}

- text, gold, predicted: needed. gold is a label (a string, number or boolean), or a list of strings, any of which is right.
- id: a string or number, by default the line's number.
- probabilities: of the labels, summing to 1; one left out is 0. On every line or on none.
- score: a number from 0 to 1, where an answer is more than right or wrong (its F1); then it is what the page averages. On every
  line or on none; without it the score is 1 where predicted equals gold.

A file of training texts for the leak report has "text" and, if known, "gold" on each line; one named .txt is a text a line.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gptjax.config import UserError


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One text with its gold label (or the answers that are right), what was predicted, and how sure that was."""

    id: str
    text: str
    gold: str | tuple[str, ...]
    predicted: str
    probabilities: Mapping[str, float] | None = None
    score: float | None = None

    @property
    def points(self) -> float:
        """`score`, or 1 where the prediction is right and 0 where it is wrong."""
        if self.score is not None:
            return self.score
        return float(self.predicted == self.gold if isinstance(self.gold, str) else self.predicted in self.gold)

    @property
    def confidence(self) -> float | None:
        """Probability of what was predicted."""
        return None if self.probabilities is None else self.probabilities.get(self.predicted, 0.0)


@dataclasses.dataclass(frozen=True)
class TrainText:
    text: str
    gold: str | None = None


def read_predictions(path: str | pathlib.Path) -> list[Prediction]:
    """All predictions of a file. Raises `UserError`, naming file and line, for what is not in the form above."""
    found = [_prediction(row, number, place) for number, row, place in _rows(path)]
    if not found:
        raise UserError(f"{path} has no predictions.")
    for name in ("probabilities", "score"):
        having = sum(getattr(prediction, name) is not None for prediction in found)
        if 0 < having < len(found):
            raise UserError(f"{path}: {having} of {len(found)} lines have {name}; it is on every line or on none.")
    return found


def read_train(path: str | pathlib.Path) -> list[TrainText]:
    """Training texts of JSON lines, or of a .txt file. Raises `UserError`, naming file and line."""
    if pathlib.Path(path).suffix == ".txt":
        return [TrainText(line) for line in _read(path).splitlines() if line.strip()]
    return [
        TrainText(_text(row, "text", place), _label(row["gold"], place) if _is_label(row.get("gold")) else None)
        for _, row, place in _rows(path)
    ]


def write_predictions(path: str | pathlib.Path, predictions: Iterable[Prediction]) -> None:
    """The file that `read_predictions` reads."""
    with open(path, "w", encoding="utf-8") as file:
        for prediction in predictions:
            row = {key: value for key, value in dataclasses.asdict(prediction).items() if value is not None}
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def _read(path: str | pathlib.Path) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}.") from None


def _rows(path: str | pathlib.Path) -> Iterator[tuple[int, dict[str, Any], str]]:
    """(line's number from 1, object, "file:line") of every line that is not empty."""
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place} is not JSON: {error.msg} at column {error.colno}.") from None
        if not isinstance(row, dict):
            raise UserError(f"{place} is not a JSON object.")
        yield number, row, place


def _prediction(row: dict[str, Any], number: int, place: str) -> Prediction:
    for name in ("text", "gold", "predicted"):
        if name not in row:
            raise UserError(f"{place} has no {name!r}; it has {', '.join(map(repr, row)) or 'nothing'}.")
    gold = row["gold"]
    several = isinstance(gold, list)
    if several and not (gold and all(isinstance(answer, str) for answer in gold)):
        raise UserError(f"{place}: a list as 'gold' holds one or more strings.")
    return Prediction(
        id=_label(row.get("id", number), place),
        text=_text(row, "text", place),
        gold=tuple(gold) if several else _label(gold, place),
        predicted=_label(row["predicted"], place),
        probabilities=_probabilities(row.get("probabilities"), place),
        score=_score(row.get("score"), place),
    )


def _text(row: dict[str, Any], name: str, place: str) -> str:
    if not isinstance(row.get(name), str):
        raise UserError(f"{place}: {name!r} is not a string.")
    return row[name]


def _is_label(value: Any) -> bool:
    return isinstance(value, (str, int, float))


def _label(value: Any, place: str) -> str:
    if not _is_label(value):
        raise UserError(f"{place}: {value!r} is neither a string nor a number.")
    return value if isinstance(value, str) else json.dumps(value)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _probabilities(value: Any, place: str) -> dict[str, float] | None:
    if value is None:
        return None
    if not (isinstance(value, dict) and value and all(_number(chance) and chance >= 0 for chance in value.values())):
        raise UserError(f"{place}: 'probabilities' is an object of labels and numbers from 0 to 1.")
    total = math.fsum(value.values())
    if abs(total - 1) > 1e-3:
        raise UserError(f"{place}: the probabilities sum to {total:.4g}, not 1.")
    return {label: float(chance) for label, chance in value.items()}


def _score(value: Any, place: str) -> float | None:
    if value is None:
        return None
    if not (_number(value) and 0 <= value <= 1):
        raise UserError(f"{place}: 'score' is a number from 0 to 1, not {value!r}.")
    return float(value)
