"""Knobs of what a pre-trained model is fine-tuned for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptjax.config.knobs import UserError, knob

if TYPE_CHECKING:
    from gptjax.config.schema import Config

HEADED = ("classification", "multilabel", "regression", "tagging", "answers")  # kinds whose answer is read off a head
SINGLE = "task"  # the name of a run's only task


@dataclass(frozen=True)
class TaskConfig:
    """What a model is fine-tuned for."""

    kind: str = knob(
        "none",
        "What a record is for: none, documents are modelled as text; a label of a text (classification), several (multilabel) or "
        "numbers (regression); a tag of each word (tagging); the part of a text that answers a question (answers); or a text's "
        "completion (completion).",
        choices=("none", "classification", "multilabel", "regression", "tagging", "answers", "completion"),
    )
    path: str = knob("", "The records to train on: a file, a glob, or several separated by commas.")
    eval_path: str = knob(
        "", "The records to evaluate on; empty: data.eval_fraction of those of `path`, by a hash of their content."
    )
    format: str = knob(
        "auto",
        "How the files are read; auto: by their names.",
        choices=("auto", "jsonl", "csv", "tsv", "conll", "squad", "tfds", "folders"),
    )
    columns: tuple[str, ...] = knob((), "csv, tsv: names of the columns; empty: the first row has them.")
    max_bad_rows: int = knob(0, "Rows that cannot be read and are skipped, each named, before it is an error.", at_least=0)
    text: str = knob("{text}", "Of a text as a whole: the text to read, with {FIELD} for what a record has in its field.")
    label: str = knob(
        "label",
        "Of a text as a whole: the field of the label, labels or numbers; regression: fields of a number each, separated by "
        "commas, are several.",
    )
    labels: tuple[str, ...] = knob(
        (), "All labels or tags (regression: the numbers' names), in order; empty: those of the training records, sorted."
    )
    separator: str = knob(",", "multilabel, regression: what stands between labels or numbers in a text; a list needs none.")
    threshold: float = knob(0.5, "multilabel: the probability from which on a label is given.", above=0, below=1)
    words: str = knob("words", "tagging: the field of the list of words.")
    tags: str = knob("tags", "tagging: the field of the list of their tags.")
    join: str = knob(" ", "tagging: what stands between words; empty: nothing, as in Chinese.")
    word_token: str = knob(
        "last",
        "tagging: which token of a word has its tag. A causal model has seen the whole word at its last one alone; all: the loss "
        "is of all, and what counts is said at the last.",
        choices=("first", "last", "all"),
    )
    scheme: str = knob(
        "BIO",
        "tagging: what the files' tags are: BIO (B at the begin of every entity), IOB1 (B only between neighbours of one type), "
        "IOBES (E at the end, S alone), or none, tags of single words.",
        choices=("BIO", "IOB1", "IOBES", "none"),
    )
    train_scheme: str = knob("same", "tagging: the scheme to train on.", choices=("same", "BIO", "IOB1", "IOBES"))
    malformed: str = knob(
        "refuse",
        "tagging: what a sequence that is not of the scheme is: a bad row (refuse), or made one of the entities that seqeval "
        "finds in it (repair).",
        choices=("refuse", "repair"),
    )
    question: str = knob("{question}\n", "answers: what stands before the context, with {FIELD} for what a record has there.")
    context: str = knob("context", "answers: the field of the text that answers are parts of.")
    overlap: float = knob(
        0.25,
        "tagging, answers: of what is longer than a row, the share of a row that a window has in common with the one before.",
        at_least=0,
        below=1,
    )
    max_answer: int = knob(200, "answers: the most characters of an answer.", at_least=1)
    unanswerable: str = knob(
        "auto",
        "answers: whether a question may have no answer (SQuAD 2.0); auto: where a training record has none.",
        choices=("auto", "yes", "no"),
    )
    null_threshold: float = knob(
        0.0, "answers: how much higher than the best answer's score that of none must be for there to be none."
    )
    normaliser: str = knob(
        "squad",
        "answers: how answers are compared, as in the data set's own script.",
        choices=("squad", "mlqa-en", "mlqa-zh", "cmrc"),
    )
    prompt: str = knob("{prompt}", "completion: what is given, with {FIELD} for what a record has in its field.")
    completion: str = knob("{completion}", "completion: what is to be written behind it, and alone costs anything.")
    too_long: str = knob(
        "cut",
        "Examples of more than data.seq_len tokens: cut (the end of a text, the beginning of a prompt), dropped, or refused.",
        choices=("cut", "drop", "refuse"),
    )


def tasks_of(config: Config) -> dict[str, TaskConfig]:
    """{name: its knobs} of a run's tasks; {} where it has none."""
    return {} if config.task.kind == "none" else {SINGLE: config.task}


def with_tasks(config: Config, tasks: dict[str, TaskConfig]) -> Config:
    """The config with what the training records have settled, such as labels."""
    return dataclasses.replace(config, task=tasks[SINGLE]) if tasks else config


def tasks_refusal(config: Config) -> str:
    """Why a run's model does not write texts, to go on from its folder; "" where it does."""
    kinds = [knobs.kind for knobs in tasks_of(config).values()]
    if not kinds or any(kind not in HEADED for kind in kinds):
        return ""
    return f"was trained for task.kind={kinds[0]}, and its head says that instead of writing: ask it by `gptjax predict`."


def check(config: Config) -> None:
    """Raises `UserError` for knobs of the task that don't go together, or that others contradict."""
    task = config.task
    if task.kind == "none":
        return
    name = f"task.kind={task.kind}"
    if not task.path:
        raise UserError(f"{name} needs task.path, a file or a glob.")
    if task.kind == "multilabel" and not task.separator:
        raise UserError(f"{name} needs a task.separator between the labels of a text.")
    if len(set(task.labels)) < len(task.labels):
        twice = next(label for label in task.labels if task.labels.count(label) > 1)
        raise UserError(f"task.labels has {twice!r} twice.")
    if task.scheme == "none" and task.train_scheme != "same":
        raise UserError(f"task.train_scheme={task.train_scheme} needs a task.scheme that it is made of, not none.")
    _check_elsewhere(config, name)


def _check_elsewhere(config: Config, name: str) -> None:
    data, objective, model = config.data, config.objective, config.model
    for key in ("path", "eval_path", "name", "mixture"):
        if getattr(data, key):
            raise UserError(f"{name} reads the records of task.path, and data.{key}={getattr(data, key)!r} documents; give one.")
    if data.packing == "windows":
        raise UserError(f"{name} keeps an example in one row, which data.packing=windows does not; take packed or padded.")
    if objective.name != "causal":
        raise UserError(f"{name} goes with objective.name=causal, not with objective.name={objective.name}.")
    if model.prediction_heads > 1:
        raise UserError(f"{name} has no loss for model.prediction_heads={model.prediction_heads}; set it to 1.")
    for group in ("batch", "seq_len"):
        if start := getattr(config.train, f"{group}_warmup_start"):
            raise UserError(f"{name} keeps the shape of a batch, which train.{group}_warmup_start={start} changes.")
    if config.optimizer.name == "sophia":
        raise UserError(f"{name} has no curvature for optimizer.name=sophia.")
