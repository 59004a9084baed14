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

OF_TEXTS = ("classification", "multilabel", "regression")  # kinds that say something of a text as a whole
WRITING = ("completion", "chat")  # kinds whose answers are texts
HEADED = ("classification", "multilabel", "regression", "tagging", "answers")  # kinds whose answer is read off a head
SINGLE = "task"  # the name of a run's only task


@dataclass(frozen=True)
class TaskConfig:
    """What a model is fine-tuned for."""

    kind: str = knob(
        "none",
        "What a record is for: none, documents are modelled as text; a label of a text (classification), several (multilabel) or "
        "numbers (regression); a tag of each word (tagging); the part of a text that answers a question (answers); a text's "
        "completion (completion); the assistant's turns in a conversation (chat); or the better of two completions (preference).",
        choices=(
            "none",
            "classification",
            "multilabel",
            "regression",
            "tagging",
            "answers",
            "completion",
            "chat",
            "preference",
        ),
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
    tfds_name: str = knob("", "format=tfds: the data set's name; `path` is then its data_dir.")
    train_split: str = knob("train", "format=tfds: the split to train on.")
    eval_split: str = knob("", "format=tfds: the split to evaluate on; empty: data.eval_fraction of train_split.")
    word_column: int = knob(0, "format=conll: the column of the words, from 0; from the end below 0.")
    tag_column: int = knob(-1, "format=conll: the column of the tags.")
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
    augment: str = knob(
        "",
        "Of a text as a whole: what copies of training texts are changed by, such as typo, to be trained on beside them; any of "
        "`gptjax attack`'s perturbations that needs no file.",
    )
    augment_share: float = knob(1.0, "augment: copies, as a share of the training records.", above=0, at_most=1)
    augment_words: float = knob(0.1, "augment: share of a copy's words that are changed.", above=0, at_most=1)
    adversarial_norm: float = knob(
        0.0,
        "Adversarial training (Miyato et al., 2017): each example costs once more with its tokens' embeddings moved to where its "
        "loss grows fastest, by this share of their norm; 0: none. A step takes twice the arithmetic.",
        at_least=0,
    )
    adversarial_weight: float = knob(1.0, "adversarial_norm: what the loss of moved examples is multiplied by.", above=0)
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


def tasks_refusal(config: Config) -> str:
    """Why a run's model does not write texts, to go on from its folder; "" where it does."""
    kinds = [knobs.kind for knobs in tasks_of(config).values()]
    if not kinds or any(kind not in HEADED for kind in kinds):
        return ""
    return f"was trained for task.kind={kinds[0]}, and its head says that instead of writing: ask it by `gptjax predict`."


def check(config: Config) -> None:
    """Raises `UserError` for knobs of the task that don't go together, or that others contradict."""
    task = config.task
    if not task.mixture:
        for key in ("mixture_weights", "mixture_settings"):
            if getattr(task, key):
                raise UserError(f"task.{key}={','.join(getattr(task, key))} needs task.mixture, which names the tasks.")
        if task.kind == "none":
            if task.adversarial_norm:
                raise UserError(f"task.adversarial_norm={task.adversarial_norm} needs a task, but task.kind=none; set it to 0.")
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
    if task.augment and task.kind not in OF_TEXTS:
        raise UserError(f"{name}.augment={task.augment} changes texts as a whole, which {task.kind} does not read; leave it out.")
    if task.adversarial_norm and task.kind == "preference":
        raise UserError(
            f"{name}.adversarial_norm={task.adversarial_norm} moves texts away from those that the initial model was asked "
            f"about, which {name}.kind=preference compares with; set it to 0."
        )
    if task.format == "tfds" and not task.tfds_name:
        raise UserError(f"{name}.format=tfds needs {name}.tfds_name, the data set's name.")
    if not task.path:
        raise UserError(f"{name}.kind={task.kind} needs {name}.path, a file or a glob.")
    if task.kind == "multilabel" and not task.separator:
        raise UserError(f"{name}.kind=multilabel needs {name}.separator, what stands between the labels of a text.")
    if len(set(task.labels)) < len(task.labels):
        twice = next(label for label in task.labels if task.labels.count(label) > 1)
        raise UserError(f"{name}.labels has {twice!r} twice.")
    if task.scheme == "none" and task.train_scheme != "same":
        raise UserError(f"{name}.train_scheme={task.train_scheme} needs a {name}.scheme that it is made of, not none.")
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
