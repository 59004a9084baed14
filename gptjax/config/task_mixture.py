"""Several tasks in one run, read: which there are, what each is set to, and their shares of the rows over the run."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gptjax.config.knobs import UserError, parsed, typed
from gptjax.config.mixture import Knots, members, nearest, own_settings, weights_over_run

if TYPE_CHECKING:
    from gptjax.config.task import TaskConfig

_OF_ALL = ("mixture", "mixture_settings", "mixture_weights", "mixture_temperature")


@functools.lru_cache(maxsize=64)
def tasks(task: TaskConfig) -> Mapping[str, TaskConfig]:
    """{task's name: the knobs of it alone}, in the order of `task.mixture`. Raises `UserError`."""
    alone = dataclasses.replace(task, eval_path="", mixture=(), mixture_settings=(), mixture_weights=())
    kinds = _field(task, "kind").metadata["choices"][1:]
    found: dict[str, TaskConfig] = {}
    for _, name, kind, path in members("task.mixture", task.mixture, "NAME=KIND:PATH"):
        if kind not in kinds:
            near = nearest(kind, kinds) or "."
            raise UserError(f"task.mixture: {name} is of kind {kind!r}, which is none of {', '.join(kinds)}{near}")
        found[name] = dataclasses.replace(alone, kind=kind, path=path)
    knobs = tuple(field.name for field in dataclasses.fields(task) if field.name not in (*_OF_ALL, "kind", "path"))
    given = own_settings("task.mixture_settings", task.mixture_settings, tuple(found), knobs, "task", "news.label=topic")
    for name, setting, text in given:
        found[name] = dataclasses.replace(found[name], **{setting: _value(task, f"{name}.{setting}", setting, text)})
    return found


def _value(task: TaskConfig, key: str, setting: str, text: str) -> Any:
    field, kind, where = _field(task, setting), typing.get_type_hints(type(task))[setting], f"task.mixture_settings: {key}"
    if kind != tuple[str, ...]:
        return typed(where, parsed(where, text, kind), kind, field)
    if not text.startswith("["):
        return typed(where, tuple(part for part in text.split("|") if part), kind, field)
    try:
        return typed(where, json.loads(text), kind, field)
    except ValueError as error:
        raise UserError(f"{where}={text!r} is not valid JSON: {error}.") from None


def _field(task: TaskConfig, name: str) -> dataclasses.Field:
    return next(field for field in dataclasses.fields(task) if field.name == name)


def settled(task: TaskConfig, found: Mapping[str, TaskConfig]) -> TaskConfig:
    """The knobs of all with what has changed in those of each, as settings."""
    settings = {item.partition("=")[0]: item for item in task.mixture_settings}
    for name, before in tasks(task).items():
        for field in dataclasses.fields(before):
            value = getattr(found[name], field.name)
            if value != getattr(before, field.name):
                text = json.dumps(value, ensure_ascii=False) if isinstance(value, tuple) else str(value)
                settings[f"{name}.{field.name}"] = f"{name}.{field.name}={text}"
    return dataclasses.replace(task, mixture_settings=tuple(settings.values()))


def weights(task: TaskConfig, rows: Mapping[str, int]) -> dict[str, Knots]:
    """{task: its weights by place in the run}: those that are given, or by its number of rows. Raises `UserError`."""
    given = weights_over_run("task.mixture_weights", task.mixture_weights, tuple(tasks(task)))
    if given and task.mixture_temperature != 1:
        raise UserError("task.mixture_weights and task.mixture_temperature are both given; keep one.")
    return given or {name: ((0.0, float(rows[name]) ** (1 / task.mixture_temperature)),) for name in tasks(task)}
