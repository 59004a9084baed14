"""The door: what a person wrote becomes a `Config`, once. Past it there is no ConfigDict."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import pathlib
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from gptjax.config import adapter, data, model, objective, optimizer, parameterization, run, task
from gptjax.config.knobs import UserError, typed
from gptjax.config.schema import Config


def defaults() -> ml_collections.ConfigDict:
    """All knobs at their defaults, for a recipe to edit. It is locked: a misspelt name raises."""
    return ml_collections.ConfigDict(to_dict(Config())).lock()


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dicts of a (part of a) config, in the order of declaration."""
    return {
        field.name: to_dict(value) if dataclasses.is_dataclass(value := getattr(config, field.name)) else value
        for field in dataclasses.fields(config)
    }


def to_json(config: Config) -> str:
    return json.dumps(to_dict(config), indent=2, ensure_ascii=False) + "\n"


def from_json(path: pathlib.Path) -> Config:
    """Reads a `config.json` that a run wrote."""
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None


def flatten(config: Config) -> dict[str, Any]:
    """{"model.num_layers": 4, ...}"""
    return {key: value for key, value, _ in walk(config)}


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """(dotted key, value, field) of every knob, in the order of declaration."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value, field


def from_dict(values: Mapping[str, Any] | ml_collections.ConfigDict) -> Config:
    """Strict keys, strict types, bounds and cross-field checks; sizes given as 0 are filled in."""
    config = _build(Config, values, "")
    config = dataclasses.replace(config, model=model.derive(config.model))
    _check_durations(config)
    for group in (model, data, objective, optimizer, run, parameterization, adapter, task):
        group.check(config)
    return config


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, (Mapping, ml_collections.ConfigDict)):
        raise UserError(f"{prefix.rstrip('.') or 'the config'} is {values!r}, but it must be a group of keys.")
    types = _types(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise unknown_key(f"{prefix}{key}")
    arguments = {}
    for name, field in fields.items():
        if name not in values:
            continue
        value = values[name]
        if dataclasses.is_dataclass(types[name]):
            arguments[name] = _build(types[name], value, f"{prefix}{name}.")
        else:
            arguments[name] = typed(f"{prefix}{name}", value, types[name], field)
    return cls(**arguments)


_types = functools.cache(typing.get_type_hints)  # evaluates each annotation anew, which is most of the time of a check


def unknown_key(key: str) -> UserError:
    """The error for a dotted key that the schema lacks, with the nearest that it has."""
    known = list(flatten(Config())) + [field.name for field in dataclasses.fields(Config)]
    leaf = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    near = near or [name for name in known if name.rsplit(".", 1)[-1] == leaf][:1]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return UserError(f"unknown config key {key}{f'; did you mean {near[0]}?' if near else '.'}")


def underived(config: Config) -> Config:
    """The config with sizes that follow from others set back to 0, so that they follow again when those are overridden."""
    return dataclasses.replace(config, model=model.underived(config.model))


def _check_durations(config: Config) -> None:
    values = flatten(config)
    for key in values:
        if not key.endswith(("_steps", "_tokens", "_epochs")):
            continue
        stem = key.rsplit("_", 1)[0]
        family = [f"{stem}_{unit}" for unit in ("steps", "tokens", "epochs") if f"{stem}_{unit}" in values]
        given = [f"{name}={values[name]}" for name in family if values[name]]
        if len(family) == 3 and len(given) > 1:
            raise UserError(f"{' and '.join(given)} are both given; keep one and set the other to 0.")


def differences(a: Config, b: Config, shaping_only: bool = False) -> dict[str, tuple[Any, Any]]:
    """{key: (value in a, value in b)} where the two differ; `shaping_only` leaves out knobs that a resumed run may change."""
    other = flatten(b)
    return {
        key: (value, other[key])
        for key, value, field in walk(a)
        if value != other[key] and (field.metadata["shapes_run"] or not shaping_only)
    }
