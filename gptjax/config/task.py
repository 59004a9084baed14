"""Knobs of what a pre-trained model is fine-tuned for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptjax.config import task_mixture
from gptjax.config.knobs import UserError, knob
from gptjax.config.mixture import Knots

if TYPE_CHECKING:
    from gptjax.config.schema import Config

WRITING = ("completion", "chat")  # kinds whose answers are texts
SINGLE = "task"  # the name of a run's only task


@dataclass(frozen=True)
class TaskConfig:
    """What a model is fine-tuned for."""

    kind: str = knob(
        "none",
        "What a record is for: none, documents are modelled as text; a label of a text (classification); a text's completion "
        "(completion); the assistant's turns in a conversation (chat); or the better of two completions (preference).",
        choices=("none", "classification", "completion", "chat", "preference"),
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
    prompt: str = knob("{prompt}", "completion, preference: what is given, with {FIELD} for what a record has in its field.")
    completion: str = knob(
        "{completion}",
        "completion: what is to be written behind it, and alone costs anything. A field of it may have a list of texts, or of "
        "SQuAD's answers, all of them right: each is an example.",
    )
    too_long: str = knob(
        "cut",
        "Examples of more than data.seq_len tokens: cut (the end of a text, the beginning of a prompt), dropped, or refused.",
        choices=("cut", "drop", "refuse"),
    )

    messages: str = knob("messages", "chat: the field of the conversation, a list of {role, content}.")
    chat_template: str = knob(
        "",
        "How a conversation is written: a Jinja file, or plain, ROLE: CONTENT a line, which needs no package; empty: as the "
        "tokenizer's files say.",
    )
    turns: str = knob("all", "chat: which of the assistant's turns are learnt.", choices=("all", "last"))

    chosen: str = knob("{chosen}", "preference: the better completion.")
    rejected: str = knob("{rejected}", "preference: the worse one.")
    preference_loss: str = knob(
        "sigmoid", "preference: DPO's (Rafailov et al., 2023), or IPO's square (Azar et al., 2023).", choices=("sigmoid", "ipo")
    )
    preference_beta: float = knob(0.1, "preference: how dear it is to leave the initial model.", above=0)
    preference_smoothing: float = knob(
        0.0, "preference: share of the pairs that are taken to be the wrong way round; sigmoid only.", at_least=0, below=0.5
    )

    generate_records: int = knob(
        0,
        "completion, chat: prompts that are answered at each evaluation, the first; 0: none.",
        at_least=0,
        shapes_run=False,
    )
    max_new_tokens: int = knob(64, "Tokens of such an answer at most.", at_least=1, shapes_run=False)
    temperature: float = knob(0.0, "Of such an answer; 0: the most probable tokens.", at_least=0, shapes_run=False)
    num_beams: int = knob(1, "Beams of such an answer; 1: no beam search.", at_least=1, shapes_run=False)
    stop_strings: tuple[str, ...] = knob((), "What ends such an answer, beside the end-of-text token.", shapes_run=False)
    measures: tuple[str, ...] = knob(
        (),
        "What such answers are measured by, against all completions of their prompt: BLEU and ROUGE in words or with each "
        "Chinese character a word (zh, mixed), chrF, exact match and F1 of SQuAD or of MLQA's Chinese, and their diversity.",
        choices=("bleu", "bleu-zh", "chrf", "rouge", "rouge-mixed", "em_f1", "em_f1-zh", "distinct", "self_bleu"),
        shapes_run=False,
    )

    mixture: tuple[str, ...] = knob(
        (),
        "Several tasks, which take the place of kind, path and eval_path: NAME=KIND:PATH. Each has its own head, rows, random "
        "order, epochs and held-out part; a row holds examples of one, and costs the mean over its task's targets in the batch.",
    )
    mixture_settings: tuple[str, ...] = knob(
        (),
        "What a task has of its own, NAME.SETTING=VALUE, a setting being any knob here; those of `task` for one that doesn't "
        'say. Lists are a|b, or JSON as in ["a", "b"].',
    )
    mixture_weights: tuple[str, ...] = knob(
        (),
        "Shares of the rows, as data.mixture_weights has them; empty: by mixture_temperature.",
    )
    mixture_temperature: float = knob(
        1.0,
        "Shares of the rows in proportion to (a task's rows)**(1/temperature): 1 as if all were one task, large ones near equal "
        "(Raffel et al., 2020).",
        at_least=1,
    )
    loss_weight: float = knob(1.0, "mixture: what a task's loss is multiplied by.", above=0)


def tasks_of(config: Config) -> dict[str, TaskConfig]:
    """{name: its knobs} of a run's tasks; {} where it has none."""
    if config.task.mixture:
        return dict(task_mixture.tasks(config.task))
    return {} if config.task.kind == "none" else {SINGLE: config.task}


def with_tasks(config: Config, tasks: dict[str, TaskConfig]) -> Config:
    """The config with what the training records have settled, such as labels."""
    if config.task.mixture:
        return dataclasses.replace(config, task=task_mixture.settled(config.task, tasks))
    return dataclasses.replace(config, task=tasks[SINGLE]) if tasks else config


def task_weights(config: Config, rows: Mapping[str, int]) -> dict[str, Knots]:
    """{task: its weights by place in the run} of a run of several, that have so many rows each; {} where it has not."""
    return task_mixture.weights(config.task, rows) if config.task.mixture else {}


def check(config: Config) -> None:
    """Raises `UserError` for knobs of the task that don't go together, or that others contradict."""
    task = config.task
    if not task.mixture:
        for key in ("mixture_weights", "mixture_settings"):
            if getattr(task, key):
                raise UserError(f"task.{key}={','.join(getattr(task, key))} needs task.mixture, which names the tasks.")
        if task.kind == "none":
            return
    elif task.kind != "none" or task.path:
        raise UserError("task.mixture has the kind and the path of each task: leave out task.kind and task.path.")
    name = "task.mixture" if task.mixture else f"task.kind={task.kind}"
    for one, knobs in tasks_of(config).items():
        _check_task(config, "task" if one == SINGLE and not task.mixture else f"task.mixture: {one}", knobs)
    if task.mixture:
        task_mixture.weights(task, dict.fromkeys(tasks_of(config), 1))
    _check_elsewhere(config, name)


def _check_task(config: Config, name: str, task: TaskConfig) -> None:
    """`name` begins the name of a knob in a message."""
    if not task.path:
        raise UserError(f"{name}.kind={task.kind} needs {name}.path, a file or a glob.")
    if task.preference_loss == "ipo" and task.preference_smoothing:
        raise UserError(
            f"{name}.preference_smoothing={task.preference_smoothing} belongs to preference_loss=sigmoid: ipo has its own."
        )
    if task.generate_records:
        if task.kind not in WRITING:
            raise UserError(f"{name}.generate_records={task.generate_records}: {task.kind} writes nothing.")
        if task.max_new_tokens >= config.data.seq_len:
            raise UserError(
                f"{name}.max_new_tokens={task.max_new_tokens} leaves no room for a prompt in data.seq_len={config.data.seq_len}."
            )
    elif task.measures:
        raise UserError(f"{name}.measures={','.join(task.measures)} needs {name}.generate_records, the prompts to be answered.")


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
