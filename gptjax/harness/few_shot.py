"""Classification by likelihood, from no, one or few examples in the prompt: zero-, one- and few-shot tables over seeds.

An experiment is a JSON file, the fields of `FewShot`:

    {"data": "test.jsonl", "pool": "train.jsonl",
     "template": "Review: {text}\\nSentiment: {label}",
     "verbalizer": {"1": "positive", "0": "negative"},
     "shots": [0, 1, 4], "seeds": [0, 1, 2], "calibration": ["none", "contextual"]}
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.data.records import read_records
from gptjax.harness.intervals import CONFIDENCE, RESAMPLES, aligned
from gptjax.harness.likelihood import Likelihood, Scored

LABEL = "{label}"


@dataclass(frozen=True)
class FewShot:
    """One experiment. Paths are relative to the file that it was read from. Raises `UserError` for what cannot be."""

    data: str  # records to label: JSONL, CSV or TSV
    template: str  # one record, its fields as {name}; it ends with {label}
    verbalizer: Mapping[str, Any]  # {a label as it is in the data: the word, or the words, that stand for it}
    pool: str = ""  # records that examples are drawn from; "": those of `data`, but never the tested one
    label: str = "label"  # the field that holds the label
    columns: tuple[str, ...] = ()  # names of the columns, where the first line of a CSV or TSV file does not say them
    instruction: str = ""  # what the prompt begins with
    separator: str = "\n\n"  # between examples
    shots: tuple[int, ...] = (0, 1, 4)
    seeds: tuple[int, ...] = (0, 1, 2)
    balanced: bool = True  # labels take turns among the examples; False: as the pool has them
    score: str = "sum"  # one of SCORES
    calibration: tuple[str, ...] = ("none",)  # some of CALIBRATIONS
    content_free: tuple[str, ...] = ("N/A", "[MASK]", "")  # what contextual calibration puts in place of each field
    limit: int = 0  # records of `data` that are labelled, drawn by seed 0; 0: all

    def __post_init__(self) -> None:
        if not self.template.endswith(LABEL) or self.template.count(LABEL) != 1:
            raise UserError(f"template={self.template!r} must end with its one {LABEL}.")
        if not self.fields:
            raise UserError(f"template={self.template!r} has no field of the records, as {{text}}.")
        if len(self.verbalizer) < 2 or not all(words and all(words) for words in self.words().values()):
            raise UserError("verbalizer must have a word for each of at least two labels.")
        for name, given, known in (("score", (self.score,), SCORES), ("calibration", self.calibration, CALIBRATIONS)):
            if unknown := [value for value in given if value not in known]:
                raise UserError(f"{name}={unknown[0]} is none of {', '.join(known)}.")
        if not self.shots or not self.seeds or not self.calibration or min(self.shots) < 0:
            raise UserError("shots, seeds and calibration need at least one value each, and shots none below 0.")

    @property
    def fields(self) -> list[str]:
        """The names in the template but the label."""
        return [name for name in re.findall(r"\{(\w+)\}", self.template) if name != "label"]

    def words(self) -> dict[str, list[str]]:
        """{label: its words}."""
        return {label: [words] if isinstance(words, str) else list(words) for label, words in self.verbalizer.items()}

    def question(self, values: Mapping[str, Any]) -> str:
        """The template of a record up to its label."""
        template = self.template.removesuffix(LABEL)
        return re.sub(r"\{(\w+)\}", lambda match: str(values[match[1]]), template)

    def prompt(self, examples: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> str:
        """Instruction, examples with the first word of their labels, and the question."""
        shown = [self.question(example) + self.words()[str(example[self.label])][0] for example in examples]
        return self.separator.join([*([self.instruction] if self.instruction else []), *shown, self.question(values)])


def read_experiment(path: pathlib.Path) -> FewShot:
    """The experiment of a JSON file. Raises `UserError`, naming file and key."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"--few_shot={path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"--few_shot={path} is not valid JSON: {error}.") from None
    known = {own.name: own for own in dataclasses.fields(FewShot)}
    if not isinstance(values, dict):
        raise UserError(f"--few_shot={path} must be an object with the keys {', '.join(known)}.")
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{path}: {key} is none of {', '.join(known)}.")
        if not _fits(str(known[key].type), value):
            raise UserError(f"{path}: {key}={value!r} must be {known[key].type}.")
    if missing := [name for name in ("data", "template", "verbalizer") if name not in values]:
        raise UserError(f"{path} lacks {missing[0]}.")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    for key in ("data", "pool"):
        if values.get(key):
            values[key] = str(path.parent / pathlib.Path(values[key]).expanduser())
    try:
        return FewShot(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _fits(declared: str, value: Any) -> bool:
    """Whether a JSON value is of the type that a field of `FewShot` declares."""
    kinds: dict[str, Callable[[Any], bool]] = {
        "str": lambda one: isinstance(one, str),
        "int": lambda one: isinstance(one, int) and not isinstance(one, bool) and one >= 0,
        "bool": lambda one: isinstance(one, bool),
    }
    if declared.startswith("tuple["):
        inner = declared.removeprefix("tuple[").partition(",")[0]
        return isinstance(value, list) and all(kinds[inner](one) for one in value)
    if declared.startswith("Mapping"):
        words = value.values() if isinstance(value, dict) else [None]
        return all(
            isinstance(own, str) or (isinstance(own, list) and all(isinstance(word, str) for word in own)) for own in words
        )
    return kinds[declared](value)


# --- scores -------------------------------------------------------------------------------------------------------------------

# How the log-probability of a word of so many tokens and UTF-8 bytes becomes its score.
SCORES: dict[str, Callable[[Scored, str], float]] = {
    "sum": lambda scored, word: scored.total,
    "token": lambda scored, word: scored.total / len(scored.log_probs),
    "byte": lambda scored, word: scored.total / len(word.encode()),
}

# What is taken off the scores: "none"; "contextual", so that prompts without content get all labels alike (Zhao et al., 2021);
# "pmi", what the label gets behind the end of the template alone, its domain (Holtzman et al., 2021).
CALIBRATIONS = ("none", "contextual", "pmi")


@dataclass(frozen=True)
class Cell:
    """A row of the table: one number of examples with one calibration. `accuracies` has one value a seed."""

    shots: int
    calibration: str
    accuracies: list[float]
    low: float
    high: float
    items: int
    correct: np.ndarray = field(repr=False)  # bool [seeds, items]

    @property
    def accuracy(self) -> float:
        return float(np.mean(self.accuracies))


def run(like: Likelihood, experiment: FewShot) -> tuple[list[Cell], float]:
    """(a cell for each number of examples and calibration, the accuracy of always saying the commonest label).

    The interval resamples records and seeds. Without examples, and without calibration by them, a seed changes nothing, and there
    is one. Raises `UserError` for records that lack a field or have a label without a word, and for too small a pool.
    """
    records, pool, is_same = load(experiment)
    labels = list(experiment.words())
    truth = np.array([labels.index(str(record[experiment.label])) for _, record in records])
    cells = []
    for shots in experiment.shots:
        ranked = [draw(experiment, pool, seed) for seed in (experiment.seeds if shots else experiment.seeds[:1])]
        found = [_scores(like, experiment, records, pool, order, shots, is_same) for order in ranked]
        for calibration in experiment.calibration:
            correct = np.stack([own[calibration].argmax(-1) == truth for own in found])
            low, high = _interval(correct)
            cells.append(Cell(shots, calibration, correct.mean(-1).tolist(), low, high, len(records), correct))
    return cells, max(Counter(truth.tolist()).values()) / len(truth)


def load(experiment: FewShot) -> tuple[list[tuple[int, Any]], list[Any], bool]:
    """(records to label with their numbers, the pool, whether these are the same file's). Raises `UserError` for a record that
    lacks a field or whose label has no word, and for a pool that is too small.
    """
    needed, words = [*experiment.fields, experiment.label], experiment.words()

    def fault(values: dict[str, Any]) -> str:
        label = values[experiment.label]
        return "" if str(label) in words else f"has the label {label!r}, which has no word in verbalizer"

    loaded = {}
    for path in dict.fromkeys((experiment.data, experiment.pool or experiment.data)):
        found = read_records(path, columns=experiment.columns, required=needed, check=fault, key="few_shot", limit_key="")
        loaded[path] = [record.values for record in found]
    records, pool = list(enumerate(loaded[experiment.data])), loaded[experiment.pool or experiment.data]
    if experiment.limit and experiment.limit < len(records):
        picked = np.random.default_rng(0).permutation(len(records))[: experiment.limit]
        records = [records[number] for number in sorted(picked.tolist())]
    if max(experiment.shots) and len(pool) < max(experiment.shots) + 1:
        raise UserError(f"shots={max(experiment.shots)} needs a pool of at least one record more, but there are {len(pool)}.")
    return records, pool, (experiment.pool or experiment.data) == experiment.data


def draw(experiment: FewShot, pool: Sequence[Mapping[str, Any]], seed: int) -> list[int]:
    """Numbers of the pool's records in the order in which they are taken as examples, by seed: more shots have those of fewer.
    Balanced, a label comes again after all others have come, in an order of its own seed.
    """
    order = np.random.default_rng(seed).permutation(len(pool)).tolist()
    if not experiment.balanced:
        return order
    by_label: dict[str, list[int]] = {}
    for number in order:
        by_label.setdefault(str(pool[number][experiment.label]), []).append(number)
    turns = [(turn, place, number) for place, own in enumerate(by_label.values()) for turn, number in enumerate(own)]
    return [number for _, _, number in sorted(turns)]


def examples_for(
    experiment: FewShot, pool: Sequence[Mapping[str, Any]], order: Sequence[int], shots: int, number: int | None, values: Any
) -> list[Mapping[str, Any]]:
    """The first `shots` of `order` but the tested record itself: that of this `number` (None: of another file), and any that
    reads the same.
    """
    asked = experiment.question(values)
    chosen: list[Mapping[str, Any]] = []
    for candidate in order:
        if len(chosen) == shots:
            break
        if candidate != number and experiment.question(pool[candidate]) != asked:
            chosen.append(pool[candidate])
    if len(chosen) < shots:
        raise UserError(f"shots={shots}: the pool has only {len(chosen)} records that read otherwise than {asked[:60]!r}.")
    return chosen


def _scores(
    like: Likelihood,
    experiment: FewShot,
    records: Sequence[tuple[int, Any]],
    pool: Sequence[Any],
    order: Sequence[int],
    shots: int,
    is_same: bool,
) -> dict[str, np.ndarray]:
    """{calibration: scores [records, labels]} of one draw of examples."""
    chosen = [examples_for(experiment, pool, order, shots, number if is_same else None, values) for number, values in records]
    plain = label_scores(
        like, experiment, [experiment.prompt(own, values) for own, (_, values) in zip(chosen, records, strict=True)]
    )
    found = {"none": plain}
    if "contextual" in experiment.calibration:
        # A record that is one of the examples has others: each set of examples has a calibration of its own.
        sets = list(dict.fromkeys(tuple(map(id, own)) for own in chosen))
        examples = {tuple(map(id, own)): own for own in chosen}
        empty = [dict.fromkeys(experiment.fields, text) for text in experiment.content_free]
        prompts = [experiment.prompt(examples[key], values) for key in sets for values in empty]
        free = _normalised(label_scores(like, experiment, prompts)).reshape(len(sets), len(empty), -1).mean(1)
        place = {key: row for row, key in enumerate(sets)}
        found["contextual"] = plain - np.log(free[[place[tuple(map(id, own))] for own in chosen]])
    if "pmi" in experiment.calibration:
        domain = re.split(r"\{\w+\}", experiment.template.removesuffix(LABEL))[-1]
        found["pmi"] = plain - label_scores(like, experiment, [domain])
    return found


def label_scores(like: Likelihood, experiment: FewShot, prompts: Sequence[str]) -> np.ndarray:
    """The score [prompts, labels] of each label: that of its word, or of its words together (log-sum-exp)."""
    words = experiment.words()
    flat = [word for own in words.values() for word in own]
    scored = iter(like.of_pairs([(prompt, word) for prompt in prompts for word in flat]))
    rate = SCORES[experiment.score]
    each = np.array([[rate(next(scored), word) for word in flat] for _ in prompts])
    starts = np.cumsum([0, *(len(own) for own in words.values())])[:-1]
    return np.logaddexp.reduceat(each, starts, axis=1)


def _normalised(scores: np.ndarray) -> np.ndarray:
    """exp(scores) over the labels, adding up to 1."""
    shifted = np.exp(scores - scores.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def _interval(correct: np.ndarray) -> tuple[float, float]:
    """CONFIDENCE of the resamples of seeds and records, of correct [seeds, items]."""
    seeds, items = correct.shape
    rng = np.random.default_rng(0)
    weights = rng.multinomial(seeds, [1 / seeds] * seeds, RESAMPLES) / seeds
    counts = rng.multinomial(items, [1 / items] * items, RESAMPLES) / items
    accuracies = np.einsum("rs,si,ri->r", weights, correct.astype(np.float64), counts, optimize=True)
    low, high = np.quantile(accuracies, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def table(cells: Sequence[Cell], majority: float) -> str:
    """Lines of examples, calibration, accuracy over the seeds, interval, and each seed's accuracy."""
    rows = [("shots", "calibration", "accuracy", f"{CONFIDENCE:.0%} interval", "by seed", "n")]
    rows += [
        (
            str(cell.shots),
            cell.calibration,
            f"{cell.accuracy:.4f}",
            f"{cell.low:.4f} to {cell.high:.4f}",
            " ".join(f"{accuracy:.4f}" for accuracy in cell.accuracies),
            str(cell.items),
        )
        for cell in cells
    ]
    return f"{aligned(rows)}\nalways the commonest label: {majority:.4f}"


def as_dicts(cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    """The cells for JSON."""
    for cell in cells:
        values = {
            name: getattr(cell, name) for name in ("shots", "calibration", "accuracy", "accuracies", "low", "high", "items")
        }
        yield values
