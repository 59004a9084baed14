"""Recipes and command-line overrides: how a person's words become a `Config`."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import pathlib
import re
import traceback
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from gptjax.config import Config, UserError, from_dict, from_json, parsed, to_dict, underived, unknown_key


def load_recipe(spec: str, overrides: Sequence[str] = ()) -> Config:
    """The config of `FILE.py[:ARG]` with overrides such as `model.num_layers=4` laid over it.

    A `config.json` of a run's folder is taken too, so that any run can be started again elsewhere.
    """
    values = recipe_values(spec)
    lay_over(values, spec, {}, overrides)
    return from_dict(values)


def lay_over(values: ml_collections.ConfigDict, spec: str, settings: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Lays {dotted key: value} and texts such as `model.num_layers=4` over what the recipe `spec` says: over the model of
    `init_from`, where `init_model` asks for that.
    """

    def lay(keys: tuple[str, ...] = ()) -> None:
        for key, value in settings.items():
            if not keys or key in keys:
                apply_value(values, key, value)
        for override in overrides:
            if not keys or override.partition("=")[0] in keys:
                apply_override(values, override)

    lay(("init_from", "init_model"))
    if values.get("init_model") and not spec.partition(":")[0].endswith(".json"):  # in a run's own config it has been done
        adopt_model(values)
    lay()


def adopt_model(values: ml_collections.ConfigDict) -> None:
    """Lays the model of `init_from` over the group `model`, and has the tokenizer taken from there. Raises `UserError`."""
    folder = pathlib.Path(values.get("init_from") or "")
    path = folder / "config.json"
    if not values.get("init_from"):
        raise UserError("init_model needs init_from, the folder of a run or of a Hugging Face model.")
    if not path.is_file():
        raise UserError(f"init_from={folder} is neither a run's folder nor a Hugging Face folder: it has no config.json.")
    if is_foreign(folder):
        from gptjax.interop.huggingface import model_knobs

        knobs = model_knobs(folder)
    else:
        knobs = to_dict(underived(from_json(path)).model)
    for name, value in knobs.items():
        apply_value(values, f"model.{name}", value)
    apply_value(values, "data.tokenizer", "init_from")
    apply_value(values, "data.tokenizer_path", "")


def is_foreign(folder: pathlib.Path) -> bool:
    """Whether the folder's config.json is one of Hugging Face's; ours has a group `model`."""
    try:
        values = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and not isinstance(values.get("model"), dict)


def recipe_values(spec: str) -> ml_collections.ConfigDict:
    """What `FILE.py[:ARG]` or a `config.json` says, not yet checked, for overrides to be laid over it."""
    path, _, argument = spec.partition(":")
    if path.endswith(".json"):
        return ml_collections.ConfigDict(to_dict(underived(from_json(pathlib.Path(path)))))
    values = call_file(pathlib.Path(path), "get_config", argument, "recipe")
    if not isinstance(values, ml_collections.ConfigDict):
        raise UserError(f"get_config of the recipe {path} must return a ConfigDict, not {type(values).__name__}.")
    return values


def call_file(path: pathlib.Path, function: str, argument: str, kind: str) -> Any:
    """What `function` of a Python file returns; `kind` is what the file is called in the sentence that says why it fails."""
    if not path.is_file():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else [], n=1
        )
        hint = f"; did you mean {path.parent / near[0]}?" if near else "."
        raise UserError(f"the {kind} {path} does not exist{hint}")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"the {kind} {path} is not a Python file.")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise UserError(f"the {kind} {path} has no function {function}.")
        return getattr(module, function)(argument) if argument else getattr(module, function)()
    except UserError:
        raise
    except Exception as error:  # it is somebody's program: whatever it raises, the answer is one sentence
        raise UserError(f"the {kind} {path} {_failure(path, error)}") from error


def _failure(path: pathlib.Path, error: Exception) -> str:
    unknown = re.match(r'\W*Key "([^"]*)" does not exist', str(error))  # ConfigDict's, which goes on to print itself
    if unknown:
        near = re.search(r'Did you mean "([^"]*)"', str(error))
        return f"sets an unknown key {unknown[1]}{f'; did you mean {near[1]}?' if near else '.'}"
    if isinstance(error, SyntaxError):
        return f"cannot be read: {error.msg} at line {error.lineno}."
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f" at line {lines[-1]}" if lines else ""
    return f"fails{where} with {type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}."


def apply_override(values: ml_collections.ConfigDict, override: str) -> None:
    """Lays `a.b=text` over `values`; the text is read as the type that the schema declares for the key."""
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"the override {override!r} has no value; write --config.{key}=VALUE.")
    expected = declared_type(key)
    _lay(values, key, parsed(key, text, expected))


def apply_value(values: ml_collections.ConfigDict, key: str, value: Any) -> None:
    """Lays a value that is no text over the dotted `key`. Raises `UserError` for an unknown key; `from_dict` checks the type."""
    declared_type(key)
    _lay(values, key, value)


def _lay(values: ml_collections.ConfigDict, key: str, value: Any) -> None:
    *groups, leaf = key.split(".")
    for group in groups:
        if not isinstance(values.get(group), ml_collections.ConfigDict):
            raise UserError(f"the recipe's config has no group {group} to lay {key} over; start from gptjax.config.defaults().")
        values = values[group]
    with values.ignore_type(), values.unlocked():
        values[leaf] = value


def declared_type(key: str) -> Any:
    """The type that the schema gives the dotted `key`. Raises `UserError` for an unknown key or a group."""
    cls: Any = Config
    for part in key.split("."):
        types = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
        if part not in types:
            raise unknown_key(key)
        cls = types[part]
    if dataclasses.is_dataclass(cls):
        raise UserError(f"{key} is a group of keys; set one of {', '.join(f'{key}.{f.name}' for f in dataclasses.fields(cls))}.")
    return cls
