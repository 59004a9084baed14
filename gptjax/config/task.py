"""Knobs of what a pre-trained model is fine-tuned for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptjax.config.knobs import UserError, knob

if TYPE_CHECKING:
    from gptjax.config.schema import Config

SINGLE = "task"  # the name of a run's only task


@dataclass(frozen=True)
class TaskConfig:
    """What a model is fine-tuned for."""

    kind: str = knob(
        "none",
        "What a record is for: none, documents are modelled as text; a label of a text (classification); or a text's "
        "completion (completion).",
        choices=("none", "classification", "completion"),
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
    text: str = knob("{text}", "classification: the text to read, with {FIELD} for what a record has in its field.")
    label: str = knob("label", "classification: the field of the label.")
    labels: tuple[str, ...] = knob((), "classification: all labels, in order; empty: those of the training records, sorted.")
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


def check(config: Config) -> None:
    """Raises `UserError` for knobs of the task that don't go together, or that others contradict."""
    task = config.task
    if task.kind == "none":
        return
    name = f"task.kind={task.kind}"
    if not task.path:
        raise UserError(f"{name} needs task.path, a file or a glob.")
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
