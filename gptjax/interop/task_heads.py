"""Heads of tasks as transformers and PEFT have them: one table of forms by kind of task, read in both directions.

transformers has a class of each architecture for texts as a whole, for tokens, and for the part of a text that answers a
question: the decoder without its output table, and a linear layer in its place. Its weight is [outputs, width], our kernel
[D, K]. PEFT saves that layer whole beside an adapter ("modules_to_save").
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from gptjax.config import HEADED, TaskConfig, UserError
from gptjax.interop import safetensors
from gptjax.interop.architectures import ARCHITECTURES
from gptjax.interop.tensors import ENCODINGS, Tensors


@dataclasses.dataclass(frozen=True)
class Form:
    """What a kind of task is there."""

    suffix: str  # of transformers' class
    module: str  # the layer's name
    task_type: str  # PEFT's
    saved: tuple[str, ...]  # what PEFT itself writes into modules_to_save
    problem_type: str = ""  # config.json's

    def class_of(self, architecture: str) -> str:
        """GPT2ForSequenceClassification"""
        return ARCHITECTURES[architecture].classes.removesuffix("LMHeadModel").removesuffix("ForCausalLM") + self.suffix

    def prefix_of(self, architecture: str) -> str:
        """In front of every name but the head's. Some classes for questions call the decoder otherwise than all others."""
        renamed = self.module == "qa_outputs" and architecture in ("llama", "qwen2", "qwen3")
        return "transformer." if renamed else ARCHITECTURES[architecture].prefix


_OF_TEXTS = Form("ForSequenceClassification", "score", "SEQ_CLS", ("classifier", "score"))
_FORMS = {
    "classification": dataclasses.replace(_OF_TEXTS, problem_type="single_label_classification"),
    "multilabel": dataclasses.replace(_OF_TEXTS, problem_type="multi_label_classification"),
    "regression": dataclasses.replace(_OF_TEXTS, problem_type="regression"),
    "tagging": Form("ForTokenClassification", "score", "TOKEN_CLS", ("classifier", "score")),
    "answers": Form("ForQuestionAnswering", "qa_outputs", "QUESTION_ANS", ("qa_outputs",)),
}
_CLASSIFIERS = ("gpt2", "gpt_neox")  # whose class for tokens calls the layer so

MODULES = ("score", "classifier", "qa_outputs")
TENSORS = tuple(f"{module}.{part}" for module in MODULES for part in ("weight", "bias"))


def form_of(kind: str, architecture: str) -> Form:
    """Of a kind of task that has a head."""
    form = _FORMS[kind]
    return dataclasses.replace(form, module="classifier") if kind == "tagging" and architecture in _CLASSIFIERS else form


# --- in -------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Head:
    """One that was read."""

    source: pathlib.Path
    module: str
    params: dict[str, np.ndarray]  # "kernel" [D, K], and "bias" [K] where it has one
    encodings: dict[str, str]  # {"score.weight": "F32"}
    kinds: tuple[str, ...]  # of tasks that it may be of, as far as the folder says

    @property
    def num_outputs(self) -> int:
        return self.params["kernel"].shape[1]

    @property
    def suffix(self) -> str:
        """Of transformers' class that it is of."""
        return _FORMS[self.kinds[0]].suffix

    def described(self) -> str:
        return f"{self.module} of {self.source}, a head of {self.num_outputs} output{'s' * (self.num_outputs != 1)}"


def head_in(tensors: Tensors, names: Mapping[str, str], problem_type: str = "") -> Head | None:
    """The head among tensors, None where there is none. `names`: {"score.weight": its name in the file}; `problem_type`: as
    config.json says. Raises `UserError` for several heads, or one of which a tensor is missing or has no place.
    """
    found = [module for module in MODULES if f"{module}.weight" in names or f"{module}.bias" in names]
    if not found:
        return None
    source, module = tensors.source, found[0]
    if len(found) > 1:
        raise UserError(f"{source} has the heads {' and '.join(found)}, where one is expected.")
    stored = {part: names.get(f"{module}.{part}") for part in ("weight", "bias")}
    params: dict[str, np.ndarray] = {}
    encodings = {}
    for part, axes in (("weight", 2), ("bias", 1)):
        if (name := stored[part]) is None:
            continue
        tensors.check_kind(name)
        if len(shape := tensors[name].shape) != axes or 0 in shape:
            raise UserError(
                f"{source}: the tensor {name} has shape {shape}, where a head has [outputs{', width' * (axes == 2)}]."
            )
        params["kernel" if axes == 2 else "bias"] = tensors.rows(name, 0, shape[0]).T
        encodings[f"{module}.{part}"] = tensors[name].kind
    missing = "weight" if "kernel" not in params else "bias" if module != "score" and "bias" not in params else ""
    if missing:
        raise UserError(f"{source} has no tensor {module}.{missing} beside the other one of its head.")
    return Head(source, module, params, encodings, _kinds(module, params, problem_type))


def _kinds(module: str, params: Mapping[str, np.ndarray], problem_type: str) -> tuple[str, ...]:
    """A layer says what it is by its name and its bias; whether it is of labels or numbers, config.json may."""
    if module == "qa_outputs":
        return ("answers",)
    if "bias" in params:
        return ("tagging",)
    if told := [kind for kind, form in _FORMS.items() if problem_type and form.problem_type == problem_type]:
        return tuple(told)
    return ("regression", "multilabel") if params["kernel"].shape[1] == 1 else ("classification", "multilabel", "regression")


def head_of(folder: pathlib.Path) -> Head | None:
    """The head of a Hugging Face folder; None where it has none. Raises as `head_in`."""
    tensors = safetensors.open_folder(folder)
    values = safetensors.read_json(folder / "config.json")
    return head_in(tensors, {name: name for name in TENSORS if name in tensors}, str(values.get("problem_type") or ""))


def labels_of(folder: pathlib.Path) -> tuple[str, ...]:
    """The labels in a Hugging Face folder's config.json, in order; () where they have no names, as transformers' LABEL_0 is none.

    Raises `UserError` where they are not numbered.
    """
    names = safetensors.read_json(folder / "config.json").get("id2label") or {}
    try:
        labels = tuple(str(names[key]) for key in sorted(names, key=int))
    except (TypeError, ValueError):
        raise UserError(f"{folder / 'config.json'}: id2label is not an object of labels by number.") from None
    return () if all(re.fullmatch(r"LABEL_\d+", label) for label in labels) else labels


def labelled(
    head: Head, task: TaskConfig, names: tuple[str, ...], log: Callable[[str], None]
) -> tuple[TaskConfig, dict[str, np.ndarray]]:
    """(the task with its labels, the head's parameters with its outputs in their order). `names`: those of id2label.

    Raises `UserError`, naming the head and the knob, where it is a head of another kind or width, or nothing tells its labels.
    """
    if task.kind not in head.kinds:
        raise UserError(f"{head.described()}, is one for task.kind={' or '.join(head.kinds)}, not for task.kind={task.kind}.")
    count, labels = head.num_outputs, task.labels or names
    if task.kind == "answers":
        if count != 2:
            raise UserError(f"{head.described()}, is none for task.kind=answers, which has 2: where an answer begins and ends.")
        return task, head.params
    fields = [field.strip() for field in task.label.split(",")]
    if not labels and task.kind == "regression" and len(fields) == count:
        labels = tuple(fields)
    if not labels:
        raise UserError(
            f"nothing says what the {count} outputs of {head.module} in {head.source} are for: name them in order by task.labels."
        )
    if len(labels) != count:
        where = "task.labels" if task.labels else "id2label, which task.labels overrules,"
        raise UserError(f"{where} has {len(labels)} labels ({', '.join(labels)}), but {head.described()}, is to be named.")
    order = list(range(count))
    if set(labels) == set(names):
        order = [names.index(label) for label in labels]
    elif len(names) == count and task.labels:
        if moved := [label for label in labels if label in names and names.index(label) != labels.index(label)]:
            raise UserError(
                f"task.labels={','.join(labels)} has {moved[0]} at another place than id2label ({', '.join(names)}), and not "
                "the same labels: either all are its own, in any order, or new names for its labels, in its order."
            )
        log("labels renamed: " + ", ".join(f"{old} is {new}" for old, new in zip(names, labels, strict=True) if old != new) + ".")
    return dataclasses.replace(task, labels=labels), {part: array[..., order] for part, array in head.params.items()}


# --- out ------------------------------------------------------------------------------------------------------------------------


def headed(tasks: Mapping[str, TaskConfig], asked: str, option: str = "--task") -> str:
    """The name of the task whose head is to be written, "" for none: the only one with a head, or the one `asked` for ("none":
    the decoder alone). Raises `UserError`.
    """
    with_head = [name for name, knobs in tasks.items() if knobs.kind in HEADED]
    if asked and asked != "none" and asked not in tasks:
        has = f"the tasks {', '.join(tasks)}" if tasks else "no task"
        raise UserError(f"{option}={asked}: the run has {has}; {option}=none writes its decoder alone.")
    if asked:
        return asked if asked in with_head else ""
    if len(with_head) > 1:
        raise UserError(
            f"the run has the tasks {', '.join(with_head)}, each with a head, and a folder has one: name it by {option}."
        )
    return with_head[0] if with_head else ""


def tensors_of(form: Form, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{"score.weight": [K, D], ...} of {"kernel": [D, K], "bias": [K]}."""
    parts = {"kernel": "weight", "bias": "bias"}
    return {f"{form.module}.{parts[part]}": np.asarray(array).T for part, array in params.items()}


def writes(form: Form, params: Mapping[str, Any], kind_of: Callable[[str], str]) -> list[safetensors.Write]:
    """The head's tensors to be written, each in the encoding that `kind_of` gives for its name."""
    return [
        (name, kind_of(name), array.shape, functools.partial(_whole, array, ENCODINGS[kind_of(name)].dtype))
        for name, array in tensors_of(form, params).items()
    ]


def _whole(array: np.ndarray, dtype: np.dtype) -> Iterable[np.ndarray]:
    return [np.ascontiguousarray(array, dtype)]


def config_of(form: Form, architecture: str, labels: tuple[str, ...]) -> dict[str, Any]:
    """What config.json says of the class and its labels."""
    values: dict[str, Any] = {"architectures": [form.class_of(architecture)]}
    if labels:
        values["id2label"] = {str(number): label for number, label in enumerate(labels)}
        values["label2id"] = {label: number for number, label in enumerate(labels)}
    return values | ({"problem_type": form.problem_type} if form.problem_type else {})
